"""What a run will need, before it is paid for: bytes on each rank in each phase, FLOPs and hours, from config.json alone.

One function a quantity; bytes are those of the rank with the most. c is a ppo.PPOConfig (or SFT's flags under the same names),
shards the number of ranks over which weights are sharded, S in the comments below. tests/test_plan.py holds these functions
against arithmetic by hand, against measured runs and against PyTorch's own memory tracker on the 8B model.

Not counted: the rollout's numbers in host memory (some hundred bytes a token), checkpoints that wait for the disk.
"""
import functools
import math
from dataclasses import replace

import torch

from lib import decode
import model as M

GB = 1e9
GPU_OVERHEAD = 3e9  # CUDA context, NCCL's buffers, what the allocator cannot hand out: an assumption, nobody measured it here
CPU_OVERHEAD = 0.4e9  # Python and torch themselves
PCIE = 20e9  # bytes a second between GPU and host under --offload; an assumption
ITEMS = ("weights", "gradients", "optimizer", "reference", "sampler", "kv cache", "gathered", "activations")


# ---------------------------------------------------------------------------------------------------- parameters

@functools.lru_cache(maxsize=8)
def shapes(config, critic=False):
    """{name: shape} of the policy's or the critic's parameters."""
    with torch.device("meta"):
        net = (M.Critic if critic else M.Llama)(config)
    return {name: tuple(p.shape) for name, p in net.named_parameters()}


