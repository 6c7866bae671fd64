"""Break it and see: mistakes of one line that public implementations of PPO for language models have made, each
put into the real code while it runs, trained on the tiny recipe beside the sound code.

    python -m tests.lab kl-sign               train the sound code and the one with this mistake, and compare them
    python -m tests.lab all --jobs 2          every mistake, some hours
    python -m tests.lab all --test            the test that catches each mistake, seen to fail
    python -m tests.lab all --out docs/results/lab       the table from the numbers that are kept there

docs/lab.md has the results. A run is PPO of the tiny recipe with half of its steps, so that all of them are done in
an hour or two; further words go to `rlsp.py ppo`, for example --steps 40. What is finished in --out is kept, and
the same command goes on after an interruption. TINY=FOLDER takes other problems than those of data/tiny.

A mistake is a function of the sound one, `plain`, that returns the broken one; it takes its place under the name
that the decorator gives. Nothing else of the program is changed, and none of it is copied. Evaluation is sound.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "results")]

import pytest  # noqa: E402
import torch  # noqa: E402

from lib import guards, parallel  # noqa: E402
import model as M  # noqa: E402
import ppo  # noqa: E402
import rewards  # noqa: E402
import rlsp  # noqa: E402
import experiment  # noqa: E402

TINY = Path(os.environ.get("TINY", ROOT / "data" / "tiny"))  # the model, and the problems

# Metrics that others say as well, or that are never anything but constant in the tiny recipe.
LEFT_OUT = ("step", "warnings", "alpha", "kl_coef", "response_length_max", "alternatives", "self_correction")

# The sound code in the settings that some mistakes need to show themselves.
SOUND = {"sound": "", "sound-cool": "--temperature 0.7", "sound-twice": "--epochs 2"}


@dataclass
class Mistake:
    """owner.attribute is what `broken` replaces; `test` fails with it; `beside` is the sound run to compare with,
    whose flags it has too, and `flags` are its own. `stops`: what the run says where a guard stops it at its first
    update; the guard is then switched off to see the harm."""
    name: str
    what: str
    owner: object
    attribute: str
    test: str
    broken: Callable
    beside: str = "sound"
    flags: str = ""
    stops: str = ""


MISTAKES = {}


def mistake(what, owner, attribute, test, **more):
    """Under the function's name, with hyphens, in MISTAKES."""
    def keep(broken):
        name = broken.__name__.replace("_", "-")
        MISTAKES[name] = Mistake(name, what, owner, attribute, test, broken, **more)
        return broken
    return keep


# ----------------------------------------------------------------------------------------------- the mistakes

@mistake("a response without an answer counts as right, since '' is in every string",
         rewards, "explain", "test_rewards.py::test_outcome_alone")
def empty_accepted(plain):
    def explain(response, gold, boxed_only=True):
        answer = rewards.extract_answer(response, boxed_only)
        return (answer or "") in gold, answer, "contained in the gold"
    return explain


@mistake("the score is written one place after the EOS, where no action is",
         ppo, "token_rewards", "test_ppo.py::test_checklist_6_and_10_the_score_lands_on_the_last_action_and_the_kl_is_detached")
def score_after_the_end(plain):
    def token_rewards(scores, k1, mask, kl_coef):
        reward = plain(torch.zeros_like(scores), k1, mask, kl_coef)
        after = mask.shape[1] - mask.int().flip(1).argmax(1)
        reward[torch.arange(len(scores)), after.clamp(max=mask.shape[1] - 1)] += scores
        return reward
    return token_rewards


@mistake("the KL penalty has the wrong sign: the reward is larger the farther the policy is from the reference",
         ppo, "kl_estimates", "test_ppo.py::test_checklist_10_k1_and_k3_both_estimate_the_kl")
def kl_sign(plain):
    def kl_estimates(logprob, ref_logprob):
        k1, k3 = plain(logprob, ref_logprob)
        return -k1, k3
    return kl_estimates


@mistake("returns are made from the advantages after these were whitened",
         ppo, "gae", "test_ppo.py::test_checklist_8_gae_equals_its_definition")
def returns_whitened(plain):
    def gae(rewards, values, mask, gamma, lam):
        advantages, _ = plain(rewards, values, mask, gamma, lam)
        advantages = ppo.whiten(advantages, mask)
        return advantages, (advantages + values) * mask
    return gae


@mistake("the critic's value of an action is read after the action, not before it",
         M.Critic, "forward", "test_model.py::test_checklist_5_token_t_is_scored_by_the_state_before_it")
