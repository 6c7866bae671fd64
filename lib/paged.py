"""A paged KV cache for GPUs: memory is used for tokens, not reserved for the longest response.

lib.decode.KVCache reserves the full length of every row, which suits the matrix products of a CPU. Here a row
takes pages of PAGE positions as its sequence grows and returns them when it ends (PagedAttention,
2309.06180). If pages run out, the last sequence is put back and continues later from its tokens
(lib/scheduler.py). Attention of a decode step is one call per layer (lib/varlen.py).
"""
import torch

from lib import varlen

PAGE = 256  # positions of a page; FlashAttention 2 takes multiples of 256


def to_device(x, device):
    """x, a CPU tensor, on the device; the host does not wait for the transfer to a GPU."""
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=True)


def position_bytes(config, dtype):
    """Keys and values of one token in all layers."""
    width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * width * dtype.itemsize


class PagedCache:
    """Keys and values of up to `slots` sequences of up to `length` tokens, in `pages` pages that they share.

    Both are [layers, pages + 1, PAGE, K, d]. Page 0 belongs to no row: rows without a sequence and pads of
    prompts write there, and it is never read. The methods are those of lib.decode.KVCache.
    """
    block = PAGE
    shares_prefix = False  # copies of a shared beginning would take pages for rows that are still free

    def __init__(self, config, slots, length, pages, dtype, device):
        shape = (config.num_hidden_layers, pages + 1, PAGE, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.made_for = (dtype, shape[0], *shape[3:])
        self.slots = slots
        self.length = length
        self.positions = pages * PAGE
        # The pages of each row, on the host, and a copy on the device. The copy keeps its address, so that
        # CUDA graphs read the current table.
        self.held = [[] for _ in range(slots)]
        self.table = torch.zeros(slots, self.blocks(length), dtype=torch.int32, device=device)
        self.starts = torch.arange(slots + 1, dtype=torch.int32, device=device)  # of queries, one per row
        shape = (config.num_attention_heads, config.num_key_value_heads), config.head_dim, PAGE
        half = dtype in (torch.bfloat16, torch.float16)
        self.one_call = self.k.is_cuda and half and varlen.reads_pages(dtype, self.k.device, *shape)
        self.clear()

    @classmethod
    def pages(cls, config, slots, length, dtype, gb):
        """(pages, bytes of each) for `slots` rows, or as many as fit into gb * 1e9 bytes; 0 is no limit.

        Raises ValueError if not even one row fits."""
        page = PAGE * position_bytes(config, dtype)
        least = cls.blocks(length) + 1  # a new row asks for one more page: see Scheduler.refill
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
        """Free all pages, including those of an interrupted call."""
        self.free = list(range(self.k.shape[1] - 1, 0, -1))
        self.held = [[] for _ in self.held]
        self.changed = True

    def room(self):
        """The number of free pages."""
        return len(self.free)

    def hold(self, row, length):
        """Give the row pages for `length` positions. Returns False, and gives none, if too few are free."""
        missing = self.blocks(length) - len(self.held[row])
        if missing > len(self.free):
            return False
        for _ in range(missing):
            self.held[row].append(self.free.pop())
            self.changed = True
        return True

    def cut(self, row, length):
        """Free the pages of a row after its first `length` positions."""
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
        """Update the table on the device."""
        if self.changed:
            rows = torch.zeros(self.table.shape, dtype=torch.int32)
            for row, pages in enumerate(self.held):
                rows[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self.table.copy_(to_device(rows, self.table.device), non_blocking=True)
            self.changed = False

    def graph_counts(self, n, counts):
        """What a CUDA graph for n rows depends on: only n, if attention is one call per layer."""
        return (n,) if self.one_call else (n,) * len(counts)

    def attention(self, row, positions, counts):
        """The attention of new tokens at positions [n or 1, T] in the counts[0] rows from `row` on, for
        model.Attention. No row is longer than len(counts) pages. The returned function stores the new keys
        and values."""
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
                return varlen.one_call(q[:, :, 0], keys, values, table, starts, used, self.length)[:, :, None]
            return varlen.gathered(q, keys, values, chosen, seen)
        return attention
