"""Checks to run on a GPU: python -m tests.gpu [--model FOLDER] [check ...]

They take about ten minutes on one card and need no network. Each check prints PASS or FAIL with its figures, and a failure does
not stop the others; the exit status is 1 if one failed. Without a GPU this is a dry run of the same code at toy size, which CI
makes. docs/gpus.md says what only a GPU can show, and what has run where.

    environment   card, attention backends, what varlen_attn does here, the matrix peak
    forward       logits and packed log-probs against transformers (or float32 on the CPU)
    sampling      tokens equal to the CPU's in float32; log-probs of the bfloat16 sampler against the scorer
    pages         four rollouts, weights freed and refreshed between: the same tokens, no memory lost; pages that run out
    ppo           two steps on CPU and GPU; first ratio in bfloat16
    resume        a run stopped and resumed equals the unbroken one
    offload       FSDP on one card with --offload
    kernels       kernels of a decode step per layer, by blocks and by pages (counted, not run)
    decode        speed at 8B shape, rows x contexts, beside the limit of reading weights and keys
    rollout       64 responses of up to 2,048 tokens at 8B shape
    update        16,384 tokens in 8 layers of 8B: share of the peak, memory beside the plan
    cards         with two cards or more: FSDP, HSDP and the tensor sampler against one card
    peers         the same prompts through vLLM or transformers, where installed (needs --model)
"""
import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import bench  # noqa: E402
import model as M  # noqa: E402
from lib import decode, guards, hf, logs, paged, parallel, plan, varlen  # noqa: E402
import ppo  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LLAMA = dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5)
SHAPE = LLAMA if CUDA else LLAMA | dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)


def folder(args, name, **changes):
    """A model folder with random weights, of the tiny model's size on a GPU and smaller in a dry run."""
    toy = {} if CUDA else dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, head_dim=16)
    path = args.tmp / name
    return path if path.is_dir() else bench.random_folder(path, **toy | changes)


def say(text):
    print(f"    {text}", flush=True)


def expect(name, found, limit):
    say(f"{name}: {found:.3g}, expected at most {limit:g}")
    assert found <= limit, name  # NaN is no more at most than 2 is


def wait():
    if CUDA:
        torch.cuda.synchronize()


def timed(function):
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def random_model(cls, dtype, **changes):
    config = M.Config.from_dict(SHAPE | changes)
    with torch.device("meta"):
        net = cls(config).to(dtype)
    net.to_empty(device=DEVICE)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(0, 0.5 * config.hidden_size**-0.5)
    if CUDA:
        varlen.accelerate(net, torch.bfloat16, DEVICE)
    return net


def environment(args):
    say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {parallel.memory()[2]}")
    peak = logs.matrix_peak(DEVICE, torch.bfloat16 if CUDA else torch.float32)
    say(f"matrix products: {peak:.3g} FLOP/s")
    if CUDA:
        q, k = (torch.randn(1, heads, 777, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (32, 8))
        chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True)
        say(f"scaled_dot_product_attention takes backend {chosen} (1 flash, 2 efficient, 3 cuDNN)")
        say(f"varlen_attn: packs {varlen.packs(torch.bfloat16, DEVICE, (32, 8), 128)}, "
            f"reads pages {varlen.reads_pages(torch.bfloat16, DEVICE, (32, 8), 128, paged.PAGE)}")


def forward(args):
    path = folder(args, "forward", vocab_size=1024)
    ours = hf.load(path, M.Llama, torch.float32, DEVICE)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (2, 300), generator=g)
    try:
        from transformers import AutoModelForCausalLM
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        exact = lambda: theirs(tokens).logits
    except ImportError:
        say("transformers is not installed: compared with float32 on the CPU")
        exact = lambda: hf.load(path, M.Llama, torch.float32)(tokens)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[0, 50:] = True
    mask[1, 7:200] = True
    with torch.no_grad():
        wanted = exact()
        found = ours(tokens.to(DEVICE)).cpu()
        half = hf.load(path, M.Llama, torch.bfloat16, DEVICE)
        low = half(tokens.to(DEVICE)).cpu()
        scores = torch.log_softmax(wanted[:, :-1] / 0.7, -1).gather(-1, tokens[:, 1:, None])[..., 0]
        for net, name, limit in ((ours, "float32", 1e-3), (half, "bfloat16", 0.3)):
            packed = net.logprobs(tokens.to(DEVICE), mask.to(DEVICE), 0.7)[0].cpu()
            expect(f"{name} packed log-probs, largest difference", float((packed[:, 1:] - scores)[mask[:, 1:]].abs().max()), limit)
    expect("float32 logits, largest difference", float((wanted - found).abs().max()), 1e-3)
    expect("bfloat16 logits, mean difference", float((wanted - low).abs().mean()), 0.05)


