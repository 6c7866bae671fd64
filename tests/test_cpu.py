"""cpu.py and cpu.c against the model's own forward and backward, and each kernel against float64."""
import math
import platform

import pytest
import torch
import torch.nn.functional as F

from lib import cpu, decode, parallel
import model as M
import ppo
from conftest import TINY, tiny_llama
from test_model import LLAMA31, PROMPTS, QWEN, QWEN3

CONFIGS = [TINY, QWEN, TINY | dict(attention_bias=True, tie_word_embeddings=True), LLAMA31 | dict(num_attention_heads=5, num_key_value_heads=1, head_dim=64), QWEN3]
CONFIG_NAMES = ["llama", "qwen2.5", "bias, tied", "wide", "qwen3"]


def kernels(net):
    library = cpu.kernels(net.model.embed_tokens.weight, net.config)
    if library is None:
        pytest.skip("no C compiler, or oneDNN has no products in bfloat16 for this processor")
    return library


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(ours, exact):
    """Off by no more than the rounding of the result, and by 1e-3 of the largest where terms cancel."""
    return ((ours.double() - exact).abs() <= 0.0041 * exact.abs() + 1e-3 * exact.abs().max()).all()


def test_only_bfloat16_on_cpu_takes_the_kernels():
    kernels(tiny_llama().bfloat16())
    net = tiny_llama()
    assert cpu.kernels(net.model.embed_tokens.weight, net.config) is None
    assert cpu.kernels(net.model.embed_tokens.weight.bfloat16().to("meta"), net.config) is None


# ---- scoring and training

def some_batch(vocab=97, lengths=(1, 150, 33, 64, 2, 97)):
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, vocab, (n + 1,), generator=g).tolist() for n in lengths]
    return ppo.pad(rows, torch.long), ppo.pad([[False] + [True] * n for n in lengths], torch.bool)