def values_off_by_one(plain):
    def forward(self, tokens, mask):
        one = torch.zeros_like(tokens[:, :1])
        later = torch.cat((one.bool(), mask), dim=1)  # [B, T + 1]: the state before t + 1 stands behind t
        return plain(self, torch.cat((tokens, one), dim=1), later)[:, 1:]
    return forward


@mistake("advantages are not whitened",
         ppo, "whiten", "test_ppo.py::test_checklist_9_whitened_advantages_have_masked_mean_0_and_variance_1")
def not_whitened(plain):
    def whiten(x, mask, most=None):
        return x * mask
    return whiten


@mistake("the mask is `token != pad` with the EOS as pad: prompts are trained, the EOS is not",
         ppo, "as_batch", "test_ppo.py::test_checklist_3_and_4_the_eos_is_an_action_and_masks_come_from_lengths")
def mask_by_id(plain):
    def as_batch(samples):
        batch = plain(samples)
        pad = next((s.response[-1] for s in samples if not s.truncated), -1)  # the EOS
        places = torch.arange(batch["tokens"].shape[1])
        batch["mask"] = (batch["tokens"] != pad) & (places > 0) & (places < batch["length"][:, None])
        return batch
    return as_batch


@mistake("the sampled EOS is no action: responses are stored without it",
         ppo, "as_batch", "test_ppo.py::test_checklist_3_and_4_the_eos_is_an_action_and_masks_come_from_lengths")
def eos_untrained(plain):
    def as_batch(samples):
        batch = plain(samples)
        for row, sample in enumerate(samples):
            if not sample.truncated and len(sample.response) > 1:
                batch["mask"][row, batch["length"][row] - 1] = False
        return batch
    return as_batch


@mistake("log-probs are taken at temperature 1 after sampling at 0.7",
         M.Llama, "logprobs", "test_ppo.py::test_checklist_1_everything_is_scored_at_the_sampling_temperature",
         beside="sound-cool")
def temperature_1(plain):
    def logprobs(self, tokens, mask, temperature=1.0, entropy=True):
        return plain(self, tokens, mask, 1.0, entropy)
    return logprobs


@mistake("old log-probs at the sampling temperature 0.7, new ones at 1",
         ppo.Trainer, "policy_step", "test_ppo.py::test_checklist_11_the_first_ratio_is_1_or_training_stops",
         beside="sound-cool", stops="the ratio on the first minibatch is off 1")
def temperature_in_half(plain):
    def policy_step(self, part, count):
        config = self.config
        self.config = replace(config, temperature=1.0)
        found = plain(self, part, count)
        self.config = config
        return found
    return policy_step


@mistake("the reference is refreshed with the policy's weights after each step, as the sampler is",
         ppo.Trainer, "train_step", "test_ppo.py::test_checklist_10_the_reference_stays_as_it_started")
def reference_follows(plain):
    def train_step(self):
        found = plain(self)
        parallel.copy_weights(self.policy, self.reference)
        return found
    return train_step


@mistake("the old log-probs are computed anew before each update, so that the ratio is always 1",
         ppo.Trainer, "policy_step", "test_ppo.py::test_checklist_11_the_first_ratio_is_1_or_training_stops",
         beside="sound-twice")
def old_recomputed(plain):
    def policy_step(self, part, count):
        with torch.no_grad():
            old, _ = self.policy.logprobs(part["tokens"], part["mask"], self.config.temperature)
        return plain(self, part | {"old_logprob": old}, count)
    return policy_step


@mistake("the loss takes the smaller of the clipped and the unclipped term: it clips on the wrong side",
         ppo, "policy_loss", "test_ppo.py::test_checklist_12_losses_equal_slow_loops", beside="sound-twice")
def clip_wrong_side(plain):
    def policy_loss(logprob, old_logprob, advantage, mask, clip=0.2, count=None):
        return -plain(logprob, old_logprob, -advantage, mask, clip, count)  # min(a, b) = -max(-a, -b)
    return policy_loss


@mistake("the policy's loss is a mean over each micro-batch, and these means are summed",
         ppo, "policy_loss", "test_ppo.py::test_checklist_13_the_micro_batch_size_does_not_change_the_update",
         flags="--micro-tokens 500")
def mean_per_micro_batch(plain):
    def policy_loss(logprob, old_logprob, advantage, mask, clip=0.2, count=None):
        return plain(logprob, old_logprob, advantage, mask, clip)
    return policy_loss


@mistake("the last token of every response is set to the EOS, and those that were cut off are paid as finished",
         ppo.Trainer, "sample", "test_ppo.py::test_checklist_7_truncated_responses_are_counted_and_scored_as_they_stand")
