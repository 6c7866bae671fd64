"""RLSP on the command line: one subcommand a stage.

    python rlsp.py sft    --model FOLDER --data FILE.jsonl --out runs/sft     supervised fine-tuning on demonstrations
    python rlsp.py ppo    --model FOLDER --data FILE.jsonl --out runs/ppo     PPO with verifier and exploration reward
    python rlsp.py eval   --model FOLDER ... --data FILE.jsonl --out runs/ev  accuracy, pass@k, maj@k, lengths
    python rlsp.py sample --model FOLDER --problem TEXT                       look at some responses
    python rlsp.py report runs/ppo runs/ev ...                                one HTML page of runs and evaluations

The same commands run on several processes: torchrun --nproc_per_node 8 rlsp.py ppo ...
Bad input gets one line on standard error and exit status 2 before anything is computed or written; training that
cannot go on (a number that is not finite, say) one line and exit status 1.
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm

import model as M
import ppo
import rewards

ROOT = Path(__file__).resolve().parent
MAY_CHANGE = ("resume", "save_every", "keep", "log_rollouts", "log_tokens", "slots", "micro_tokens", "recompute",
              "judge_url", "judge_workers", "judge_failures")  # at --resume
REWARD_FLAGS = ("exploration", "alpha", "length_scale", "length_floor", "steps_scale")  # of Eq. 1; `sample` has them, too


# ---------------------------------------------------------------------------------------------------- input

@contextlib.contextmanager
def checked_input():
    """What goes wrong in here is the caller's input: one line, exit status 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        print(f"rlsp.py: error: {e}", file=sys.stderr)
        sys.exit(2)


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face model folder with its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises Exception itself
        raise ValueError(f"{path}: not a tokenizer: {e}") from None
    tokenizer.encode_special_tokens = True  # <|eot_id|> in somebody's text is text; templates place the real ones by id
    tokenizer.no_truncation()
    tokenizer.no_padding()
    M.chat_style(tokenizer)
    size = M.Config.from_pretrained(folder).vocab_size
    if tokenizer.get_vocab_size() > size:
        raise ValueError(f"{path}: {tokenizer.get_vocab_size()} tokens, but config.json's vocab_size is {size}")
    return tokenizer


