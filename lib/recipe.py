"""What the whole recipe will need, as `rlsp.py plan` prints it: memory, hours, GPU-hours, dollars and disk of
SFT, PPO and the final evaluation. lib/plan.py has the arithmetic.

c is a rlsp.Plan: PPO's settings and a Machine. Not counted are the time for loading, saving and starting, and
the logs on disk (less than 1 GB per run).
"""
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from lib import checkpoint, files, plan
from lib.flags import flag
from lib.plan import GB, GPU_OVERHEAD


@dataclass
class Machine:
    """The assumptions of a plan: the lengths that the hours follow from, the stages around PPO, and the
    GPUs."""
    mean_prompt: float = flag("model and data", 150.0, "mean tokens per prompt, for the hours", 1)
    mean_response: float = flag("model and data", 1000.0, "mean tokens per response in PPO, for the hours",
                                1)
    sft_examples: int = flag("sft and test", 90_000, "demonstrations; 0: PPO without SFT", 0)
    sft_tokens: float = flag("sft and test", 2500.0, "mean tokens of prompt with demonstration", 1)
    sft_max_tokens: int = flag("sft and test", 8192, "longest prompt with demonstration, tokens", 1)
    sft_epochs: int = flag("sft and test", 5, "passes over the demonstrations", 1)
    sft_batch: int = flag("sft and test", 64, "demonstrations per optimizer step, over all GPUs", 1)
    test_problems: int = flag("sft and test", 530, "problems of the final evaluation, of the models before "
                              "SFT, after SFT and after PPO; 0: no evaluation", 0)
    test_samples: int = flag("sft and test", 1, "responses per problem in that evaluation", 1)
    test_response: float = flag("sft and test", 1500.0, "mean tokens per response in that evaluation", 1)
    test_max_response: int = flag("sft and test", 8192, "longest response in that evaluation, tokens", 1)
    judge_seconds: float = flag("judge", 5.0, "seconds per reply of the judge, for the hours", 0)
    gpus: int = flag("machine", 8, "number of GPUs, with one process each", 1)
    gpus_per_node: int = flag("machine", 8, "GPUs per node, over which weights are sharded unless "
                              "--shard-ranks is given", 1)
    gpu_memory: float = flag("machine", 80.0, "GB (1e9 bytes) per GPU", 1e-3)
    flops: float = flag("machine", 1.5e14, "FLOP/s per GPU that matrix products reach, not its peak", 1)
    bandwidth: float = flag("machine", 1e12, "bytes/s at which decoding reads a GPU's memory", 1)
    network: float = flag("machine", 5e10, "bytes/s between GPUs, for the weights of a sharded sampler and "
                          "the partial sums of a tensor sampler", 1)
    price: float = flag("machine", 0.0, "dollars per GPU and hour", 0)


def stages(c):
    """{stage: its settings under PPO's names} of SFT, PPO and the final evaluation. SFT is treated as the
    update of a PPO step without a critic, whose rollout is all demonstrations."""
    sft = replace(c, rollout_batch=c.sft_examples, samples=1, max_prompt=c.sft_max_tokens, max_response=0,
                  train_batch=c.sft_batch, epochs=c.sft_epochs, advantage="group")
    test = replace(c, rollout_batch=c.test_problems, samples=c.test_samples,
                   max_response=c.test_max_response)
    stages = {"sft": sft, "ppo": c, "eval": test}
    return {stage: settings for stage, settings in stages.items() if settings.rollout_batch}


def models_tested(c):
    """The number of models in the final evaluation: the one given, after SFT, after PPO."""
    return 3 if c.sft_examples else 2


def held_out(c):
    """(how often PPO evaluates the policy with --eval-data, on how many problems)."""
    if not c.eval_data:
        return 0, 0
    steps = {0, c.steps, *range(0, c.steps, c.eval_every or c.steps)}
    return len(steps), len(files.load_problems(c.eval_data, ("problem",)))