def truncated_as_finished(plain):
    def sample(self, chosen, streams, title):
        samples, stats = plain(self, chosen, streams, title)
        finished = [replace(s, response=[*s.response[:-1], self.chat.end], truncated=False) for s in samples]
        return finished, stats
    return sample


@mistake("the length reward pays for repeated lines and phrases",
         rewards, "without_repetition", "test_rewards.py::test_padding_and_repetition_earn_nothing")
def repetition_paid(plain):
    def without_repetition(text):
        return text
    return without_repetition


@mistake("one learning rate for both networks: the critic learns as slowly as the policy",
         ppo.Trainer, "load_networks", "test_ppo.py::test_checklist_14_the_critic_learns_alone_first")
def critic_lr(plain):
    def load_networks(self, mesh):
        plain(self, mesh)
        self.lr["critic"] = self.config.lr
    return load_networks


@contextlib.contextmanager
def broken(name, guarded=False):
    """The program with this mistake; a sound one stays as it is. guarded: with the guard that would stop it."""
    found = MISTAKES.get(name)
    before = [(guards, "first_ratio", guards.first_ratio)]
    if found:
        plain = getattr(found.owner, found.attribute)
        before.append((found.owner, found.attribute, plain))
        setattr(found.owner, found.attribute, found.broken(plain))
        if found.stops and not guarded:
            guards.first_ratio = lambda step, ratio, error, dtype: {"first_ratio": ratio, "first_ratio_error": error}
    try:
        yield
    finally:
        for owner, attribute, plain in before:
            setattr(owner, attribute, plain)


# ----------------------------------------------------------------------------------------------- running them

# The words that train.sh gives rlsp.py, so that the recipe stands in one place: a line of words for each stage.
RECIPE = r"""
set -euo pipefail
eval "$(sed -n '/^tiny_[a-z]*() {/,/^}/p' "$1")"
echo() { :; }
stage() { printf '%s --out' "$1"; printf ' %q' "${@:2}"; printf '\n'; }
"${@:2}"
"""


def recipe(function, *words, seed):
    """The command lines of rlsp.py that a function of train.sh gives."""
    done = subprocess.run(["bash", "-c", RECIPE, "lab", ROOT / "train.sh", function, *map(str, words)], check=True,
                          capture_output=True, text=True, env=os.environ | {"SEED": str(seed), "TINY": str(TINY)})
    return [shlex.split(line) for line in done.stdout.splitlines()]


def rlsp_py(command):
    sys.argv = ["rlsp.py", *command]
    rlsp.main()


def train(name, seed, sft, folder, words):
    """PPO from the model sft with a mistake, then a sound evaluation; FOLDER.json has what is kept of them."""
    found = MISTAKES.get(name)
    flags = shlex.split(f"{SOUND[found.beside]} {found.flags}" if found else SOUND[name])
    with broken(name):
        rlsp_py(recipe("tiny_ppo", sft, f"{folder}/ppo", "--steps", 20, *flags, *words, seed=seed)[0])
    cool = ["--temperature", "0.7"] if "--temperature" in flags else []  # sampled as it was trained
    where = [f"{folder}/eval", "--samples", "4", "--model", f"{folder}/ppo/model"]
    rlsp_py(recipe("tiny_eval", *where, *cool, seed=seed)[0])
    Path(f"{folder}.json").write_text(json.dumps(numbers(Path(folder))) + "\n")


def start(seed, folder):
    """The three stages of SFT, whose last model is folder/sft/model."""
    for command in recipe("tiny_sft", folder, TINY / "sft.jsonl", seed=seed):
        rlsp_py(command)


def numbers(folder):
    """What is kept of a run: its scores on held-out problems and, step by step, what metrics.jsonl has."""
    (summary,) = json.loads((folder / "eval/summary.json").read_text()).values()
    rows = experiment.rows(folder / "ppo/metrics.jsonl")
    names = dict.fromkeys(name for row in rows for name in row if name not in LEFT_OUT)
    scores = {name: summary["all"][name] for name in ("accuracy", "tokens", "answered", "truncated")}
    return experiment.rounded(scores | {"metrics": {name: [row.get(name) for row in rows] for name in names}})


