"""RLSP on the command line, with one subcommand per stage.

    python rlsp.py sft    --model FOLDER --data FILE.jsonl --out runs/sft
                          supervised fine-tuning on demonstrations
    python rlsp.py ppo    --model FOLDER --data FILE.jsonl --out runs/ppo
                          PPO with a verifier and an exploration reward
    python rlsp.py eval   --model FOLDER ... --data FILE.jsonl --out runs/eval
                          accuracy, pass@k, maj@k, lengths
    python rlsp.py sample --model FOLDER --problem TEXT
                          look at some responses
    python rlsp.py plan   --model FOLDER --gpus N --gpu-memory GB
                          memory, hours and disk of the recipe, from config.json alone
    python rlsp.py export runs/ppo --checkpoint step-000020 --out FOLDER
                          a Hugging Face folder of any checkpoint
    python rlsp.py report runs/ppo runs/eval ...
                          one HTML page of runs and evaluations

The same commands run on several processes: torchrun --nproc_per_node 8 rlsp.py ppo ...
A run that was stopped or killed continues with: rlsp.py sft | ppo | eval --resume RUN

Exit status:
    0   done
    1   the run cannot go on (a number that is not finite, a full disk, ...); one line says why
    2   bad input; one line says what, before anything is computed or written
    75  stopped by SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU after a checkpoint was
        written; start it again with --resume

torchrun turns every failure into 1, so the file RUN/stopped exists as long as a run is stopped in
this way. RUN/done is the last file that a run writes: if it exists, the run is complete.
"""
import dataclasses
import json
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # `python -I` leaves this folder out

# With this setting segments of CUDA memory can grow, so that less is lost to fragmentation. torch
# reads it when it is imported.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from lib.signals import REQUEUE, Stopped, end, keep_streams, signals

if __name__ == "__main__":
    keep_streams()
    signals.install(importing=True)

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from lib import checkpoint, cli, cpu, decode, evaluation, files, flags, guards, hf, inputs, logs
from lib import parallel, plan, recipe, report, threads
from lib.chat import Prompting
from lib.export import Export, export
from lib.flags import REQUIRED, flag, pick
from lib.tracking import Tracking
import model as M
from ppo import PPOConfig
import ppo



# ---------------------------------------------------------------------------------- flags

@dataclass(kw_only=True)
class Run:
    """The flags shared by the commands that write a run's folder."""
    model: str = flag("model and data", REQUIRED, "Hugging Face model folder", resume="content")
    data: str = flag("model and data", REQUIRED, "jsonl with problem and answer", resume="content")
    dtype: str = flag(
        "memory", "auto", "compute type (master weights: float32); auto: bfloat16 on GPUs and on "
        "processors that multiply it, else float32", choices=("auto", "bfloat16", "float32"))
    resume: str | None = flag(
        "run", None, "continue the run in this folder, with its flags",
        resume="once")
    changed_input: bool = flag(
        "run", False, "with --resume: continue although data, model, verifier, reward or rubric "
        "have changed", resume="once")


@dataclass(kw_only=True)
class Training(Run, Tracking):
    checkpoint: str | None = flag(
        "run", None, "checkpoint for --resume, such as step-000020; without it, the newest one",
        resume="once")


@dataclass(kw_only=True)
class SFT(Prompting, Training, pick(
        PPOConfig, "seed", "keep", "warmup", "lr_end", "adam_eps", "grad_clip", "micro_tokens",
        "recompute", "compile", "offload", "shard_ranks", save_every=200)):
    """Supervised fine-tuning on demonstrations of the reasoning process."""
    command = "sft"
    data: str = flag(
        "model and data", REQUIRED, "jsonl with problem and solution", resume="content")
    from_scratch: bool = flag(
        "model and data", False, "start from random weights instead of the folder's")
    max_tokens: int = flag(
        "model and data", 8192, "longest prompt with demonstration allowed, tokens", 1)
    drop_long: bool = flag(
        "model and data", False, "leave out longer demonstrations, and say how many")
    epochs: int = flag("update", 2, "passes over the data", 1, resume="longer")
    batch: int = flag("update", 64, "demonstrations per optimizer step, over all ranks", 1)
    lr: float = flag("update", 1e-5, "learning rate", 0)
    run: str = flag(
        "run", "runs/sft", "folder to write; must not exist", resume="any", option="--out")