def stage_seconds(config, c, shards):
    """{stage: seconds}. "held" is PPO's evaluations on held-out problems, and "judge" is what --exploration
    judge adds to PPO. Loading, saving and starting are not counted."""
    out = {}
    for stage, s in stages(c).items():
        if stage == "sft":
            took = plan.seconds(config, s, c.gpus, shards, c.sft_tokens, 0, c.gpus_per_node)
            out[stage] = took["update"] + took.get("offload", 0)
        elif stage == "ppo":
            out[stage] = c.steps * sum(plan.seconds(config, s, c.gpus, shards, c.mean_prompt,
                                               c.mean_response, c.gpus_per_node).values())
            times, problems = held_out(c)
            if times:
                test = replace(c, rollout_batch=problems, samples=c.eval_samples)
                took = plan.seconds(config, test, c.gpus, shards, c.mean_prompt, c.mean_response,
                                    c.gpus_per_node)
                out["held"] = times * took["rollout"]
            turns = math.ceil(c.rollout_batch * c.samples / c.gpus / c.judge_workers)
            out["judge"] = c.steps * turns * c.judge_seconds
        else:
            took = plan.seconds(config, s, c.gpus, shards, c.mean_prompt, c.test_response,
                                c.gpus_per_node)
            out[stage] = models_tested(c) * took["rollout"]
    return out


def checkpoint_bytes(config, c, stage):
    """Bytes of a checkpoint on disk: float32 weights and Adam's moments of all trained networks."""
    nets = plan.trained(config, c, stage)
    return plan.weights(nets, 1) + plan.optimizer(nets, 1)


def disk(config, c, stage, saves=math.inf):
    """(bytes at most, bytes at the end) of a stage's folder, into which `saves` checkpoints are written in
    turn. A new checkpoint is complete before the oldest one is removed, and the best one may be an old one.
    An evaluation writes only texts."""
    if stage == "eval":
        return 0, 0
    model = plan.frozen_copy(config, c, 1)
    one = checkpoint_bytes(config, c, stage)
    kept = c.keep + (stage == "ppo" and c.keep_best)
    return min(kept + 1, saves) * one + model, min(kept, saves) * one + model


def check_disk(folder, config, c, stage, steps):
    """Raises a ValueError if the disk has no room for the checkpoints and the model of a run of `steps` steps
    in `folder`. What it wrote there before it was stopped counts as its own.

    Without this a run would find the disk full at its second or third checkpoint, and lose all steps since
    the one before."""
    saved = checkpoint.steps(folder)
    left = steps - (int(saved[-1].name[5:]) if saved else 0)
    saves = len(saved) + math.ceil(left / (c.save_every or steps))
    most, _ = disk(config, c, stage, saves)
    parts = [Path(folder) / name for name in ("checkpoints", "model")]
    most -= sum(file.stat().st_size for part in parts for file in part.rglob("*") if file.is_file())
    # the folder of the checkpoints, which may be a link to another disk, or the nearest one that is there yet
    place = next(place for place in (parts[0], *parts[0].absolute().parents) if place.exists())
    size = shutil.disk_usage(place)
    if size.total and most > size.free:  # a total of 0: a file system that does not tell its size
        one = checkpoint_bytes(config, c, stage) / GB
        raise ValueError(
            f"{files.visible(folder, 1000)}: the run needs {most / GB:.4g} GB of disk for checkpoints of "
            f"{one:.4g} GB and a model, and {size.free / GB:.4g} GB are free; --keep is {c.keep}, "
            "and one checkpoint more is there while it is written")


def report(config, c, shards):
    """Print the whole plan; returns whether every stage fits."""
    memory = c.gpu_memory * GB - GPU_OVERHEAD
    sampler, why = plan.choose_sampler([config], c, c.gpus, shards, memory, "ppo", c.gpus_per_node)
    c = replace(c, sampler=sampler)
    policy = plan.elements(plan.shapes(config)) / GB
    critic = plan.elements(plan.shapes(config, critic=True)) / GB if c.advantage == "gae" else 0
    print(f"{policy:.2f}e9 parameters, critic {critic:.2f}e9; {c.gpus} GPU(s), "
          f"weights sharded over {shards}, {c.gpus // shards} replica(s)\n{why}\n")
    print("\n".join(plan.table(plan.phases(config, c, c.gpus, shards, "ppo", c.gpus_per_node))) + "\n")
    fits = [verdict(config, settings, shards, stage) for stage, settings in {"ppo": c, **stages(c)}.items()]
    if c.offload:
        on_host = plan.host_bytes(config, c, shards)
        print(f"host memory: {on_host / GB:.1f} GB per GPU for weights, gradients and optimizer")
    print("\n".join(["", *step_lines(config, c, shards), "", *recipe_lines(config, c, shards)]))
    return all(fits)


