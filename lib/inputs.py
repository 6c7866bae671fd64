"""Checks of a command's inputs before anything is computed. The first problem raises a ValueError or an
OSError.

Every rank makes all checks, and no function here waits for another rank (parallel.alike).
"""
from pathlib import Path

import numpy as np

from lib import chat, cli, files, functions, hf, judge, logs, tracking

RESPONSES = 2**20  # most responses of a step or an evaluation, whose tokens are all held in memory


def chat_of(folder, args):
    """The Chat of a model folder, by the flags. Its note, if it has one, is printed as a warning."""
    found = chat.Chat(folder, args)
    if found.note:
        logs.say(f"warning: {found.note}")
    return found


def check_prompts(path, rows, asked, allowed):
    """The length of the longest prompt, in tokens. A ValueError names the first line whose prompt is longer
    than allowed. It is raised before the next line is read, since tokenizing long texts takes time."""
    longest = 0
    for row in rows:
        n = len(asked.prompt_ids(row["problem"]))
        if n > allowed:
            raise ValueError(f"{path}:{row['line']}: the prompt has {n} tokens, "
                             f"expected at most {allowed} (--max-prompt)")
        longest = max(longest, n)
    return longest


def check_responses(what, number, samples, flag="--samples"):
    if number * samples > RESPONSES:
        raise ValueError(f"{what} {number} with {flag} {samples}: expected at most {RESPONSES} responses")


def check_length(folder, tokens):
    allowed = hf.read_config(folder).max_position_embeddings
    if tokens > allowed:
        raise ValueError(f"{folder}/config.json: max_position_embeddings is {allowed}, "
                         f"but prompt and response may have {tokens} tokens")


def needed(args):
    """The fields that each row of a problem file must have. A user's own verifier may need no answers."""
    return ("problem",) if args.verifier else ("problem", "answer")


def for_sft(args, example):
    """(chat, examples) for SFT. An example is what example(chat, row) makes of a demonstration, (token ids,
    mask of the trained ones), as arrays of int32 and bool. Lists would take eight times as much memory, 15 GB
    per process for 100,000 long demonstrations."""
    cli.must_be_new(args)
    tracking.check(args)
    asked = chat_of(args.model, args)
    hf.tokenizer_files(args.model)
    if not args.from_scratch:
        hf.check_weights(args.model)
    examples = []
    left_out = 0
    for row in files.read_problems(args.data, ("problem", "solution")):
        ids, mask = example(asked, row)
        if len(ids) > args.max_tokens and args.drop_long:
            left_out += 1
            continue
        if len(ids) > args.max_tokens:
            raise ValueError(f"{args.data}:{row['line']}: {len(ids)} tokens, expected at most "
                             f"{args.max_tokens} (--max-tokens; --drop-long leaves such rows out)")
        if not any(mask):  # a batch of such rows would have no loss
            raise ValueError(f"{args.data}:{row['line']}: solution has no token to train on, "
                             "expected a piece of text marked true")
        examples.append((np.array(ids, np.int32), np.array(mask, bool)))
    if args.drop_long:
        logs.say(f"{left_out} of {left_out + len(examples)} demonstrations have more than --max-tokens "
                 f"{args.max_tokens} tokens and are left out")
    if not examples:
        raise ValueError(f"{args.data}: every demonstration is longer than --max-tokens {args.max_tokens}")
    check_length(args.model, max(len(ids) for ids, _ in examples))
    cli.check_inputs(args)
    asked.keep(args)
    return asked, examples