@dataclass(kw_only=True)
class PPO(Prompting, Training, PPOConfig):
    """PPO with an outcome verifier and an exploration reward. The defaults are the paper's values
    for an 8B model."""
    command = "ppo"
    run: str = flag(
        "run", "runs/ppo", "folder to write; must not exist", resume="any", option="--out")


@dataclass(kw_only=True)
class Eval(Prompting, Run, pick(
        PPOConfig, "seed", "max_prompt", "samples", "verifier", "slots", "kv_gb", "sampler",
        "shard_ranks")):
    """Accuracy of one or more models on a problem file."""
    command = "eval"
    model: list[str] = flag(
        "model and data", REQUIRED, "Hugging Face model folders; the table has a row for each",
        resume="content")
    limit: int | None = flag("model and data", None, "take only the first N problems", 1)
    temperature: float = flag("rollout", 0.7, "sampling temperature; 0 is greedy", 0)
    max_response: int | None = flag(
        "rollout", None, "longest response, tokens; without it, 8192 or as many as the model has "
        "room for", 1)
    any_answer: bool = flag(
        "reward", False, "if there is no box, take 'the answer is', #### or the last number")
    run: str = flag(
        "run", "runs/eval", "folder to write; must not exist", resume="any", option="--out")


@dataclass(kw_only=True)
class Sample(Prompting, pick(
        PPOConfig, "samples", "exploration", "alpha", "length_scale", "length_floor", "steps_scale",
        "verifier", "seed", max_response=1024),
        pick(Eval, "limit", "temperature"), pick(Run, "model", "dtype")):
    """Print responses to a problem."""
    command = "sample"
    problem: str | None = flag("model and data", None, "text of a problem")
    answer: str | None = flag("model and data", None, "its answer, for the verifier")
    data: str | None = flag(
        "model and data", None, "jsonl with problem and answer, instead of --problem")


@dataclass(kw_only=True)
class Plan(PPOConfig, recipe.Machine):
    """Compute memory per phase, FLOPs, hours and disk of SFT, PPO and evaluation from config.json
    alone. The exit status is 2 if a stage does not fit. All settings of ppo are accepted; those
    that cost neither memory nor time change nothing."""
    command = "plan"
    model: str = flag("model and data", REQUIRED, "folder with a config.json; needs no weights")


@dataclass(kw_only=True)
class Report:
    """Write one HTML page: curves, rollouts and tokens of runs, tables of evaluations."""
    command = "report"
    runs: list[str] = flag(
        "model and data", REQUIRED, "folders that sft, ppo or eval wrote", option="RUN")
    out: str | None = flag(
        "run", None, "file to write; without it, report.html in the first RUN")
    csv: str | None = flag(
        "run", None, "also write the curves to this CSV file, one line per run and step")
    live: bool = flag("run", False, "rewrite the page until the runs are done")


COMMANDS = {kind.command: kind for kind in (SFT, PPO, Eval, Sample, Plan, Export, Report)}


def parser():
    return flags.parser(__doc__, COMMANDS)


def read_flags(words):
    return cli.read_flags(parser(), COMMANDS, words)


def check_room(args, size, mesh, stage, steps):
    """Print the plan on rank 0 and return the sampler, which is the same for all ranks. Raises
    ValueError if the run, with the settings `size`, does not fit into memory or onto the disk."""
    line, sampler = parallel.together(lambda: plan.check(
        hf.read_config(args.model), size, parallel.world_size(), mesh["shard"].size(),
        *parallel.memory(), stage, parallel.environment()[3]), all_ranks=True)[0]
    parallel.together(lambda: recipe.check_disk(
        args.run, hf.read_config(args.model), size, stage, steps))
    if parallel.rank() == 0:
        print(line, flush=True)
    return sampler


