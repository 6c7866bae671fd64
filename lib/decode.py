"""Sampling from a model: `generate`, with a KV cache and slots that are refilled as sequences finish. (model.generate is this one.)

    1. KVCache     keys and values of many sequences, and attention over them
    2. sample      a token a row, by a number in [0, 1) that belongs to its sequence alone
    3. generate    prompts prefilled once, all sequences decoded together

The model's own forward pass is the definition of what comes out, tests/test_model.py the proof: token by token without a cache.
Shapes: n sequences, T tokens, S positions, V vocabulary, H query heads, K key/value heads, d = head size.
Ideas: continuous batching (Orca, OSDI 2022), blocks of keys (PagedAttention, 2309.06180).
"""
import math
import os
from collections import deque

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lib.cpu import BLOCK, CPUDecoder

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass


# ---------------------------------------------------------------------------------------------------- 1. KVCache

class KVCache:
    """Keys and values of `slots` sequences of up to `length` tokens; allocated once and used by any number of `generate`.

    [layers, blocks, slots, K, BLOCK, d]: position p lies in block p // BLOCK. Decoding reads each block for the rows that
    reach it and no further, and each such read is one contiguous piece, which CPU's matrix products take without a copy.
    """
    BLOCK = BLOCK

    def __init__(self, config, slots, length, dtype, device):
        blocks = -(-length // self.BLOCK)
        shape = (config.num_hidden_layers, blocks, slots, config.num_key_value_heads, self.BLOCK, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.slots, self.length = slots, length

    @classmethod
    def rows(cls, config, slots, length, dtype, gb):
        """(rows, bytes of one) of a cache of `slots` rows, or of as many as fit into gb * 1e9 bytes; gb 0 sets no limit."""
        row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * -(-length // cls.BLOCK) * cls.BLOCK
        if gb and gb * 1e9 < row:
            raise ValueError(f"--kv-gb is {gb:g}, expected at least {row / 1e9:.3g}: keys and values of one sequence of {length} tokens")
        return min(slots, int(gb * 1e9 / row)) if gb else slots, row

    @classmethod
    def sized(cls, config, slots, length, dtype, device, gb):
        return cls(config, cls.rows(config, slots, length, dtype, gb)[0], length, dtype, device)

    def blocks(self, length):
        return -(-length // self.BLOCK)

    def copy(self, source, target, length):
        """The first `length` positions of row `source` into the rows `target`, a list or a slice (which needs no transfer to a GPU)."""
        for x in (self.k[:, : self.blocks(length)], self.v[:, : self.blocks(length)]):
            x[:, :, target] = x[:, :, source : source + 1]

    def attend(self, row, positions, counts):
        """The `attend` of new tokens at positions [n or 1, T] in rows row, row + 1, ...; counts[j] of them reach block j.

        Plain products and one softmax, block by block: on CPU, twice as fast at one query as scaled_dot_product_attention,
        which copies keys, and of fixed shapes: a row's numbers are the same, bit for bit, whatever else is computed with it.
        """
        S, device = len(counts) * self.BLOCK, positions.device
        rows = torch.arange(row, row + counts[0], device=device)[:, None]
        hidden = torch.zeros(*positions.shape, S, device=device)
        hidden.masked_fill_(torch.arange(S, device=device) > positions[..., None], -math.inf)
        at = (positions // self.BLOCK, rows, slice(None), positions % self.BLOCK)
        blocks = [(row + m, j * self.BLOCK, (j + 1) * self.BLOCK) for j, m in enumerate(counts)]

        def attend(layer, q, k, v):  # [n, H, T, d], [n, K, T, d]
            n, H, T, d = q.shape
            K, keys, values = k.shape[1], self.k[layer], self.v[layer]
            keys[at], values[at] = k.transpose(1, 2), v.transpose(1, 2)
            q = q.reshape(n, K, H // K * T, d)  # the query heads of one key head are rows of one product: no key is read twice
            scores = torch.full((n, K, H // K * T, S), -math.inf, device=device)
            for (end, a, b), block in zip(blocks, keys):
                scores[: end - row, ..., a:b] = q[: end - row] @ block[row:end].transpose(-1, -2)
            scores = torch.add(hidden[:, None], scores.view(n, H, T, S), alpha=d**-0.5)
            p = torch.softmax(scores, -1).to(q.dtype).view(n, K, -1, S)
            y = torch.zeros_like(q)
            for (end, a, b), block in zip(blocks, values):
                y[: end - row] += p[: end - row, ..., a:b] @ block[row:end]
            return y.view(n, H, T, d)
        return attend


# ---------------------------------------------------------------------------------------------------- 2. sample

def uniforms(seed, stream, n):
    """n numbers in [0, 1) that depend on (seed, stream) alone."""
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return torch.rand(n, generator=torch.Generator().manual_seed(mixed >> 1))


def sample(logits, temperature, u):
    """A token a row and its log-probability, computed in float32 from logits [n, V]: the arg max at temperature 0, else the first
    token whose cumulative probability passes u [n]. It is found in two steps, by sums over blocks of tokens, then inside the block."""
    logits = logits.float()
    if temperature == 0:
        best, token = logits.max(-1)
        return token, best - logits.logsumexp(-1)
    p = torch.softmax(logits / temperature, -1)
    p = p.view(len(p), -1, math.gcd(p.shape[-1], 256))  # [n, blocks, tokens of a block]
    cdf = p.sum(-1).cumsum(-1)
    target = u[:, None] * cdf[:, -1:]  # u is scaled by the last sum, which rounding leaves near 1
    # right=True never lands on a probability of 0
    block = torch.searchsorted(cdf, target, right=True).clamp(max=p.shape[1] - 1)  # [n, 1]
    inside = p.gather(1, block[..., None].expand(-1, -1, p.shape[-1]))[:, 0]
    target = target - F.pad(cdf, (1, 0)).gather(1, block)
    cdf = inside.cumsum(-1)
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(target)))  # rounding may not pass the block's end
    token = torch.searchsorted(cdf, target, right=True).clamp(max=p.shape[-1] - 1)
    return (block * p.shape[-1] + token)[:, 0], inside.gather(1, token)[:, 0].log()


def draw(decoder, logits, temperature, u):
    """sample, by the decoder's kernel where it has one; else on CPU as many logits at a time as its own caches hold."""
    if isinstance(decoder, CPUDecoder) and temperature:
        return decoder.sample(logits, temperature, u)
    n = len(logits)
    rows = n if logits.is_cuda else 16
    parts = [sample(logits[r : r + rows], temperature, u if u is None else u[r : r + rows]) for r in range(0, n, rows)]
    return tuple(torch.cat(x) for x in zip(*parts))


# ---------------------------------------------------------------------------------------------------- 3. generate

@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, eos_ids=(), seed=0, streams=None, slots=64,
             return_logprobs=False, progress=None, cache=None, lockstep=False, look=None, stats=None):
    """Continue each prompt until an EOS id or max_new_tokens.

    prompts: token lists of any lengths >= 1. Returns the new tokens as lists in the same order, EOS kept; with
    return_logprobs also the log-probability of each, as float lists, at the sampling temperature. Temperature 0 is greedy.
    Every sequence draws from its own stream of numbers, (seed, streams[i]), default i: a response does not depend on what
    else is in the batch, on `slots` (sequences decoded at once) or on the number of processes.

    cache: a KVCache to use again, which bounds `slots`. lockstep: the weights are sharded, each forward is a collective;
    every rank calls, with prompts or without. look: tokens between two looks of the host. stats: a dict to fill with kv_use,
    decode_waste and prefill_padding, shares of the cache's positions, of the decoded and of the prefilled tokens.

    A prompt is prefilled without its last token, which is the first one that decoding takes. A finished sequence leaves at
    once: its slot goes to the next sample of its own prompt, whose keys are there, or to the last active one.
    """
    if temperature < 0 or max_new_tokens < 1 or slots < 1:
        raise ValueError(f"generate: temperature {temperature}, max_new_tokens {max_new_tokens} or slots {slots} out of range")
    if any(len(p) == 0 for p in prompts):
        raise ValueError(f"generate: prompt {next(i for i, p in enumerate(prompts) if not p)} is empty")
    weight = model.model.embed_tokens.weight
    device, cuda, eos = weight.device, weight.is_cuda, set(eos_ids)
    decoder = not lockstep and CPUDecoder.of(model) or model
    length = max(map(len, prompts), default=1) + max_new_tokens - 1  # the last token is not looked back at
    if cache is None:
        cache = KVCache(model.config, max(1, min(slots, len(prompts))), length, weight.dtype, device)
    if cache.length < length:
        raise ValueError(f"generate: prompt and response need {length} positions, the cache has {cache.length}")
    made_for, c = (cache.k.dtype, len(cache.k), *cache.k.shape[3:]), model.config
    if made_for != (weight.dtype, c.num_hidden_layers, c.num_key_value_heads, cache.BLOCK, c.head_dim):
        raise ValueError(f"generate: the cache is of another model: type, layers, key heads, block and head size {made_for}")
    slots = min(slots, cache.slots)
    look = 1 if lockstep else look or (8 if cuda else 1)
    out, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    # Longest first: neighbours are of like length. Samples of one prompt stand side by side.
    known = {}
    prompt_of = [known.setdefault(tuple(p), i) for i, p in enumerate(prompts)]  # equal prompts have one number
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompt_of[i], i)))
    active = []  # active[row] = index of the prompt that sits in this row of the cache
    head = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1) if prompts else 0  # all prompts begin alike
    prefills = deque([(0, [prompts[0][:head]], 0)] if head else [])  # (first row, tokens of each, positions held before)
    copies = [(0, slice(1, slots), head)] if head else []  # (row, rows, positions) to copy once these are done
    state = torch.zeros(4, slots, dtype=torch.long, device=device)  # of each row: last token, its position, tokens out, prompt
    streams = range(len(prompts)) if streams is None else streams
    to_device = lambda x: (x.pin_memory() if cuda else x).to(device, non_blocking=True)
    noise = to_device(torch.stack([uniforms(seed, s, max_new_tokens) for s in streams])) if temperature and prompts else None
    graphs, pool, moved = {}, torch.cuda.graph_pool_handle() if cuda else None, False  # moved: rows changed hands since `state` was written
    held = steps = row_steps = prefilled = prefill_tokens = 0

    def refill():
        """Waiting sequences into free rows: those whose prompt is in no row yet, to be prefilled, then copies of such rows."""
        row_of = {prompt_of[i]: row for row, i in enumerate(active)}
        fresh, again, start = [], {}, len(active)
        new = [waiting.popleft() for _ in range(min(slots - start, len(waiting)))]
        for i in new:
            if prompt_of[i] not in row_of:
                row_of[prompt_of[i]] = start + len(fresh)
                fresh.append(i)
        active.extend(fresh)
        for i in new:
            if i not in fresh:
                again.setdefault(row_of[prompt_of[i]], []).append(len(active))
                active.append(i)
        copies.extend((row, rows, len(prompts[active[row]]) - 1) for row, rows in again.items())
        lengths = [len(prompts[i]) - 1 - head for i in fresh]
        first = 0
        for j in range(1, len(fresh) + 1):  # a group is prefilled at once: of like length, so that little is padding
            if j == len(fresh) or lengths[j] < 0.9 * lengths[first] or (j - first + 1) * lengths[first] > PREFILL_TOKENS:
                if lengths[first]:
                    prefills.append((start + first, [prompts[i][head:-1] for i in fresh[first:j]], head))
                first = j

    def copy():
        while copies:
            cache.copy(*copies.pop())

    def step(n, counts):
        """One token more in the first n rows. The host looks at nothing here, so that a graph can be captured of it."""
        token, position, count, index = (x[:n] for x in state)
        u = noise[index, count] if temperature else None
        logits = decoder.decode(token, position, cache, counts)
        new, logprob = draw(decoder, logits, temperature, u)
        token.copy_(new)
        position.add_(1).clamp_(max=cache.length - 1)  # the clamps are for rows that hold no sequence, see replay
        count.add_(1).clamp_(max=max_new_tokens - 1)
        return torch.stack([new.double(), logprob.double()])  # one tensor: one transfer brings both

    def replay(n, counts):
        """step as a CUDA graph: one launch in place of thousands. n is rounded up, so that few graphs do for all."""
        n = min(slots, -(-n // 8) * 8)
        counts = (n,) * len(counts)
        if counts not in graphs:  # the first time without: libraries allocate memory then, which a capture must not
            graphs[counts] = None
            return step(n, counts)
        if graphs[counts] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):  # one pool of memory for all: they run one after the other
                graphs[counts] = graph, step(n, counts)
        graph, result = graphs[counts]
        graph.replay()
        return result.clone()

    def decode():
        """`look` steps of all rows, then one look of the host at the new tokens; the finished ones leave."""
        nonlocal moved, held, steps, row_steps
        ends = [len(prompts[i]) + len(out[i]) for i in active]
        n, ahead = len(active), min(look, min(max_new_tokens - len(out[i]) for i in active))
        if moved:
            rows = [((out[i] or prompts[i])[-1], end - 1, len(out[i]), i) for i, end in zip(active, ends)]
            rows += [(0, head, 0, 0)] * (slots - n)
            state.copy_(to_device(torch.tensor(rows).T.contiguous()), non_blocking=True)
            moved = False
        counts = tuple(1 + max(r for r, end in enumerate(ends) if end + ahead > j * cache.BLOCK + 1)
                       for j in range(cache.blocks(max(ends) + ahead - 1)))
        results = torch.stack([(replay if cuda and not lockstep else step)(n, counts) for _ in range(ahead)])
        held, steps, row_steps = held + ahead * sum(ends), steps + ahead, row_steps + ahead * n
        for tokens, scores in results.tolist():
            for i, token, score in zip(active, tokens, scores):
                if not (out[i] and out[i][-1] in eos):
                    out[i].append(int(token))
                    logprobs[i].append(score)
        for row in reversed(range(n)):
            i = active[row]
            if out[i][-1] in eos or len(out[i]) == max_new_tokens:
                moved = True
                if waiting and prompt_of[waiting[0]] == prompt_of[i]:  # the prompt's keys are in this row
                    active[row] = waiting.popleft()
                else:
                    end = active.pop()
                    if row < len(active):
                        cache.copy(len(active), slice(row, row + 1), len(prompts[end]) + len(out[end]))
                        active[row] = end
                if progress:
                    progress.update()

    while True:
        if waiting and not prefills and (not active or slots - len(active) >= max(1, slots // 8)):
            refill()  # several prompts share one prefill
            moved = True
            if not prefills:
                copy()
        work = bool(prefills or active)
        if lockstep:
            work = torch.tensor(work, dtype=torch.int, device=device)
            dist.all_reduce(work, dist.ReduceOp.MAX)
        if not work:
            break
        if prefills:
            row, parts, start = prefills.popleft()
            tokens = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in parts], batch_first=True)
            model.prefill(to_device(tokens), cache, row, start)  # decoding overwrites what pads leave before it is looked at
            prefilled, prefill_tokens = prefilled + sum(map(len, parts)), prefill_tokens + tokens.numel()
            if not prefills:
                copy()
        elif active:
            decode()
        else:  # another rank has work: take part in its collectives
            model.decode(state[0, :1], state[1, :1], cache, (1,))
    if stats is not None:
        stats |= dict(kv_use=held / max(1, steps * cache.slots * cache.length),
                      decode_waste=(row_steps - sum(map(len, out))) / max(1, row_steps),
                      prefill_padding=(prefill_tokens - prefilled) / max(1, prefill_tokens))
    return (out, logprobs) if return_logprobs else out
