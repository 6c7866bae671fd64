"""Evaluation: sampling, verifying, accuracy, pass@k and maj@k, for one or more models on a problem file, and
for a policy on held-out problems during training."""
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from lib import chat, checkpoint, files, functions, guards, hf, logs, parallel, plan, report, sampling
from lib.flags import flag
import model as M
import rewards


@dataclass
class HeldOut:
    """The settings of evaluations during PPO, as flags of `rlsp.py ppo`."""
    eval_data: str | None = flag(
        "held-out problems", None, "jsonl with problem and answer; metrics.jsonl gets the accuracy on it "
        "before the first step, every --eval-every steps and after the last one", resume="content")
    eval_every: int = flag("held-out problems", 20, "steps between evaluations; 0: only before and after", 0,
                           resume="any")
    eval_samples: int = flag("held-out problems", 1, "responses per held-out problem", 1)
    keep_best: bool = flag(
        "held-out problems", False, "in addition to the newest --keep checkpoints, keep the one with the "
        "best held-out accuracy (the first of equal ones)", resume="any")


def pass_at_k(n, c, k):
    """An unbiased estimate of the probability that at least one of k samples is right, from n samples of
    which c are right (arXiv 2107.03374)."""
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers):
    """The answer that most samples agree on, or None. Mathematically equal answers are counted together, and
    ties go to the earlier one."""
    groups = []  # [representative, votes]
    for a in answers:
        if a is not None:
            match = next((g for g in groups if g[0] == a or rewards.answers_equal(a, g[0])), None)
            if match:
                match[1] += 1
            else:
                groups.append([a, 1])
    return max(groups, key=lambda g: g[1])[0] if groups else None


def maj_at_k(rows, k):
    """The share of right majorities over the disjoint groups of k samples of each problem. A majority is
    right if the verifier accepts the first response that gave its answer."""
    votes = []
    for r in rows:
        for i in range(0, len(r["answers"]) - k + 1, k):
            answers = r["answers"][i : i + k]
            answer = majority(answers)
            votes.append(answer is not None and r["correct"][i + answers.index(answer)])
    return sum(votes) / len(votes)


def summarize(rows, n):
    """The scores of evaluated problems. Each row has correct, answers and tokens, lists over n samples."""
    def mean(values):
        return sum(values) / len(values)

    accuracy = [mean(r["correct"]) for r in rows]
    squares = sum((a - mean(accuracy)) ** 2 for a in accuracy)
    out = {"problems": len(rows), "accuracy": mean(accuracy),
           "standard_error": math.sqrt(squares / max(1, len(rows) - 1) / len(rows)),
           "tokens": mean([t for r in rows for t in r["tokens"]]),
           "truncated": mean([t for r in rows for t in r["truncated"]]),
           "answered": mean([a is not None for r in rows for a in r["answers"]])}
    for k in (2**i for i in range(1, n.bit_length()) if 2**i <= n):
        out[f"pass@{k}"] = mean([pass_at_k(n, sum(r["correct"]), k) for r in rows])
        out[f"maj@{k}"] = maj_at_k(rows, k)
    return out


def choose_sampler(args, problems, longest, mesh):
    """What --sampler auto becomes, the same for all models and ranks; if it is not a whole copy, a line says
    why. longest: the tokens of the longest prompt.
    Nothing is refused: on CPU much of a cache is never touched, and takes no memory."""
    def choose():
        size = SimpleNamespace(**vars(args) | {"rollout_batch": problems, "max_prompt": longest})
        gpu, host, _ = parallel.memory()
        memory, overhead = plan.of_a_process(gpu, host)
        return plan.choose_sampler(
            [hf.read_config(folder) for folder in args.model], size, parallel.world_size(),
            mesh["shard"].size(), memory - overhead, "eval", parallel.environment()[3])

    sampler, why = parallel.together(choose, all_ranks=True)[0]
    if sampler != "whole":
        logs.say(f"plan: {why}")
    return sampler