# ---------------------------------------------------------------------------------- sft

def sft_example(chat, row):
    """Prompt + demonstration + end of turn, as (token ids, mask of the trained ones)."""
    ids = chat.prompt_ids(row["problem"])
    mask = [False] * len(ids)
    pieces = row["solution"] if isinstance(row["solution"], list) else [[row["solution"], True]]
    for i, (text, trained) in enumerate(pieces):
        new = chat.response_ids(text, first=i == 0)
        ids, mask = ids + new, mask + [trained] * len(new)
    return ids + [chat.end], mask + [pieces[-1][1]]


def sft(args):
    """Maximum likelihood of the demonstrations' tokens."""
    with cli.checked_input():
        with parallel.alike():
            chat, examples = inputs.for_sft(args, sft_example)
        longest = max(len(ids) for ids, _ in examples)
        device, mesh = parallel.start(args.shard_ranks, args.offload)
        size = PPOConfig(
            max_prompt=longest, max_response=0, train_batch=args.batch, dtype=args.dtype,
            micro_tokens=args.micro_tokens, recompute=args.recompute, offload=args.offload,
            keep=args.keep, save_every=args.save_every)
        total = args.epochs * math.ceil(len(examples) / args.batch)
        check_room(args, size, mesh, "sft", total)
        found = checkpoint.find(args.run, args.checkpoint) if args.resume else None
        dtype = getattr(torch, args.dtype)
        policy = hf.load(args.model, M.Llama, torch.float32, device, mesh, dtype,
                         init_seed=args.seed if args.from_scratch else None, offload=args.offload)
        run = cli.new_run(args, found)
        policy.model.recompute = args.recompute
        if args.compile:
            parallel.compile_blocks(policy)
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps, weight_decay=0.0,
            fused=True)
        trained = {"policy": policy}, {"policy": optimizer}
        first = checkpoint.resume(run, *trained, found)["step"] if args.resume else 0
    signals.leave = False
    with logs.bar("sft", total, first) as bar:
        for step in range(first + 1, total + 1):
            chosen = examples_of_step(examples, step, args)
            metrics, timing = sft_step(policy, optimizer, chosen, step, total, run, device, args)
            logs.log(run, {"metrics": [metrics], "timing": [timing]})
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", grad_norm=f"{metrics['grad_norm']:.2f}")
            checkpoint.after_step(step, total, args.save_every, lambda: checkpoint.save(
                run, *trained, step, {"policy": step}, args.keep))
    hf.save(policy, run / "model", dtype)
    parallel.together(lambda: chat.write(run / "model"))
    if parallel.rank() == 0:
        print(f"wrote {files.visible(run / 'model', 1000)}")


def examples_of_step(examples, step, args):
    """The batch of a step, counted from 1. The data has a new order in each epoch."""
    steps_per_epoch = math.ceil(len(examples) / args.batch)
    epoch, at = divmod(step - 1, steps_per_epoch)
    order = parallel.epoch_order(len(examples), args.seed, epoch)
    return [examples[i] for i in order[at * args.batch : (at + 1) * args.batch]]


def sft_step(policy, optimizer, chosen, step, total, run, device, args):
    """One optimizer step on the chosen examples. Returns (metrics, timing)."""
    started = time.perf_counter()
    count = sum(int(mask.sum()) for _, mask in chosen)
    loss = sft_loss(policy, chosen, count, device, args.micro_tokens)
    norm = guards.clip_gradients(policy, args.grad_clip)
    batch = {} if math.isfinite(loss + norm) else {
        name: ppo.pad([example[i] for example in chosen], torch.long)
        for i, name in enumerate(("tokens", "mask"))}
    for name, x in (("loss", loss), ("grad_norm", norm)):
        guards.check_finite(name, x, step, run, batch, {"policy": policy})
    lr = args.lr * ppo.lr_factor(step - 1, total, args.warmup, args.lr_end)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    timing = logs.sft_timing(policy.config, chosen, count, time.perf_counter() - started, device,
                             getattr(torch, args.dtype))
    return dict(step=step, loss=loss, grad_norm=norm, lr=lr, tokens=count), timing | {"step": step}