def scores_and_gradients(net, tokens, mask, bonus=0.0):
    net.zero_grad()
    logprob, entropy = net.logprobs(tokens, mask, 0.7)
    ((logprob * torch.linspace(-1, 1, logprob.numel()).view(logprob.shape)).sum() + bonus * entropy.sum()).backward()
    return logprob.detach(), entropy.detach(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("recompute, bonus", [(False, 0.5), (True, 0.0)])
@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_scores_and_gradients_are_as_near_to_float32_as_the_plain_ones(config, recompute, bonus, monkeypatch):
    kernels(tiny_llama(**config).bfloat16())
    monkeypatch.setattr(cpu, "VOCABULARY", 40)  # several pieces
    net, (tokens, mask) = tiny_llama(**config), some_batch()
    for name, p in net.named_parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1
    net.model.recompute = recompute
    exact = scores_and_gradients(net, tokens, mask, bonus)
    net.model.dtype = torch.bfloat16  # of float32 masters
    plain = scores_and_gradients(net, tokens, mask, bonus)
    fast = scores_and_gradients(cpu.accelerate(net), tokens, mask, bonus)
    rms = lambda x: x.double().pow(2).mean().sqrt()
    for i in (0, 1):
        assert 0 < rms(fast[i] - exact[i]) < 1.2 * rms(plain[i] - exact[i]) < 0.1 * rms(exact[i])
    off = {name: [rms(x[2][name] - exact[2][name]) / rms(exact[2][name]) for x in (fast, plain)] for name in exact[2]}
    assert all(g.dtype == torch.float32 for g in fast[2].values())
    assert all(ours < 0.1 for ours, _ in off.values()), off
    assert sum(ours for ours, _ in off.values()) < 1.3 * sum(theirs for _, theirs in off.values())


def attention_in_float64(qkv, K, G, d, cos, sin, lengths):
    """A query at a time."""
    heads, out = qkv[0].unflatten(1, (-1, d)), []
    c, s = cos[0, 0, :, None], sin[0, 0, :, None]
    q, k = (M.rotate(x, c, s) for x in (heads[:, : K * G], heads[:, K * G : K * G + K]))
    v, start = heads[:, K * G + K:], 0
    for n in lengths.tolist():
        for i in range(start, start + n):
            out.append(torch.cat([torch.softmax(k[start : i + 1, h // G] @ q[i, h] / d**0.5, 0) @ v[start : i + 1, h // G] for h in range(K * G)]))
        start += n
    return torch.stack(out)[None]


@pytest.mark.parametrize("how", ["tiles", "vectors", "loops"])
@pytest.mark.parametrize("K, G, d", [(2, 3, 16), (1, 2, 64), (2, 1, 40)])
def test_attention_and_its_gradient_equal_float64(K, G, d, how, monkeypatch):
    lengths = torch.tensor([1, 32, 33, 90, 31])
    kernels(tiny_llama().bfloat16())
    if how == "loops":  # compiled as for a processor that has neither
        cpu.compiled.cache_clear()
        if platform.machine() == "x86_64":
            monkeypatch.setenv("CC", "cc -mno-avx512bf16 -mno-amx-bf16")
    library = cpu.compiled(d, G)
    if library.use_tiles(how == "tiles") != (how == "tiles"):
        pytest.skip("this processor has no matrix unit")
    try:
        N = int(lengths.sum())
        angle = torch.rand(1, 1, N, d // 2, generator=torch.Generator().manual_seed(1)) * 6
        cos, sin, grad = angle.cos().bfloat16(), angle.sin().bfloat16(), randn(1, N, K * G * d, seed=2)
        qkv = randn(1, N, (G + 2) * K * d).requires_grad_()
        exact = qkv.detach().double().requires_grad_()
        y, expected = cpu.AttentionFunction.apply(library, qkv, K, G, d, cos, sin, lengths), attention_in_float64(exact, K, G, d, cos.double(), sin.double(), lengths)
        y.backward(grad), expected.backward(grad.double())
        for ours, theirs in ((y, expected), (qkv.grad, exact.grad)):
            assert (ours.double() - theirs).abs().max() < 0.02 * theirs.abs().max()
            assert (ours.double() - theirs).pow(2).mean() < 5e-5 * theirs.pow(2).mean()

        # what else lies end to end with a sequence changes no bit of it, not even a NaN
        other, mine = qkv.detach().clone(), slice(33, 66)
        other[:, :33], other[:, 66:] = randn(1, 33, other.shape[2], seed=5) * 9, math.nan
        other.requires_grad_()
        z = cpu.AttentionFunction.apply(library, other, K, G, d, cos, sin, lengths)
        z.backward(grad)
        assert torch.equal(z[:, mine], y[:, mine]) and torch.equal(other.grad[:, mine], qkv.grad[:, mine]) and not torch.equal(z[:, :33], y[:, :33])
    finally:
        library.use_tiles(True)
        if how == "loops":
            cpu.compiled.cache_clear()


def test_attention_of_keys_far_apart_is_exact():
    """Scores of some hundreds: a softmax that is one for one key, and no overflow."""
    library, lengths = kernels(tiny_llama(num_attention_heads=1, num_key_value_heads=1, head_dim=32).bfloat16()), torch.tensor([40])
    qkv, still = torch.zeros(1, 40, 3, 32).bfloat16(), torch.ones(1, 1, 40, 16).bfloat16()
    qkv[0, :, 0, 0], qkv[0, :, 1, 0], qkv[0, :, 2] = 1000, torch.linspace(-40, 0, 40), randn(40, 32)
    qkv[0, 7, 1, 0] = 60
    y = cpu.AttentionFunction.apply(library, qkv.flatten(2), 1, 1, 32, still, still * 0, lengths)
    assert torch.equal(y[0], torch.cat([qkv[0, :7, 2], qkv[0, 7:8, 2].expand(33, -1)]))


@pytest.mark.parametrize("rows, cols", [(1, 1), (32, 64), (70, 33), (5, 100)])
def test_turning_and_adding_gradients_is_exact(rows, cols):
    library, x, held = kernels(tiny_llama().bfloat16()), randn(rows, cols), randn(cols, rows).float()
    assert torch.equal(cpu.turned(library, x), x.t())
    sums = held.clone()
    library.add_turned(rows, cols, 0, cols, x, sums)
    assert torch.equal(sums, held + x.t().float())
    first, width = cols // 3, cols - cols // 3 - cols // 5
    part = held[:width].clone()
    library.add_turned(rows, cols, first, width, x, part)
    assert torch.equal(part, held[:width] + x[:, first : first + width].t().float())
    sums = held.clone()
    library.add(x.numel(), x.t().contiguous(), sums)
    assert torch.equal(sums, held + x.t().float())


def test_gradients_of_masters_add_up_and_frozen_ones_get_none():
    net, (tokens, mask) = cpu.accelerate(tiny_llama()), some_batch()
    kernels(tiny_llama().bfloat16())
    net.model.dtype = torch.bfloat16
    once = {name: g.clone() for name, g in scores_and_gradients(net, tokens, mask)[2].items()}
    run = lambda: net.logprobs(tokens, mask, 0.7)[0]
    (run() * torch.linspace(-1, 1, mask.numel()).view(mask.shape)).sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name
    net.zero_grad()
    frozen = net.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    run().sum().backward()
    assert frozen.grad is None and all(p.grad is not None for p in net.parameters() if p is not frozen)


def test_norm_and_its_gradient_equal_float64():
    library = kernels(tiny_llama().bfloat16())
    for n, size, scale in ((5, 32, 1.0), (129, 77, 1e-3), (64, 576, 100.0)):
        x, weight, grad, around = (randn(1, n, size, seed=1) * scale).requires_grad_(), randn(size, seed=2).requires_grad_(), randn(1, n, size, seed=3), randn(1, n, size, seed=4)
        same, y = cpu.RMSNormFunction.apply(library, x, weight, 1e-5)
        exact_x, exact_weight = (p.detach().double().requires_grad_() for p in (x, weight))
        expected = F.rms_norm(exact_x, weight.shape, exact_weight, 1e-5)
        torch.autograd.backward([same, y], [around, grad]), torch.autograd.backward([exact_x * 1, expected], [around.double(), grad.double()])
        assert torch.equal(same, x) and ((y - expected).abs() <= 0.0041 * expected.abs()).all()
        assert close(x.grad, exact_x.grad) and close(weight.grad, exact_weight.grad)


def test_a_norms_gradient_has_the_same_bits_for_any_number_of_threads():
    library, threads, found = kernels(tiny_llama().bfloat16()), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            x, weight = randn(1, 201, 200).requires_grad_(), randn(200, seed=1).requires_grad_()
            cpu.RMSNormFunction.apply(library, x, weight, 1e-5)[1].backward(randn(1, 201, 200, seed=2))
            found.append(torch.cat([x.grad.flatten(), weight.grad]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_swiglu_and_its_gradient_equal_float64():
    library = kernels(tiny_llama().bfloat16())
    for size, scale in ((32, 1.0), (77, 1e-3), (45, 100.0)):
        x, grad = (randn(1, 5, 2 * size, seed=size) * scale).requires_grad_(), randn(1, 5, size)
        exact = x.detach().double().requires_grad_()
        gate, up = exact.chunk(2, -1)
        y, expected = cpu.SwiGLUFunction.apply(library, x), F.silu(gate) * up
        y.backward(grad), expected.backward(grad.double())
        assert ((y - expected).abs() <= 0.0041 * expected.abs() + 1e-30).all()
        assert close(x.grad, exact.grad)


@pytest.mark.parametrize("scale", [1, 30])
def test_log_probs_of_logits_equal_float64(scale):
    """By pieces of the vocabulary, of the last of which less than a whole one is left."""
    library = kernels(tiny_llama().bfloat16())
    for V, piece in ((7, 7), (97, 40), (5000, 1024)):
        logits, targets, grad = randn(4, V, seed=V) * scale, torch.tensor([0, V - 1, 3, 3]), torch.tensor([1.0, -2.0, 0.0, 0.5])
        exact = (logits.double() / 0.7).requires_grad_()
        p = torch.log_softmax(exact, -1)
        pieces = [(first, logits[:, first : first + piece].contiguous()) for first in range(0, V, piece)]
        found = []
        for with_entropy in (True, False):
            top, (sum, mean, logit) = torch.full((4,), -1e30), torch.zeros(3, 4)
            for first, x in pieces:
                library.token_logprob(*x.shape, first, 1 / 0.7, x, targets, top, sum, mean if with_entropy else None, logit)
            found.append((logit - top - sum.log(), sum.log() - mean / sum))
        expected = p[torch.arange(4), targets]
        (logprob, entropy), (without, _) = found
        assert torch.equal(logprob, without) and torch.allclose(logprob.double(), expected, atol=2e-5)
        assert torch.allclose(entropy.double(), -(p.exp() * p).sum(-1), atol=2e-5)
        (expected * grad).sum().backward(retain_graph=True)
        without = exact.grad.clone()
        (-(p.exp() * p).sum(-1) * grad.flip(0)).sum().backward()
        for grad_entropy, theirs in ((None, without / 0.7), (grad.flip(0).contiguous(), exact.grad / 0.7)):
            ours = [x.clone() for _, x in pieces]
            for (first, _), x in zip(pieces, ours):
                library.token_logprob_backward(*x.shape, first, 1 / 0.7, x, targets, top + sum.log(), grad, entropy, grad_entropy)
            assert ((torch.cat(ours, 1).double() - theirs).abs() <= 0.0041 * theirs.abs() + 1e-5).all()


def test_a_number_that_is_not_finite_is_never_lost():
    """One NaN or infinity in any weight: the log-probs are not finite, by the kernels as by the plain operations."""
    tokens, mask = some_batch()
    kernels(tiny_llama().bfloat16())
    for bad in (float("nan"), float("inf")):
        for name, _ in tiny_llama().named_parameters():
            net = cpu.accelerate(tiny_llama().bfloat16())
            weight = dict(net.named_parameters())[name].data
            weight.view(-1)[int(tokens[1, 5]) * weight.shape[-1] if "embed" in name else 0] = bad
            assert not net.logprobs(tokens, mask)[0].isfinite().all(), (name, bad)


def test_a_kernel_refuses_what_is_not_contiguous():
    library = kernels(tiny_llama().bfloat16())
    with pytest.raises(Exception, match="expected a contiguous one"):
        library.swiglu(4, 3, randn(6, 4).t(), randn(4, 3))


def test_one_process_rounds_its_masters_as_fsdp_does():
    """What FSDP hands a block, a layer takes by itself: the same log-probs, bit for bit, and gradients."""
    _, mesh = parallel.start()
    tokens, mask = some_batch()
    for config in (TINY, QWEN):
        nets = [cpu.accelerate(tiny_llama(**config)) for _ in range(2)]
        nets[0].model.dtype = torch.bfloat16
        parallel.shard(nets[1], mesh, torch.bfloat16)
        (alone, _, gradients), (sharded, _, others) = (scores_and_gradients(net, tokens, mask) for net in nets)
        assert torch.equal(alone, sharded)
        for name, g in gradients.items():  # FSDP adds the gradients of a token's places, and of a tied head, in bfloat16
            other = parallel.full(others[name])
            if "norm" in name:  # FSDP of PyTorch 2.15 leaves these in float32
                other = other.bfloat16().float()
            assert (g - other).abs().max() <= (0.01 if "embed" in name else 0) * g.abs().max(), name


def test_without_a_compiler_all_is_plain_and_says_so(monkeypatch, capsys):
    net, (tokens, mask) = tiny_llama().bfloat16(), some_batch()
    kernels(net)

    def run():
        responses = decode.generate(net, PROMPTS, 5, temperature=0, return_logprobs=True, decoder=cpu.CPUDecoder.of(net))
        return responses, net.logprobs(tokens, mask)[0].tolist()

    plain = decode.generate(net, PROMPTS, 5, temperature=0, return_logprobs=True), net.logprobs(tokens, mask)[0].tolist()
    cpu.accelerate(net)
    fast = run()
    assert fast[0][1] != plain[0][1] and fast[1] != plain[1]
    try:
        for compiler, words in (("no-such-compiler", "no-such-compiler"), ("false", "status 1")):
            cpu.compiled.cache_clear()
            monkeypatch.setenv("CC", compiler)
            capsys.readouterr()
            assert run() == run() == plain
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("cpu.c: not compiled") and words in lines[0]
    finally:
        cpu.compiled.cache_clear()


@pytest.mark.parametrize("compiler, said", [("cc '", "No closing quotation"), ("{script}", "caf\ufffd \\x1b[2J is not allowed")])
def test_a_compiler_with_a_stray_quote_or_words_of_another_encoding_is_one_line(tmp_path, monkeypatch, capsys, compiler, said):
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\nprintf 'caf\\351 \\033[2J is not allowed\\nmore' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", compiler.format(script=script))
    assert cpu.compiled.__wrapped__(16, 2) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"cpu.c: not compiled ({said}")


def test_loading_the_kernels_leaves_the_processes_floats_alone():
    """A library linked with -ffast-math would make zeros of the smallest numbers, everywhere."""
    kernels(tiny_llama().bfloat16())
    assert float(torch.tensor([1e-40]) * 0.5) > 0 and float(torch.tensor([1e-40] * 100_000).sum()) > 0


# ---- a decode step

@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_the_cpu_decoder_is_as_near_to_float32_as_the_plain_step(config):
    net = tiny_llama(**config).bfloat16()
    kernels(net)
    for seed in (1, 2):  # the second time with other weights in the same tensors
        g = torch.Generator().manual_seed(seed)
        for name, p in net.named_parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.2 + ("norm" in name))
        exact = M.Llama(net.config)
        exact.load_state_dict(net.state_dict())
        for n in (1, 3, 40):
            lengths, tokens = torch.randint(1, 290, (n,), generator=g), torch.randint(0, 97, (n, 290), generator=g)
            lengths[0] = 129  # the first of a block
            last = lengths - 1
            counts = tuple(int((last >= j * 128).nonzero().max()) + 1 for j in range(-(-int(lengths.max()) // 128)))
            logits = []
            with torch.inference_mode():
                for step in (net, cpu.CPUDecoder.of(net)):
                    cache = decode.KVCache(net.config, n, 290, torch.bfloat16, "cpu")
                    net.prefill(tokens[:, :-1], cache, 0, 0)  # what lies at and after the last one's position is not its own
                    logits.append(step.decode(tokens[torch.arange(n), last], last, cache, counts).float())
                expected = torch.stack([exact(row[None, :length])[0, -1] for row, length in zip(tokens, lengths)])
            plain, fast = ((x - expected).pow(2).mean().sqrt() for x in logits)
            assert fast < 1.2 * plain < 0.1 * expected.std(), (seed, n)


def test_attention_of_the_kernels_equals_a_softmax_in_float64():
    """At both ends of blocks, also where one score is far above all others and where all are far below zero."""
    net = tiny_llama(num_attention_heads=6, num_key_value_heads=2, head_dim=40).bfloat16()
    library, g = kernels(net), torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 127, 128, 129, 256, 257, 300])
    n, H, K, d = len(lengths), 6, 2, 40
    cache = decode.KVCache(net.config, n + 1, 300, torch.bfloat16, "cpu")
    for scale in (1, 30):
        cache.k.normal_(generator=g).mul_(scale), cache.v.normal_(generator=g)
        k, v, before = cache.k[1], cache.v[1], cache.v.clone()
        qkv = torch.randn(n, H + 2 * K, d, generator=g).bfloat16()
        cos, sin = (x[:, 0, 0].contiguous() for x in net.model.rotation(lengths[:, None] - 1, torch.bfloat16))
        out, positions = torch.empty(n, H, d, dtype=torch.bfloat16), lengths - 1
        library.decode_attention(n, K, qkv, cos, sin, positions, k, v, cache.k.stride(1), out)
        turned = M.rotate(qkv[:, :, None].double(), cos[:, None, None].double(), sin[:, None, None].double())[:, :, 0]
        for r, length in enumerate(lengths.tolist()):
            for h in range(H):
                keys, values = (x[:, r, h // 3].reshape(-1, d)[:length].double() for x in (k, v))
                assert (keys[-1] - turned[r, H + h // 3]).abs().max() < 0.004 * turned.abs().max()
                assert torch.equal(values[-1], qkv[r, H + K + h // 3].double())
                p = torch.softmax(keys @ turned[r, h].bfloat16().double() / d**0.5, 0)
                assert (out[r, h] - p @ values).abs().max() < 0.004 * values.abs().max(), (scale, r, h)
                before[1, (length - 1) // 128, r, h // 3, (length - 1) % 128] = values[-1]
        assert torch.equal(cache.v, before)  # one position a row was written, in one layer


def test_tokens_sampled_by_the_kernel_are_those_of_the_definition():
    """The cumulative sum in float64, but for a u within rounding of a token's border; and never a token without a probability."""
    net = tiny_llama().bfloat16()
    kernels(net)
    decoder, u = cpu.CPUDecoder.of(net), decode.uniforms(0, 0, 2000)
    for V, scale in ((5, 1), (256, 2), (257, 1), (49152, 3), (3000, 40)):
        logits = randn(20, V, seed=V).repeat(100, 1) * scale
        logits[:, V // 2] = -math.inf
        token, logprob = decoder.sample(logits, 0.7, u)
        p = torch.softmax(logits.double() / 0.7, -1)
        cdf = p.cumsum(-1)
        above, below = (x.gather(1, token[:, None])[:, 0] for x in (cdf, cdf - p))
        assert ((below <= u + 1e-5) & (u - 1e-5 <= above)).all(), V
        assert (token == (cdf <= u[:, None].double()).sum(-1)).float().mean() > 0.99, V
        assert torch.allclose(logprob.double(), p.gather(1, token[:, None])[:, 0].log(), atol=2e-5)
    logits = torch.full((3, 600), -math.inf).bfloat16()
    logits[:, 300], logits[:, 301], logits[:, 7] = 2.0, 1.0, -200.0
    assert decoder.sample(logits, 1.0, torch.tensor([0.0, 0.5, 0.99999994]))[0].tolist() == [300, 300, 301]