def in_a_process(function, *arguments, folder):
    """Call a function of this file in a process of its own, which writes what it says to folder/log.txt."""
    shutil.rmtree(folder, ignore_errors=True)  # what was stopped in the middle
    folder.mkdir(parents=True)
    code = "import json, sys; from tests import lab; getattr(lab, sys.argv[1])(*json.loads(sys.argv[2]))"
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run([sys.executable, "-c", code, function.__name__, json.dumps(arguments, default=str)],
                              cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
                              stdout=log, stderr=log)
    if done.returncode:
        last = (folder / "log.txt").read_text().splitlines()[-1:]
        print(f"{folder}/log.txt: exit status {done.returncode}: {' '.join(last)}", flush=True)


def run_all(names, args, words):
    """Train what is not yet finished, seed by seed, args.jobs at a time."""
    def one(name, seed, model):
        folder = args.out / f"seed-{seed}" / name
        print(f"seed {seed}: {name}", flush=True)
        in_a_process(train, name, seed, model, folder, words, folder=folder)

    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            todo = [name for name in names if not (args.out / f"seed-{seed}/{name}.json").is_file()]
            folder = (args.sft or args.out / "sft") / f"seed-{seed}"
            if todo and not args.sft and not (folder / "sft/done").is_file():
                print(f"seed {seed}: SFT", flush=True)
                in_a_process(start, seed, folder, folder=folder)
            for name in todo:
                pool.submit(one, name, seed, folder / "sft/model")


# ----------------------------------------------------------------------------------------------- comparing them

def read(folder, names, seeds):
    """{name: {seed: what numbers() kept}} of the runs that are there."""
    files = {name: {seed: folder / f"seed-{seed}/{name}.json" for seed in seeds} for name in names}
    return {name: {seed: json.loads(file.read_text()) for seed, file in found.items() if file.is_file()}
            for name, found in files.items()}


def leaves(runs, sound):
    """When a metric gives a mistake away: its first step, and how many times its margin it is outside then; None
    if it never does.

    runs and sound: its values step by step for each seed. Sound values of all seeds, two steps before to two
    steps after, span a range; half of its width more on either side is the margin. The metric has left it at the
    first of three steps in which all seeds are outside, on the same side. (1e-5 is rounding.) It has also left
    where all seeds have one and the same number in all three steps, and no sound run has it: infinitely far.
    """
    def outside(step):
        """How many margins all seeds are outside, with the sign of the side; 0 if one is not."""
        near = [values[i] for values in sound for i in range(max(0, step - 2), min(len(values), step + 3))]
        near = [x for x in near if x is not None]
        here = [values[step] for values in runs]
        if not near or None in here:
            return 0.0
        margin = 0.5 * (max(near) - min(near)) + 1e-5
        above = min(here) - max(near)
        below = min(near) - max(here)
        return above / margin if above > margin else -below / margin if below > margin else 0.0

    steps = min(map(len, runs))
    distances = [outside(step) for step in range(steps)]
    for step in range(steps - 2):
        three = distances[step : step + 3]
        if all(x > 0 for x in three) or all(x < 0 for x in three):
            return step + 1, distances[step]
        found = {x for values in runs for x in values[step : step + 3]}
        others = {x for values in sound for x in values[step : step + 3]}
        if len(found) == 1 and None not in found | others and not found & others:
            return step + 1, math.copysign(math.inf, found.pop() - min(others))
    return None


def signs(runs, sound):
    """[(step, name of a metric, how far outside)] of the metrics that give a mistake away, the first one first."""
    metrics = lambda found, name: [run["metrics"].get(name) for run in found.values()]
    names = {name for run in runs.values() for name in run["metrics"]}
    found = {name: leaves(metrics(runs, name), metrics(sound, name)) for name in names
             if all(metrics(runs, name)) and all(metrics(sound, name))}
    return sorted(((step, name, far) for name, (step, far) in ((n, f) for n, f in found.items() if f)),
                  key=lambda sign: (sign[0], -abs(sign[2]), sign[1]))


def percent(runs):
    return {seed: 100 * run["accuracy"] for seed, run in runs.items()}


def differences(runs, sound):
    """Held-out accuracy minus that of the sound run of the same seed, points."""
    return [x - percent(sound)[seed] for seed, x in percent(runs).items() if seed in sound]


