"""What a run writes while it goes on: its jsonl logs, progress bars, and how well it uses the machine."""
import contextlib
import functools
import json
import os
import re
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from lib import files, guards, hf, parallel, tracking
from lib.answers import bare, parse
import rewards


LOGS = ("metrics", "rollouts", "tokens", "timing")  # RUN/*.jsonl, each line with its step


def log(run, rows):
    """Append the rows {log's name: rows} to the run's logs."""
    parallel.together(lambda: [files.append_jsonl(run / f"{name}.jsonl", lines)
                               for name, lines in rows.items()])
    tracking.log(rows)


def last_line(run, name, step):
    """The last line of a log if it belongs to this step, else {}."""
    file = run / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    row = json.loads(lines[-1]) if lines else {}
    return row if row.get("step") == step else {}


def complete(run, rows):
    """Add the values of each row of {log's name: row} to the log's last line if that has the row's step, else
    as a new line."""
    def write():
        for name, row in rows.items():
            file = run / f"{name}.jsonl"
            before = last_line(run, name, row["step"])
            lines = file.read_text(encoding="utf-8").splitlines(True) if file.is_file() else []
            kept = lines[:-1] if before else lines
            files.write_text(file, "".join(kept) + json.dumps(before | row) + "\n")
            files.sync(file)

    parallel.together(write)
    tracking.log({name: [row] for name, row in rows.items()})


def say(line):
    """Print a line for the user, on rank 0 only."""
    if parallel.rank() == 0:
        tqdm.write(f"rlsp.py: {line}", file=sys.stderr)


def readable(gold):
    """Whether the verifier can read an answer. An answer that it cannot read matches only an exact copy, and
    one that is not even equal to itself never matches."""
    one = bare(gold.strip())
    read = parse(gold.strip(), True)[0] != "unreadable" or rewards.words(one) or rewards.options(one)
    return bool(read) and rewards.verify(f"\\boxed{{{gold}}}", gold)


def gold_warning(path, problems):
    """A warning that says how many answers of a problem file the verifier cannot read; "" if it can read
    all."""
    rows = [p for p in problems if not readable(p["answer"])]
    if not rows:
        return ""
    return (f"the verifier cannot read {len(rows)} of {len(problems)} answers of "
            f"{files.visible(path, 1000)}, first in line {rows[0].get('line')}: "
            f"{files.visible(repr(rows[0]['answer']), 60)}")


EQUATION_1 = ("outcome", "exploration", "floored", "alpha")  # the quantities that --reward replaces


def without_equation_1(row, own_verifier):
    """Metrics or parts of a reward under --reward. The parts of Eq. 1 were not paid and are left out. A
    verdict of the mathematics verifier decided nothing, so its name gets the prefix math_."""
    row = {k: v for k, v in row.items() if k not in EQUATION_1}
    for name in ("accuracy", "correct"):
        if name in row and not own_verifier:
            row[f"math_{name}"] = row.pop(name)
    return row


def rollout_row(step, sample, own_reward, own_verifier):
    """A line of rollouts.jsonl."""
    parts = asdict(sample.parts)
    return {"step": step, "problem": sample.problem["problem"], "gold": sample.problem.get("answer"),
            "response": sample.text, "tokens": len(sample.response), "truncated": sample.truncated,
            "reward": without_equation_1(parts, own_verifier) if own_reward else parts}


def token_rows(trainer, samples, batch):
    """Lines of tokens.jsonl: each response's tokens, and for each token the numbers that trained it.
    new_logprob is that of the policy after the step's updates; it takes one more scoring, which changes no
    number of the training."""
    if not samples:
        return []

    @torch.no_grad()
    def score(tokens, mask):
        return {"new_logprob": trainer.policy.logprobs(tokens, mask, trainer.config.temperature)[0]}

    batch = {k: v[: len(samples)] for k, v in batch.items()}
    batch |= trainer.fill(batch, score, "tokens")
    names = ["old_logprob", "new_logprob", "ref_logprob", "entropy", "reward", "advantage", "raw_advantage"]
    names += ["value", "return"] if "critic" in trainer.nets else []
    rows = []
    for i, sample in enumerate(samples):
        mask = batch["mask"][i]
        numbers = {name: [float(f"{x:.6g}") for x in batch[name][i, mask].tolist()] for name in names}
        rows.append({"step": trainer.step, "problem": sample.problem["problem"],
                     "gold": sample.problem.get("answer"), "score": sample.parts.total,
                     "tokens": hf.token_texts(trainer.tokenizer, sample.response), **numbers})
    return rows