def sampling(args):
    path = folder(args, "small")
    count = 40 if CUDA else 12
    prompts = [[1 + (i * 7 + j) % 20 for j in range(3 + i % 9)] for i in range(count)]
    ask = dict(max_new_tokens=150 if CUDA else 20, eos_ids=(3,), return_logprobs=True)

    def run(device, dtype=torch.float32, **more):
        return decode.generate(hf.load(path, M.Llama, dtype, device), prompts, **ask, **more)

    (a, x), (b, y), (c, _) = run("cpu", slots=16), run(DEVICE, slots=16), run(DEVICE, slots=37, look=1)
    same = sum(p == q for p, q in zip(a, b))
    say(f"{same} of {count} responses the same on CPU and here, {sum(p == q for p, q in zip(b, c))} with other slots")
    assert min(same, sum(p == q for p, q in zip(b, c))) >= count - 2  # a draw at a boundary may fall the other way
    expect("their log-probs, largest difference",
           max(abs(s - t) for p, q, u, v in zip(a, b, x, y) if p == q for s, t in zip(u, v)), 1e-3)
    if CUDA:
        net = hf.load(path, M.Llama, torch.bfloat16, DEVICE)
        out, sampled = decode.generate(net, prompts, **ask)
        rows = [p + r for p, r in zip(prompts, out)]
        mask = ppo.pad([[False] * len(p) + [True] * len(r) for p, r in zip(prompts, out)], torch.bool)
        with torch.no_grad():
            scored = net.logprobs(ppo.pad(rows, torch.long).to(DEVICE), mask.to(DEVICE))[0].cpu()[mask]
        expect("bfloat16: sampler against scorer, mean, nats", float((scored - torch.tensor(sum(sampled, []))).abs().mean()), 0.05)


def pages(args):
    path = folder(args, "small")
    net, source = (hf.load(path, M.Llama, torch.float32, DEVICE) for _ in range(2))
    outs = []
    used = []
    for _ in range(4):
        outs.append(decode.generate(net, [[1, 2, 3]] * (32 if CUDA else 4), 300 if CUDA else 10, 1.0, (), slots=32))
        gc.collect()
        if CUDA:
            wait()
            used.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
        parallel.free_weights(net)
        parallel.copy_weights(source, net)  # new addresses: no graph may hold the old ones
    assert all(out == outs[0] for out in outs)
    if CUDA:
        expect("memory kept from the second to the fourth rollout, bytes", used[3][0] - used[1][0], 1e6)
        expect("the same as the driver sees it", used[1][1] - used[3][1], 3e8)
    prompts = [[5 + i % 7] * (4 + i) for i in range(12)]
    long = 600 if CUDA else 10
    small = paged.PagedCache(net.config, 12, 20 + long, 2 + paged.PagedCache.blocks(20 + long), torch.float32, DEVICE)
    expected = decode.generate(net, prompts, long, 1.0, ())
    found = decode.generate(net, prompts, long, 1.0, (), cache=small)
    same = sum(a == b for a, b in zip(expected, found))
    say(f"with {small.k.shape[1] - 1} pages for 12 sequences: {same} of 12 responses the same")
    assert same >= 11


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trainer(args, name, device=None, **settings):
    """A trainer of a small random model on the tiny problems."""
    run = args.tmp / name
    run.mkdir(exist_ok=True)
    problems = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").read_text().splitlines()[:20]]
    settings = dict(steps=3 if CUDA else 2, rollout_batch=8, train_batch=4, max_response=40 if CUDA else 10, slots=8, freeze_steps=1, lr=1e-3,
                    critic_lr=1e-3, micro_tokens=400, exploration="length", length_scale=8.0, warmup=0.0, save_every=1,
                    adam_eps=1e-5, dtype="float32", temperature=0.7) | settings
    return bench.bench_trainer(folder(args, "small"), run, problems, device=device, **settings)


def trained(args, name, device=None, **settings):
    """The metrics of a run. The first check that asks for them makes the run."""
    if not (args.tmp / name / "metrics.jsonl").is_file():
        trainer(args, name, device, **settings).train()
    return metrics(args.tmp / name)


def compare(a, b, share, names=("value_loss", "critic_grad_norm", "policy_grad_norm")):
    for x, y in zip(a, b):
        for key in names:
            if key in x:
                expect(f"step {x['step']} {key} {x[key]:.6g} and {y[key]:.6g}, difference", abs(x[key] - y[key]),
                       share * abs(x[key]) + 1e-4)


