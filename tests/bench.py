"""Benchmarks: whole tables, ours beside peers measured in the same run. Not timed tests.

    python -m tests.bench verifier [--cases FILE] [--hostile FILE] [--rounds N]      rewards.verify, and Math-Verify where it is installed

A case is {"gold", "pred", "kind": "answer" or "response", "equal": true or false, "soft": a careful grader may decline}.
Without --cases the pairs of tests/test_rewards.py are used.
"""
import argparse
import json
import statistics
import sys
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


def main(words=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    p = what.add_parser("verifier", help="accuracy and time of the verifier, beside Math-Verify")
    p.add_argument("--cases", default=beside("cases.jsonl"), help="jsonl of labelled cases")
    p.add_argument("--hostile", default=beside("hostile.jsonl"), help="jsonl of inputs that are made to break graders")
    p.add_argument("--rounds", type=int, default=3)
    p.set_defaults(function=verifier)
    args = parser.parse_args(words)
    args.function(args)

if __name__ == "__main__":
    main()