def sft_loss(policy, chosen, count, device, micro_tokens):
    """Forward and backward of the mean loss over the `count` trained tokens of the whole step. (A
    mean per sequence or micro-batch would give the tokens of long demonstrations less weight.)
    Returns the loss."""
    ranks = parallel.world_size()
    lengths = [len(ids) for ids, _ in chosen]
    loss_sum = torch.zeros(1)
    for shares in ppo.micro_batches(range(len(chosen)), lengths, micro_tokens, ranks):
        nothing = (chosen[0][0][:2], [False, False])
        mine = [chosen[i] for i in shares[parallel.rank()]] or [nothing]
        tokens = ppo.pad([ids for ids, _ in mine], torch.long).to(device)
        mask = ppo.pad([m for _, m in mine], torch.bool).to(device)
        loss = -policy.logprobs(tokens, mask, entropy=False)[0].sum() / count
        (loss * ranks).backward()
        loss_sum += loss.detach().cpu()
    return float(parallel.all_reduce(loss_sum))


# ---------------------------------------------------------------------------------- ppo

def run_ppo(args):
    with cli.checked_input():
        with parallel.alike():
            chat, problems, held_out, longest, verifier, function = inputs.for_ppo(args)
        device, mesh = parallel.start(args.shard_ranks, args.offload)
        size = dataclasses.replace(args, max_prompt=longest)
        args.sampler = check_room(args, size, mesh, "ppo", args.steps)
        found = checkpoint.find(args.run, args.checkpoint) if args.resume else None
        trainer = ppo.Trainer(args, args.model, problems, chat, args.run, device, mesh,
                              function, verifier, held_out)
        if not (verifier or function):
            trainer.gold_warning = logs.gold_warning(args.data, problems)
            if trainer.gold_warning:
                logs.say(f"warning: {trainer.gold_warning}")
        cli.new_run(args, found)
        if args.resume:
            trainer.resume(found)
    trainer.train()
    if parallel.rank() == 0:
        print(f"wrote {files.visible(Path(args.run) / 'model', 1000)}")


# ---------------------------------------------------------------------------------- plan

def run_plan(args):
    """Print what the recipe would need on GPUs, which need not be present. The exit status is 2 if
    a stage does not fit."""
    with cli.checked_input():
        config = hf.read_config(args.model)
        shards = args.shard_ranks or min(args.gpus, args.gpus_per_node)
        if args.gpus % shards:
            raise ValueError(f"--shard-ranks is {shards}, expected a divisor of --gpus {args.gpus}")
        fits = recipe.report(config, args, shards)
    sys.exit(0 if fits else 2)


# ---------------------------------------------------------------------------------- eval

def run_eval(args):
    with cli.checked_input():
        with parallel.alike():
            rows, verifier, room, longest = inputs.for_eval(args)
            unread = "" if verifier else logs.gold_warning(args.data, rows)
        args = dataclasses.replace(args, max_response=room)
        device, mesh = parallel.start(args.shard_ranks)
        args.sampler = evaluation.choose_sampler(args, len(rows), longest, mesh)
        run = cli.new_run(args)
        if unread:
            logs.say(f"warning: {unread}")
        outputs = [run / f"outputs-{i + 1}.jsonl" for i in range(len(args.model))]
        earlier = parallel.together(
            lambda: [evaluation.earlier_results(file, rows, args) for file in outputs])[0]
    summaries = {}
    for folder, file, results in zip(args.model, outputs, earlier):
        if results is None:
            results = evaluation.evaluate(folder, rows, args, device, mesh, verifier)
            lines = "".join(json.dumps(row) + "\n" for row in results)
            parallel.together(lambda: files.write_text(file, lines))
        summaries[folder] = evaluation.by_group(results, args.samples)
    if parallel.rank() == 0:
        files.write_text(run / "summary.json", json.dumps(summaries, indent=2) + "\n")
        evaluation.print_table(summaries, args.samples)
        print(f"{len(rows)} problems of {files.visible(args.data, 1000)}, {args.samples} sample(s) "
              f"at temperature {args.temperature}, at most {args.max_response} tokens; "
              f"outputs in {files.visible(run, 1000)}")