def evaluate(folder, rows, args, device, mesh, verifier=None):
    """Sample and verify, each rank its share. Returns one dict per problem, in order, on every rank. With a
    user's own verifier, a response without a box votes for maj@k with its whole text, since such a task may
    not ask for a box."""
    asked = chat.Chat(folder, args)
    dtype = getattr(torch, args.dtype)
    config = hf.read_config(folder)
    sampler_mesh = sampling.mesh_of(args.sampler, config, mesh)
    net = hf.load(folder, M.Llama, dtype, device, sampler_mesh).eval()
    n = args.samples
    mine = range(parallel.rank(), len(rows) * n, parallel.world_size())
    prompts = [asked.prompt_ids(r["problem"]) for r in rows]
    longest = max(map(len, prompts)) + args.max_response
    cache = sampling.new_cache(config, args, len(rows) * n, longest, dtype, device, mesh)
    title = f"eval {files.visible(folder, 40)}"
    with logs.bar(title, len(mine), lines=10) as bar, guards.sampling_from(folder, net):
        responses = sampling.generate(
            net, [prompts[i // n] for i in mine], args.max_response, args.temperature, asked.eos,
            seed=args.seed, streams=mine, slots=args.slots, progress=bar, cache=cache,
            lockstep=args.sampler == "sharded")
    texts = [asked.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    attempts = [(text, rows[i // n]) for i, text in zip(mine, texts)]
    verdicts = functions.call_all(verifier, attempts) if verifier else [None] * len(attempts)
    results = []
    for i, response, text, verdict in zip(mine, responses, texts, verdicts):
        correct, answer, reason = judged(text, rows[i // n], verdict, not args.any_answer)
        results.append((i, text, correct, answer, reason, len(response), response[-1] not in asked.eos))
    results = sorted(sum(parallel.gather(results), []))
    out = []
    for j, row in enumerate(rows):
        _, texts, correct, answers, reasons, tokens, truncated = map(list, zip(*results[j * n : (j + 1) * n]))
        out.append({k: row[k] for k in ("unique_id", "subject", "level", "problem", "answer") if k in row}
                   | dict(correct=correct, answers=answers, tokens=tokens, truncated=truncated,
                          reasons=reasons, responses=texts))
    return out


def judged(text, row, verdict, boxed_only=True):
    """(correct, answer, reason) of a response. verdict: the result of a user's own verifier, or None."""
    if verdict is None:
        return rewards.explain(text, row["answer"], boxed_only)
    return verdict, rewards.extract_answer(text, boxed_only) or text.strip() or None, "--verifier"


def held_out(trainer):
    """Evaluate the policy on the held-out problems, if that is due after the last finished step and has not
    been done. The scores are added to the step's line of metrics.jsonl, which was logged before, so that a
    run stopped during the evaluation resumes with it. Step 0 is the start and has a line of its own."""
    c, step, run = trainer.config, trainer.step, trainer.run
    due = step in (0, c.steps) or (c.eval_every and step % c.eval_every == 0)
    if not (due and trainer.problems[trainer.training :]):
        return
    if parallel.together(lambda: "eval_accuracy" in logs.last_line(run, "metrics", step))[0]:
        return
    started = time.perf_counter()
    scores = scores_on_held_out(trainer)
    seconds = time.perf_counter() - started
    logs.complete(run, {"metrics": {"step": step} | {f"eval_{name}": x for name, x in scores.items()},
                        "timing": {"step": step, "eval_seconds": seconds}})
    logs.say(f"step {step}: {100 * scores['accuracy']:.1f} % of the answers to {scores['problems']} held-out "
             f"problems are right (standard error {100 * scores['standard_error']:.1f} %); "
             f"{scores['tokens']:.0f} tokens per response; {seconds:.0f} s")
    if c.keep_best and trainer.saved < step == parallel.together(lambda: checkpoint.best(run))[0]:
        trainer.save()


def scores_on_held_out(trainer):
    """summarize() of the current policy, sampled as in a rollout: from the same copy of the policy, into the
    same cache, at the same temperature. Each response has its own stream of random numbers, which no rollout
    uses and which is the same at every step, so two evaluations differ only by the policy."""
    n = trainer.config.eval_samples
    rows = trainer.problems[trainer.training :]
    mine = range(parallel.rank(), len(rows) * n, parallel.world_size())
    samples, _ = trainer.sample([trainer.training + i // n for i in mine], [-1 - i for i in mine],
                                f"evaluation after step {trainer.step}")
    results = []
    for i, s, verdict in zip(mine, samples, functions.ask(trainer.verifier, samples)):
        correct, answer, _ = judged(s.text, s.problem, verdict)
        results.append((i, correct, answer, len(s.response), s.truncated))
    results = sorted(sum(parallel.gather(results), []))
    names = ("correct", "answers", "tokens", "truncated")
    columns = [list(zip(*results[j * n : (j + 1) * n]))[1:] for j in range(len(rows))]
    return summarize([dict(zip(names, column)) for column in columns], 1)


def earlier_results(file, rows, args):
    """The results that this evaluation wrote for a model before it was stopped (a whole file), or None.
    Raises a ValueError if they are of other problems."""
    if not file.exists():
        return None
    results = report.outputs(file, args.samples)
    if len(results) != len(rows):
        raise ValueError(f"{file}: {len(results)} problems, but {args.data} has {len(rows)}: "
                         "it has changed since")
    for number, (result, row) in enumerate(zip(results, rows), 1):
        if any(result.get(key) != row.get(key) for key in ("problem", "answer", *files.GROUPS)):
            raise ValueError(f"{file}:{number}: not the problem of {args.data}:{row['line']}, "
                             "which has changed since")
    return results


def by_group(results, samples):
    """{"all" or "subject ..." or "level ...": scores} of a model's results."""
    scores = {"all": summarize(results, samples)}
    for key in files.GROUPS:
        for value in sorted({r[key] for r in results if key in r}, key=str):
            scores[f"{key} {value}"] = summarize([r for r in results if r.get(key) == value], samples)
    return scores


def print_table(summaries, samples):
    """One row per model and group; accuracy with its 95 % interval in percent, response length in tokens."""
    keys = [k for k in next(iter(summaries.values()))["all"] if "@" in k]  # pass@k and maj@k
    names = {folder: files.visible(folder) for folder in summaries}
    width = max(map(len, names.values()))
    print(f"{'model':{width}}  {'group':24}  problems  accuracy %  95 % interval      tokens  truncated %"
          + "".join(f"{k:>9}" for k in keys))
    for folder, groups in summaries.items():
        for group, s in groups.items():
            name = names[folder] if group == "all" else ""
            low, high = report.interval(s, samples)
            print(f"{name:{width}}  {files.visible(group, 24):24}  {s['problems']:8d}  "
                  f"{100 * s['accuracy']:10.1f}  {100 * low:5.1f} to {100 * high:5.1f}"
                  f"{s['tokens']:12.1f}  {100 * s['truncated']:11.1f}"
                  + "".join(f"{100 * s[k]:9.1f}" for k in keys))


def show(row, text, tokens, truncated, tokenizer, verifier, args):
    """Print a response with its verdict and the parts of Eq. 1."""
    print(f"--- {files.visible(row['problem'], None, files.LINES)}")
    print(logs.coloured(files.visible(text, None, files.LINES)))
    print(f"... {tokens} tokens{', truncated' if truncated else ''}; "
          + ", ".join(f"{k} {v}" for k, v in rewards.behaviours(text).items()))
    if not verifier and row["answer"] is None:
        return
    parts = rewards.score(
        text, row.get("answer") or "", truncated=truncated,
        count_tokens=lambda s: len(tokenizer.encode(s, add_special_tokens=False).ids),
        verdict=verifier(text, row) if verifier else None, exploration=args.exploration, alpha=args.alpha,
        length_scale=args.length_scale, length_floor=args.length_floor, steps_scale=args.steps_scale)
    found, gold = (files.visible(repr(x)) for x in (parts.answer, row.get("answer")))
    print(f"... {'right' if parts.correct else 'wrong'}: answer {found} against {gold} ({parts.reason})")
    print(f"... reward {round(parts.total, 6):.4g} = {parts.alpha:.4g} * {parts.outcome:.4g} + "
          f"{1 - parts.alpha:.4g} * {parts.exploration:.4g} (alpha, outcome, exploration); "
          f"{parts.length} reasoning tokens, {parts.steps} steps" + ", floored" * parts.floored)