def elements(shapes, shards=1):
    """Numbers that one rank holds: FSDP cuts dimension 0 and pads every rank to the largest piece."""
    return sum(-(-shape[0] // shards) * math.prod(shape[1:]) for shape in shapes.values())


def block(shapes):
    """The parameters of one block, an FSDP unit."""
    return {n: s for n, s in shapes.items() if n.startswith("model.layers.0.")}


def root(shapes):
    """The parameters outside of the blocks: embedding, last norm, head."""
    return {n: s for n, s in shapes.items() if not n.startswith("model.layers.")}


def item_size(c):
    return getattr(torch, c.dtype).itemsize


# ---------------------------------------------------------------------------------------------------- what stays

def weights(nets, shards):
    """Float32 masters of the trained networks."""
    return sum(4 * elements(net, shards) for net in nets)


gradients = weights  # float32, too, summed over micro-steps


def optimizer(nets, shards):
    """Adam's two moments in float32."""
    return 2 * weights(nets, shards)


def frozen_copy(config, c, shards):
    """The reference, or the sampler: the policy's weights in the compute type."""
    return item_size(c) * elements(shapes(config), shards)


def cache_rows(config, c, ranks):
    """(sequences decoded at once on a rank, bytes of the keys and values of each)."""
    rows = min(c.slots, -(-c.rollout_batch * c.samples // ranks))
    return decode.KVCache.rows(config, rows, c.max_prompt + c.max_response, getattr(torch, c.dtype), c.kv_gb)


def kv_cache(config, c, ranks):
    return math.prod(cache_rows(config, c, ranks))


# ---------------------------------------------------------------------------------------------------- what comes and goes

def micro_step_tokens(c, ranks):
    """Tokens of the largest micro-step on a rank; a sequence is never cut."""
    longest = c.max_prompt + c.max_response
    return max(longest, min(c.micro_tokens, longest * -(-c.train_batch // ranks)))


def saved(config, c, tokens):
    """What autograd keeps of one block: of each of two norms two float32 widths, a root and the output; q, k, v, attention's output
    by the sequence and joined, its log-sum-exp; four widths of the MLP. (CUDA's fused norm keeps less than this, the CPU's.)"""
    D, F, H, K, d, b = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
                        config.head_dim, item_size(c))
    return tokens * (2 * (8 * D + 4 + b * D) + b * (3 * H * d + 2 * K * d) + 4 * H + 4 * b * F)


def block_backward(config, c, tokens):
    """What is alive at the worst moment of a block's backward: in the MLP, or for narrow MLPs in a norm."""
    D, F, b = config.hidden_size, config.intermediate_size, item_size(c)
    return saved(config, c, tokens) + tokens * max(2 * b * F, 16 * D - 4 * b * F)


def block_forward(config, c, tokens):
    """The same of a forward without gradients: the MLP's three widths, the residual stream, a norm in float32."""
    return tokens * (3 * item_size(c) * config.intermediate_size + (2 * item_size(c) + 8) * config.hidden_size)


def logits(config, tokens):
    """A chunk's logits in float32 and one pass over them."""
    return 8 * min(M.LOGIT_CHUNK, tokens) * config.vocab_size


def cached_attention(config, c, tokens, length):
    """A block of `tokens` new tokens over `length` cached positions: float32 scores, before and after the softmax and in the
    compute type, and the mask; the residual stream, its norm, q and k and v, two sums of values."""
    H, b = config.num_attention_heads, item_size(c)
    length = -(-length // decode.BLOCK) * decode.BLOCK
    width = 2 * config.hidden_size + (3 * H + 2 * config.num_key_value_heads) * config.head_dim
    return tokens * (length * (H * (8 + (b if b < 4 else 0)) + 4) + b * width)


def decoding(config, c, ranks):
    """The rollout's most, of four moments: a prefill's MLP or scores, decoding's scores or logits: as computed, in float32, over
    the temperature and as probabilities."""
    rows, _ = cache_rows(config, c, ranks)
    prefill = min(max(decode.PREFILL_TOKENS, c.max_prompt), rows * c.max_prompt)
    return max(block_forward(config, c, prefill), cached_attention(config, c, prefill, c.max_prompt),
               cached_attention(config, c, rows, c.max_prompt + c.max_response),
               (12 + (item_size(c) if item_size(c) < 4 else 0)) * rows * config.vocab_size)


def gathered_weights(c, net):
    """The root, one block, the next one's all-gather."""
    return item_size(c) * (elements(root(net)) + 2 * elements(block(net)))


def forward(config, c, shards, tokens, net):
    """(gathered, activations) of a forward without gradients."""
    return gathered_weights(c, net), max(block_forward(config, c, tokens), logits(config, tokens))


def backward(config, c, shards, tokens, net):
    """(gathered, activations) of a training pass at its worst moment, of three: the logits, a block's backward, and the end, when
    the root's gradients are reduced. "Gathered" are a unit's whole weights, gradients and float32 reduction; one process alone rounds
    its weights layer by layer, and without activation checkpointing keeps them until their backward."""
    b, D = item_size(c), config.hidden_size
    r, k = elements(root(net)), elements(block(net))
    policy = "value_head.weight" not in net
    elements_of_head = config.vocab_size * D if policy else 0
    head = b * elements_of_head
    summed = 4 * elements_of_head  # the head's gradient is there, in float32, from the first chunk on
    kept = b * (elements(net) - r - k) if shards == 1 and b < 4 and not c.recompute else 0
    inputs = config.num_hidden_layers * (b * tokens * D if c.recompute else saved(config, c, tokens))
    last_norm = tokens * (8 * D + 4 + 2 * b * D)  # with its output, of which the scored states are taken
    backward_of_a_block = block_backward(config, c, tokens) - (0 if c.recompute else saved(config, c, tokens))
    moments = [
        (b * (r + k) + summed + kept, inputs + last_norm + (logits(config, tokens) + b * tokens * D if policy else 8 * tokens * D)),
        (b * (r + 2 * k) + head + 4 * k + kept, inputs + backward_of_a_block),
        ((b + 4) * r + 4 * elements(root(net), shards), b * tokens * D)]
    return max(moments, key=sum)


# ---------------------------------------------------------------------------------------------------- phases

def phases(config, c, ranks, shards, stage="ppo"):
    """{phase: {item: bytes on a rank}}; under --offload weights, gradients and optimizer are not there but in host memory."""
    policy = shapes(config)
    nets = trained(config, c, stage)
    device = 0 if c.offload else 1
    w, g, o = (device * f(nets, shards) for f in (weights, gradients, optimizer))
    largest = max(math.prod(s) for s in policy.values())
    gathered_tensor = {"gathered": 2 * 4 * largest}  # a tensor is gathered in pieces, then joined
    tokens = micro_step_tokens(c, ranks)
    passes = lambda f, nets: dict(zip(("gathered", "activations"), max((f(config, c, shards, tokens, n) for n in nets), key=sum)))
    base = {"weights": w}
    if stage == "ppo":
        base |= {"reference": frozen_copy(config, c, shards), "kv cache": kv_cache(config, c, ranks)}  # kept over the whole run
        whole = c.sampler == "whole"
        sampler = {"sampler": frozen_copy(config, c, 1 if whole else shards)}
        rollout = {"gathered": 0 if whole else gathered_weights(c, policy), "activations": decoding(config, c, ranks)}
        keep = {} if whole else sampler  # a whole copy is freed until its refresh
        return {
            "load": base | sampler,
            "rollout": base | {"optimizer": o} | sampler | rollout,
            "scoring": base | {"optimizer": o} | keep | passes(forward, nets),
            "update": base | {"gradients": g, "optimizer": o} | keep | passes(backward, nets),
            "save": base | {"optimizer": o} | sampler | gathered_tensor}
    return {"load": base, "update": base | {"gradients": g, "optimizer": o} | passes(backward, nets),
            "save": base | {"optimizer": o} | gathered_tensor}


def peak(table):
    """(phase, bytes) of the phase that needs most."""
    return max(((phase, sum(items.values())) for phase, items in table.items()), key=lambda x: x[1])


def trained(config, c, stage="ppo"):
    """Shapes of the networks that are trained."""
    return [shapes(config)] + ([shapes(config, critic=True)] if stage == "ppo" and c.advantage == "gae" else [])


def host_bytes(config, c, shards, stage="ppo"):
    """Host memory a rank under --offload: weights, gradients and optimizer."""
    nets = trained(config, c, stage)
    return weights(nets, shards) + gradients(nets, shards) + optimizer(nets, shards) if c.offload else 0


def advice(config, c, ranks, shards, memory):
    """Flags, as {name: value}, with which the run fits; None if there are none."""
    changes, longest = {}, c.max_prompt + c.max_response
    at = lambda changes: (replace(c, **changes), changes.get("shard_ranks", shards))
    ladder = [("recompute", True), ("kv_gb", 8), ("micro_tokens", max(longest, c.micro_tokens // 2)), ("kv_gb", 8), ("micro_tokens", longest),
              ("kv_gb", 8), ("shard_ranks", ranks), ("kv_gb", 8), ("sampler", "sharded"), ("kv_gb", 1), ("offload", True), ("kv_gb", 1),
              ("advantage", "group")]
    for name, value in ladder:
        now, s = at(changes)
        _, need = peak(phases(config, now, ranks, s))
        if need <= memory:
            break
        if name == "kv_gb":  # the cache must hold some sequences, here value, to be worth its weights' reading
            rows, row = cache_rows(config, now, ranks)
            least, value = min(rows, value) * row, math.floor((memory - need + rows * row) / GB * 10) / 10
            if value * GB < least:
                continue
        trial, s = at(changes | {name: value})
        if peak(phases(config, trial, ranks, s))[1] < need:
            changes[name] = value
    now, s = at(changes)
    return changes if peak(phases(config, now, ranks, s))[1] <= memory else None


# ---------------------------------------------------------------------------------------------------- time

def flops_token(config, context, critic=False):
    """FLOPs of one token's forward: 2 a weight in a matrix product, attention over half the context, causal."""
    net = shapes(config, critic)
    n = sum(math.prod(s) for name, s in net.items() if len(s) == 2 and not name.endswith("embed_tokens.weight"))
    n += math.prod(net["model.embed_tokens.weight"]) if config.tie_word_embeddings and not critic else 0
    return 2 * n + 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context


def flops(config, c, prompt, response):
    """FLOPs of a step over all ranks, for mean lengths: rollout, scoring, update."""
    context, responses = prompt + response, c.rollout_batch * c.samples
    tokens = responses * context
    policy, critic = flops_token(config, context), flops_token(config, context, critic=True) if c.advantage == "gae" else 0
    return {"rollout": tokens * policy, "scoring": tokens * (2 * policy + critic),
            "update": tokens * c.epochs * (4 if c.recompute else 3) * (policy + critic)}  # backward is two forwards, recompute one more


def seconds(config, c, ranks, shards, prompt, response, flops_s, bandwidth, network):
    """Seconds of a step's phases. Decoding waits for memory, not for arithmetic: each new token of a batch reads the weights and
    the cache, and a sharded sampler gathers all weights over the network. bytes and FLOPs are per second and rank."""
    need = flops(config, c, prompt, response)
    per_rank, longest = -(-c.rollout_batch * c.samples // ranks), c.max_response
    at_once, row = cache_rows(config, c, ranks)
    # the slots stay full until the last responses, one of which is likely to be as long as allowed
    turns = max(longest, math.ceil(per_rank * response / at_once))
    whole = frozen_copy(config, c, 1)
    turn = (whole + at_once * row * (prompt + response / 2) / (c.max_prompt + c.max_response)) / bandwidth
    if c.sampler == "sharded":
        turn = max(turn, whole * (shards - 1) / shards / network)
    out = {"rollout": turns * turn + need["rollout"] / ranks / flops_s}
    out |= {phase: need[phase] / ranks / flops_s for phase in ("scoring", "update")}
    if c.offload:  # each micro-step brings the float32 weights twice and takes the gradients once
        micro_steps = c.epochs * math.ceil(c.rollout_batch * c.samples * (prompt + response) / (ranks * c.micro_tokens))
        out["offload"] = micro_steps * 3 * weights(trained(config, c), shards) / PCIE
    return out


# ---------------------------------------------------------------------------------------------------- text

def table(found):
    """The phases as lines of text, GB."""
    lines = [f"{'GB':12}" + "".join(f"{phase:>9}" for phase in found)]
    for item in ITEMS:
        if any(items.get(item) for items in found.values()):
            lines.append(f"{item:12}" + "".join(f"{items.get(item, 0) / GB:9.1f}" for items in found.values()))
    return [*lines, f"{'sum':12}" + "".join(f"{sum(items.values()) / GB:9.1f}" for items in found.values())]


def line(found):
    """The worst phase in one line."""
    phase, need = peak(found)
    return f"{need / GB:.2f} GB in {phase} ({', '.join(f'{k} {v / GB:.2f}' for k, v in found[phase].items() if v)})"


def words(changes):
    """Changed settings as flags."""
    flag = lambda name, value: ("--" if value is not False else "--no-") + name.replace("_", "-") + ("" if value in (True, False) else f" {value}")
    return " ".join(flag(*change) for change in changes.items())


def check(config, c, ranks, shards, gpu, host, what, stage):
    """One line about a run that fits; a ValueError with the arithmetic and what to change for one that does not.
    gpu, host, what: as of model.memory."""
    if gpu is None:  # a CPU's own memory is the host's
        c = replace(c, offload=False)
    memory, overhead = (host, CPU_OVERHEAD) if gpu is None else (gpu, GPU_OVERHEAD)
    found = phases(config, c, ranks, shards, stage)
    if peak(found)[1] + overhead > memory:
        changes = advice(config, c, ranks, shards, memory - overhead) if stage == "ppo" else None
        raise ValueError(f"does not fit into {what}: each process needs {line(found)} and {overhead / GB:.1f} GB beside"
                         + (f"; it fits with {words(changes)}" if changes else ""))
    if host_bytes(config, c, shards, stage) > host:
        raise ValueError(f"--offload: each process needs {host_bytes(config, c, shards, stage) / GB:.1f} GB of host memory, of {what}")
    return f"plan: each process needs {line(found)}; there are {memory / GB:.2f} GB; it computes in {c.dtype}"


def report(config, c, ranks, shards, memory, prompt, response, flops_s, bandwidth, network):
    """Print everything about a PPO run on GPUs; returns whether it fits."""
    count = lambda critic: elements(shapes(config, critic)) / GB
    found = phases(config, c, ranks, shards)
    phase, need = peak(found)
    fits = need + GPU_OVERHEAD <= memory
    print(f"{count(False):.2f}e9 parameters, critic {count(True) if c.advantage == 'gae' else 0:.2f}e9; {ranks} GPU(s), "
          f"weights sharded over {shards}, {ranks // shards} replica(s)\n")
    print("\n".join(table(found)))
    print(f"\npeak: {need / GB:.1f} GB in {phase} + {GPU_OVERHEAD / GB:.1f} for CUDA and NCCL (assumed), of {memory / GB:.1f}: "
          + ("fits" if fits else "DOES NOT FIT"))
    if not fits:
        changes = advice(config, c, ranks, shards, memory - GPU_OVERHEAD)
        print(f"it fits with {words(changes)}" if changes else "no flag of this table makes it fit: it needs more GPUs, or larger ones")
    if c.offload:
        print(f"host memory: {host_bytes(config, c, shards) / GB:.1f} GB a GPU for weights, gradients and optimizer")
    need = flops(config, c, prompt, response)
    took = seconds(config, c, ranks, shards, prompt, response, flops_s, bandwidth, network)
    print(f"\na step: {c.rollout_batch * c.samples} responses of {response:.0f} tokens after prompts of {prompt:.0f}; {sum(need.values()):.2e} FLOPs ("
          + ", ".join(f"{k} {v:.1e}" for k, v in need.items()) + ")")
    print(f"at {flops_s:.3g} FLOP/s, {bandwidth:.3g} B/s of memory, {network:.3g} B/s of network a GPU: {sum(took.values()):.0f} s ("
          + ", ".join(f"{k} {v:.0f}" for k, v in took.items()) + f"), {c.steps} steps in {c.steps * sum(took.values()) / 3600:.1f} hours")
    return fits
