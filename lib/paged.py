"""A KV cache of pages for GPUs: memory holds tokens, not rows that wait for the longest response.

lib.decode.KVCache reserves every row at its full length, which suits the matrix products of a CPU. Here a
row takes pages of PAGE positions as its sequence grows and gives them back when it ends (PagedAttention,
2309.06180). Where pages run out, the sequence that came last is put back and goes on later from its tokens
(lib/scheduler.py). Attention of a decode step is one call per layer: FlashAttention by torch's varlen_attn
where it reads pages, else scaled_dot_product_attention over gathered pages, which defines it.

The gathered form is tested on CPU against lib.decode.KVCache. Whether varlen_attn can be had, and computes
the same, is tried on the GPU itself before it is used: torch 2.13 knows pages in its interface, but which of
its kernels take them depends on the card and on the build.
"""
import functools
import inspect

import torch
import torch.nn.functional as F

PAGE = 256  # positions of a page; FlashAttention 2 takes multiples of 256

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


def to_device(x, device):
    """x, a CPU tensor, on the device; the host does not wait for the transfer to a GPU."""
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=True)


def one_call(q, k, v, table, starts, used, longest):
    """Attention of one query per row over pages: q [n, H, d], k and v [pages, PAGE, K, d], table [n, m] and
    used [n] (positions of each row) in int32 -> [n, H, d]."""
    return varlen_attn(q, k, v, starts, None, 1, longest, enable_gqa=True, seqused_k=used, block_table=table)


def gathered(q, k, v, table, seen):
    """The same by its definition, for T queries per row: q [n, H, T, d], seen [n, 1, T, m * PAGE] ->
    [n, H, T, d]."""
    keys, values = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))  # [n, K, m * PAGE, d]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)


@functools.lru_cache
def reads_pages(dtype, device, heads, d):
    """Whether one_call works here and agrees with `gathered`, tried on two rows of three pages.

    heads: (H, K) of the model, d its head size."""
    if varlen_attn is None or "block_table" not in inspect.signature(varlen_attn).parameters:
        return False
    g = torch.Generator().manual_seed(0)
    H, K = heads
    q = torch.randn(2, H, d, generator=g).to(device, dtype)
    k, v = (torch.randn(7, PAGE, K, d, generator=g).to(device, dtype) for _ in range(2))
    table = torch.tensor([[5, 2, 3], [1, 6, 4]], device=device)
    used = torch.tensor([3 * PAGE - 1, PAGE + 7], device=device)
    seen = torch.arange(3 * PAGE, device=device) < used[:, None, None, None]
    expected = gathered(q[:, :, None], k, v, table, seen)[:, :, 0].float()
    starts = torch.arange(3, dtype=torch.int32, device=device)
    try:
        found = one_call(q, k, v, table.int(), starts, used.int(), 3 * PAGE).float()
    except (RuntimeError, ValueError) as e:
        print(f"attention gathers pages, for varlen_attn reads none here: {str(e)[:200]!r}", flush=True)
        return False
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.02:
        print(f"attention gathers pages, for varlen_attn is off by {error:.2g} here", flush=True)
        return False
    return True