# ---------------------------------------------------------------------------------- sample

def run_sample(args):
    """Print responses with their verdicts and the parts of Eq. 1."""
    with cli.checked_input():
        with parallel.alike():
            chat, rows, verifier = inputs.for_sample(args)
        device, _ = parallel.start()
        net = hf.load(args.model, M.Llama, getattr(torch, args.dtype), device).eval()
    prompts = [chat.prompt_ids(r["problem"]) for r in rows for _ in range(args.samples)]
    with guards.sampling_from(args.model, net):
        responses = decode.generate(net, prompts, args.max_response, args.temperature, chat.eos,
                                    seed=args.seed, decoder=cpu.CPUDecoder.of(net))
    for i, response in enumerate(responses):
        row = rows[i // args.samples]
        text = chat.tokenizer.decode(response, skip_special_tokens=True)
        truncated = response[-1] not in chat.eos
        evaluation.show(row, text, len(response), truncated, chat.tokenizer, verifier, args)


# ---------------------------------------------------------------------------------- report

def run_report(args):
    with cli.checked_input():
        out = Path(args.out or Path(args.runs[0]) / "report.html")
        # Settings that may change within a run do not distinguish one run from another
        free = {f.name for kind in COMMANDS.values() for f in dataclasses.fields(kind)
                if f.metadata["resume"] in ("any", "once")}
        defaults = {f.name: f.default for f in dataclasses.fields(PPOConfig)}
        write = report.follow if args.live else report.write
        write(args.runs, out, args.csv and Path(args.csv), free, defaults)
    for file in filter(None, (out, args.csv)):
        size = os.path.getsize(file) / 1e6
        print(f"wrote {files.visible(file, 1000)} ({size:.1f} MB)")


# ---------------------------------------------------------------------------------- main

@record  # torchrun's summary then shows the error that came first
def main():
    parallel.keep_freed_memory()
    threads.share_cores()
    with cli.checked_input():
        parallel.join()  # comes first, so that no rank waits for one that refuses its flags
        with parallel.alike():
            args = read_flags(sys.argv[1:])
        cli.check_ranks(args)
    stages = {"sft": sft, "ppo": run_ppo, "eval": run_eval, "sample": run_sample,
              "plan": run_plan, "export": export, "report": run_report}
    with cli.exit_statuses(args):
        if not isinstance(args, Run):
            stages[args.command](args)
        elif parallel.together(lambda: cli.is_done(args))[0]:
            if parallel.rank() == 0:
                print(f"{files.visible(args.run, 1000)} is done")
        else:
            signals.install()
            if args.resume:
                with cli.checked_input():
                    parallel.together(lambda: files.lock(args.run))
            stages[args.command](args)
            parallel.together(lambda: files.write_text(Path(args.run) / "done", cli.planned(args)))


if __name__ == "__main__":
    status = 1
    try:
        signals.importing = False
        main()
        status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    except Stopped:
        print(f"rlsp.py: stopped by {signals.name()}", file=sys.stderr)
        status = REQUEUE
    except Exception:
        print(files.visible(traceback.format_exc(), 100_000, files.LINES), file=sys.stderr)
    end(status, output_matters=sys.argv[1:2] not in (["sft"], ["ppo"], ["eval"]))