def verdict(config, c, shards, stage):
    """Print a stage's peak; returns whether it fits."""
    phase, need = plan.peak(plan.phases(config, c, c.gpus, shards, stage, c.gpus_per_node))
    memory = c.gpu_memory * GB - GPU_OVERHEAD
    print(f"{stage} peak: {need / GB:.1f} GB in {phase} + {GPU_OVERHEAD / GB:.1f} for CUDA and NCCL "
          f"(assumed), of {c.gpu_memory:.1f}: " + ("fits" if need <= memory else "DOES NOT FIT"))
    if need > memory:
        changes = plan.advice(config, c, c.gpus, shards, memory, stage, c.gpus_per_node)
        print(f"it fits with {plan.words(changes)}" if changes else
              "no flag of this table makes it fit: it needs more GPUs, or larger ones")
    return need <= memory


def step_lines(config, c, shards):
    """Lines with the FLOPs and seconds of a PPO step."""
    work = plan.flops(config, c, c.mean_prompt, c.mean_response)
    took = plan.seconds(config, c, c.gpus, shards, c.mean_prompt, c.mean_response, c.gpus_per_node)
    total = sum(took.values())
    return [f"a PPO step: {c.rollout_batch * c.samples} responses of {c.mean_response:.0f} tokens "
            f"after prompts of {c.mean_prompt:.0f}; {sum(work.values()):.2e} FLOPs ("
            + ", ".join(f"{k} {v:.1e}" for k, v in work.items()) + ")",
            f"at {c.flops:.3g} FLOP/s, {c.bandwidth:.3g} B/s of memory, {c.network:.3g} B/s of network "
            f"per GPU: {total:.0f} s (" + ", ".join(f"{k} {v:.0f}" for k, v in took.items())
            + f"), {c.steps} steps in {c.steps * total / 3600:.1f} hours"]


def recipe_lines(config, c, shards):
    """The stages as a table of hours, GPU-hours, dollars and disk, followed by what it assumes."""
    took = stage_seconds(config, c, shards)
    tested = models_tested(c)
    what = {"sft": f"{c.sft_examples} demonstrations of {c.sft_tokens:.0f} tokens, {c.sft_epochs} epochs",
            "ppo": f"{c.steps} steps",
            "eval": f"{tested} models, {c.test_problems} problems x {c.test_samples}, "
                    f"{c.test_response:.0f} tokens",
            "judge": f"{c.judge_workers} requests at once per GPU, {c.judge_seconds:g} s each"}
    lines = [f"{'stage':5}  {'':52}{'hours':>7}{'GPU-hours':>11}" + f"{'dollars':>9}" * bool(c.price)
             + f"{'disk GB':>9}{'kept GB':>9}"]

    def add(stage, text, s, gigabytes=""):
        hours = s / 3600
        price = f"{hours * c.gpus * c.price:9.0f}" if c.price else ""
        lines.append(f"{stage:5}  {text:52}{hours:7.1f}{hours * c.gpus:11.1f}{price}{gigabytes}")

    most = kept = 0
    for stage, settings in stages(c).items():
        at_most, at_end = disk(config, settings, stage)
        add(stage, what[stage], took[stage], f"{at_most / GB:9.1f}{at_end / GB:9.1f}")
        if stage == "ppo" and "held" in took:
            add("held", "{} evaluations in PPO, {} problems x {}".format(*held_out(c), c.eval_samples),
                took["held"])
        most = max(most, kept + at_most)
        kept += at_end
    judge = took.pop("judge")
    gigabytes = f"{most / GB:9.1f}{kept / GB:9.1f}"
    add("all", "without a judge", sum(took.values()), gigabytes)
    add("judge", what["judge"], judge)
    add("all", "with --exploration judge", sum(took.values()) + judge, gigabytes)
    one = checkpoint_bytes(config, c, "ppo") / GB
    return lines + [
        f"disk: a checkpoint of PPO has {one:.1f} GB (--keep {c.keep}{' --keep-best' * c.keep_best}, "
        f"and one more while it is written), RUN/model {plan.frozen_copy(config, c, 1) / GB:.1f}; downloads "
        "are not counted",
        "GB and FLOPs are arithmetic on config.json and flags. Assumed, each a flag: numbers and lengths of "
        "texts, FLOP/s, B/s, the judge's seconds; nothing was timed on GPUs"]
