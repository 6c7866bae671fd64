"""Sampling with a KV cache and slots that are refilled as sequences finish: model.generate, but faster.

    1. KVCache     keys and values of many sequences, and attention over them
    2. sample      one token per row, by a random number in [0, 1) that belongs only to its sequence
    3. Stepper     the state of the rows on the device, and one decoding step, on a GPU as CUDA graphs
    4. generate    prompts are prefilled once, and all sequences are decoded together

lib/scheduler.py decides which sequence is in which row of the cache; it needs no tensors.

Shapes: n sequences, T tokens, S positions, V vocabulary, H query heads, K key/value heads, d = head size.
References: continuous batching (Orca, OSDI 2022), blocks of keys (PagedAttention, 2309.06180).
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lib.paged import PagedCache, position_bytes, to_device
from lib.scheduler import Scheduler
from model import product, uniforms

BLOCK = 128  # positions in a block of the KV cache


# --------------------------------------------------------------------------------------------------------
# 1. KVCache

class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens, for any number of calls of `generate`.

    Both are [layers, blocks, slots, K, BLOCK, d]: position p lies in block p // BLOCK. Decoding reads each
    block only for the rows that reach it, and each such read is one contiguous piece, which matrix products
    on CPU take without a copy. lib.paged.PagedCache, for GPUs, has the same methods.
    """
    block = BLOCK
    shares_prefix = True  # free rows may hold the beginning that all prompts share

    def __init__(self, config, slots, length, dtype, device):
        K = config.num_key_value_heads
        shape = (config.num_hidden_layers, self.blocks(length), slots, K, BLOCK, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.made_for = (dtype, shape[0], K, shape[-1])
        self.slots = slots
        self.length = length
        self.positions = slots * length

    @classmethod
    def rows(cls, config, slots, length, dtype, gb):
        """(rows, bytes of each) of a cache of `slots` rows, or of as many as fit into gb * 1e9 bytes.

        gb 0 sets no limit. Raises ValueError if not even one row fits."""
        row = cls.blocks(length) * BLOCK * position_bytes(config, dtype)
        if gb and gb * 1e9 < row:
            raise ValueError(f"--kv-gb is {gb:g}, expected at least {row / 1e9:.3g}: "
                             f"keys and values of one sequence of {length} tokens")
        return min(slots, int(gb * 1e9 / row)) if gb else slots, row

    @classmethod
    def sized(cls, config, slots, length, dtype, device, gb):
        """A cache of `slots` rows, or of as many as fit into gb * 1e9 bytes (see `rows`)."""
        rows, _ = cls.rows(config, slots, length, dtype, gb)
        return cls(config, rows, length, dtype, device)

    @staticmethod
    def blocks(length):
        """How many blocks hold `length` positions."""
        return -(-length // BLOCK)

    def copy(self, source, target, length):
        """Copy the first `length` positions of row `source` to the rows `target`, a list or a slice."""
        for x in (self.k[:, : self.blocks(length)], self.v[:, : self.blocks(length)]):
            x[:, :, target] = x[:, :, source : source + 1]

    def move(self, source, target, length):
        """Put the first `length` positions of row `source` into row `target`."""
        self.copy(source, slice(target, target + 1), length)

    # Every row has all of its positions from the start, so these methods have nothing to do.

    def clear(self):
        pass

    def room(self):
        return math.inf

    def hold(self, row, length):
        return True

    def cut(self, row, length):
        pass

    def tell(self):
        pass

    def graph_counts(self, n, counts):
        return (n,) * len(counts)

    def attention(self, row, positions, counts):
        """The attention of new tokens at positions [n or 1, T] in rows from `row` on, for model.Attention.

        counts[j] of these rows reach block j. The returned function stores the new keys and values and
        computes attention by plain products, block by block, and one softmax. For one query on CPU this is
        twice as fast as scaled_dot_product_attention, which copies keys. The shapes of the products are
        fixed, so a row's numbers are the same, bit for bit, whatever other rows are computed with it.
        """
        device = positions.device
        S = len(counts) * BLOCK
        rows = torch.arange(row, row + counts[0], device=device)[:, None]  # [n, 1]
        hidden = torch.zeros(*positions.shape, S, device=device)  # [n or 1, T, S]: -inf for what comes later
        hidden.masked_fill_(torch.arange(S, device=device) > positions[..., None], -math.inf)
        new = (positions // BLOCK, rows, slice(None), positions % BLOCK)  # where the new tokens lie
        # the part of each block that is read: (rows, first position, end)
        spans = [(m, j * BLOCK, (j + 1) * BLOCK) for j, m in enumerate(counts)]

        def attention(layer, q, k, v):  # [n, H, T, d], [n, K, T, d], [n, K, T, d] -> [n, H, T, d]
            n, H, T, d = q.shape
            K = k.shape[1]
            keys = self.k[layer]  # [blocks, slots, K, BLOCK, d]
            values = self.v[layer]
            keys[new] = k.transpose(1, 2)
            values[new] = v.transpose(1, 2)
            # the query heads that share a key head are rows of one product, so that no key is read twice
            q = q.reshape(n, K, H // K * T, d)
            scores = torch.full((n, K, H // K * T, S), -math.inf, device=device)
            for (m, first, end), block in zip(spans, keys):
                scores[:m, ..., first:end] = product(q[:m], block[row : row + m].transpose(-1, -2))
            scores = torch.add(hidden[:, None], scores.view(n, H, T, S), alpha=d**-0.5)
            p = torch.softmax(scores, -1).to(q.dtype).view(n, K, -1, S)
            y = torch.zeros_like(q, dtype=torch.float32)
            for (m, first, end), block in zip(spans, values):
                y[:m] += product(p[:m, ..., first:end], block[row : row + m])
            return y.to(q.dtype).view(n, H, T, d)
        return attention


def new_cache(config, slots, length, dtype, device, gb):
    """The cache for this device: `slots` rows of up to `length` tokens, or what fits into gb * 1e9 bytes."""
    kind = PagedCache if torch.device(device).type == "cuda" else KVCache
    return kind.sized(config, slots, length, dtype, device, gb)


# --------------------------------------------------------------------------------------------------------
# 2. sample

def sample(logits, temperature, u):
    """One token per row of logits [n, V] and its log-probability in nats: [n], [n], computed in float32.

    At temperature 0 it is the likeliest, otherwise the first whose cumulative probability exceeds u [n]. That
    token is found in two steps: first its block, by sums over blocks of tokens, then the token in the block.
    """
    logits = logits.float()
    if temperature == 0:
        best, token = logits.max(-1)
        return token, best - logits.logsumexp(-1)
    p = torch.softmax(logits / temperature, -1)
    p = p.view(len(p), -1, math.gcd(p.shape[-1], 256))  # [n, blocks, tokens of a block]
    cdf = p.sum(-1).cumsum(-1)  # [n, blocks]
    target = u[:, None] * cdf[:, -1:]  # u is scaled by the last sum, which rounding leaves near 1
    # right=True never lands on a probability of 0
    block = torch.searchsorted(cdf, target, right=True).clamp(max=p.shape[1] - 1)  # [n, 1]
    inside = p.gather(1, block[..., None].expand(-1, -1, p.shape[-1]))[:, 0]  # [n, tokens of a block]
    target = target - F.pad(cdf, (1, 0)).gather(1, block)
    cdf = inside.cumsum(-1)
    # rounding must not pass the block's end
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(target)))
    token = torch.searchsorted(cdf, target, right=True).clamp(max=p.shape[-1] - 1)  # [n, 1]
    return (block * p.shape[-1] + token)[:, 0], inside.gather(1, token)[:, 0].log()


class Decoder:
    """Decoding by the model's own forward pass, the definition. lib.cpu.CPUDecoder is faster for bfloat16 on
    CPU."""

    def __init__(self, model):
        self.model = model

    def decode(self, tokens, positions, cache, counts):
        """Logits [n, V] after tokens [n] at positions [n], as Llama.decode gives them."""
        return self.model.decode(tokens, positions, cache, counts)

    def sample(self, logits, temperature, u):
        """The same as the function `sample`; on CPU it takes only as many rows at a time as fit into the
        processor's caches."""
        n = len(logits)
        size = n if logits.is_cuda else 16
        parts = []
        for first in range(0, n, size):
            part = slice(first, first + size)
            parts.append(sample(logits[part], temperature, u if u is None else u[part]))
        tokens, logprobs = zip(*parts)
        return torch.cat(tokens), torch.cat(logprobs)


# --------------------------------------------------------------------------------------------------------
# 3. Stepper

class Stepper:
    """The last token, position, number of new tokens and random stream of each row, on the device, and one
    step of all rows.

    The host reads nothing inside `step`, so that on a GPU it can be captured as a CUDA graph, whose single
    launch replaces thousands.
    """

    def __init__(self, decoder, cache, slots, temperature, max_new_tokens, noise, graphs):
        self.decoder = decoder
        self.cache = cache
        self.slots = slots
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.noise = noise  # [sequences, max_new_tokens] numbers in [0, 1), or None where sampling is greedy
        self.rows = torch.zeros(4, slots, dtype=torch.long, device=cache.k.device)
        self.graphs = {} if graphs else None  # {rows that reach each block: (graph, its result)}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        self.capture_seconds = 0.0

    def write(self, state, prefix):
        """Copy the state of the rows to the device.

        In a CUDA graph, rows without a sequence also decode, at position `prefix`."""
        rows = state + [(0, prefix, 0, 0)] * (self.slots - len(state))
        self.rows.copy_(to_device(torch.tensor(rows).T.contiguous(), self.rows.device), non_blocking=True)

    def run(self, n, counts):
        """Sample one more token in each of the first n rows, of which counts[j] reach block j.

        Returns tokens and log-probs, float64 [2, n]."""
        return self.step(n, counts) if self.graphs is None else self.replay(n, counts)

    def step(self, n, counts):
        token, position, count, index = self.rows[:, :n]  # [n] each
        u = self.noise[index, count] if self.temperature else None
        logits = self.decoder.decode(token, position, self.cache, counts)  # [n, V]
        new, logprob = self.decoder.sample(logits, self.temperature, u)
        token.copy_(new)
        position.add_(1).clamp_(max=self.cache.length - 1)  # the clamps are for rows without a sequence
        count.add_(1).clamp_(max=self.max_new_tokens - 1)
        return torch.stack([new.double(), logprob.double()])  # one tensor: one transfer brings both

    def replay(self, n, counts):
        """`step` as a CUDA graph. n is rounded up, so that eight graphs serve all numbers of rows."""
        size = -(-self.slots // 8)
        n = min(self.slots, -(-n // size) * size)
        counts = self.cache.graph_counts(n, counts)
        if counts not in self.graphs:  # not captured the first time, when libraries allocate memory
            self.graphs[counts] = None
            return self.step(n, counts)
        if self.graphs[counts] is None:
            started = time.perf_counter()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # graphs run one after another, in the same memory
                result = self.step(n, counts)
            self.graphs[counts] = (graph, result)
            self.capture_seconds += time.perf_counter() - started
        graph, result = self.graphs[counts]
        graph.replay()
        return result.clone()


@dataclass
class Tally:
    """Counts of what one call of `generate` has done; shares() is logged."""
    held: int = 0  # positions of the cache in use, summed over steps
    steps: int = 0
    row_steps: int = 0  # rows decoded, summed over steps
    prefilled: int = 0  # tokens of prompts prefilled
    padded: int = 0  # the same with padding

    def shares(self, cache, tokens):
        """Shares between 0 and 1: the cache's positions in use, the decoded rows that were wasted, and the
        prefilled tokens that were padding. `tokens` is the number of sampled tokens."""
        return dict(kv_use=self.held / max(1, self.steps * cache.positions),
                    decode_waste=(self.row_steps - tokens) / max(1, self.row_steps),
                    prefill_padding=(self.padded - self.prefilled) / max(1, self.padded))


# --------------------------------------------------------------------------------------------------------
# 4. generate

@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, eos_ids=(), seed=0, streams=None, slots=64,
             return_logprobs=False, progress=None, cache=None, lockstep=False, look=None, stats=None,
             decoder=None):
    """Continue each prompt until an EOS id or max_new_tokens.

    prompts are token lists of any lengths >= 1. Returns the new tokens as lists in the same order, EOS kept;
    with return_logprobs also the log-probability of each in nats, as lists of floats, at the sampling
    temperature. Temperature 0 is greedy. Every sequence draws from its own stream of random numbers, (seed,
    streams[i]), by default (seed, i). So a response depends neither on the rest of the batch, nor on `slots`
    (the number of sequences decoded at once), nor on the number of processes. Raises ValueError for invalid
    requests and for a cache that does not fit.

    cache: a KVCache to reuse, which bounds `slots`.
    lockstep: the weights are sharded, so that each forward pass is a collective, and every rank makes this
    call, even without prompts.
    look: the number of steps after which the host reads the new tokens.
    stats: a dict to fill with kv_use, decode_waste and prefill_padding (see Tally.shares).
    decoder: makes the steps, by default Decoder(model); lib.cpu.CPUDecoder.of(model) is another.
    progress: a tqdm bar that counts finished sequences.
    """
    check_request(prompts, max_new_tokens, temperature, slots)
    weight = model.model.embed_tokens.weight
    device = weight.device
    length = max(map(len, prompts), default=1) + max_new_tokens - 1  # nothing attends to the last token
    if cache is None:
        cache = new_cache(model.config, max(1, min(slots, len(prompts))), length, weight.dtype, device, 0)
    check_cache(cache, model.config, weight.dtype, length)
    slots = min(slots, cache.slots)
    look = 1 if lockstep else look or (8 if weight.is_cuda else 1)
    noise = None
    if temperature and prompts:
        streams = range(len(prompts)) if streams is None else streams
        noise = to_device(torch.stack([uniforms(seed, stream, max_new_tokens) for stream in streams]), device)
    cache.clear()
    scheduler = Scheduler(prompts, slots, max_new_tokens, set(eos_ids), cache.shares_prefix)
    graphs = weight.is_cuda and not lockstep
    stepper = Stepper(decoder or Decoder(model), cache, slots, temperature, max_new_tokens, noise, graphs)
    tally = Tally()
    while True:
        if scheduler.wants_refill():
            scheduler.refill(cache)
            copy_rows(scheduler, cache)
        if not any_rank(bool(scheduler.prefills or scheduler.active), lockstep, device):
            break
        if scheduler.prefills:
            prefill_group(model, scheduler, cache, tally)
            copy_rows(scheduler, cache)
        elif scheduler.active:
            finished = decode_rows(scheduler, stepper, look, tally)
            if progress:
                progress.update(finished)
        else:  # another rank has work: take part in its collectives
            model.decode(stepper.rows[0, :1], stepper.rows[1, :1], cache, (1,))
    if stats is not None:
        stats |= tally.shares(cache, sum(map(len, scheduler.out)))
        if stepper.graphs is not None:
            stats["graph_seconds"] = stepper.capture_seconds
    return (scheduler.out, scheduler.logprobs) if return_logprobs else scheduler.out


def check_request(prompts, max_new_tokens, temperature, slots):
    if temperature < 0 or max_new_tokens < 1 or slots < 1:
        raise ValueError(f"generate: temperature {temperature}, max_new_tokens {max_new_tokens} "
                         f"or slots {slots} out of range")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {i} is empty")


def check_cache(cache, config, dtype, length):
    if cache.length < length:
        raise ValueError(f"generate: prompt and response need {length} positions, "
                         f"the cache has {cache.length}")
    if cache.made_for != (dtype, config.num_hidden_layers, config.num_key_value_heads, config.head_dim):
        raise ValueError("generate: the cache is of another model: "
                         f"type, layers, key heads and head size {cache.made_for}")


def any_rank(work, lockstep, device):
    """Whether this rank, or in lock-step any rank, has work."""
    if lockstep:
        work = torch.tensor(work, dtype=torch.int, device=device)
        dist.all_reduce(work, dist.ReduceOp.MAX)
    return bool(work)


def copy_rows(scheduler, cache):
    """Copy the keys and values of prompts to the rows of their other samples, once all prefills are done."""
    while scheduler.copies and not scheduler.prefills:
        cache.copy(*scheduler.copies.pop())


def prefill_group(model, scheduler, cache, tally):
    """Compute keys and values of the next group of prompts; decoding overwrites what pads leave behind."""
    row, parts, start = scheduler.prefills.popleft()
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in parts], batch_first=True)  # [rows, T]
    cache.tell()
    model.prefill(to_device(tokens, cache.k.device), cache, row, start)
    tally.prefilled += sum(map(len, parts))
    tally.padded += tokens.numel()


def decode_rows(scheduler, stepper, look, tally):
    """At most `look` steps of all rows, after which the host reads the new tokens. Returns the number of
    sequences that finished."""
    ahead = scheduler.ahead(look)
    scheduler.make_room(stepper.cache, ahead)
    stepper.cache.tell()
    ends = scheduler.ends()
    n = len(ends)
    block = stepper.cache.block
    if scheduler.moved:
        stepper.write(scheduler.state(), scheduler.prefix)
        scheduler.moved = False
    counts = tuple(1 + max(row for row, end in enumerate(ends) if end + ahead > j * block + 1)
                   for j in range(stepper.cache.blocks(max(ends) + ahead - 1)))  # rows that reach block j
    results = torch.stack([stepper.run(n, counts) for _ in range(ahead)])  # [ahead, 2, n]
    tally.held += ahead * sum(ends)
    tally.steps += ahead
    tally.row_steps += ahead * n
    scheduler.take(results.tolist())
    return scheduler.leave(stepper.cache)
