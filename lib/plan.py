"""What a run will need, before it is paid for: bytes on each rank in each phase, FLOPs and seconds.

Everything follows from config.json. There is one function per quantity, and bytes are those of the rank that
needs most. c is a ppo.PPOConfig (or SFT's flags under the same names), ranks the number of processes, shards
the number of ranks over which weights are sharded, node the number of ranks of a node (default: shards), and
split the number of ranks that share a copy of the sampler. tests/test_plan.py compares these functions with
arithmetic by hand, with measured runs and with PyTorch's own memory tracker on the 8B model.

The rollout's numbers in host memory, some hundred bytes per token, are not counted.
"""
import copy
import functools
import math
from dataclasses import replace

import torch

from lib import decode, scheduler, tensor
from lib.paged import PAGE, PagedCache, position_bytes
import model as M

GB = 1e9
GPU_OVERHEAD = 3e9  # CUDA context, NCCL's buffers, fragmentation: assumed, not measured
CPU_OVERHEAD = 0.4e9  # Python and torch themselves
LATENCY = 2e-5  # fixed seconds of a collective among the GPUs of a node: assumed, not measured
PCIE = 20e9  # bytes per second between GPU and host under --offload: assumed, not measured
# The rows of the table, in this order.
ITEMS = ("weights", "gradients", "optimizer", "reference", "sampler", "kv cache", "gathered", "activations")


# --------------------------------------------------------------------------------------------------------
# Parameters

@functools.lru_cache(maxsize=8)
def shapes(config, critic=False):
    """{name: shape} of the policy's or the critic's parameters."""
    with torch.device("meta"):
        net = (M.Critic if critic else M.Llama)(config)
    return {name: tuple(p.shape) for name, p in net.named_parameters()}


