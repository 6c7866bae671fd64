"""One call of attention for sequences of many lengths, on GPUs: FlashAttention by torch's varlen_attn.

Its definition is scaled_dot_product_attention, sequence by sequence or over gathered pages, which is tested
on CPU. Before varlen_attn is used, a trial on the card itself shows whether it is available and agrees with
the definition: its interface grows with torch's releases, and which of its kernels accept pages depends on
the card and the build.
"""
import functools
import inspect

import torch
import torch.nn.functional as F

from lib import parallel
from model import Attention

try:
    from torch.nn.attention.varlen import varlen_attn
    KNOWN = set(inspect.signature(varlen_attn).parameters)
except ImportError:  # before torch 2.10
    KNOWN = set()


def one_call(q, k, v, table, starts, used, longest):
    """Attention of one query per row over pages: q [n, H, d], k and v [pages, page, K, d], table [n, m] and
    used [n] (positions of each row) in int32 -> [n, H, d]."""
    return varlen_attn(q, k, v, starts, None, 1, longest, enable_gqa=True, seqused_k=used, block_table=table)


def gathered(q, k, v, table, seen):
    """The same by its definition, for T queries per row: q [n, H, T, d], seen [n, 1, T, m * page] ->
    [n, H, T, d]."""
    keys, values = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))  # [n, K, m * page, d]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)


@functools.lru_cache
def reads_pages(dtype, device, heads, d, page):
    """Whether one_call works here and agrees with `gathered`, tried on two rows of three pages.

    heads: (H, K) of the model, d its head size."""
    if "block_table" not in KNOWN:
        return False
    g = torch.Generator().manual_seed(0)
    H, K = heads
    q = torch.randn(2, H, d, generator=g).to(device, dtype)
    k, v = (torch.randn(7, page, K, d, generator=g).to(device, dtype) for _ in range(2))
    table = torch.tensor([[5, 2, 3], [1, 6, 4]], device=device)
    used = torch.tensor([3 * page - 1, page + 7], device=device)
    seen = torch.arange(3 * page, device=device) < used[:, None, None, None]
    expected = gathered(q[:, :, None], k, v, table, seen)[:, :, 0].float()
    starts = torch.arange(3, dtype=torch.int32, device=device)
    return agrees("attention gathers pages", expected, lambda: one_call(
        q, k, v, table.int(), starts, used.int(), 3 * page).float())


def agrees(instead, expected, function):
    """Whether function() works here and is `expected` up to rounding. If not, one line says what is done
    instead."""
    try:
        error = float((function() - expected).norm() / expected.norm())
    except (RuntimeError, ValueError) as e:
        why = f"does not do it here: {str(e)[:200]!r}"
    else:
        if error < 0.02:
            return True
        why = f"is off by {error:.2g} here"
    if parallel.rank() == 0:
        print(f"{instead}, for varlen_attn {why}", flush=True)
    return False


@torch.compiler.disable
def packed(q, k, v, lengths):
    """model.Attention.packed in one call: q [1, H, N, d], k and v [1, K, N, d], lengths [S] with sum N, on
    the CPU -> [1, H, N, d]."""
    starts = starts_of(lengths, q.device)
    longest = int(lengths.max())
    y = varlen_attn(*(x[0].transpose(0, 1) for x in (q, k, v)), starts, starts, longest, longest,
                    window_size=(-1, 0), enable_gqa=True)  # causal: nothing on the right is seen
    return y.transpose(0, 1)[None]


@functools.lru_cache(maxsize=1)  # by identity: all layers of a pass share one tensor of lengths
def starts_of(lengths, device):
    """Where each sequence starts, and where the last one ends: int32 [S + 1]."""
    return F.pad(lengths.cumsum(0), (1, 0)).int().to(device)


@functools.lru_cache
def packs(dtype, device, heads, d):
    """Whether `packed` works here and agrees with model.Attention.packed, with its gradients, tried on
    three sequences. heads: (H, K) of the model, d its head size."""
    if not {"window_size", "enable_gqa"} <= KNOWN:
        return False
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 130, 1])
    H, K = heads
    q, k, v, dy = (torch.randn(1, n, 136, d, generator=g).to(device, dtype) for n in (H, K, K, H))

    def run(attention):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        y = attention(*inputs, lengths)
        y.backward(dy)
        return torch.cat([x.flatten() for x in (y.detach(), *(x.grad for x in inputs))]).float()

    return agrees("attention takes a call per sequence", run(functools.partial(Attention.packed, None)),
                  lambda: run(packed))


def accelerate(net, dtype, device):
    """Let a finished Llama or Critic make one attention call per layer for sequences that lie end to end, if
    the device supports that in this type."""
    c = net.config
    if packs(dtype, device, (c.num_attention_heads, c.num_key_value_heads), c.head_dim):
        for layer in net.model.layers:
            layer.self_attn.packed = packed
