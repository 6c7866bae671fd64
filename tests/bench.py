"""Benchmarks: whole tables, ours beside peers measured in the same run. Not timed tests.

    python -m tests.bench verifier [--cases FILE] [--hostile FILE] [--rounds N]      rewards.verify, and Math-Verify where it is installed    python -m tests.bench rollout --model FOLDER [--peer transformers] [--peer vllm --vllm-python PYTHON]            generate

A case is {"gold", "pred", "kind": "answer" or "response", "equal": true or false, "soft": a careful grader may decline}.
Without --cases the pairs of tests/test_rewards.py are used.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import answers  # noqa: E402
import rewards  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "verifier"

def beside(name):
    return str(SHARED / name) if (SHARED / name).is_file() else None


def own_cases():
    import test_rewards as t
    pairs = [(*line.split(" ~ "), equal) for text, equal in ((t.EQUAL, True), (t.DIFFERENT, False)) for line in text.strip().splitlines()]
    return [dict(gold=gold, pred=pred, kind="answer", equal=equal) for pred, gold, equal in pairs]

def graders():
    """{name: function(response, gold) -> bool}; a peer that is not installed is left out, with a word on it."""
    found = {"rewards.py": lambda response, gold: rewards.verify(response, gold, boxed_only=False)}
    try:
        import math_verify
    except ImportError:
        print("math-verify is not installed (pip install math-verify): measured without it")
        return found
    found["Math-Verify"] = lambda response, gold: bool(math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(response)))
    return found

def verifier(args):
    cases = [json.loads(line) for line in open(args.cases)] if args.cases else own_cases()
    core = [not case.get("soft") for case in cases]
    texts = [case["pred"] if case["kind"] == "response" else f"The final answer is $\\boxed{{{case['pred']}}}$." for case in cases]
    functions = graders()
    seconds, verdicts = {name: [] for name in functions}, {}
    for _ in range(args.rounds):                          # interleaved: what disturbs one disturbs the other
        for name, function in functions.items():
            answers.parse.cache_clear()
            took, said = [], []
            for text, case in zip(texts, cases):
                start = time.perf_counter()
                said.append(function(text, case["gold"]))
                took.append(time.perf_counter() - start)
            seconds[name].append(took)
            verdicts[name] = said
    print(f"{len(cases)} cases, {sum(core)} of them core; times: median of {args.rounds} interleaved rounds, ms a case")
    print(f"{'':12} {'core %':>7} {'FP':>4} {'FN':>4} {'all %':>7} {'mean':>9} {'p95':>9} {'worst':>9} {'slower than ours':>17}")
    mean = {name: statistics.median(statistics.mean(took) for took in rounds) for name, rounds in seconds.items()}
    for name, said in verdicts.items():
        right = [s == case["equal"] for s, case in zip(said, cases)]
        wrong = [(s, c) for s, c, r in zip(said, core, right) if c and not r]
        p95, worst = (statistics.median(sorted(took)[int(share * (len(took) - 1))] for took in seconds[name]) for share in (0.95, 1))
        print(f"{name:12} {100 * sum(r for r, c in zip(right, core) if c) / sum(core):7.2f} {sum(s for s, _ in wrong):4} "
              f"{sum(not s for s, _ in wrong):4} {100 * statistics.mean(right):7.2f} {1e3 * mean[name]:9.3f} {1e3 * p95:9.3f} {1e3 * worst:9.1f} "
              f"{mean[name] / mean['rewards.py']:16.0f}x")

    if args.hostile:
        built = lambda value: value if isinstance(value, str) else "".join(piece * times for piece, times in value)
        took = []
        for case in map(json.loads, open(args.hostile)):
            answers.parse.cache_clear()
            start = time.perf_counter()
            rewards.verify(built(case["pred"]), built(case["gold"]), boxed_only=False)
            took.append(time.perf_counter() - start)
        print(f"{len(took)} hostile inputs, rewards.py: mean {1e3 * statistics.mean(took):.2f} ms, worst {1e3 * max(took):.1f} ms")


def best(function, rounds=7):
    """Least seconds of a call: what the machine can do, for limits."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def machine():
    """{bfloat16, float32: FLOP/s of a large matrix product; memory: bytes/s read and written by a copy}, as measured now."""
    import torch
    found, n = {}, 2048
    for dtype in torch.bfloat16, torch.float32:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * n**3 / best(lambda: a @ b)
    x = torch.zeros(2**26)
    y = torch.zeros_like(x)
    found["memory"] = 2 * x.nbytes / best(lambda: y.copy_(x))
    print(f"machine: {torch.get_num_threads()} threads; matrix product {found['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16, "
          f"{found['float32'] / 1e9:.0f} in float32; copy {found['memory'] / 1e9:.1f} GB/s")
    return found


def linear_seconds(net, n):
    """Seconds of the linear layers alone, each with its own weights, for n rows: the limit of a decode step."""
    import torch
    with torch.inference_mode():
        weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Linear)]
        weights += [net.model.embed_tokens.weight] if net.config.tie_word_embeddings else []
        inputs = [torch.randn(n, w.shape[1]).to(w.dtype) for w in weights]
        return best(lambda: [torch.nn.functional.linear(x, w) for x, w in zip(inputs, weights)], 5)


def rollout_prompts(tokenizer, count):
    import model as M
    file = SHARED.parent / "gsm8k" / "test.jsonl"
    if file.is_file():
        texts = [json.loads(line)["question"] for line in open(file)][:count]
    else:
        texts = [f"A farmer has {7 * i + 3} hens and sells {i + 2} of them" + f", then buys {i % 9 + 1} more" * (i % 7) + ". How many has he now?"
                 for i in range(count)]
    return [M.chat_prompt(tokenizer, text) for text in texts]