def for_ppo(args):
    """(chat, problems, held-out problems, longest prompt, verifier, reward function) for PPO, or an error if
    an input is wrong."""
    cli.must_be_new(args)
    tracking.check(args)
    if args.advantage == "group" and args.samples < 2:
        raise ValueError("--advantage group: --samples is 1, "
                         "expected at least 2 (the group's mean is the baseline)")
    if args.advantage == "gae" and args.freeze_steps >= args.steps:
        raise ValueError(f"--freeze-steps is {args.freeze_steps}, expected fewer than --steps {args.steps}")
    if args.keep_best and not args.eval_data:
        raise ValueError("--keep-best: expected --eval-data, which decides which checkpoint is best")
    if args.exploration == "judge":
        judge.check_judge(args.judge_url, args.judge_model)
        judge.read_rubric(args.judge_rubric)
    asked = chat_of(args.model, args)
    hf.tokenizer_files(args.model)
    hf.check_weights(args.model)
    problems = files.load_problems(args.data, needed(args))
    longest = check_prompts(args.data, problems, asked, args.max_prompt)
    held_out = files.load_problems(args.eval_data, needed(args)) if args.eval_data else []
    longest = max(longest, check_prompts(args.eval_data, held_out, asked, args.max_prompt))
    check_length(args.model, longest + args.max_response)
    check_responses("--eval-data: problems", len(held_out), args.eval_samples, "--eval-samples")
    check_responses("--rollout-batch", args.rollout_batch, args.samples)
    verifier = functions.load("--verifier", args.verifier, functions.verdict)
    reward = functions.load("--reward", args.reward, functions.number)
    cli.check_inputs(args)
    asked.keep(args)
    if held_out:
        warn_of_held_out(args, problems, held_out)
    return asked, problems, held_out, longest, verifier, reward


def warn_of_held_out(args, problems, held_out):
    """Warn of held-out problems that are also trained on, and of answers that the verifier cannot read."""
    trained = {words(row) for row in problems}
    shared = [row for row in held_out if words(row) in trained]
    if shared:
        logs.say(f"warning: {len(shared)} of {len(held_out)} problems of {args.eval_data} are also in "
                 f"{args.data}, first line {shared[0]['line']}: they are trained on, not held out")
    unread = "" if args.verifier else logs.gold_warning(args.eval_data, held_out)
    if unread:
        logs.say(f"warning: {unread}")


def words(row):
    """A problem's text in a form by which duplicates are found."""
    return " ".join(row["problem"].split()).casefold()


def for_eval(args):
    """(problems, verifier, longest response, longest prompt) for eval, or an error if an input is wrong."""
    cli.must_be_new(args)
    rows = files.load_problems(args.data, needed(args), args.limit)
    verifier = functions.load("--verifier", args.verifier, functions.verdict)
    if args.temperature == 0 and args.samples > 1:
        raise ValueError(f"--samples is {args.samples}, "
                         "expected 1 at --temperature 0: greedy samples are all the same")
    if len({Path(folder).resolve() for folder in args.model}) < len(args.model):
        raise ValueError("--model: a folder is given twice, expected different models")
    check_responses("problems", len(rows), args.samples)
    room = 8192  # the paper's value, or what the smallest model leaves beside its longest prompt
    longest_of_all = 0
    for folder in args.model:
        asked = chat_of(folder, args)
        hf.check_weights(folder)
        longest = check_prompts(args.data, rows, asked, args.max_prompt)
        check_length(folder, longest + (args.max_response or 1))
        longest_of_all = max(longest_of_all, longest)
        room = min(room, hf.read_config(folder).max_position_embeddings - longest)
    cli.check_inputs(args)
    return rows, verifier, args.max_response or room, longest_of_all


def for_sample(args):
    """(chat, problems, verifier) for sample, or an error if an input is wrong."""
    if (args.problem is None) == (args.data is None):
        raise ValueError("sample: expected either --problem TEXT or --data FILE.jsonl")
    if args.data and args.answer is not None:
        raise ValueError("--answer belongs to --problem; the problems of --data have their own")
    if args.exploration == "judge":
        raise ValueError("--exploration judge: sample has no judge, expected none, length or steps")
    if args.data:
        rows = files.load_problems(args.data, needed(args), args.limit)
    else:
        files.check_text(args.problem, "--problem")
        rows = [{"problem": args.problem, "answer": args.answer}]
    check_responses("problems", len(rows), args.samples)
    verifier = functions.load("--verifier", args.verifier, functions.verdict)
    asked = chat_of(args.model, args)
    hf.check_weights(args.model)
    longest = max(len(asked.prompt_ids(row["problem"])) for row in rows)
    check_length(args.model, longest + args.max_response)
    return asked, rows, verifier