def read_jsonl(path, growing=False):
    """(line number, object) of each line of a jsonl file; growing: a last line still being written is left out."""
    with open(path, encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    if growing and not line.endswith("\n"):
                        return
                    raise ValueError(f"{path}:{number}: not valid JSON: {e}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8 text: {e}") from None


def load_problems(path, need=("problem", "answer"), limit=None):
    """Rows of a jsonl file, each with the texts `need` (solution may also be a list of [text, trained] pairs)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected problems as jsonl")
    rows = []
    for number, row in read_jsonl(path):
        for key in need:
            value = row.get(key)
            pieces = key == "solution" and isinstance(value, list) and value and all(
                isinstance(p, list) and [type(x) for x in p] == [str, bool] for p in value)
            if not pieces and not (isinstance(value, str) and value.strip()):
                found = "nothing" if value is None else repr(value)[:60]
                raise ValueError(f"{path}:{number}: {key} is {found}, expected text")
        rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path}: holds no problem")
    return rows[:limit]


def check_prompts(path, rows, tokenizer, allowed):
    """The length of the longest prompt, tokens; a ValueError names the first line whose prompt is longer than allowed."""
    lengths = [len(M.chat_prompt(tokenizer, row["problem"])) for row in rows]
    for row, n in zip(rows, lengths):
        if n > allowed:
            raise ValueError(f"{path}:{row['line']}: the prompt has {n} tokens, expected at most {allowed} (--max-prompt)")
    return max(lengths)


def check_length(folder, tokens):
    allowed = M.Config.from_pretrained(folder).max_position_embeddings
    if tokens > allowed:
        raise ValueError(f"{folder}/config.json: max_position_embeddings is {allowed}, but prompt and response may take {tokens} tokens")


def load_function(spec):
    """FILE.py:FUNCTION -> the function. The file is the user's own code."""
    file, _, name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise FileNotFoundError(f"--reward {spec}: expected an existing FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location("reward_function", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {spec}: {file} has no function {name!r}")
    return getattr(module, name)


def new_run(folder, args):
    """Make the run's folder with config.json: every flag, versions, git commit. Rank 0 alone does it, the others wait."""
    folder = Path(folder)
    if M.rank() == 0:
        folder.mkdir(parents=True)
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "git": git.stdout.strip() or None,
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {M.world_size()} process(es)"
                    + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")}
        M.write_text(folder / "config.json", json.dumps({"flags": vars(args), "versions": versions}, indent=2, default=str) + "\n")
    if M.world_size() > 1:
        dist.barrier()
    return folder


def must_be_new(folder):
    if os.environ.get("RANK", "0") == "0" and Path(folder).exists():
        raise FileExistsError(f"{folder}: exists already; nothing was overwritten, give another --out")


# ---------------------------------------------------------------------------------------------------- sft

def sft_example(tokenizer, row):
    """Prompt + demonstration + end of turn, as (ids, mask of the trained ones)."""
    ids = M.chat_prompt(tokenizer, row["problem"])
    mask = [False] * len(ids)
    pieces = row["solution"] if isinstance(row["solution"], list) else [[row["solution"], True]]
    for text, trained in pieces:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids, mask = ids + new, mask + [trained] * len(new)
    return ids + [M.end_of_turn(tokenizer)], mask + [pieces[-1][1]]


def sft(args):
    """Maximum likelihood of the demonstrations' tokens. The loss is a mean over the trained tokens of the whole optimizer
    step: a mean a sequence or a micro-batch would give the tokens of long demonstrations less weight."""
    with checked_input():
        must_be_new(args.run)
        tokenizer = load_tokenizer(args.model)
        if not args.from_scratch:
            M.weight_files(args.model)
        rows = load_problems(args.data, ("problem", "solution"))
        examples = [sft_example(tokenizer, row) for row in rows]
        for row, (ids, _) in zip(rows, examples):
            if len(ids) > args.max_tokens:
                raise ValueError(f"{args.data}:{row['line']}: {len(ids)} tokens, expected at most {args.max_tokens} (--max-tokens)")
        check_length(args.model, max(len(ids) for ids, _ in examples))
    device, mesh = M.start_processes()
    with checked_input():
        policy = M.load_model(M.Llama, args.model, torch.float32, device, mesh, getattr(torch, args.dtype),
                              init_seed=args.seed if args.from_scratch else None)
        run = new_run(args.run, args)
    policy.model.recompute = args.recompute
    if args.compile:
        M.compile_blocks(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    ranks = M.world_size()
    steps_an_epoch = math.ceil(len(examples) / args.batch)
    total = args.epochs * steps_an_epoch
    bar = tqdm(total=total, desc="sft", disable=M.rank() != 0)
    for step in range(total):
        started = time.perf_counter()
        order = ppo.epoch_order(len(examples), args.seed, step // steps_an_epoch)
        at = step % steps_an_epoch * args.batch
        chosen = [examples[i] for i in order[at : at + args.batch]]
        lengths = [len(ids) for ids, _ in chosen]
        count, loss_sum = sum(sum(mask) for _, mask in chosen), torch.zeros(1)
        for shares in ppo.micro_batches(range(len(chosen)), lengths, args.micro_tokens, ranks):
            mine = [chosen[i] for i in shares[M.rank()]] or [(chosen[0][0][:2], [False, False])]
            tokens = ppo.pad([ids for ids, _ in mine], torch.long).to(device)
            mask = ppo.pad([m for _, m in mine], torch.bool).to(device)
            loss = -policy.logprobs(tokens, mask, entropy=False)[0].sum() / count
            (loss * ranks).backward()
            loss_sum += loss.detach().cpu()
        loss = float(ppo.all_reduce(loss_sum))
        norm = float(M.full(torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ppo.TrainingError(f"sft step {step + 1}: loss {loss} and gradient norm {norm} are not both finite")
        lr = args.lr * ppo.lr_factor(step, total, args.warmup, args.lr_end)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if M.rank() == 0:
            seconds = time.perf_counter() - started
            flops_per_s = M.flops(policy.config, lengths, count) / seconds
            timing = {"tokens_per_s": sum(lengths) / seconds, "flops_per_s": flops_per_s,
                      "mfu": flops_per_s / ranks / M.matrix_peak(device, getattr(torch, args.dtype))}
            ppo.append_jsonl(run / "metrics.jsonl", [{"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": count, "timing": timing}])
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", grad_norm=f"{norm:.2f}")
    bar.close()
    policy.save_pretrained(run / "model", getattr(torch, args.dtype))
    if M.rank() == 0:
        ppo.copy_tokenizer(args.model, run / "model")
        print(f"wrote {run / 'model'}")


# ---------------------------------------------------------------------------------------------------- ppo

def run_ppo(args):
    with checked_input():
        if args.resume:
            if not Path(args.run).is_dir():
                raise FileNotFoundError(f"{args.run}: no such run to resume")
            started = M.read_json(Path(args.run) / "config.json").get("flags", {})
            for name, value in vars(args).items():
                if name not in MAY_CHANGE and started.get(name) != value:
                    raise ValueError(f"--resume: {name} is {value!r}, but {args.run} was started with {started.get(name)!r}")
        else:
            must_be_new(args.run)
        config = ppo.PPOConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ppo.PPOConfig)})
        if config.advantage == "group" and config.samples < 2:
            raise ValueError("--advantage group: --samples is 1, expected at least 2 (the group's mean is the baseline)")
        if config.advantage == "gae" and config.freeze_steps >= config.steps:
            raise ValueError(f"--freeze-steps is {config.freeze_steps}, expected fewer than --steps {config.steps}")
        if config.exploration == "judge":
            rewards.check_judge(config.judge_url, config.judge_model)
        tokenizer = load_tokenizer(args.model)
        M.weight_files(args.model)
        problems = load_problems(args.data)
        longest = check_prompts(args.data, problems, tokenizer, config.max_prompt)
        check_length(args.model, longest + config.max_response)
        function = load_function(args.reward) if args.reward else None
    device, mesh = M.start_processes()
    with checked_input():
        trainer = ppo.Trainer(config, args.model, problems, tokenizer, args.run, device, mesh, function)
        if args.resume:
            trainer.resume()
        else:
            new_run(args.run, args)
    trainer.train()
    if M.rank() == 0:
        print(f"wrote {Path(args.run) / 'model'}")


# ---------------------------------------------------------------------------------------------------- eval

def pass_at_k(n, c, k):
    """Probability that at least one of k samples is right, estimated without bias from c right ones of n (2107.03374)."""
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers):
    """The answer that most samples agree on, mathematically equal ones counted together; ties go to the earlier one."""
    groups = []  # [representative, votes]
    for a in answers:
        if a is not None:
            match = next((g for g in groups if g[0] == a or rewards.answers_equal(a, g[0])), None)
            if match:
                match[1] += 1
            else:
                groups.append([a, 1])
    return max(groups, key=lambda g: g[1])[0] if groups else None


def summarize(rows, n):
    """Scores of evaluated problems (rows with correct, answers, tokens, each a list of n samples)."""
    mean = lambda values: sum(values) / len(values)
    accuracy = [mean(r["correct"]) for r in rows]
    out = {"problems": len(rows), "accuracy": mean(accuracy),
           "standard_error": math.sqrt(sum((a - mean(accuracy)) ** 2 for a in accuracy) / max(1, len(rows) - 1) / len(rows)),
           "tokens": mean([t for r in rows for t in r["tokens"]]), "truncated": mean([t for r in rows for t in r["truncated"]]),
           "answered": mean([a is not None for r in rows for a in r["answers"]])}
    for k in (2**i for i in range(1, n.bit_length()) if 2**i <= n):
        out[f"pass@{k}"] = mean([pass_at_k(n, sum(r["correct"]), k) for r in rows])
        votes = []  # maj@k over the disjoint groups of k samples
        for r in rows:
            for i in range(0, n - k + 1, k):
                answer = majority(r["answers"][i : i + k])
                votes.append(answer is not None and rewards.answers_equal(answer, r["answer"]))
        out[f"maj@{k}"] = mean(votes)
    return out


def evaluate(folder, rows, args, device):
    """Sample and verify; every rank does its share. Returns one dict a problem, in order, on every rank."""
    tokenizer = load_tokenizer(folder)
    net, eos = M.Llama.from_pretrained(folder, getattr(torch, args.dtype), device).eval(), M.eos_ids(folder, tokenizer)
    n, ranks = args.samples, M.world_size()
    mine = range(M.rank(), len(rows) * n, ranks)
    prompts = [M.chat_prompt(tokenizer, r["problem"]) for r in rows]
    with tqdm(total=len(mine), desc=f"eval {folder}", disable=M.rank() != 0) as bar:
        responses = M.generate(net, [prompts[i // n] for i in mine], args.max_response, args.temperature, eos, seed=args.seed,
                               streams=mine, slots=args.slots, progress=bar)
    results = []
    for i, response in zip(mine, responses):
        text = tokenizer.decode(response, skip_special_tokens=True)
        correct, answer, reason = rewards.explain(text, rows[i // n]["answer"], boxed_only=not args.any_answer)
        results.append((i, text, correct, answer, reason, len(response), response[-1] not in eos))
    if ranks > 1:
        gathered = [None] * ranks  # objects of our own processes
        dist.all_gather_object(gathered, results)
        results = sorted(sum(gathered, []))
    out = []
    for j, row in enumerate(rows):
        _, texts, correct, answers, reasons, tokens, truncated = map(list, zip(*results[j * n : (j + 1) * n]))
        out.append({k: row[k] for k in ("unique_id", "subject", "level", "problem", "answer") if k in row}
                   | dict(correct=correct, answers=answers, tokens=tokens, truncated=truncated, reasons=reasons, responses=texts))
    return out


def run_eval(args):
    with checked_input():
        must_be_new(args.run)
        rows = load_problems(args.data, limit=args.limit)
        if args.temperature == 0 and args.samples > 1:
            raise ValueError(f"--samples is {args.samples}, expected 1 at --temperature 0: greedy samples are all the same")
        room = 8192  # the paper's, or what the smallest model has beside the longest prompt
        for folder in args.model:
            tokenizer = load_tokenizer(folder)
            M.weight_files(folder)
            longest = check_prompts(args.data, rows, tokenizer, args.max_prompt)
            check_length(folder, longest + (args.max_response or 1))
            room = min(room, M.Config.from_pretrained(folder).max_position_embeddings - longest)
        args.max_response = args.max_response or room
    device, _ = M.start_processes()
    with checked_input():
        run = new_run(args.run, args)
    summaries = {}
    for i, folder in enumerate(args.model):
        results = evaluate(folder, rows, args, device)
        total = summarize(results, args.samples)
        summaries[folder] = {"all": total}
        for key in ("subject", "level"):
            for value in sorted({r[key] for r in results if key in r}, key=str):
                summaries[folder][f"{key} {value}"] = summarize([r for r in results if r.get(key) == value], args.samples)
        if M.rank() == 0:
            ppo.append_jsonl(run / f"outputs-{i + 1}.jsonl", results)
    if M.rank() == 0:
        M.write_text(run / "summary.json", json.dumps(summaries, indent=2) + "\n")
        print_table(summaries)
        print(f"{len(rows)} problems of {args.data}, {args.samples} sample(s) at temperature {args.temperature}, "
              f"at most {args.max_response} tokens; outputs in {run}")


def print_table(summaries):
    """One row a model and group; accuracy with its standard error in percent, response length in tokens."""
    keys = [k for k in next(iter(summaries.values()))["all"] if "@" in k]  # pass@k and maj@k
    width = max(len(str(f)) for f in summaries)
    print(f"{'model':{width}}  {'group':24}  problems  accuracy %      tokens  truncated %" + "".join(f"{k:>9}" for k in keys))
    for folder, groups in summaries.items():
        for group, s in groups.items():
            print(f"{folder if group == 'all' else '':{width}}  {group[:24]:24}  {s['problems']:8d}  {100 * s['accuracy']:5.1f} ± "
                  f"{100 * s['standard_error']:4.1f}  {s['tokens']:10.1f}  {100 * s['truncated']:11.1f}"
                  + "".join(f"{100 * s[k]:9.1f}" for k in keys))


# ---------------------------------------------------------------------------------------------------- sample

def coloured(text):
    """Text with its behaviours in colour, where standard output is a terminal and NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    colours = dict(zip(rewards.BEHAVIOURS, (33, 36, 35, 32)))
    phrases = "|".join(f"(?P<{name}>{phrase})" for name, phrase in rewards.BEHAVIOURS.items())
    return re.sub(rf"\b(?:{phrases})\b", lambda m: f"\033[1;{colours[m.lastgroup]}m{m[0]}\033[0m", text, flags=re.I)


def run_sample(args):
    """Print responses with what the verifier and Eq. 1 say of them."""
    with checked_input():
        if args.problem is None and args.data is None:
            raise ValueError("sample: give --problem TEXT or --data FILE.jsonl")
        if args.exploration == "judge":
            raise ValueError("--exploration judge: sample asks no judge, choose none, length or steps")
        rows = [{"problem": args.problem, "answer": args.answer}] if args.problem else load_problems(args.data, limit=args.limit)
        tokenizer = load_tokenizer(args.model)
        device, _ = M.start_processes()
        net, eos = M.Llama.from_pretrained(args.model, getattr(torch, args.dtype), device).eval(), M.eos_ids(args.model, tokenizer)
        check_length(args.model, max(len(M.chat_prompt(tokenizer, r["problem"])) for r in rows) + args.max_response)
    prompts = [M.chat_prompt(tokenizer, r["problem"]) for r in rows for _ in range(args.samples)]
    for i, response in enumerate(M.generate(net, prompts, args.max_response, args.temperature, eos, seed=args.seed)):
        row, text = rows[i // args.samples], tokenizer.decode(response, skip_special_tokens=True)
        truncated = response[-1] not in eos
        print(f"--- {row['problem']}\n{coloured(text)}\n"
              f"... {len(response)} tokens{', truncated' if truncated else ''}; "
              + ", ".join(f"{k} {v}" for k, v in rewards.behaviours(text).items()))
        if row["answer"] is not None:
            count = lambda s: len(tokenizer.encode(s, add_special_tokens=False).ids)
            parts = rewards.score(text, row["answer"], truncated=truncated, count_tokens=count,
                                  **{name: getattr(args, name) for name in REWARD_FLAGS})
            verdict = "right" if parts.correct else "wrong"
            print(f"... {verdict}: answer {parts.answer!r} against {row['answer']!r} ({parts.reason})\n... reward {round(parts.total, 6):.4g} "
                  f"= {parts.alpha:.4g} * {parts.outcome:.4g} + {1 - parts.alpha:.4g} * {parts.exploration:.4g} (alpha, outcome, "
                  f"exploration); {parts.length} reasoning tokens, {parts.steps} steps" + ", floored" * parts.floored)


# ---------------------------------------------------------------------------------------------------- report

LOG_BYTES = 8_000_000  # of rollouts, and again of tokens, that a report embeds: it shall open at once and go through e-mail


def log_rows(path, need):
    """Rows of a log, perhaps of a run in progress, each with need, {key: type}; the lists in a row of tokens fit together."""
    rows = []
    for number, row in read_jsonl(path, growing=True):
        for key, kind in need.items():
            if type(row.get(key)) is not kind:
                raise ValueError(f"{path}:{number}: {key} is {repr(row.get(key))[:60]}, expected {kind.__name__}")
        if "tokens" in need and any(isinstance(x, list) and len(x) != len(row["tokens"]) for x in row.values()):
            raise ValueError(f"{path}:{number}: lists of different lengths, expected one number a token")
        rows.append(row)
    return rows


def embedded(value):
    """JSON that can stand in a <script>: nothing in it opens or closes a tag."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def thinned(rows, size):
    """Rows of about `size` bytes: as many of each step as fit, and where one is too many, every second, fourth ... step."""
    steps = {}
    for row in rows:
        steps.setdefault(row["step"], []).append((row, len(embedded(row)) + 1))
    each, stride = max(map(len, steps.values()), default=1), 1
    while True:
        kept = [pair for pairs in list(steps.values())[::-1][::stride][::-1] for pair in pairs[:each]]  # the last step stays
        if sum(length for _, length in kept) < size or (each == 1 and stride >= len(steps)):
            return [row for row, _ in kept]
        each, stride = (each * 3 // 4, 1) if each > 1 else (1, 2 * stride)


def gather_run(folder, share):
    """What a run of sft or ppo logged: flags, each quantity as a list over the steps, and share bytes of its texts."""
    config = M.read_json(folder / "config.json")
    metrics = []
    for row in log_rows(folder / "metrics.jsonl", {"step": int}):
        nested = {f"{k}.{name}": v for k, x in row.items() if isinstance(x, dict) for name, v in x.items()}
        metrics.append({k: v if type(v) is int else float(f"{v:.6g}") for k, v in (row | nested).items()
                        if type(v) in (int, float) and math.isfinite(v)})
    if not metrics:
        raise ValueError(f"{folder / 'metrics.jsonl'}: holds no step yet")
    out = config | {"metrics": {k: [row.get(k) for row in metrics] for k in dict.fromkeys(k for row in metrics for k in row)}}
    for name, need in ("rollouts", {"response": str, "reward": dict}), ("tokens", {"tokens": list, "reward": list}):
        file = folder / f"{name}.jsonl"
        rows = log_rows(file, {"problem": str, "step": int} | need) if file.is_file() else []
        out[name] = thinned(rows, share)
        out[f"{name}_logged"] = len(rows)
    return out


def interval(s):
    """Wilson's 95 % interval of an accuracy. Samples of one problem are not independent: the standard error over problems
    says of how many independent trials the accuracy is worth."""
    p, z = s["accuracy"], 1.96
    n = p * (1 - p) / s["standard_error"] ** 2 if s["standard_error"] else s["problems"]
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def gather_eval(folder):
    """The tables of an evaluation, and how the responses behave."""
    models = []
    for i, (model, groups) in enumerate(M.read_json(folder / "summary.json").items(), 1):
        responses = [text for row in log_rows(folder / f"outputs-{i}.jsonl", {"responses": list}) for text in row["responses"]]
        counts = [rewards.behaviours(text) for text in responses]
        rates = {k: sum(c[k] > 0 for c in counts) / len(counts) for k in rewards.BEHAVIOURS}
        rates["repetition"] = sum(map(rewards.repetition, responses)) / len(responses)
        models.append({"model": model, "rates": rates, "groups": {k: s | {"interval": interval(s)} for k, s in groups.items()}})
    return M.read_json(folder / "config.json") | {"models": models}


def group_runs(runs):
    """Runs that differ by nothing but their seed and the model that this seed made get the same `group` and its `label`."""
    defaults = {f.name: f.default for f in dataclasses.fields(ppo.PPOConfig)}  # of flags younger than a run
    groups = {}
    for run in runs:
        flags = (defaults if run["flags"].get("command") == "ppo" else {}) | run["flags"]
        flags = {k: "none" if v is None else str(v) for k, v in flags.items() if k not in ("seed", "run", "model", *MAY_CHANGE)}
        groups.setdefault(json.dumps(flags, sort_keys=True), (flags, []))[1].append(run)
    for key, (flags, members) in list(groups.items()):
        if len({run["flags"].get("seed") for run in members}) < len(members):  # one seed twice: the models are different ones
            del groups[key]
            groups |= {f"{key} {run['name']}": (dict(flags), [run]) for run in members}
    for i, (flags, members) in enumerate(groups.values()):
        # the label has as many flags as it takes to tell the group from the others of the same command
        label, others = [], [f for f, _ in groups.values() if f is not flags and f.get("command") == flags.get("command")]
        for key, value in flags.items():
            alike = [f for f in others if f.get(key) == value]
            if len(alike) < len(others):
                label.append(f"{key}={value}")
                others = alike
        for run in members:
            run |= {"group": i, "label": ", ".join(label) if label and not others else members[0]["name"]}


def run_report(args):
    """Everything that runs have logged in one HTML file, which needs nothing else."""
    with checked_input():
        folders = list(dict.fromkeys(Path(folder).resolve() for folder in args.runs))
        for folder in folders:
            there = {f for f in ("config.json", "metrics.jsonl", "summary.json") if (folder / f).is_file()}
            if "config.json" not in there or len(there) == 1:
                raise FileNotFoundError(f"{folder}: not a run of sft, ppo or eval: no config.json with metrics.jsonl or summary.json")
        root = os.path.commonpath([folder.parent for folder in folders])
        share = LOG_BYTES // max(1, sum((folder / "rollouts.jsonl").is_file() for folder in folders))
        data = {"runs": [], "evals": [], "behaviours": rewards.BEHAVIOURS}
        for folder in folders:
            kind = "runs" if (folder / "metrics.jsonl").is_file() else "evals"
            try:
                found = gather_run(folder, share) if kind == "runs" else gather_eval(folder)
                found |= {"flags": dict(found["flags"]), "versions": dict(found["versions"]), "name": os.path.relpath(folder, root)}
                data[kind].append(found)
            except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
                raise ValueError(f"{folder}: not what this program writes: {e!r}") from None
        group_runs(data["runs"])
        out = Path(args.out or Path(args.runs[0]) / "report.html")
        M.write_text(out, (ROOT / "data" / "report.html").read_text(encoding="utf-8").replace("{{DATA}}", embedded(data)))
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


# ---------------------------------------------------------------------------------------------------- flags

def number(kind, low=None, high=None):
    """An argparse type: a finite number of the kind within [low, high]."""
    def parse(text):
        value = kind(text)
        if (low is not None and value < low) or (high is not None and value > high) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {'' if low is None else f'at least {low}'}"
                                             f"{' and ' if None not in (low, high) else ''}{'' if high is None else f'at most {high}'}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name, function, help):
        p = commands.add_parser(name, help=help, description=help, formatter_class=formatter)
        p.set_defaults(function=function)
        return p

    def common(p, run, dtype="bfloat16"):
        p.add_argument("--seed", type=int, default=0, help="seed of everything random")
        p.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype, help="compute type")
        if run:
            p.add_argument("--out", dest="run", default=run, help="folder to write; must not exist")

    def decoding(p, temperature, response):
        p.add_argument("--temperature", type=number(float, 0), default=temperature, help="0 is greedy")
        p.add_argument("--samples", type=number(int, 1), default=1, help="responses a problem")
        p.add_argument("--max-response", type=number(int, 1), default=response,
                       help="longest response, tokens" + ("" if response else "; without it 8192, or what the model leaves room for"))
        p.add_argument("--limit", type=number(int, 1), default=None, help="only the first problems of the file")

    def setting(p, f):
        m, name = f.metadata, "--" + f.name.replace("_", "-")
        if m["kind"] is bool:
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=m["help"])
        else:
            kind = number(m["kind"], m["low"], m["high"]) if m["kind"] in (int, float) else str
            p.add_argument(name, type=kind, choices=m["choices"], default=f.default, help=m["help"])

    p = command("sft", sft, "supervised fine-tuning on demonstrations of the reasoning process")
    p.add_argument("--model", required=True, help="Hugging Face model folder")
    p.add_argument("--data", required=True, help="jsonl with problem and solution")
    p.add_argument("--from-scratch", action="store_true", help="start from random weights instead of the folder's")
    p.add_argument("--epochs", type=number(int, 1), default=2, help="passes over the data")
    p.add_argument("--batch", type=number(int, 1), default=64, help="demonstrations an optimizer step, over all ranks")
    p.add_argument("--lr", type=number(float, 0), default=1e-5, help="learning rate")
    p.add_argument("--warmup", type=number(float, 0, 1), default=0.03, help="share of the steps over which the rate rises")
    p.add_argument("--lr-end", type=number(float, 0, 1), default=0.1, help="the rate falls along a cosine to this share")
    p.add_argument("--grad-clip", type=number(float, 0), default=1.0, help="largest gradient norm")
    p.add_argument("--max-tokens", type=number(int, 1), default=8192, help="longest prompt and demonstration allowed, tokens")
    p.add_argument("--micro-tokens", type=number(int, 1), default=16384, help="tokens in one forward and backward pass on each rank")
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help="activation checkpointing")
    p.add_argument("--compile", action="store_true", help="torch.compile of the blocks; needs a C++ compiler, on a GPU Triton")
    common(p, "runs/sft")

    p = command("ppo", run_ppo, "PPO with outcome verifier and exploration reward; defaults are the paper's for an 8B model")
    p.add_argument("--model", required=True, help="Hugging Face model folder: policy, critic and reference start from it")
    p.add_argument("--data", required=True, help="jsonl with problem and answer")
    p.add_argument("--out", dest="run", default="runs/ppo", help="folder to write; must not exist")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out, with the same flags")
    for f in dataclasses.fields(ppo.PPOConfig):
        setting(p, f)

    p = command("eval", run_eval, "accuracy of one or more models on a problem file")
    p.add_argument("--model", required=True, nargs="+", help="Hugging Face model folders; the table has a row for each")
    p.add_argument("--data", required=True, help="jsonl with problem and answer")
    p.add_argument("--any-answer", action="store_true", help="without a box, take 'the answer is', #### or the last number")
    p.add_argument("--max-prompt", type=number(int, 1), default=2048, help="longest prompt allowed, tokens")
    p.add_argument("--slots", type=number(int, 1), default=64, help="sequences decoded at once on each rank")
    decoding(p, 0.7, None)
    common(p, "runs/eval")

    p = command("sample", run_sample, "print responses to a problem")
    p.add_argument("--model", required=True, help="Hugging Face model folder")
    p.add_argument("--problem", help="text of a problem")
    p.add_argument("--answer", help="its answer, if the verifier shall judge")
    p.add_argument("--data", help="jsonl with problem and answer, instead of --problem")
    for f in dataclasses.fields(ppo.PPOConfig):
        if f.name in REWARD_FLAGS:
            setting(p, f)
    decoding(p, 0.7, 1024)
    common(p, None)

    p = command("report", run_report, "one HTML page: curves, rollouts and tokens of runs, tables of evaluations")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders that sft, ppo or eval wrote")
    p.add_argument("--out", default=None, help="file to write; without it report.html in the first RUN")
    return top


def main():
    args = parser().parse_args()
    M.keep_freed_memory()
    function = args.__dict__.pop("function")
    try:
        function(args)
        if dist.is_initialized():
            M.stop_processes()
    except ppo.TrainingError as e:
        sys.exit(f"rlsp.py: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