class PagedCache:
    """Keys and values of up to `slots` sequences of up to `length` tokens, in `pages` pages that they share.

    Both are [layers, pages + 1, PAGE, K, d]. Page 0 belongs to nobody: rows without a sequence and pads of
    prompts write there, and nobody reads it. The methods are those of lib.decode.KVCache.
    """
    block = PAGE
    shares_prefix = False  # a beginning that all prompts share would keep pages for rows that nobody has yet

    def __init__(self, config, slots, length, pages, dtype, device):
        shape = (config.num_hidden_layers, pages + 1, PAGE, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.made_for = (dtype, shape[0], *shape[3:])
        self.slots = slots
        self.length = length
        self.positions = pages * PAGE
        # The page of each PAGE positions of each row: on the host, and its copy on the device, whose address
        # stays the same, so that CUDA graphs read what is current.
        self.held = [[] for _ in range(slots)]
        self.table = torch.zeros(slots, self.blocks(length), dtype=torch.int32, device=device)
        self.starts = torch.arange(slots + 1, dtype=torch.int32, device=device)  # of queries, one per row
        heads = config.num_attention_heads, config.num_key_value_heads
        half = dtype in (torch.bfloat16, torch.float16)
        self.one_call = self.k.is_cuda and half and reads_pages(dtype, self.k.device, heads, config.head_dim)
        self.clear()

    @classmethod
    def pages(cls, config, slots, length, dtype, gb):
        """(pages, bytes of each) for `slots` rows, or as many as fit into gb * 1e9 bytes; 0 is no limit.

        Raises ValueError if not even one row fits."""
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        page = 2 * width * PAGE * dtype.itemsize  # keys and values
        least = cls.blocks(length) + 1  # see Scheduler.refill: a new row asks for one page more
        if gb and gb * 1e9 < (least + 1) * page:
            raise ValueError(f"--kv-gb is {gb:g}, expected at least {(least + 1) * page / 1e9:.3g}: "
                             f"keys and values of one sequence of {length} tokens")
        whole = max(least, slots * cls.blocks(length))
        return min(whole, int(gb * 1e9 / page) - 1) if gb else whole, page

    @classmethod
    def sized(cls, config, slots, length, dtype, device, gb):
        """A cache of as many pages as `slots` rows may need, or as fit into gb * 1e9 bytes."""
        pages, _ = cls.pages(config, slots, length, dtype, gb)
        return cls(config, slots, length, pages, dtype, device)

    @staticmethod
    def blocks(length):
        """How many pages hold `length` positions."""
        return -(-length // PAGE)

    def clear(self):
        """Take all pages back, also those of a call that was interrupted."""
        self.free = list(range(self.k.shape[1] - 1, 0, -1))
        self.held = [[] for _ in self.held]
        self.changed = True

    def room(self):
        """How many pages nobody holds."""
        return len(self.free)

    def hold(self, row, length):
        """Give the row pages for `length` positions; False, and nothing is given, where they are missing."""
        missing = self.blocks(length) - len(self.held[row])
        if missing > len(self.free):
            return False
        for _ in range(missing):
            self.held[row].append(self.free.pop())
            self.changed = True
        return True

    def cut(self, row, length):
        """Take back the pages behind the first `length` positions of a row."""
        kept = self.blocks(length)
        self.free.extend(reversed(self.held[row][kept:]))
        del self.held[row][kept:]
        self.changed = True

    def move(self, source, target, length):
        """Give the pages of row `source` to row `target`, which gives up its own."""
        self.cut(target, 0)
        self.held[target], self.held[source] = self.held[source], []

    def copy(self, source, targets, length):
        """Copy the first `length` positions of row `source` to the rows `targets`, a list."""
        n = self.blocks(length)
        pages = [page for row in targets for page in self.held[row][:n]]
        for x in (self.k, self.v):
            x[:, pages] = x[:, self.held[source][:n] * len(targets)]

    def tell(self):
        """Bring the table on the device up to date."""
        if self.changed:
            rows = torch.zeros(self.table.shape, dtype=torch.int32)
            for row, pages in enumerate(self.held):
                rows[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self.table.copy_(to_device(rows, self.table.device), non_blocking=True)
            self.changed = False

    def graph_counts(self, n, counts):
        """What a CUDA graph for n rows depends on: with one call per layer on n alone."""
        return (n,) if self.one_call else (n,) * len(counts)

    def attention(self, row, positions, counts):
        """The attention of new tokens at positions [n or 1, T] in the counts[0] rows from `row` on, for
        model.Attention. No row is longer than len(counts) pages. The function that is returned stores the new
        keys and values."""
        n = counts[0]
        table = self.table[row : row + n]  # [n, pages of a row]
        positions = positions.expand(n, -1)  # [n, T]
        page = table.gather(1, positions // PAGE)
        places = page * PAGE + positions % PAGE  # [n, T], where the new tokens lie
        single = self.one_call and positions.shape[1] == 1
        used = (positions[:, 0] + 1).int()
        if not single:
            chosen = table[:, : len(counts)]
            S = chosen.shape[1] * PAGE
            seen = torch.arange(S, device=positions.device) <= positions[:, None, :, None]  # [n, 1, T, S]

        def attention(layer, q, k, v):  # [n, H, T, d], [n, K, T, d], [n, K, T, d] -> [n, H, T, d]
            keys = self.k[layer]
            values = self.v[layer]
            for cached, new in ((keys, k), (values, v)):
                cached.view(-1, *cached.shape[2:])[places] = new.transpose(1, 2)
            if single:
                starts = self.starts[: n + 1]
                return one_call(q[:, :, 0], keys, values, table, starts, used, self.length)[:, :, None]
            return gathered(q, keys, values, chosen, seen)
        return attention