def table(found):
    """The mistakes as a table of Markdown."""
    lines = []
    for name, runs in found.items():
        if not runs:
            continue
        shown = experiment.shown(list(percent(runs).values()))
        if name in SOUND:
            lines.append([f"`{name}` {SOUND[name]}".strip(), str(len(runs)), shown, "", "", ""])
            continue
        mistake = MISTAKES[name]
        sound = found[mistake.beside]
        both = {seed: run for seed, run in runs.items() if seed in sound}
        given = [f"`{metric}` {'above' if far > 0 else 'below'}, step {step}"
                 for step, metric, far in signs(both, sound)[:2]] if both else []
        points = differences(runs, sound)
        each = ", ".join(f"{x:+.1f}" for x in points)
        harm = f"{each}: {experiment.shown(points, '+')}" if len(points) > 1 else each
        test = mistake.test.partition("::")[2]
        lines.append([f"`{name}`", str(len(runs)), shown, harm, "; ".join(given) or "none", f"`{test}`"])
    head = ["mistake", "seeds", "accuracy %", "minus sound, seed by seed: mean", "given away by", "test that fails"]
    return experiment.table(head, lines)


def figure(found):
    """Held-out accuracy minus the sound run's as SVG, the most harmful mistake first: a point for each seed, a bar
    for their mean."""
    rows = {name: differences(runs, found[MISTAKES[name].beside]) for name, runs in found.items() if name in MISTAKES}
    rows = {name: points for name, points in rows.items() if points}
    rows = dict(sorted(rows.items(), key=lambda row: experiment.mean_error(row[1])[0]))
    everything = [x for points in rows.values() for x in points]
    left = experiment.ticks(max(1.0, -min(everything)))
    step = left[1]
    right = [step * (i + 1) for i in range(math.ceil(max(1.0, max(everything)) / step))]
    low, high = -left[-1], right[-1]
    x0, y0, width, line = 200, 50, 560, 26
    place = lambda x: x0 + width * (x - low) / (high - low)
    bottom = y0 + line * len(rows)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {bottom + 60}" font-family="sans-serif" font-size="12">',
           f'<rect width="800" height="{bottom + 60}" fill="#ffffff"/>',
           f'<text x="{x0}" y="24" font-weight="bold">what each mistake costs: a point for each seed, a bar for the mean</text>']
    for x in [-x for x in reversed(left)] + right:
        colour = "#555555" if x == 0 else "#dddddd"
        out.append(f'<path d="M{place(x):.1f} {y0 - 8}V{bottom}" stroke="{colour}"/>'
                   f'<text x="{place(x):.1f}" y="{bottom + 18}" text-anchor="middle">{f"{x:+g}" if x else 0}</text>')
    for i, (name, points) in enumerate(rows.items()):
        y = y0 + line * i + line / 2
        mean, _ = experiment.mean_error(points)
        out.append(f'<text x="{x0 - 12}" y="{y + 4}" text-anchor="end">{name}</text>'
                   f'<path d="M{place(0):.1f} {y}H{place(mean):.1f}" stroke="#d55e00" stroke-width="10"/>')
        out += [f'<circle cx="{place(x):.1f}" cy="{y}" r="3.5" fill="#0072b2"/>' for x in points]
    out.append(f'<text x="{x0 + width / 2}" y="{bottom + 42}" text-anchor="middle" fill="#555555">'
               "held-out accuracy minus that of the sound run with the same seed, points</text>")
    return "\n".join([*out, "</svg>\n"])


def caught(name):
    """Whether the test that is named for a mistake fails with it and passes without."""
    test = str(ROOT / "tests" / MISTAKES[name].test)
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    sound = pytest.main([*quiet, test])
    with broken(name, guarded=True):
        return pytest.main([*quiet, test]) == pytest.ExitCode.TESTS_FAILED and sound == pytest.ExitCode.OK


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=["all", *SOUND, *MISTAKES],
                        help=f"all, or some of {', '.join(MISTAKES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/lab", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--sft", type=Path, help="folder with seed-N/sft/model; without it these are trained first")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    parser.add_argument("--test", action="store_true", help="only show that the test of each mistake catches it")
    args, words = parser.parse_known_args(argv)
    args.out = args.out.resolve()
    args.sft = args.sft and args.sft.resolve()
    names = list(MISTAKES) if "all" in args.names else args.names
    if args.test:
        missed = [name for name in names if not caught(name)]
        sys.exit(f"not caught: {', '.join(missed)}" if missed else 0)
    sound = dict.fromkeys(MISTAKES[name].beside for name in names if name in MISTAKES)
    names = [*sound, *(name for name in names if name in MISTAKES)]
    run_all(names, args, words)
    found = read(args.out, names, args.seeds)
    print(table(found))
    if args.figure:
        args.figure.write_text(figure(found), encoding="utf-8")
    missing = [f"seed {seed}: {name}" for name in names for seed in args.seeds if seed not in found[name]]
    if missing:
        sys.exit(f"not there: {', '.join(missing)}")


if __name__ == "__main__":
    main()
