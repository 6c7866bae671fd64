"""The verifier beside Math-Verify on labelled cases: accuracy, false positives and time of both in one run.

    python tests/tools/graders.py [CASES.jsonl ...] [--rounds N]

Run it with a Python that has math-verify (pip install math-verify, in an environment of its own);
without it only our verifier is measured. A case is {"gold", "pred", "kind": "answer" or "response",
"equal", "soft": a careful grader may decline, "boxed_only"}. Both get the same texts, a bare answer in a
box; times are of the processor.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import rewards  # noqa: E402
from lib import answers  # noqa: E402

SHARED = ROOT.parent / "shared" / "data" / "verifier"

def ours(text, case):
    if case["kind"] == "answer" and "boxed_only" in case:
        return rewards.answers_equal(case["pred"], case["gold"])
    return rewards.verify(text, case["gold"], boxed_only=case.get("boxed_only", False))

def graders():
    found = {"rewards.py": ours}
    try:
        import math_verify
    except ImportError:
        print("math-verify is not installed: measured without it")
        return found
    def peer(text, case):
        gold = case["gold"].strip().strip("$")
        return bool(math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(text)))
    from importlib.metadata import version
    found[f"Math-Verify {version('math-verify')}"] = peer
    return found

def measure(cases, rounds):
    """{name: (verdicts, mean seconds, worst seconds)}; the graders take turns, a case's least time counts."""
    functions = graders()
    verdicts = {name: [] for name in functions}
    seconds = {name: [float("inf")] * len(cases) for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            answers.parse.cache_clear()
            verdicts[name] = []
            for n, case in enumerate(cases):
                bare = case["kind"] == "answer"
                text = f"The final answer is $\\boxed{{{case['pred']}}}$." if bare else case["pred"]
                start = time.process_time()
                verdicts[name].append(function(text, case))
                seconds[name][n] = min(seconds[name][n], time.process_time() - start)
    return {name: (verdicts[name], statistics.mean(seconds[name]), max(seconds[name])) for name in functions}

def main(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", type=Path, default=[SHARED / "cases.jsonl", SHARED / "cases-2.jsonl"])
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args(arguments)
    for path in args.cases:
        cases = [json.loads(line) for line in open(path)]
        core = [not case.get("soft") for case in cases]
        print(f"\n{path.name}: {len(cases)} cases, {sum(core)} core\n"
              f"| grader | core % | false positives | false negatives | all % | all false positives "
              f"| mean ms | worst ms |\n"
              f"|---|---|---|---|---|---|---|---|")
        for name, (said, mean, worst) in measure(cases, args.rounds).items():
            right = [s == case["equal"] for s, case in zip(said, cases)]
            wrong = [s for s, c, r in zip(said, core, right) if c and not r]
            accepted = sum(s and not case["equal"] for s, case in zip(said, cases))
            share = 100 * sum(r for r, c in zip(right, core) if c) / sum(core)
            print(f"| {name} | {share:.2f} | {sum(wrong)} | {len(wrong) - sum(wrong)} "
                  f"| {100 * statistics.mean(right):.1f} | {accepted} | {1e3 * mean:.3f} "
                  f"| {1e3 * worst:.1f} |")

if __name__ == "__main__":
    main(sys.argv[1:])