def describe(trainer, samples, batch, explained):
    """Metrics of a rollout. Per-token quantities are averaged over actions, all others over responses.
    explained: the critic's explained variance, which is left out without a critic."""
    metrics = describe_rollout(samples, batch) | {"kl_coef": trainer.kl_coef}
    if "critic" in trainer.nets:
        metrics["explained_variance"] = explained
    else:
        del metrics["value"]
    if trainer.reward_function:
        metrics = without_equation_1(metrics, trainer.verifier)
    if trainer.config.exploration == "judge":
        metrics["judge_failed"] = sum(s.effort is None for s in samples) / len(samples)
    return metrics


def describe_rollout(samples, batch):
    """The metrics that follow from samples and their batch alone."""
    def mean(values):
        return sum(values) / len(samples)

    def mean_over_actions(x):
        return float((x * batch["mask"]).sum() / batch["mask"].sum())

    parts = [s.parts for s in samples]
    lengths = [len(s.response) for s in samples]
    counts = [rewards.behaviours(s.text) for s in samples]
    return dict(
        reward=mean([p.total for p in parts]),
        outcome=mean([p.outcome for p in parts]),
        exploration=mean([p.exploration for p in parts]),
        floored=mean([p.floored for p in parts]),
        alpha=parts[0].alpha,
        accuracy=mean([p.correct for p in parts]),
        answered=mean([p.answer is not None for p in parts]),
        reasoning_length=mean([p.length for p in parts]),
        reasoning_steps=mean([p.steps for p in parts]),
        response_length=mean(lengths),
        response_length_max=max(lengths),
        truncated=mean([s.truncated for s in samples]),
        repetition=mean([rewards.repetition(s.text) for s in samples]),
        # The share of responses that show the behaviour:
        **{name: mean([c[name] > 0 for c in counts]) for name in counts[0]},
        k1=mean_over_actions(batch["k1"]),
        k3=mean_over_actions(batch["k3"]),
        entropy=mean_over_actions(batch["entropy"]),
        value=mean_over_actions(batch["value"]),
        advantage=mean_over_actions(batch["raw_advantage"]),
        sampler_logprob_diff=mean_over_actions((batch["sampler_logprob"] - batch["old_logprob"]).abs()),
        kl_response=float((batch["k1"] * batch["mask"]).sum() / len(samples)))


@functools.lru_cache
def matrix_peak(device, dtype):
    """The measured FLOP/s of a large matrix product, the best of five. `mfu` is a share of it.

    The size grows until the product takes 50 ms, or reaches a size at which every GPU is at its peak. It
    starts small, because a processor that emulates a type may need a hundred times as long, and everything
    waits."""
    n = 8192 if device.type == "cuda" else 256
    while True:
        a = torch.ones(n, n, dtype=dtype, device=device)
        seconds = min(product_seconds(a), product_seconds(a))  # the first product of a size is slower
        if seconds >= 0.05 or n >= 8192:
            break
        n *= 2
    best = min([seconds] + [product_seconds(a) for _ in range(3)])
    return 2 * n**3 / best


def product_seconds(a):
    started = time.perf_counter()
    float((a @ a)[0, 0])  # float() waits for a GPU
    return time.perf_counter() - started


def flops(config, lengths, scored):
    """Model FLOPs of one forward and backward pass over sequences of these lengths, in which `scored` tokens
    need the token head.

    A weight costs 6 per token, 2 forward and 4 backward. Causal attention over t tokens multiplies
    t (t + 1) / 2 pairs of H x d numbers in each of two products (Q K^T, P V), and backward twice as many:
    6 H d t (t + 1) per layer. Recomputation (activation checkpointing, the head's logits, attention's own
    backward) does not count, and neither do norms and embeddings."""
    c = config
    width = c.num_attention_heads * c.head_dim
    kv_width = c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * width + 2 * kv_width + 3 * c.intermediate_size)
    pairs = sum(t * (t + 1) for t in lengths)
    head = c.vocab_size * c.hidden_size * scored
    return 6 * (c.num_hidden_layers * (layer * sum(lengths) + width * pairs) + head)


class Timer:
    """Seconds of each phase of a step: `with timer("rollout"): ...`."""

    def __init__(self):
        self.seconds = {}
        self.cpu_started = time.process_time()

    @contextlib.contextmanager
    def __call__(self, phase):
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    def cpu_seconds(self):
        """Processor seconds of all threads of this process since the start."""
        return time.process_time() - self.cpu_started


class Lines:
    """A replacement for tqdm's bar in log files and pipes: it prints a line for each set of numbers to show,
    or `lines` lines over the whole work. It has only those methods of tqdm that are used."""

    def __init__(self, desc, total, first, lines):
        self.desc = desc
        self.total = total
        self.first = first
        self.n = first
        self.lines = lines
        self.started = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n=1):
        before = self.n
        self.n += n
        if self.lines and before * self.lines // self.total < self.n * self.lines // self.total:
            self.set_postfix({})

    def set_postfix(self, shown=None, **more):
        """Print the line as tqdm formats it, without the bar itself."""
        postfix = ", ".join(f"{k}={v}" for k, v in ((shown or {}) | more).items())
        form = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        elapsed = time.monotonic() - self.started
        line = tqdm.format_meter(self.n, self.total, elapsed, prefix=self.desc, postfix=postfix,
                                 bar_format=form, initial=self.first)
        print(line, file=sys.stderr)