def rollout(args):
    """generate beside peers, then a decode step from 1 to 128 rows beside its limit."""
    import torch
    from tokenizers import Tokenizer

    import model as M
    root = Path(__file__).resolve().parents[1]
    folder = root / "data" / "tiny" / "model" if args.toy else Path(args.model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    net = M.load_model(M.Llama, folder, torch.bfloat16, init_seed=0 if args.toy else None).eval()
    prompts, max_new = rollout_prompts(tokenizer, 8 if args.toy else args.prompts), 8 if args.toy else args.max_new
    rounds, eos, stats = 1 if args.toy else args.rounds, M.eos_ids(folder, tokenizer), {}
    machine()
    if not args.toy:
        print(f"linear layers alone: {args.slots / linear_seconds(net, args.slots):.0f} tokens/s at {args.slots} rows")
    cache = M.KVCache(net.config, min(args.slots, len(prompts)), max(map(len, prompts)) + max_new, torch.bfloat16, "cpu")

    def ours(i):
        return sum(map(len, M.generate(net, prompts, max_new, 0.7, eos, seed=i, slots=args.slots, cache=cache, stats=stats)))

    runs = {"rlsp": ours}
    if "transformers" in args.peer:
        import transformers
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

        def peer(i, size=32):
            torch.manual_seed(i)
            useful = 0
            for a in range(0, len(prompts), size):
                batch = prompts[a : a + size]
                T = max(map(len, batch))
                ids = torch.tensor([[eos[0]] * (T - len(p)) + p for p in batch])
                mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in batch])
                new = theirs.generate(ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=max_new,
                                      eos_token_id=eos, pad_token_id=eos[0])[:, T:].tolist()
                useful += sum(next((j + 1 for j, t in enumerate(row) if t in eos), len(row)) for row in new)
            return useful
        runs["transformers"] = peer
    if "vllm" in args.peer:
        job = tempfile.NamedTemporaryFile("w", suffix=".json")
        json.dump(dict(model=str(folder), prompts=prompts, max_new=max_new, temperature=0.7, eos=eos, slots=args.slots), job)
        job.flush()
        server = subprocess.Popen([args.vllm_python, str(root / "tests" / "vllm_peer.py"), job.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"})

        def vllm(i):
            server.stdin.write("go\n")
            server.stdin.flush()
            line = next((x for x in server.stdout if x.startswith("RESULT")), None)
            if line is None:
                raise RuntimeError("the process of vllm ended; its messages are above")
            return float(line.split()[1]), int(line.split()[2])
        runs["vllm"] = vllm
    speeds = {name: [] for name in runs}
    for i in range(rounds):  # interleaved: what disturbs one disturbs the other
        for name, function in runs.items():
            start = time.perf_counter()
            result = function(i)
            seconds, tokens = result if isinstance(result, tuple) else (time.perf_counter() - start, result)
            speeds[name].append(tokens / seconds)
    middle = {name: statistics.median(s) for name, s in speeds.items()}
    print(f"{len(prompts)} prompts, up to {max_new} tokens, {args.slots} slots; useful tokens/s, median of {rounds} interleaved rounds; "
          + ", ".join(f"{k} {100 * v:.1f} %" for k, v in stats.items()))
    print(f"{'':14} {'tokens/s':>9} {'ours is':>8}   rounds")
    for name, s in speeds.items():
        print(f"{name:14} {middle[name]:9.1f} {middle['rlsp'] / middle[name]:7.2f}x   " + " ".join(f"{x:.1f}" for x in s))
    print(f"{'rows':>5} {'ms a step':>10} {'limit':>8} {'share':>6} {'tokens/s':>9}   at 200 positions; limit: the linear layers alone")
    with torch.inference_mode():
        for n in (1, 8) if args.toy else (1, 2, 4, 8, 16, 32, 64, 128):
            rows = M.KVCache(net.config, n, 256, torch.bfloat16, "cpu")
            tokens, positions, u = torch.zeros(n, dtype=torch.long), torch.full((n,), 200), torch.rand(n)
            def step():
                logits = net.decode(tokens, positions, rows, (n, n))
                return [M.sample(x, 0.7, v) for x, v in zip(logits.split(16), u.split(16))]
            step()
            took, limit = best(step, 5), linear_seconds(net, n)
            print(f"{n:5} {1e3 * took:10.1f} {1e3 * limit:8.1f} {100 * limit / took:5.0f}% {n / took:9.0f}")
    if "vllm" in runs:
        server.stdin.close()
        server.wait()


def main(words=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    p = what.add_parser("verifier", help="accuracy and time of the verifier, beside Math-Verify")
    p.add_argument("--cases", default=beside("cases.jsonl"), help="jsonl of labelled cases")
    p.add_argument("--hostile", default=beside("hostile.jsonl"), help="jsonl of inputs that are made to break graders")
    p.add_argument("--rounds", type=int, default=3)
    p.set_defaults(function=verifier)
    p = what.add_parser("rollout", help="useful tokens a second of generate, beside transformers and vLLM")
    p.add_argument("--model", default="smollm2", help="model folder")
    p.add_argument("--peer", action="append", default=[], choices=("transformers", "vllm"))
    p.add_argument("--vllm-python", default="python", help="Python of the environment that has vllm")
    p.add_argument("--slots", type=int, default=128)
    p.add_argument("--prompts", type=int, default=128)
    p.add_argument("--max-new", type=int, default=256)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--toy", action="store_true", help="some seconds, to see that it works")
    p.set_defaults(function=rollout)
    args = parser.parse_args(words)
    args.function(args)

if __name__ == "__main__":
    main()