def ppo_steps(args):
    compare(trained(args, "cpu", torch.device("cpu"))[:2], trained(args, "here")[:2], 0.02)  # later a draw may fall otherwise
    if CUDA:
        for row in trained(args, "half", dtype="bfloat16"):
            say(f"bfloat16 step {row['step']}: " + ", ".join(f"{k} {row[k]:.3g}" for k in (
                "first_ratio_error", "sampler_logprob_diff", "value_loss", "policy_grad_norm") if k in row))


def resume(args):
    whole = trained(args, "here")
    first = trainer(args, "halves")
    found, samples, batch = first.train_step()
    logs.log_step(first, found, samples, batch)
    first.save()
    second = trainer(args, "halves")
    second.resume()
    second.train()
    compare(whole, metrics(args.tmp / "halves"), 1e-3)


def offload(args):
    if CUDA:
        kept, offloaded = trained(args, "half", dtype="bfloat16"), trained(args, "offloaded", dtype="bfloat16", offload=True)
    else:
        kept, offloaded = trained(args, "here"), trained(args, "offloaded", offload=True)
    compare(kept[:2], offloaded[:2], 0.05)


class Kernels(TorchDispatchMode):
    """Notes the names of operations that would be kernels: those that are no views. Under inference mode an
    operation that consists of others, such as aten::item, comes whole."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, arguments=(), named=None):
        if not func.is_view:
            self.names.append(func.name())
        return func(*arguments, **(named or {}))


def kernels_of(make_cache, context, rows=64):
    """Kernels of a decode step at 8B shape on the meta device."""
    config = M.Config.from_dict(LLAMA)
    with torch.device("meta"):
        net = M.Llama(config).to(torch.bfloat16)
        cache = make_cache(config, rows)
        decoder = decode.Decoder(net)
        tokens = torch.ones(rows, dtype=torch.long)
        positions = torch.full((rows,), context)
        with torch.inference_mode(), Kernels() as kernels:
            decoder.decode(tokens, positions, cache, (rows,) * cache.blocks(context + 1))
    return len(kernels.names)


def kernels(args):
    def blocks(config, rows):
        return decode.KVCache(config, rows, 6200, torch.bfloat16, "meta")

    def with_pages(config, rows):
        cache = paged.PagedCache(config, rows, 6200, 100, torch.bfloat16, "meta")
        cache.one_call = "block_table" in varlen.KNOWN  # without it pages are gathered
        return cache

    for context in (1000, 6000):
        for name, cache in (("blocks", blocks), ("pages", with_pages)):
            count = kernels_of(cache, context)
            say(f"context {context}, {name}: {count} kernels per token, {count / 32:.1f} per layer")
    c = M.Config.from_dict(LLAMA)
    for rows, longest, mean in ((64, 4246, 1370),):
        page = paged.PagedCache.pages(c, 1, 1, torch.bfloat16, 0)[1]
        row = decode.KVCache.rows(c, 1, longest, torch.bfloat16, 0)[1]
        held = page * (mean / paged.PAGE + 0.5)
        say(f"8B, at most {longest} positions, {mean} on average: {row / 1e9:.2f} GB per sequence by rows, {held / 1e9:.2f} GB by pages; "
            f"in 24 GB {int(24e9 / row)} and {int(24e9 / held)} sequences")


def decode_speed(args):
    net = random_model(M.Llama, torch.bfloat16).requires_grad_(False)
    c = net.config
    read = sum(p.nbytes for name, p in net.named_parameters() if "embed" not in name)
    for rows in (8, 32, 64) if CUDA else (2,):
        for context in (128, 1024, 2048, 4096) if CUDA else (64,):
            cache = decode.new_cache(c, rows, context + 128, torch.bfloat16, DEVICE, 0)
            prompts = [[5] * (context - 60)] * rows
            first, second = (8, 72) if CUDA else (4, 8)
            decode.generate(net, prompts, 2, 1.0, (), slots=rows, cache=cache)
            short, long = (timed(lambda: decode.generate(net, prompts, n, 1.0, (), slots=rows, cache=cache)) for n in (first, second))
            seconds = (long - short) / (second - first)
            keys = rows * context * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
            say(f"{rows} rows, context {context}: {1e3 * seconds:.2f} ms per token, {rows / seconds:.0f} tokens/s; reading "
                f"weights and keys at 3.35 TB/s takes {(read + keys) / 3.35e9:.2f} ms")


def rollout(args):
    net = random_model(M.Llama, torch.bfloat16).requires_grad_(False)
    longest = 2048 if CUDA else 40
    cache = decode.new_cache(net.config, 64, 150 + longest, torch.bfloat16, DEVICE, 24.0)
    eos = tuple(range(0, net.config.vocab_size, 700))  # a random model ends after 700 tokens on average
    prompts = [[7 + i] * (150 if CUDA else 9) for i in range(64 if CUDA else 4)]
    stats = {}
    out = []
    seconds = timed(lambda: out.extend(decode.generate(net, prompts, longest, 1.0, eos, cache=cache, stats=stats)))
    tokens = sum(map(len, out))
    say(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s, longest {max(map(len, out))}, "
        + ", ".join(f"{k} {v:.3g}" for k, v in stats.items()))


def update(args):
    net = random_model(M.Llama, torch.float32, num_hidden_layers=8 if CUDA else 2)
    net.model.dtype = torch.bfloat16
    net.model.recompute = True
    adam = torch.optim.Adam(net.parameters(), lr=1e-7, fused=True)
    g = torch.Generator().manual_seed(1)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    total, low, high = (16384, 200, 2500) if CUDA else (120, 20, 40)
    for _ in range(3):  # new lengths each time, as every micro-batch has
        lengths = []
        while sum(lengths) < total:
            lengths.append(min(int(torch.randint(low, high, (), generator=g)), total - sum(lengths) + 2))
        tokens = torch.randint(500, (len(lengths), max(lengths)), device=DEVICE)
        mask = torch.zeros(tokens.shape, dtype=torch.bool, device=DEVICE)
        for i, n in enumerate(lengths):
            mask[i, min(150, n - 1) : n] = True

        def step():
            net.logprobs(tokens, mask, 0.7, entropy=False)[0].sum().backward()
            guards.clip_gradients(net, 1.0)
            adam.step()
            adam.zero_grad()

        seconds = timed(step)
        done = logs.flops(net.config, lengths, int(mask.sum()))
        share = done / seconds / logs.matrix_peak(DEVICE, torch.bfloat16 if CUDA else torch.float32)
        say(f"{len(lengths)} sequences: {seconds:.2f} s, {sum(lengths) / seconds:.0f} tokens/s, {share:.0%} of the peak, "
            "what is computed again not counted")
    if CUDA:
        c = ppo.PPOConfig(advantage="group", max_prompt=150, max_response=2350, train_batch=64)
        kept, active = plan.backward(net.config, c, 1, total, plan.shapes(net.config))
        planned = 16 * plan.elements(plan.shapes(net.config)) + kept + active
        say(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, planned {planned / 1e9:.1f} GB")


def cards(args):
    if torch.cuda.device_count() < 2:
        say("one card or none: not run (tests/test_distributed.py compares the same on CPU)")
        return
    path = folder(args, "small")
    ways = {"one": (1, []), "fsdp": (2, []), "tensor": (2, ["sampler=tensor"])}
    if torch.cuda.device_count() >= 4:
        ways["hsdp"] = (4, ["shard_ranks=2"])
    found = {}
    for name, (n, words) in ways.items():
        out = args.tmp / f"cards-{name}"
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                   str(ROOT / "tests/distributed.py"), str(path), str(out), str(ROOT / "data/tiny/train.jsonl"), *words]
        subprocess.run(command, check=True, timeout=600)
        found[name] = [json.loads((out / "first.json").read_text())]
        if name != "one":
            say(f"{name}, {n} cards, against one:")
            compare(found["one"], found[name], 0.02)


def peers(args):
    if not args.model or not CUDA:
        say("no --model or no GPU: not run")
        return
    for name in ("transformers", "vllm"):  # one after the other: not all of them fit on one card
        if subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0:
            command = [sys.executable, "-m", "tests.tools.bench", "rollout", "--model", args.model]
            command += ["--peer", name, "--vllm-python", sys.executable]
            say(" ".join(command[1:]))
            subprocess.run(command, check=True, cwd=ROOT, timeout=900)


CHECKS = dict(environment=environment, forward=forward, sampling=sampling, pages=pages, ppo=ppo_steps, resume=resume, offload=offload,
              kernels=kernels, decode=decode_speed, rollout=rollout, update=update, cards=cards, peers=peers)


def main(words=None):
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face model folder, for the checks that compare with peers")
    parser.add_argument("check", nargs="*", help="names of the checks to run (default: all)")
    args = parser.parse_args(words)
    unknown = set(args.check) - set(CHECKS)
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}, expected some of {', '.join(CHECKS)}")
    if not CUDA:
        print("no GPU: a dry run at toy size, which proves nothing about GPUs")
    parallel.keep_freed_memory()
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        args.tmp = Path(tmp)
        for name in args.check or CHECKS:
            started = time.perf_counter()
            try:
                CHECKS[name](args)
                word = "PASS"
            except Exception:  # whatever it is, it is shown, and the other checks say more
                traceback.print_exc()
                failed.append(name)
                word = "FAIL"
            print(f"{word} {name} ({time.perf_counter() - started:.0f} s)", flush=True)
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