def bar(desc, total=None, first=0, inner=False, lines=0, iterable=None):
    """The progress of rank 0: a bar on a terminal, and Lines elsewhere, where every redrawing of a bar would
    remain. An inner bar, for a part of a step, disappears when it is done and prints no line."""
    terminal = sys.stderr.isatty()
    if not terminal and parallel.rank() == 0 and not inner:
        return Lines(desc, total, first, lines)
    return tqdm(iterable, total=total, initial=first, desc=desc, leave=not inner,
                disable=parallel.rank() != 0 or not terminal)


def sft_timing(config, chosen, count, seconds, device, dtype):
    """A line of timing.jsonl for sft. chosen: (ids, mask) of each example; count: the number of trained
    tokens; only these need the token head."""
    lengths = [len(ids) for ids, _ in chosen]
    flops_per_s = flops(config, lengths, count) / seconds
    return dict(seconds=seconds, tokens_per_s=sum(lengths) / seconds, flops_per_s=flops_per_s,
                mfu=flops_per_s / parallel.world_size() / matrix_peak(device, dtype))


def update_flops(trainer, lengths, actions, metrics):
    """Model FLOPs of a step's update over all ranks and epochs, summed over the networks that were
    trained."""
    heads = {"policy": actions, "critic": 0}  # tokens that need the token head
    trained = [(name, net) for name, net in trainer.nets.items() if f"{name}_lr" in metrics]
    return trainer.config.epochs * sum(flops(net.config, lengths, heads[name]) for name, net in trained)


def timing(trainer, timer, batch, metrics):
    """A line of timing.jsonl: the seconds and rates of a step's phases. Tokens per second and the update's
    model FLOPs per second are totals over all ranks; mfu is the share of the ranks' measured peaks."""
    lengths = batch["length"].tolist()
    actions = int(batch["mask"].sum())
    rollout = timer.seconds["rollout"]
    update = timer.seconds["update"]
    flops_per_s = update_flops(trainer, lengths, actions, metrics) / update
    peak = parallel.world_size() * matrix_peak(trainer.device, trainer.dtype)
    return dict(
        seconds=sum(timer.seconds.values()), cpu_seconds=timer.cpu_seconds(),
        **{f"{phase}_seconds": seconds for phase, seconds in timer.seconds.items()},
        rollout_tokens_per_s=actions / rollout,
        update_tokens_per_s=sum(lengths) * trainer.config.epochs / update,
        flops_per_s=flops_per_s, mfu=flops_per_s / peak,
        padding=parallel.idle_share(trainer.micro_steps(batch), lengths), **trainer.decoding)


def log_step(trainer, metrics, samples, batch):
    """Append a step's lines to the run's logs."""
    step = trainer.step
    tokens = token_rows(trainer, samples[: trainer.config.log_tokens], batch)
    timing = {"step": step, **metrics.pop("timing")}
    rollouts = [rollout_row(step, s, trainer.reward_function, trainer.verifier)
                for s in samples[: trainer.config.log_rollouts]]
    log(trainer.run, {"metrics": [metrics], "timing": [timing], "tokens": tokens, "rollouts": rollouts})


def shown(metrics):
    """The numbers of a step that the progress bar shows."""
    names = ("reward", "accuracy", "k1", "explained_variance")
    return ({name: f"{metrics[name]:.3f}" for name in names if name in metrics}
            | {"length": f"{metrics['response_length']:.0f}"})


def warnings(trainer, samples, differ):
    """{"warnings": reasons, in words, why a step teaches nothing}, at the first step and every tenth; {} for
    a healthy step."""
    step = trainer.step
    if step > 1 and step % 10:
        return {}
    boxes = not (trainer.verifier or trainer.reward_function)
    found = guards.unhealthy(samples, differ, trainer.config, boxes)
    if found:
        say(f"step {step}: warning: {'; '.join(found)}")
    if step == 1 and trainer.gold_warning:  # already printed at the start
        found.append(trainer.gold_warning)
    return {"warnings": "; ".join(found)} if found else {}


def coloured(text):
    """Text with its behaviours in colour, if standard output is a terminal and NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    colours = dict(zip(rewards.BEHAVIOURS, (33, 36, 35, 32)))
    phrases = "|".join(f"(?P<{name}>{phrase})" for name, phrase in rewards.BEHAVIOURS.items())

    def colour(match):
        return f"\033[1;{colours[match.lastgroup]}m{match[0]}\033[0m"

    return re.sub(rf"\b(?:{phrases})\b", colour, text, flags=re.I)
