"""The KV cache of pages: the same tokens as KVCache's, memory that holds tokens alone, and what a GPU will be asked for."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu
import model as M
from conftest import TINY, tiny_llama
from gpu import Kernels
from lib import decode, paged, varlen

PROMPTS = [[1, 5, 9], [1, 5, 9, 4, 4, 4], [2], list(range(97)), [7, *range(50, 90)]] * 2  # two samples of each
CONFIG = M.Config.from_dict(TINY)


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 8 positions, so that short sequences have many of them."""
    monkeypatch.setattr(paged, "PAGE", 8)
    monkeypatch.setattr(paged.PagedCache, "block", 8)


def cache_of(pages, slots=12, length=160):
    return paged.PagedCache(CONFIG, slots, length, pages, torch.float32, "cpu")


def reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa, seqused_k, block_table):
    """What varlen_attn is documented to compute, for one query per sequence, one sequence and head after the other."""
    assert max_q == 1 and enable_gqa and cu_seq_k is None and max(seqused_k) <= max_k
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, seqused_k, block_table)) and cu_seq_q.tolist() == list(range(len(q) + 1))
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[2]
    for i, used in enumerate(seqused_k.tolist()):
        places = [(int(block_table[i, p // k.shape[1]]), p % k.shape[1]) for p in range(used)]
        for head in range(q.shape[1]):
            keys = torch.stack([k[page, at, head // group] for page, at in places])
            values = torch.stack([v[page, at, head // group] for page, at in places])
            out[i, head] = torch.softmax(keys @ q[i, head] / math.sqrt(q.shape[2]), 0) @ values
    return out


@pytest.mark.parametrize("pages, slots, look", [(200, 10, 1), (40, 10, 3), (21, 3, 1), (21, 10, 8)])
def test_pages_change_no_response(pages, slots, look, small_pages):
    """Whether every row has its pages, or sequences are put back all the time because pages run out."""
    net = tiny_llama(max_position_embeddings=2048)
    ask = dict(temperature=0.8, eos_ids=(3,), seed=2, slots=10, return_logprobs=True)
    tokens, logprobs = decode.generate(net, PROMPTS, 40, **ask)
    cache = cache_of(pages, slots)
    for _ in range(2):  # what an earlier call left there is never seen
        found = decode.generate(net, PROMPTS, 40, cache=cache, look=look, **ask)
        assert found[0] == tokens
        assert max(abs(a - b) for x, y in zip(logprobs, found[1]) for a, b in zip(x, y)) < 2e-5
        assert sorted(cache.free) == list(range(1, pages + 1)) and not any(cache.held)


def test_sequences_are_put_back_where_pages_run_out_and_a_row_holds_no_page_too_many(monkeypatch, small_pages):
    net, seen, least = tiny_llama(max_position_embeddings=2048), [], []
    prefill, decode_rows = M.Llama.prefill, decode.decode_rows
    monkeypatch.setattr(M.Llama, "prefill", lambda self, tokens, *a: seen.append(tokens.shape[1]) or prefill(self, tokens, *a))

    def watched(scheduler, stepper, look, tally):
        finished = decode_rows(scheduler, stepper, look, tally)
        for row, pages in enumerate(cache.held):
            length = scheduler.length(scheduler.active[row]) if row < len(scheduler.active) else 0
            assert len(pages) <= -(-length // paged.PAGE)
        used = [page for pages in cache.held for page in pages]
        assert len(set(used)) == len(used) and 0 not in used and not set(used) & set(cache.free)
        least.append(len(cache.free))
        return finished

    monkeypatch.setattr(decode, "decode_rows", watched)
    cache = cache_of(24)
    responses = decode.generate(net, PROMPTS, 40, 0.8, cache=cache)
    assert {len(r) for r in responses} == {40} and min(least) == 0
    assert len(set(seen)) > 5  # prompts have four lengths; more were prefilled with the response they had


def test_a_row_without_a_sequence_and_pads_write_into_the_page_that_nobody_reads():
    net, cache = tiny_llama(), cache_of(4, slots=3)
    cache.hold(0, 10)
    cache.tell()
    before = cache.k.clone()
    net.decode(torch.tensor([1, 2, 3]), torch.tensor([9, 0, 0]), cache, (3,))  # rows 1 and 2 have no sequence
    changed = (cache.k != before).flatten(2).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [0, cache.held[0][0]]


def test_the_cache_keeps_to_its_budget():
    page = 2 * 2 * 2 * 8 * 4 * paged.PAGE  # keys and values x layers x heads x channels x bytes x positions
    cache = paged.PagedCache.sized(CONFIG, 64, 600, torch.float32, "cpu", 10.5 * page / 1e9)
    assert cache.k.nbytes + cache.v.nbytes == 10 * page and cache.slots == 64 and cache.room() == 9  # one page is nobody's
    assert paged.PagedCache.sized(CONFIG, 2, 600, torch.float32, "cpu", 0).room() == 2 * 3
    with pytest.raises(ValueError, match="--kv-gb"):
        paged.PagedCache.sized(CONFIG, 64, 600, torch.float32, "cpu", 4.9 * page / 1e9)  # three pages, one more to grow, nobody's
    tight = paged.PagedCache.sized(CONFIG, 64, 600, torch.float32, "cpu", 5.1 * page / 1e9)
    assert len(decode.generate(tiny_llama(max_position_embeddings=2048), [[1] * 590], 11, cache=tight)[0]) == 11  # the longest fits
    with pytest.raises(ValueError, match="need 601 positions, the cache has 600"):
        decode.generate(tiny_llama(), [[1, 2, 3]], 599, cache=tight)


def test_a_gpu_is_asked_for_one_call_per_layer_with_the_documented_arguments(monkeypatch):
    net = tiny_llama(max_position_embeddings=2048)
    prompts = [PROMPTS[0], list(range(97)) * 3, PROMPTS[2]]
    expected = decode.generate(net, prompts, 4, 0.8, seed=1)
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **kw: calls.append(1) or reference(*a, **kw))
    cache = cache_of(20, length=400)
    cache.one_call = True
    assert decode.generate(net, prompts, 4, 0.8, seed=1, cache=cache) == expected
    assert len(calls) == 4 * CONFIG.num_hidden_layers


def test_varlen_attn_is_tried_before_it_is_used(monkeypatch, capsys):
    reads = varlen.reads_pages.__wrapped__
    ask = torch.float32, torch.device("cpu"), (4, 2), 8, 16
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    monkeypatch.setattr(varlen, "KNOWN", {"block_table"})
    assert reads(*ask) and capsys.readouterr().out == ""
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, seqused_k, **kw: reference(*a, seqused_k=seqused_k - 5, **kw))
    assert not reads(*ask) and "is off by" in capsys.readouterr().out

    def refuses(*args, **kw):
        raise RuntimeError("block_table needs FlashAttention 3")

    monkeypatch.setattr(varlen, "varlen_attn", refuses)
    assert not reads(*ask) and "needs FlashAttention 3" in capsys.readouterr().out
    monkeypatch.setattr(varlen, "KNOWN", {"cu_seq_q"})  # torch 2.11 knows no pages
    assert not reads(*ask) and capsys.readouterr().out == ""


def packed_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What varlen_attn is documented to compute for sequences end to end, causal: one sequence and head after the other."""
    assert window_size == (-1, 0) and enable_gqa and cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    bounds = cu_seq_q.tolist()
    assert max_q == max_k == max(b - a for a, b in zip(bounds, bounds[1:])) and bounds[-1] == len(q)
    group, parts = q.shape[1] // k.shape[1], []
    for a, b in zip(bounds, bounds[1:]):
        heads = []
        for head in range(q.shape[1]):
            scores = q[a:b, head] @ k[a:b, head // group].T / math.sqrt(q.shape[2])
            later = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
            heads.append(torch.softmax(scores.masked_fill(later, -math.inf), -1) @ v[a:b, head // group])
        parts.append(torch.stack(heads, 1))
    return torch.cat(parts)


def test_training_on_a_gpu_takes_one_call_for_all_sequences_where_a_trial_says_so(monkeypatch, capsys):
    ask = torch.float32, torch.device("cpu")
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **kw: calls.append(1) or packed_reference(*a, **kw))
    monkeypatch.setattr(varlen, "KNOWN", {"window_size", "enable_gqa"})
    varlen.packs.cache_clear()
    tokens = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) > torch.tensor([[5], [1], [30]])
    nets = []
    for fast in (False, True):
        net = tiny_llama()
        if fast:
            varlen.accelerate(net, *ask)
            calls.clear()
        net.logprobs(tokens, mask)[0].sum().backward()
        nets.append(net)
    assert len(calls) == CONFIG.num_hidden_layers and capsys.readouterr().out == ""
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters()):
        assert (a.grad - b.grad).norm() < 1e-4 * a.grad.norm(), name

    varlen.packs.cache_clear()  # a kernel whose gradients are wrong is found by the trial
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *a, **kw: packed_reference(q, (k + k.detach()) / 2, v, *a, **kw))
    net = tiny_llama()
    varlen.accelerate(net, *ask)
    assert "packed" not in vars(net.model.layers[0].self_attn)
    assert "a call per sequence, for varlen_attn" in capsys.readouterr().out
    varlen.packs.cache_clear()


def test_a_step_of_the_device_asks_the_host_for_nothing_and_does_not_grow_with_the_context(monkeypatch):
    """So that CUDA graphs can be captured, and those for a number of rows serve every length."""
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, *a, **kw: torch.empty_like(q))
    net = tiny_llama(max_position_embeddings=4096)
    cache = cache_of(40, slots=8, length=2000)
    cache.one_call = True
    stepper = decode.Stepper(decode.Decoder(net), cache, 8, 0.7, 50, torch.rand(8, 50), graphs=False)
    counted = []
    for position in (10, 10, 1900):  # RoPE's frequencies are computed once
        for row in range(5):
            cache.hold(row, position + 1)
        cache.tell()
        stepper.write([(1, position, 0, i) for i in range(5)], 0)
        with torch.inference_mode(), Kernels() as kernels:
            stepper.step(5, cache.graph_counts(5, (5,) * cache.blocks(position + 1)))
        counted.append(kernels.names)
        cache.clear()
    assert counted[1] == counted[2]
    asking = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
    assert not [name for name in counted[1] if name.startswith(asking)]


def test_eight_graphs_serve_all_numbers_of_rows(monkeypatch):
    cache = cache_of(200, slots=60)
    cache.one_call = True
    stepper = decode.Stepper(None, cache, 60, 0.7, 50, None, graphs=False)
    monkeypatch.setattr(stepper, "step", lambda n, counts: n)
    served = []
    for n in range(1, 61):
        stepper.graphs = {}  # each number comes for the first time: nothing is captured, for that needs a GPU
        served.append(stepper.replay(n, (n,) * (1 + n % 2)))
        assert list(stepper.graphs) == [(served[-1],)]
    assert len(set(served)) == 8 and all(rows >= n for n, rows in enumerate(served, 1)) and max(served) == 60


class Graph(TorchDispatchMode):
    """A stand-in on CPU for torch.cuda.CUDAGraph and torch.cuda.graph. What is captured has no effect; replay()
    has it, on the addresses of the capture. As on a GPU, nothing may be asked of the device or brought to it
    from the host meanwhile."""
    made = []

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made.append(self)

    def __torch_dispatch__(self, func, types, arguments=(), named=None):
        named = named or {}
        with self:
            parts = func.decompose(*arguments, **named)
        if parts is not NotImplemented:  # it consists of other operations, which were captured
            return parts
        host = ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh")
        assert func.name() not in host, f"{func.name()} under capture"
        result = arguments[0] if func._schema.is_mutable else func(*arguments, **named)
        if not func.is_view:
            places = [x.data_ptr() for x in self.tensors(arguments, named)]
            self.calls.append((func, arguments, named, result, places))
        return result

    @staticmethod
    def tensors(*found):
        return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]

    def replay(self):
        for func, arguments, named, result, places in self.calls:
            now = [x.data_ptr() for x in self.tensors(arguments, named)]
            assert places == now, f"an input of {func.name()} has moved"
            found = func(*arguments, **named)
            if not func._schema.is_mutable:
                for old, new in zip(self.tensors(result), self.tensors(found)):
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """decode.generate on CPU as on a GPU, with graphs; a list of those that were captured."""
    class Stepper(decode.Stepper):
        def __init__(self, *settings):
            super().__init__(*settings[:-1], True)

    monkeypatch.setattr(decode, "Stepper", Stepper)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    monkeypatch.setattr(Graph, "made", [])
    return Graph.made


def pages_by_gathering(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa, seqused_k, block_table):
    """varlen_attn for pages as one computation of tensors, which a graph can hold."""
    positions = torch.arange(block_table.shape[1] * k.shape[1])
    seen = positions < seqused_k[:, None, None, None]
    return varlen.gathered(q[:, :, None], k, v, block_table, seen)[:, :, 0]


@pytest.mark.parametrize("one_call, pages, look", [(True, 200, 8), (True, 24, 3), (False, 200, 8)])
def test_replayed_graphs_sample_the_same_tokens(one_call, pages, look, monkeypatch, small_pages, graphs):
    """Whatever a step took from the host, a graph would have as it was when it was captured."""
    monkeypatch.setattr(varlen, "varlen_attn", pages_by_gathering)
    net = tiny_llama(max_position_embeddings=2048)
    ask = dict(temperature=0.8, eos_ids=range(0, 97, 6), seed=2, slots=10, look=look, return_logprobs=True)
    with monkeypatch.context() as without:
        without.setattr(decode, "Stepper", decode.Stepper.__base__)
        tokens, logprobs = decode.generate(net, PROMPTS, 20, **ask)
    assert not graphs
    cache, stats = cache_of(pages, 10), {}
    cache.one_call = one_call
    found = decode.generate(net, PROMPTS, 20, cache=cache, stats=stats, **ask)
    assert found[0] == tokens
    assert max(abs(a - b) for x, y in zip(logprobs, found[1]) for a, b in zip(x, y)) < 2e-5
    assert stats["graph_seconds"] > 0 and len(graphs) > 1
    # ten rows, two at a time; where pages are gathered, each length has graphs of its own
    assert len(graphs) <= 5 or not one_call


def test_each_rollout_captures_its_graphs_and_timing_says_what_they_cost(
        tmp_path, monkeypatch, small_pages, graphs):
    """The sampler's weights are freed for the update and lie elsewhere afterwards, which replay() would find."""
    monkeypatch.setattr(varlen, "varlen_attn", pages_by_gathering)
    t = gpu.trainer(SimpleNamespace(tmp=tmp_path), "run", steps=2, save_every=0, slots=4)
    t.cache = paged.PagedCache(t.policy.config, 4, t.cache.length, 60, torch.float32, "cpu")
    t.cache.one_call = True
    captured = []
    rollout = t.rollout

    def counted():
        graphs.clear()
        samples = rollout()
        captured.append(len(graphs))
        return samples

    t.rollout = counted
    t.train()
    assert len(captured) == 2 and all(1 <= n <= 4 for n in captured)
    rows = [json.loads(line) for line in (t.run / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["graph_seconds"] < row["rollout_seconds"] for row in rows)