def elements(shapes, shards=1):
    """How many numbers one rank holds. FSDP shards dimension 0 and pads every rank to the largest piece."""
    return sum(-(-shape[0] // shards) * math.prod(shape[1:]) for shape in shapes.values())


def block(shapes):
    """The parameters of one block, an FSDP unit."""
    return {name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")}


def root(shapes):
    """The parameters outside of the blocks: embedding, last norm, head."""
    return {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.")}


def item_size(c):
    """Bytes of a number in the compute type."""
    return getattr(torch, c.dtype).itemsize


# --------------------------------------------------------------------------------------------------------
# What stays

def weights(nets, shards):
    """Float32 masters of the trained networks."""
    return sum(4 * elements(net, shards) for net in nets)


gradients = weights  # also in float32, summed over micro-steps


def optimizer(nets, shards):
    """Adam's two moments in float32."""
    return 2 * weights(nets, shards)


def frozen_copy(config, c, shards):
    """The reference, or the sampler: the policy's weights in the compute type."""
    return item_size(c) * elements(shapes(config), shards)


def sampler_copy(config, c, shards, split):
    """The sampler's weights on a rank. In a split sampler, norms and biases of output projections stay
    whole."""
    if c.sampler != "tensor":
        return frozen_copy(config, c, shards if c.sampler == "sharded" else 1)
    policy = shapes(config)
    whole = {name: shape for name, shape in policy.items() if name.endswith(("norm.weight", "o_proj.bias"))}
    return item_size(c) * (elements(whole) + (elements(policy) - elements(whole)) // split)


def slots(c, ranks, split=1):
    """The sequences that a rank decodes at once, if the cache has room for them."""
    return min(c.slots, split * -(-c.rollout_batch * c.samples // ranks))


def cache_rows(config, c, ranks, split=1):
    """(rows of the cache on a rank, bytes of the keys and values of each on it)."""
    longest = c.max_prompt + c.max_response
    part = tensor.part(config, split)
    return decode.KVCache.rows(part, slots(c, ranks, split), longest, getattr(torch, c.dtype), c.kv_gb)


def kv_cache(config, c, ranks, split=1):
    """Keys and values of all sequences that are decoded at once, each at its full length. On a GPU they lie
    in pages (lib/paged.py), which take no more, apart from one page and the rounding up of each sequence's
    last page."""
    return math.prod(cache_rows(config, c, ranks, split))


def paged_sequences(config, c, ranks, split, mean):
    """How many sequences that hold `mean` positions on average a GPU's pages have room for at once."""
    part = tensor.part(config, split)
    longest = c.max_prompt + c.max_response
    pages, _ = PagedCache.pages(part, slots(c, ranks, split), longest, getattr(torch, c.dtype), c.kv_gb)
    held = mean / PAGE + 0.5  # the last page of a sequence is half full on average
    return min(slots(c, ranks, split), pages / held)


# --------------------------------------------------------------------------------------------------------
# What comes and goes

def micro_step_tokens(c, ranks):
    """Tokens of the largest micro-step on a rank; a sequence is never cut."""
    longest = c.max_prompt + c.max_response
    return max(longest, min(c.micro_tokens, longest * -(-c.train_batch // ranks)))


def saved(config, c, tokens):
    """What autograd saves for one block.

    For each of the two norms it saves two widths in float32, a root and the output; for attention q, k, v,
    the output per sequence and joined, and its log-sum-exp; for norms of q's and k's heads two widths in
    float32 and a root; for the MLP four widths. This holds for the norm on CPU; CUDA's fused norm saves less.
    """
    D = config.hidden_size
    F = config.intermediate_size
    H = config.num_attention_heads
    K = config.num_key_value_heads
    d = config.head_dim
    b = item_size(c)
    norm = 8 * D + 4 + b * D
    attention = b * (3 * H * d + 2 * K * d) + 4 * H
    if config.qk_norm:
        attention += (H + K) * (8 * d + 4)
    return tokens * (2 * norm + attention + 4 * b * F)


def block_backward(config, c, tokens):
    """Bytes in use at the worst moment of a block's backward pass, which is in the MLP, or for narrow MLPs in
    a norm."""
    D = config.hidden_size
    F = config.intermediate_size
    b = item_size(c)
    return saved(config, c, tokens) + tokens * max(2 * b * F, 16 * D - 4 * b * F)


def block_forward(config, c, tokens):
    """The same for a forward pass without gradients: the MLP's three widths, the residual stream, a float32
    norm."""
    b = item_size(c)
    return tokens * (3 * b * config.intermediate_size + (2 * b + 8) * config.hidden_size)


def logits(config, tokens):
    """A chunk's logits in float32 and one pass over them."""
    return 8 * min(M.LOGIT_CHUNK, tokens) * config.vocab_size


def cached_attention(config, c, tokens, length):
    """A block's attention of `tokens` new tokens over `length` cached positions.

    It holds the scores, in float32 before and after the softmax and in the compute type, and the mask, as
    well as the residual stream, its norm, q, k, v and two sums of values.
    """
    H = config.num_attention_heads
    b = item_size(c)
    length = -(-length // decode.BLOCK) * decode.BLOCK
    width = 2 * config.hidden_size + (3 * H + 2 * config.num_key_value_heads) * config.head_dim
    return tokens * (length * (H * (8 + (b if b < 4 else 0)) + 4) + b * width)


def decoding(config, c, ranks, split=1):
    """The worst of four moments of the rollout: a prefill's MLP or scores, and decoding's scores or logits.

    The logits exist as computed, in float32, divided by the temperature, and as probabilities.
    """
    b = item_size(c)
    rows = slots(c, ranks, split)
    config = tensor.part(config, split)
    prefill = min(max(scheduler.PREFILL_TOKENS, c.max_prompt), rows * c.max_prompt)
    return max(block_forward(config, c, prefill), cached_attention(config, c, prefill, c.max_prompt),
               cached_attention(config, c, rows, c.max_prompt + c.max_response),
               (12 + (b if b < 4 else 0)) * rows * config.vocab_size)


def gathered_weights(c, net):
    """The root, one block, and the next block's all-gather."""
    return item_size(c) * (elements(root(net)) + 2 * elements(block(net)))


def forward(config, c, shards, tokens, net):
    """(gathered, activations) of a forward pass without gradients."""
    return gathered_weights(c, net), max(block_forward(config, c, tokens), logits(config, tokens))


def backward(config, c, shards, tokens, net):
    """(gathered, activations) of a training pass at its worst moment.

    It is one of three: the logits, a block's backward pass, or the end, when the root's gradients are
    reduced. "Gathered" are a unit's whole weights, gradients and float32 reduction. A single process rounds
    its weights layer by layer and, without activation checkpointing, keeps them until their backward pass.
    """
    b = item_size(c)
    D = config.hidden_size
    r = elements(root(net))
    k = elements(block(net))
    policy = "value_head.weight" not in net
    elements_of_head = config.vocab_size * D if policy else 0
    head = b * elements_of_head
    summed = 4 * elements_of_head  # the head's gradient exists, in float32, from the first chunk on
    kept = b * (elements(net) - r - k) if shards == 1 and b < 4 and not c.recompute else 0
    inputs = config.num_hidden_layers * (b * tokens * D if c.recompute else saved(config, c, tokens))
    last_norm = tokens * (8 * D + 4 + 2 * b * D)  # with its output, from which the scored states are taken
    in_head = logits(config, tokens) + b * tokens * D if policy else 8 * tokens * D
    in_block = block_backward(config, c, tokens) - (0 if c.recompute else saved(config, c, tokens))
    moments = [
        (b * (r + k) + summed + kept, inputs + last_norm + in_head),
        (b * (r + 2 * k) + head + 4 * k + kept, inputs + in_block),
        ((b + 4) * r + 4 * elements(root(net), shards), b * tokens * D)]
    return max(moments, key=sum)


# --------------------------------------------------------------------------------------------------------
# Phases

def phases(config, c, ranks, shards, stage="ppo", node=None):
    """{phase: {item: bytes on a rank}} of a stage, "sft", "ppo" or "eval".

    Under --offload weights, gradients and optimizer do not count here, since they lie in host memory (see
    host_bytes).
    """
    policy = shapes(config)
    split = tensor.ranks(c.sampler, shards, node or shards)
    sharded = c.sampler == "sharded"
    gathered = gathered_weights(c, policy) if sharded else 0
    if stage == "eval":
        base = {"weights": sampler_copy(config, c, shards, split)}
        rollout = {"kv cache": kv_cache(config, c, ranks, split), "gathered": gathered,
                   "activations": decoding(config, c, ranks, split)}
        return {"load": base, "rollout": base | rollout}
    nets = trained(config, c, stage)
    on_device = 0 if c.offload else 1
    w = on_device * weights(nets, shards)
    g = on_device * gradients(nets, shards)
    o = on_device * optimizer(nets, shards)
    largest = max(math.prod(shape) for shape in policy.values())
    gathered_tensor = {"gathered": 2 * 4 * largest}  # a tensor is gathered in pieces, then joined
    tokens = micro_step_tokens(c, ranks)

    def passes(need, nets):
        gathered, activations = max((need(config, c, shards, tokens, net) for net in nets), key=sum)
        return {"gathered": gathered, "activations": activations}

    base = {"weights": w}
    if stage == "ppo":
        base["reference"] = frozen_copy(config, c, shards)  # this and the cache stay for the whole run
        base["kv cache"] = kv_cache(config, c, ranks, split)
        sampler = {"sampler": sampler_copy(config, c, shards, split)}
        rollout = {"gathered": gathered, "activations": decoding(config, c, ranks, split)}
        keep = sampler if sharded else {}  # a whole or split copy is freed until its refresh
        return {
            "load": base | sampler,
            "rollout": base | {"optimizer": o} | sampler | rollout,
            "scoring": base | {"optimizer": o} | keep | passes(forward, nets),
            "update": base | {"gradients": g, "optimizer": o} | keep | passes(backward, nets),
            "save": base | {"optimizer": o} | sampler | gathered_tensor}
    return {"load": base, "update": base | {"gradients": g, "optimizer": o} | passes(backward, nets),
            "save": base | {"optimizer": o} | gathered_tensor}


def peak(found):
    """(phase, bytes) of the phase that needs most, from the result of `phases`."""
    need = {phase: sum(items.values()) for phase, items in found.items()}
    phase = max(need, key=need.get)
    return phase, need[phase]


def trained(config, c, stage="ppo"):
    """The shapes of each network that is trained."""
    critics = [shapes(config, critic=True)] if stage == "ppo" and c.advantage == "gae" else []
    return [shapes(config)] + critics


def host_bytes(config, c, shards, stage="ppo"):
    """Host memory of a rank under --offload: weights, gradients and optimizer."""
    if not c.offload:
        return 0
    nets = trained(config, c, stage)
    return weights(nets, shards) + gradients(nets, shards) + optimizer(nets, shards)


def choose_sampler(configs, c, ranks, shards, memory, stage, node):
    """(sampler, why it is that one). For --sampler auto it is the first with which every model fits into
    `memory` bytes; if none does, the one that needs least, for which `advice` finds flags. Raises ValueError
    if --sampler tensor is impossible."""
    split = tensor.ranks("tensor", shards, node)
    objection = next(filter(None, (tensor.objection(config, split) for config in configs)), "")
    if c.sampler == "tensor" and objection:
        raise ValueError(f"--sampler tensor: {objection}")
    if c.sampler != "auto":
        return c.sampler, f"sampler {c.sampler}, as given"
    needs = {}
    reasons = []
    for sampler in ("whole", "tensor", "sharded") if shards > 1 else ("whole",):
        if sampler == "tensor" and (split == 1 or objection):
            reasons.append(f"tensor: {objection or 'no two ranks of a node'}")
            continue
        tried = copy.copy(c)
        tried.sampler = sampler
        needs[sampler] = max(peak(phases(config, tried, ranks, shards, stage, node))[1] for config in configs)
        if needs[sampler] <= memory:
            how = f" over {split} ranks" if sampler == "tensor" else ""
            return sampler, f"sampler {sampler}{how}: {', '.join(reasons) or 'it fits'}"
        reasons.append(f"{sampler} needs {needs[sampler] / GB:.1f} GB")
    least = min(needs, key=needs.get)
    return least, f"sampler {least}, though none fits: {', '.join(reasons)}"


def advice(config, c, ranks, shards, memory, stage, node):
    """Flags, as {name: value}, with which the run fits into `memory` bytes; None if there are none.

    The flags of the ladder are tried from the cheapest on, and each is kept if it lowers the peak. For kv_gb
    the ladder has the number of sequences that the cache must hold to be worth reading the weights; the
    flag's value is the memory that is left.
    """
    longest = c.max_prompt + c.max_response
    changes = {}

    def need(changes):
        shards_now = changes.get("shard_ranks", shards)
        return peak(phases(config, replace(c, **changes), ranks, shards_now, stage, node))[1]

    half = max(longest, c.micro_tokens // 2)
    ladder = [("recompute", True), ("kv_gb", 8), ("micro_tokens", half), ("kv_gb", 8),
              ("micro_tokens", longest), ("kv_gb", 8), ("shard_ranks", ranks), ("kv_gb", 8),
              ("sampler", "tensor"), ("kv_gb", 8), ("sampler", "sharded"), ("kv_gb", 1), ("offload", True),
              ("kv_gb", 1), ("advantage", "group")]
    for name, rung in ladder:
        now = replace(c, **changes)
        before = need(changes)
        shards_now = changes.get("shard_ranks", shards)
        if before <= memory:
            break
        value = rung
        if name == "kv_gb":
            rows, row = cache_rows(config, now, ranks, tensor.ranks(now.sampler, shards_now, node))
            value = math.floor((memory - before + rows * row) / GB * 10) / 10
            if value * GB < min(rows, rung) * row:
                continue
        if value == "tensor" and tensor.objection(config, tensor.ranks("tensor", shards_now, node)):
            continue
        if need(changes | {name: value}) < before:
            changes[name] = value
    return changes if need(changes) <= memory else None


# --------------------------------------------------------------------------------------------------------
# Time

def flops_token(config, context, critic=False):
    """FLOPs of one token's forward pass: 2 per weight in a matrix product, and causal attention over half the
    context."""
    net = shapes(config, critic)
    embedding = net["model.embed_tokens.weight"]
    n = sum(math.prod(shape) for name, shape in net.items()
            if len(shape) == 2 and not name.endswith("embed_tokens.weight"))
    if config.tie_word_embeddings and not critic:
        n += math.prod(embedding)  # the embedding is the head
    return 2 * n + 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context


def flops(config, c, prompt, response):
    """FLOPs of a step over all ranks, as {"rollout", "scoring", "update"}, for mean lengths in tokens."""
    context = prompt + response
    tokens = c.rollout_batch * c.samples * context
    policy = flops_token(config, context)
    critic = flops_token(config, context, critic=True) if c.advantage == "gae" else 0
    passes = 4 if c.recompute else 3  # a backward pass is two forward passes, and recomputing is one more
    return {"rollout": tokens * policy, "scoring": tokens * (2 * policy + critic),
            "update": tokens * c.epochs * passes * (policy + critic)}


def joining(config, c, rows, split):
    """Seconds in which the ranks that share a sampler combine their parts of a token in each of `rows` rows:
    a sum for the embedding and two per block, a gathering of the logits, and a broadcast of the tokens."""
    if split == 1:
        return 0.0
    sums = 2 * config.num_hidden_layers + 1
    sent = (split - 1) / split * rows  # of each number of a row, and twice that for a sum
    sent *= 2 * sums * item_size(c) * config.hidden_size + 4 * config.vocab_size
    return (sums + 2) * LATENCY + sent / c.network


def seconds(config, c, ranks, shards, prompt, response, node=None):
    """Seconds of a step's phases, as {phase: seconds}, for mean lengths in tokens and the rates of c, a
    recipe.Machine.

    Decoding is limited by memory, not by arithmetic. Each turn, which gives each sequence a new token, reads
    the weights and the sequences' keys and values; with a split sampler each rank reads its part of both and
    the results are combined, and a sharded sampler gathers all weights over the network.
    """
    need = flops(config, c, prompt, response)
    split = tensor.ranks(c.sampler, shards, node or shards)
    together = split * -(-c.rollout_batch * c.samples // ranks)  # responses of the ranks that share a copy
    context = prompt + response / 2
    at_once = paged_sequences(config, c, ranks, split, context)
    # the slots stay full until the last responses, one of which is likely to have the full length
    turns = max(1, c.max_response, math.ceil(together * response / at_once))
    rows = together * response / turns  # on average over the turns
    read = sampler_copy(config, c, 1, split)
    position = position_bytes(tensor.part(config, split), getattr(torch, c.dtype))
    turn = (read + rows * context * position) / c.bandwidth + joining(config, c, rows, split)
    if c.sampler == "sharded":
        turn = max(turn, read * (shards - 1) / shards / c.network)
    out = {phase: need[phase] / ranks / c.flops for phase in ("rollout", "scoring", "update")}
    out["rollout"] += turns * turn
    if c.offload:  # each micro-step transfers the float32 weights twice and the gradients once
        tokens = c.rollout_batch * c.samples * (prompt + response)
        micro_steps = c.epochs * math.ceil(tokens / (ranks * c.micro_tokens))
        out["offload"] = micro_steps * 3 * weights(trained(config, c), shards) / PCIE
    return out


# --------------------------------------------------------------------------------------------------------
# Text

def table(found):
    """The phases as lines of text, in GB."""
    lines = [f"{'GB':12}" + "".join(f"{phase:>9}" for phase in found)]

    def add(name, numbers):
        lines.append(f"{name:12}" + "".join(f"{number / GB:9.1f}" for number in numbers))

    for item in ITEMS:
        if any(items.get(item) for items in found.values()):
            add(item, [items.get(item, 0) for items in found.values()])
    add("sum", [sum(items.values()) for items in found.values()])
    return lines


def line(found):
    """The worst phase in one line."""
    phase, need = peak(found)
    items = ", ".join(f"{item} {size / GB:.2f}" for item, size in found[phase].items() if size)
    return f"{need / GB:.2f} GB in {phase} ({items})"


def words(changes):
    """Changed settings as flags of the command line."""
    flags = []
    for name, value in changes.items():
        flag = ("--no-" if value is False else "--") + name.replace("_", "-")
        flags.append(flag if value in (True, False) else f"{flag} {value}")
    return " ".join(flags)


def of_a_process(gpu, host):
    """(bytes that a process has, bytes that it needs in addition to what is planned)."""
    return (host, CPU_OVERHEAD) if gpu is None else (gpu, GPU_OVERHEAD)


def check(config, c, ranks, shards, gpu, host, what, stage, node=None):
    """(one line about a run that fits, its sampler). For a run that does not fit, raises a ValueError with
    the arithmetic and what to change.

    gpu, host and what are those of lib.parallel.memory.
    """
    node = node or shards
    if gpu is None:  # a CPU's own memory is the host's
        c = replace(c, offload=False)
    memory, overhead = of_a_process(gpu, host)
    sampler, why = c.sampler, ""
    if stage != "sft":
        sampler, why = choose_sampler([config], c, ranks, shards, memory - overhead, stage, node)
    c = replace(c, sampler=sampler)
    found = phases(config, c, ranks, shards, stage, node)
    if peak(found)[1] + overhead > memory:
        changes = advice(config, c, ranks, shards, memory - overhead, stage, node)
        remedy = f"; it fits with {words(changes)}" if changes else ""
        raise ValueError(f"does not fit into {what}: each process needs {line(found)} "
                         f"and {overhead / GB:.1f} GB beside{remedy}")
    on_host = host_bytes(config, c, shards, stage)
    if on_host > host:
        raise ValueError(f"--offload: each process needs {on_host / GB:.1f} GB of host memory, of {what}")
    text = f"plan: each process needs {line(found)}; there are {memory / GB:.2f} GB; it computes in {c.dtype}"
    return f"{text}; {why}" if why else text, sampler
