"""tokens.jsonl against slow loops, what `report` gathers and refuses, and the page in a real browser."""
import csv
import json
import math
import os
import shutil
import subprocess
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lib import decode, evaluation, hf
import model as M
import ppo
import rewards
import rlsp
from browser import Page
from conftest import ROOT
from lib.report import embedded, interval, thinned
from lib.signals import Stopped
from test_cli import refused  # noqa: F401  (a fixture)
from test_ppo import folder, lines, trainer, weights  # noqa: F401  (folder is a fixture)

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)><!-- \u2028 {{DATA}} Wait. Let me check."


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_jsonl(file, items):
    file.write_text("".join(json.dumps(item) + "\n" for item in items))


# ---- tokens.jsonl

@pytest.fixture(scope="module")
def logged(folder, tmp_path_factory):  # noqa: F811
    """A short run with tokens: two steps, of which the first trains the critic alone."""
    run = tmp_path_factory.mktemp("logged") / "run"
    t = trainer(folder, run, steps=2, freeze_steps=1, log_tokens=3, gamma=0.9, lam=0.8, kl_coef=0.1)
    t.train()
    return t, run


def test_logged_tokens_obey_gae_and_eq_1(logged):
    t, run = logged
    found, rollouts = rows(run / "tokens.jsonl"), rows(run / "rollouts.jsonl")
    assert [r["step"] for r in found] == [1, 1, 1, 2, 2, 2]
    for r, rollout in zip(found, rollouts[:3] + rollouts[6:9]):
        n = len(r["tokens"])
        assert n == rollout["tokens"] and r["problem"] == rollout["problem"] and r["gold"] == rollout["gold"]
        text = "".join(r["tokens"])
        assert text.removesuffix("<|eot_id|>") == rollout["response"] or "<|" in text  # a random model also says other special tokens
        assert r["score"] == rollout["reward"]["total"]
        advantage = 0.0
        for i in reversed(range(n)):
            reward = -0.1 * (r["old_logprob"][i] - r["ref_logprob"][i]) + (r["score"] if i == n - 1 else 0.0)
            delta = reward + 0.9 * (r["value"][i + 1] if i + 1 < n else 0.0) - r["value"][i]
            advantage = delta + 0.9 * 0.8 * advantage
            assert r["reward"][i] == pytest.approx(reward, abs=1e-5) and r["raw_advantage"][i] == pytest.approx(advantage, abs=2e-5)
            assert r["return"][i] == pytest.approx(advantage + r["value"][i], abs=2e-5) and r["entropy"][i] >= 0
    # whitening is one linear map for the whole rollout
    pairs = [(a, w) for r in found[3:] for a, w in zip(r["raw_advantage"], r["advantage"])]
    (a0, w0), (a1, w1) = min(pairs), max(pairs)
    for a, w in pairs:
        assert w == pytest.approx(w0 + (w1 - w0) * (a - a0) / (a1 - a0), abs=1e-3)


def test_the_new_logprob_is_of_the_policy_after_the_update(folder, logged):  # noqa: F811
    t, run = logged
    found = rows(run / "tokens.jsonl")
    for r in found[:3]:  # the policy was frozen
        assert r["new_logprob"] == pytest.approx(r["old_logprob"], abs=1e-5)
    net = hf.load(run / "model", M.Llama, torch.float32)  # saved after step 2, the last
    chosen = ppo.problems_of_step(len(t.problems), 2, 6, t.config.seed)
    for i, r in enumerate(found[3:]):
        prompt = t.prompts[chosen[i]]
        ids = decode.generate(hf.load(folder, M.Llama, torch.float32), [prompt], 12, 0.7, t.eos, seed=0, streams=[6 + i])[0]
        assert hf.token_texts(t.tokenizer, ids) == r["tokens"]  # the policy of step 2's rollout was still the first one
        with torch.no_grad():
            dense = torch.log_softmax(net(torch.tensor([prompt + ids]))[0] / 0.7, -1)
        expected = [float(dense[len(prompt) + j - 1, token]) for j, token in enumerate(ids)]
        assert r["new_logprob"] == pytest.approx(expected, abs=1e-4)
        assert max(abs(a - b) for a, b in zip(r["new_logprob"], r["old_logprob"])) > 1e-3


def test_logging_tokens_changes_no_number_of_the_training(folder, tmp_path):  # noqa: F811
    runs = []
    for n in (0, 2):
        t = trainer(folder, tmp_path / str(n), steps=3, log_tokens=n)
        t.train()
        runs.append((lines(t.run), weights(t.policy), weights(t.critic), len(rows(t.run / "tokens.jsonl"))))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])
    assert (runs[0][3], runs[1][3]) == (0, 6)


def test_group_advantage_logs_no_value_and_resume_cuts_tokens_back(folder, tmp_path):  # noqa: F811
    changes = dict(advantage="group", samples=3, rollout_batch=2, steps=2, save_every=1)
    t = trainer(folder, tmp_path, **changes)
    t.train()
    before = (tmp_path / "tokens.jsonl").read_text()
    assert all("value" not in r and "return" not in r and len(r["advantage"]) == len(r["tokens"]) for r in rows(tmp_path / "tokens.jsonl"))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    again = trainer(folder, tmp_path, **changes)
    again.resume()
    assert [r["step"] for r in rows(tmp_path / "tokens.jsonl")] == [1, 1]
    again.train()
    assert (tmp_path / "tokens.jsonl").read_text() == before


def test_token_texts_join_to_the_text_even_inside_characters():
    """One token a byte: a character of several bytes appears whole at its last token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "a é 漢 🙂 b"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    texts = hf.token_texts(tokenizer, ids)
    assert "".join(texts) == text and texts[:4] == ["a", " ", "", "é"] and texts[-1] == "b"
    cut = hf.token_texts(tokenizer, ids[:-3])  # the limit fell into the last character
    assert "".join(cut) == tokenizer.decode(ids[:-3]) and len(cut) == len(ids) - 3


# ---- gathering

def ppo_run(out, name, seed=0, steps=2, rollouts=(), tokens=(), **flags):
    """A run's folder as ppo writes it."""
    run = out / name
    run.mkdir(parents=True)
    write_jsonl(run / "timing.jsonl", [{"step": s, "seconds": 1.5} for s in range(1, steps + 1)])
    flags = {"command": "ppo", "model": f"somewhere/{seed}", "data": "d.jsonl", "run": str(run), "seed": seed, "exploration": "length",
             "gamma": 1.0, "lam": 0.5, "clip": 0.2, "samples": 1} | flags
    (run / "config.json").write_text(json.dumps({"flags": flags, "versions": {"torch": "2.6", "git": "0123456789abcdef", "machine": "m"}}))
    write_jsonl(run / "metrics.jsonl", [{"step": s, "accuracy": (s + seed) / 10, "response_length": 100.0 * s, "novel": 3}
                                        for s in range(1, steps + 1)])
    write_jsonl(run / "rollouts.jsonl", rollouts)
    write_jsonl(run / "tokens.jsonl", tokens)
    return run


def rollout(step, response, correct=True, answer="2", **more):
    return {"step": step, "problem": f"What is 1 + 1 at step {step}?", "gold": "2", "response": response, "tokens": 5, "truncated": False,
            "reward": {"total": 0.75, "outcome": 1.0, "correct": correct, "answer": answer, "reason": "same text", "exploration": -0.25,
                       "alpha": 0.8, "length": 4, "steps": 1, "floored": False}} | more


def token_row(step, tokens):
    """Numbers that obey GAE with gamma 1, lambda 0.5; none of them occurs twice."""
    n = len(tokens)
    value = [0.1 + 0.07 * i + step for i in range(n)]
    reward = [-0.003 * (i + 1) for i in range(n - 1)] + [0.9]
    advantage, following = [0.0] * n, 0.0
    for i in reversed(range(n)):
        following = advantage[i] = reward[i] + (value[i + 1] if i + 1 < n else 0) - value[i] + 0.5 * following
    return {"step": step, "problem": "What is 1 + 1?", "gold": "2", "score": 0.9, "tokens": tokens, "value": value, "reward": reward,
            "raw_advantage": advantage, "advantage": [a * 2 - 1 for a in advantage], "return": [a + v for a, v in zip(advantage, value)],
            "old_logprob": [-0.5 - 0.01 * i for i in range(n)], "new_logprob": [-0.2 - 0.02 * i for i in range(n)],
            "ref_logprob": [-0.7 - 0.03 * i for i in range(n)], "entropy": [0.3 + 0.011 * i for i in range(n)]}


def eval_folder(out, name):
    run = out / name
    run.mkdir(parents=True)
    problems = [{"subject": HOSTILE if i % 2 else "sums", "level": 1 + i % 2, "problem": "p", "answer": "2", "correct": [i < 3, False],
                 "answers": ["2", None], "tokens": [10, 20], "truncated": [False, True], "reasons": ["", ""],
                 "responses": ["Wait. Let me check.", "so"]} for i in range(4)]
    write_jsonl(run / "outputs-1.jsonl", problems)
    groups = {"all": problems} | {f"{k} {v}": [p for p in problems if p[k] == v] for k in ("subject", "level") for v in {p[k] for p in problems}}
    (run / "summary.json").write_text(json.dumps({"m/model": {k: evaluation.summarize(v, 2) for k, v in groups.items()}}))
    (run / "config.json").write_text(json.dumps({"flags": {"command": "eval", "model": ["m/model"], "data": "d", "samples": 2, "temperature": 1,
                                                           "max_response": 9, "seed": 0}, "versions": {}}))
    return run


def report(*folders, out):
    rlsp.run_report(rlsp.Report(runs=[str(folder) for folder in folders], out=str(out)))
    text = out.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0]), text


def labels(data):
    return {run["name"]: run["label"] for run in data["runs"]}


def test_runs_that_differ_by_seed_alone_are_one_group(tmp_path):
    runs = [ppo_run(tmp_path, f"{e}-{s}", s, exploration=e, log_rollouts=s) for e in ("none", "length") for s in (0, 1)]
    runs.append(ppo_run(tmp_path, "longer", 0, exploration="length", length_scale=8.0, eval_data="d/v.jsonl"))
    data, _ = report(*runs, out=tmp_path / "r.html")
    assert [run["group"] for run in data["runs"]] == [0, 0, 1, 1, 2]
    assert labels(data) == {"none-0": "exploration=none", "none-1": "exploration=none", "length-0": "exploration=length, length_scale=1000.0",
                            "length-1": "exploration=length, length_scale=1000.0", "longer": "exploration=length, length_scale=8.0"}
    same_seed = [ppo_run(tmp_path, name, 0, model=name) for name in ("a", "b")]  # other models, not other seeds
    data, _ = report(*same_seed, out=tmp_path / "r.html")
    assert [run["group"] for run in data["runs"]] == [0, 1] and labels(data) == {"a": "a", "b": "b"}
    evaluated_too = ppo_run(tmp_path, "seed-1", 1, exploration="none", eval_data="d/v.jsonl", eval_samples=4)
    data, _ = report(runs[0], evaluated_too, out=tmp_path / "r.html")
    assert [run["group"] for run in data["runs"]] == [0, 0]
    data, _ = report(runs[0], runs[0], out=tmp_path / "r.html")
    assert labels(data) == {"none-0": "none-0"}


def test_every_logged_number_is_in_the_page(tmp_path):
    run = ppo_run(tmp_path, "run")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "accuracy": NaN, "late": 1e-9}\n{"step": 4, "accu')  # the last line is still being written
    data, text = report(run, out=tmp_path / "r.html")
    assert data["runs"][0]["metrics"] == {"step": [1, 2, 3], "accuracy": [0.1, 0.2, None], "response_length": [100, 200, None],
                                          "novel": [3, 3, None], "timing.seconds": [1.5, 1.5, None], "late": [None, None, 1e-9]}
    assert data["behaviours"] == rewards.BEHAVIOURS and "{{DATA}}" not in text
    assert not any(word in text.replace("http://www.w3.org/2000/svg", "") for word in ("http:", "https:", ".innerHTML", "src=", "@import"))


def test_hostile_text_stays_inside_its_string(tmp_path):
    run = ppo_run(tmp_path, "run", rollouts=[rollout(1, HOSTILE)], tokens=[token_row(1, [HOSTILE, "b"])], exploration=HOSTILE)
    data, text = report(run, out=tmp_path / "r.html")
    assert data["runs"][0]["rollouts"][0]["response"] == HOSTILE == data["runs"][0]["tokens"][0]["tokens"][0]
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<img" not in text and "onerror=alert(1)" in text


def test_a_report_has_a_largest_size_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.report.LOG_BYTES", 20_000)
    many = [rollout(s, f"{i} " * 50) for s in range(1, 21) for i in range(8)]
    data, text = report(ppo_run(tmp_path, "run", rollouts=many), out=tmp_path / "r.html")
    kept = data["runs"][0]["rollouts"]
    assert len(embedded(kept)) <= 20_000 and data["runs"][0]["rollouts_logged"] == 160
    assert {r["step"] for r in kept} == set(range(1, 21)) and len(kept) >= 20  # fewer of each step before fewer steps
    assert thinned(many, 4000)[-1]["step"] == 20 and len(embedded(thinned(many, 4000))) <= 4000
    assert thinned(many[:8], 700) == many[:1] and thinned(many, 10**9) == many and thinned([], 10) == []


def test_evaluations_get_intervals_and_behaviours(tmp_path):
    data, _ = report(eval_folder(tmp_path, "e"), out=tmp_path / "r.html")
    found = data["evals"][0]["models"][0]
    assert found["rates"]["backtracking"] == found["rates"]["verification"] == 0.5 and found["rates"]["self_correction"] == 0
    low, high = found["groups"]["all"]["interval"]
    assert 0 <= low < 0.375 < high <= 1
    # with one sample a problem: Wilson's textbook interval, here 8 of 10, and an end that stays inside [0, 1]
    assert interval({"accuracy": 0.8, "standard_error": math.sqrt(0.16 / 10), "problems": 10}) == pytest.approx([0.490, 0.943], abs=1e-3)
    assert interval({"accuracy": 1.0, "standard_error": 0.0, "problems": 10}) == pytest.approx([0.722, 1.0], abs=1e-3)


def test_a_number_without_bounds_is_left_out(tmp_path):
    run = ppo_run(tmp_path, "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "a": 1, "b": %s, "c": 1e999}\n' % ("9" * 400))
    data, _ = report(run, out=tmp_path / "r.html")
    found = data["runs"][0]["metrics"]
    assert found["a"] == [1] and not found.keys() & {"b", "c"}


@pytest.mark.parametrize("text", ['{"other": {}}', '{"m/model": {"all": {"problems": 1, "accuracy": NaN, "standard_error": 0.0}}}'])
def test_a_summary_of_something_else_is_named(tmp_path, refused, text):  # noqa: F811
    run = eval_folder(tmp_path, "e")
    (run / "summary.json").write_text(text)
    error = refused("report", run, "--out", tmp_path / "r.html")
    assert f"{run}: not what this program writes" in error and len(error.splitlines()) == 1


def test_a_model_evaluated_twice_does_not_lend_its_behaviours_to_the_next(tmp_path):
    """As older versions wrote it: --model A A B, so summary.json has A once, and B's outputs are the third."""
    run = eval_folder(tmp_path, "e")
    config, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary"))
    config["flags"]["model"] = ["m/model", "m/model", "b"]
    (run / "config.json").write_text(json.dumps(config))
    (run / "summary.json").write_text(json.dumps(summary | {"b": summary["m/model"]}))
    first = rows(run / "outputs-1.jsonl")
    write_jsonl(run / "outputs-2.jsonl", first)
    write_jsonl(run / "outputs-3.jsonl", [r | {"responses": ["That's wrong", "so"]} for r in first])
    data, _ = report(run, out=tmp_path / "r.html")
    assert [m["rates"]["self_correction"] for m in data["evals"][0]["models"]] == [0, 0.5]


def break_file(name, text):
    def change(run):
        (run / name).write_text(text)
    return change


@pytest.mark.parametrize("change, words", [
    (shutil.rmtree, "not a run of sft, ppo or eval"), (break_file("config.json", "{"), "config.json: not valid JSON"),
    (lambda run: (run / "metrics.jsonl").unlink(), "not a run of sft, ppo or eval"), (break_file("metrics.jsonl", ""), "contains no step yet"),
    (break_file("metrics.jsonl", '{"step": 1}\n{"step": \n'), "metrics.jsonl:2: not valid JSON"),
    (break_file("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}'), "metrics.jsonl:2: not valid JSON"),
    (break_file("metrics.jsonl", '{"step": "x"}\n'), "metrics.jsonl:1: step is 'x', expected int"),
    (break_file("metrics.jsonl", "[1]\n"), "metrics.jsonl:1: expected a JSON object"),
    (break_file("rollouts.jsonl", '{"step": 1, "problem": "p", "reward": {}}\n'), "rollouts.jsonl:1: response is None, expected str"),
    (break_file("tokens.jsonl", '{"step": 1, "problem": "p", "tokens": ["a"], "reward": [1, 2]}\n'), "tokens.jsonl:1: lists of different lengths"),
    (break_file("metrics.jsonl", '{"step": 1, "x": %s}\n' % ("9" * 5000)), "metrics.jsonl:1: not valid JSON: Exceeds"),
    (break_file("rollouts.jsonl", '{"step": 1, "problem": "p", "response": "", "reward": {"total": NaN}}\n'), "run: not what this program writes: Out of"),
    (break_file("config.json", '{"flags": {"lr": NaN}, "versions": {}}'), "run: not what this program writes: Out of range float"),
    (break_file("config.json", '{"flags": 3}'), "not what this program writes")])
def test_broken_runs_get_one_line_and_status_2(tmp_path, refused, change, words):  # noqa: F811
    run = ppo_run(tmp_path, "run")
    change(run)
    error = refused("report", run, "--out", tmp_path / "r.html")
    assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("change, words", [
    (break_file("metrics.jsonl", json.dumps({"step": 2**53, "a": 1})), "metrics.jsonl:1: step is 9007199254740992, expected at most 1000000000"),
    (break_file("metrics.jsonl", '{"step": -1}'), "metrics.jsonl:1: step is -1"),
    (break_file("rollouts.jsonl", json.dumps(rollout(2**53, "x"))), "rollouts.jsonl:1: step is 9007199254740992"),
    (break_file("metrics.jsonl", json.dumps({"step": 1} | {str(i): i for i in range(100_000)})), "metrics.jsonl: 100002 quantities, expected at most 1000"),
    (break_file("config.json", json.dumps({"flags": {str(i): i for i in range(2000)}, "versions": {}})), "config.json: expected at most 1000 flags"),
    (lambda run: os.truncate(run / "rollouts.jsonl", 2**31 + 1), "rollouts.jsonl: 2147483649 bytes, expected at most 2147483648")])
def test_a_report_of_a_run_that_would_take_for_ever_is_refused(tmp_path, refused, change, words):  # noqa: F811
    run = ppo_run(tmp_path, "run")
    change(run)
    error = refused("report", run, "--out", tmp_path / "r.html")
    assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "r.html").exists()


def test_axes_of_any_numbers_have_few_ticks(tmp_path):
    """The function of the page, by node: counting up to beyond 2^53 in ones, or in steps of no size, never ends."""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node")
    text = (ROOT / "lib/report.html").read_text()
    function = text[text.index("function ticks("):text.index("// Labels of one axis")]
    cases = "[2**53, 2**53 + 2], [-1e308, 1e308], [NaN, 1], [Infinity, -Infinity], [1e16, 1e16 + 4], [0, 5e-324], [0, 1], [1, 200]"
    script = f"{function}; console.log(JSON.stringify([{cases}].map(([a, b]) => ticks(a, b, 6))))"
    found = json.loads(subprocess.run([node, "-e", script], capture_output=True, text=True, timeout=20, check=True).stdout)
    assert all(1 <= len(ticks) <= 14 for ticks in found) and found[-2] == [0, 0.2, 0.4, 0.6, 0.8, 1] and found[-1] == [50, 100, 150, 200]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path, refused, monkeypatch):  # noqa: F811
    run = ppo_run(tmp_path, "run")
    report(run, out=run / "report.html")
    before = (run / "report.html").read_text()
    report(run, out=run / "report.html")
    assert (run / "report.html").read_text() == before
    (tmp_path / "link").symlink_to(run / "report.html")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "page.html").write_text("<!doctype html><title>mine</title>")
    for out, words in ((run / "metrics.jsonl", "exists and is not a report"), (tmp_path / "page.html", "exists and is not a report"),
                       (tmp_path / "link", "not a link"), (tmp_path / "pipe", "expected a regular file"), ("/dev/null", "expected a regular file"), (tmp_path, "expected a regular file")):
        there = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        error = refused("report", run, "--out", out)
        assert words in error and len(error.splitlines()) == 1
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == there
    # one that cannot be written leaves nothing beside it
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused("report", run, "--out", tmp_path / "new.html")
    assert not [f for f in tmp_path.iterdir() if "new" in f.name]


# ---- the curves as CSV

def table(*folders, out):
    """The table's header and its lines, as a csv reader has them."""
    rlsp.run_report(rlsp.Report(runs=[str(folder) for folder in folders], out=str(out.with_suffix(".html")), csv=str(out)))
    with open(out, newline="", encoding="utf-8") as f:
        header, *found = csv.reader(f)
    return header, found


def test_the_table_has_a_line_for_each_run_and_step(tmp_path):
    run = ppo_run(tmp_path, "ppo", rollout_batch=4, samples=2)
    precise = {"step": 3, "accuracy": 1 / 3, "response_length": 12.125, "late": 1e-9, "nan": math.nan, "warnings": "all rewards are equal"}
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(precise) + '\n{"step": 4, "accu')
    with open(run / "timing.jsonl", "a") as f:
        f.write('{"step": 3, "seconds": 2.25}\n')
    header, found = table(run, sft_run(tmp_path, 2), out=tmp_path / "t.csv")
    assert header == ["run", "step", "cumulative_tokens", "cumulative_seconds", "accuracy", "response_length", "novel", "timing.seconds",
                      "late", "warnings", "loss"]
    assert found == [["ppo", "1", "800", "1.5", "0.1", "100.0", "3", "1.5", "", "", ""], ["ppo", "2", "2400", "3.0", "0.2", "200.0", "3", "1.5", "", "", ""],
                     ["ppo", "3", "2497", "5.25", repr(1 / 3), "12.125", "", "2.25", "1e-09", "all rewards are equal", ""],
                     ["sft-2", "1", "", "", "", "", "", "", "", "", "2.0"], ["sft-2", "2", "", "", "", "", "", "", "", "", "1.0"]]


def test_what_was_spent_is_unknown_after_a_step_without_it(tmp_path):
    run = ppo_run(tmp_path, "ppo", rollout_batch=4, steps=4)
    write_jsonl(run / "timing.jsonl", [{"step": s, "seconds": 1.5} for s in (1, 2, 4)])
    write_jsonl(run / "metrics.jsonl", [{"step": 0, "eval_accuracy": 0.5}] + rows(run / "metrics.jsonl"))
    assert [line[1:4] for line in table(run, out=tmp_path / "t.csv")[1]] == [
        ["0", "0", "0"], ["1", "400", "1.5"], ["2", "1200", "3.0"], ["3", "2400", ""], ["4", "4000", ""]]
    write_jsonl(run / "metrics.jsonl", [{"step": s, "tokens": 50, "loss": 1.0} for s in (1, 2)])  # as sft logs it
    assert [line[2] for line in table(run, out=tmp_path / "t.csv")[1]] == ["50", "100"]


@pytest.mark.parametrize("text, cell", [
    ("=1+1", "'=1+1"), ("  @SUM(A1)", "'  @SUM(A1)"), ("-2+3|cmd", "'-2+3|cmd"), ("a;=1", "a;'=1"), ("a,+1", "a,'+1"), ("\uff1d1", "'\uff1d1"),
    ("\t=1", "\\t=1"), ("\r\n=1", "\\r\\n=1"), ('"=1', "\"'=1"), ("a = b; c", "a = b; c"), ("exploration=length", "exploration=length")])
def test_a_text_in_the_table_is_no_formula(tmp_path, text, cell):
    run = ppo_run(tmp_path, "=run")
    write_jsonl(run / "metrics.jsonl", [{"step": 1, text: -1.5, "warnings": text}])
    header, found = table(run, out=tmp_path / "t.csv")
    assert header[4:6] == [cell, "warnings"] and found == [["'=run", "1", "", "1.5", "-1.5", cell, "1.5"]]


def test_a_table_replaces_a_table_and_nothing_else(tmp_path, refused, monkeypatch):  # noqa: F811
    run = ppo_run(tmp_path, "run")
    first = table(run, out=tmp_path / "t.csv")
    assert table(run, out=tmp_path / "t.csv") == first
    (tmp_path / "mine.csv").write_text("run,step,accuracy\n")
    (tmp_path / "link").symlink_to(tmp_path / "t.csv")
    for name, words in (("mine.csv", "exists and is not a table of a report; nothing was overwritten; give another --csv"), ("link", "not a link"),
                        ("t.html", "not a table of a report"), ("new.html", "expected another one"), (".", "expected a regular file")):
        there = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        error = refused("report", run, "--out", tmp_path / "new.html", "--csv", tmp_path / name)
        assert words in error and len(error.splitlines()) == 1
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == there
    assert "an evaluation has no curves" in refused("report", eval_folder(tmp_path, "e"), "--csv", tmp_path / "new.csv")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused("report", run, "--csv", tmp_path / "new.csv")
    assert not [f for f in tmp_path.rglob("*") if "new" in f.name]


# ---- the result, first on the page

def trained(out, name, start, metrics=(), command="ppo", **flags):
    """A run's folder with the paths that the commands write: relative to where they were started, which is `out`."""
    run = ppo_run(out, name)
    config = json.loads((run / "config.json").read_text())
    config["flags"] |= {"command": command, "model": start, "data": "d/train.jsonl", "run": name, "steps": 2} | flags
    (run / "config.json").write_text(json.dumps(config))
    if metrics:
        write_jsonl(run / "metrics.jsonl", metrics)
    return run


def evaluated(out, name, models, data="d/test.jsonl", problems=4):
    """An evaluation of {model: accuracy}."""
    run = eval_folder(out, name)
    config = json.loads((run / "config.json").read_text())
    config["flags"] |= {"model": list(models), "run": name, "data": data, "samples": 2}
    (run / "config.json").write_text(json.dumps(config))
    whole = json.loads((run / "summary.json").read_text())["m/model"]
    summary = {m: {"all": whole["all"] | {"accuracy": a, "standard_error": 0.01, "tokens": 1000 * a}} for m, a in models.items()}
    (run / "summary.json").write_text(json.dumps(summary))
    for i in range(len(models)):
        shutil.copy(run / "outputs-1.jsonl", run / "aside")
        shutil.copy(run / "aside", run / f"outputs-{i + 1}.jsonl")
    return run


def shown(line):
    """A line of the table: name, accuracies and lengths before and after."""
    ends = [line["before"], line["after"]]
    return line["name"], [p and round(p["value"], 3) for p in ends], [p and p["tokens"] for p in ends], line["on"]


def test_the_result_is_of_the_evaluations_where_they_are_given(tmp_path):
    sft = trained(tmp_path, "runs/sft", "base", command="sft")
    run = trained(tmp_path, "runs/ppo", "runs/sft/model")
    both = evaluated(tmp_path, "runs/e", {"runs/sft/model": 0.25, "./runs/ppo/model": 0.5, "other/model": 0.75})
    apart = [evaluated(tmp_path, f"runs/{i}", {m: a}, "d/other.jsonl") for i, (m, a) in enumerate({"runs/sft/model": 0.1, "runs/ppo/model": 0.2}.items())]
    data, _ = report(sft, run, both, *apart, out=tmp_path / "r.html")
    test, other = "4 problems of test.jsonl, 2 samples each", "4 problems of other.jsonl, 2 samples each"
    assert list(map(shown, data["results"])) == [
        ("sft", [None, 0.25], [None, 250], test), ("sft", [None, 0.1], [None, 100], other),
        ("ppo", [0.25, 0.5], [250, 500], test), ("ppo", [0.1, 0.2], [100, 200], other), ("other", [None, 0.75], [None, 750], test)]
    assert data["results"][2]["what"] == "PPO of sft on train.jsonl, 2 steps, exploration length, seed 0" and data["results"][2]["seconds"] == 3
    # a run of the same name elsewhere is another one
    again = evaluated(tmp_path / "elsewhere", "runs/e", {"runs/ppo/model": 0.9})
    data, _ = report(run, again, out=tmp_path / "r.html")
    assert shown(data["results"][0]) == ("runs/ppo", [0.1, 0.2], [100, 200], "rollouts, steps 1 and 2")
    assert shown(data["results"][1])[:2] == ("ppo", [None, 0.9])


@pytest.mark.parametrize("rows_, value, tokens, on", [
    ([{"step": 0, "eval_accuracy": 0.3, "eval_tokens": 30}, {"step": 1, "accuracy": 0.9}, {"step": 2, "accuracy": 0.9, "eval_accuracy": 0.4, "eval_tokens": 40}],
     [0.3, 0.4], [30, 40], "held-out problems of v.jsonl, steps 0 and 2"),
    ([{"step": 1, "accuracy": 0.1, "response_length": 5}, {"step": 2, "accuracy": 0.2, "response_length": 6}], [0.1, 0.2], [5, 6], "rollouts, steps 1 and 2"),
    ([{"step": 1, "math_accuracy": 0.1, "reward": 1.0}], [None, 0.1], [None, None], "rollouts, by the mathematics verifier, step 1"),
    ([{"step": 1, "reward": -0.5}, {"step": 2, "reward": 1.5}], [-0.5, 1.5], [None, None], "reward of the rollouts, steps 1 and 2"),
    ([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.5}], [2.5, 0.5], [None, None], "loss on the demonstrations, steps 1 and 2"),
    ([{"step": 1}], [None, None], [None, None], "")])
def test_without_evaluations_the_result_is_of_what_the_run_logged(tmp_path, rows_, value, tokens, on):
    data, _ = report(trained(tmp_path, "ppo", "m", rows_, eval_data="d/v.jsonl", steps=9), out=tmp_path / "r.html")
    (line,) = data["results"]
    assert shown(line) == ("ppo", value, tokens, on) and f"{rows_[-1]['step']} of 9 steps" in line["what"]


def test_the_result_of_seeds_is_their_mean(tmp_path):
    runs = [trained(tmp_path, f"s{s}", "m", [{"step": 1, "accuracy": a, "response_length": 100.0 * s} for a in (0.1, 0.1 + 0.2 * s)], seed=s)
            for s in (1, 2)]
    (runs[0] / "stopped").write_text("")
    data, _ = report(*runs, out=tmp_path / "r.html")
    (line,) = data["results"]
    assert "1 of 2 steps, stopped, exploration length, 2 seeds" in line["what"] and shown(line)[1] == [0.1, 0.4]
    assert line["after"]["error"] == pytest.approx(0.1) and line["after"]["tokens"] == 150


def test_strange_flags_do_no_harm_to_the_result(tmp_path):
    strange = {"run": ["x"], "data": {"a": 1}, "steps": "many", "exploration": HOSTILE, "seed": None, "rollout_batch": "x", "samples": None}
    run = trained(tmp_path, "ppo", 5, **strange)
    data, text = report(run, evaluated(tmp_path, "e", {"\x00/model": 0.5}), out=tmp_path / "r.html")
    assert text.count("<script") == 2 and len(data["results"]) == 2 and len(data["results"][0]["what"]) < 500
    assert data["runs"][0]["x"]["tokens"] == [None, None]


def test_the_curves_of_a_long_run_are_means_over_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.report.POINTS", 50)  # 10 of one run
    run = trained(tmp_path, "ppo", "m", [{"step": s, "a": s, "b": 0.5} | ({"late": 1} if s > 38 else {}) for s in range(1, 40)])
    data, _ = report(run, out=tmp_path / "r.html")
    found = data["runs"][0]
    assert found["stride"] == 4 and found["metrics"]["step"] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 39]
    assert found["metrics"]["a"] == [2.5 + 4 * i for i in range(9)] + [38] and found["metrics"]["late"] == [None] * 9 + [1]
    assert len(table(run, out=tmp_path / "t.csv")[1]) == 39  # the table has them all


# ---- live

def test_a_live_page_is_written_until_the_run_ends(tmp_path, monkeypatch, capsys):
    run = ppo_run(tmp_path, "run")
    there = sorted(f.name for f in run.iterdir())
    logs = {name: (run / name).read_text() for name in ("metrics.jsonl", "timing.jsonl")}
    (run / "metrics.jsonl").unlink()
    (run / "timing.jsonl").unlink()
    pages = []

    def next_moment(seconds):
        """What the run does while the report sleeps: nothing, its first step, nothing, the next, its end."""
        moment, page = len(pages), tmp_path / "r.html"
        pages.append((json.loads(page.read_text().split('id="data">')[1].split("</script>")[0]) if page.exists() else None, os.stat(page).st_ino if page.exists() else 0))
        if moment == 1:
            (run / "metrics.jsonl").write_text(logs["metrics.jsonl"].splitlines(True)[0] + '{"step": ')
        elif moment == 3:
            (run / "metrics.jsonl").write_text(logs["metrics.jsonl"])
            (run / "timing.jsonl").write_text(logs["timing.jsonl"])
        elif moment == 4:
            (run / "done").write_text("{}")
        assert moment < 5, "the run is done"

    monkeypatch.setattr("lib.report.time.sleep", next_moment)
    rlsp.run_report(rlsp.Report(runs=[str(run)], out=str(tmp_path / "r.html"), live=True))
    assert "waiting for the first step" in capsys.readouterr().out
    steps = [page and page["runs"][0]["metrics"]["step"] for page, _ in pages]
    assert steps == [None, None, [1], [1], [1, 2]] and all(page["live"]["seconds"] == 10 for page, _ in pages if page)
    assert pages[2][1] == pages[3][1] != pages[4][1]  # what has not changed is not written again
    last = json.loads((tmp_path / "r.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert last["live"] is None and last["runs"][0]["state"] == "done" and sorted(f.name for f in run.iterdir()) == sorted([*there, "done"])


def test_an_interrupted_live_page_ends_without_loading_itself(tmp_path, monkeypatch, refused):  # noqa: F811
    run = ppo_run(tmp_path, "run")
    (ppo_run(tmp_path, "later") / "metrics.jsonl").unlink()
    monkeypatch.setattr("lib.report.time.sleep", lambda seconds: (_ for _ in ()).throw(Stopped))
    rlsp.run_report(rlsp.Report(runs=[str(run), str(tmp_path / "later")], out=str(tmp_path / "r.html"), csv=str(tmp_path / "t.csv"), live=True))
    assert '"live":null' in (tmp_path / "r.html").read_text() and len((tmp_path / "t.csv").read_text().splitlines()) == 3
    assert "not a run of sft, ppo or eval" in refused("report", tmp_path / "none", "--live", "--out", tmp_path / "r.html")


# ---- the page in a browser

@pytest.fixture(scope="module")
def page(tmp_path_factory):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser or subprocess.run([browser, "--version"], capture_output=True).returncode:
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    out = tmp_path_factory.mktemp("page")
    few = [rollout(2, "so \\boxed{3}. Wait.", False, "3"), rollout(2, "No idea about Zebras", False, None), rollout(2, HOSTILE)]
    runs = [ppo_run(out, "r0", 0, rollouts=[rollout(1, "early \\boxed{2}")] + few, tokens=[token_row(1, ["a", "\n", "", " ééé", HOSTILE])]),
            ppo_run(out, "r1", 1, rollouts=[rollout(2, "the other run")], tokens=[token_row(2, list("xyz"))]),
            ppo_run(out, "r2", 0, exploration=HOSTILE), eval_folder(out, "e")]
    report(*runs, out=out / "r.html")
    page = Page(browser, tmp_path_factory.mktemp("profile"))
    page.open(out / "r.html")
    yield page
    page.close()


def set_control(page, selector, value):
    page.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); })()")


def cards(page):
    return page.js("[...document.querySelectorAll('#list .rollout pre')].map(e => e.textContent)")


def test_the_page_renders_without_errors_and_without_network(page):
    assert page.js("document.documentElement.dataset.ready") == "yes" and page.problems == []
    assert page.js("document.title") == "RLSP report" and page.js("document.querySelectorAll('img').length") == 0
    charts = page.js("[...document.querySelectorAll('#curves figure')].map(e => e.dataset.key)")
    assert charts == ["accuracy", "response_length", "novel", "timing.seconds"]
    assert page.js("document.querySelectorAll('[data-key=accuracy] .curve.seed').length") == 2  # two seeds; the third run is alone
    caption = page.js("document.querySelector('[data-key=response_length]').textContent")
    assert "3,703 (× 4.2)" in caption and "exploration=length × 2;" in caption  # from 100 to 200 tokens
    assert "37.5" in page.js("document.getElementById('evaluation').textContent")


def test_the_picker_and_the_search_of_rollouts(page):
    assert cards(page) == ["so \\boxed{3}. Wait.", "No idea about Zebras", HOSTILE]  # the last step of the first run
    assert page.js("[...document.querySelectorAll('#list mark')].map(e => e.textContent)") == ["Wait", "Wait", "Let me check"]
    set_control(page, "#rollouts input[type=range]", "0")
    assert cards(page) == ["early \\boxed{2}"]
    set_control(page, "#rollouts select", "1")
    assert cards(page) == ["the other run"]
    set_control(page, "#rollouts select", "0")
    set_control(page, "#search", "zeBRA")
    assert cards(page) == ["No idea about Zebras"]
    set_control(page, "#search", "early")
    assert cards(page) == []
    page.js("document.getElementById('everywhere').click()")
    assert cards(page) == ["early \\boxed{2}"]
    set_control(page, "#search", "")
    for kind, n in (("right", 2), ("wrong", 1), ("no answer", 1), ("all", 4)):
        set_control(page, "#rollouts .controls label:nth-child(3) select", kind)
        assert len(cards(page)) == n, kind
    assert "same text" in page.js("document.querySelector('#list').textContent") and page.problems == []


def shown_numbers(page):
    return page.js("Object.fromEntries([...document.querySelectorAll('#numbers tr')].map(r => [r.dataset.name, r.cells[1].textContent]))")


def test_the_microscope_shows_the_logged_numbers(page):
    row = token_row(1, ["a", "\n", "", " ééé", HOSTILE])

    def agrees(i):
        numbers = shown_numbers(page)
        value = lambda name: float(numbers[name].replace("−", "-"))
        names = {"r_t": "reward", "V_t": "value", "A_t": "raw_advantage", "whitened": "advantage", "return": "return", "log π_old": "old_logprob",
                 "log π_new": "new_logprob", "log π_ref": "ref_logprob", "entropy": "entropy"}
        for shown, logged_ in names.items():
            assert value(shown) == pytest.approx(row[logged_][i], rel=1e-3), (shown, i)
        after = row["value"][i + 1] if i + 1 < 5 else 0.0
        assert value("δ_t") == pytest.approx(row["reward"][i] + after - row["value"][i], rel=1e-3)
        assert json.loads(numbers["text"]) == row["tokens"][i]

    assert page.js("[...document.querySelectorAll('#tokens span')].map(e => e.textContent)") == ["a", "↵\n", "·", " ééé", HOSTILE]
    agrees(4)
    page.point_at("#tokens span[data-t='3']")
    agrees(3)
    page.js("document.getElementById('tokens').focus()")
    page.press("ArrowLeft")
    agrees(2)
    page.press("ArrowRight")
    agrees(3)
    before = page.js("document.querySelector('#tokens span').style.backgroundColor")
    set_control(page, "#microscope label:nth-child(4) select", "value")
    assert page.js("document.querySelector('#tokens span').style.backgroundColor") != before
    assert page.js("document.querySelectorAll('#trace .curve').length") == 3 and page.problems == []
    set_control(page, "#microscope select", "1")
    assert shown_numbers(page)["token"] == "3 of 3" and page.problems == []


def panel(page, key):
    """What the panel of a quantity says of its axes: their labels, and the ticks along x."""
    return page.js(f"""(() => {{ const of = s => [...document.querySelectorAll('[data-key="{key}"] ' + s)].map(e => e.textContent);
        return [of('text.x')[0], of('text.y')[0], of('text[text-anchor=middle]:not(.label)')]; }})()""")


def test_the_result_stands_first_and_axes_say_what_they_are(page, tmp_path):
    """From here on the tests take the browser away from the page above."""
    sft = trained(tmp_path, "runs/sft", "base", [{"step": s, "loss": 3.0 / s, "tokens": 5} for s in range(1, 11)], command="sft")
    metrics = [{"step": s, "accuracy": s / 50, "response_length": 100.0, "kl_coef": 0.05, "policy_lr": 1e-6, "k1": s / 10} for s in range(1, 41)]
    for s in (10, 20, 40):
        metrics[s - 1] |= {"eval_accuracy": s / 80, "eval_standard_error": 0.1, "eval_tokens": 120 + s, "eval_problems": 60}
    run = trained(tmp_path, "runs/ppo", "runs/sft/model", metrics, rollout_batch=512, samples=1, steps=40)
    write_jsonl(run / "timing.jsonl", [{"step": s, "seconds": 600} for s in range(1, 41)])
    report(sft, run, evaluated(tmp_path, "runs/e", {"runs/sft/model": 0.25, "runs/ppo/model": 0.5}), out=tmp_path / "r.html")
    page.open(tmp_path / "r.html")
    assert page.js("document.querySelector('main section').id") == "result"
    lines_ = page.js("[...document.querySelectorAll('#result tbody tr')].map(r => [...r.cells].map(c => c.textContent.trim()))")
    assert lines_[1] == ["ppoPPO of sft on train.jsonl, 40 steps, exploration length, seed 0",
                         "25.0 ± 1.0 → 50.0 ± 1.0 %4 problems of test.jsonl, 2 samples each", "250 → 500", "6.7 h"]
    assert panel(page, "accuracy") == ["step", "share of responses", ["10", "20", "30", "40"]] and panel(page, "loss")[1] == "nats per trained token"
    # the held-out accuracy beside that of the rollouts: a circle and a bar of two standard errors at each step that has it
    assert page.js("document.querySelectorAll('[data-key=accuracy] circle.held').length") == 3 and not page.js("document.querySelector('[data-key=eval_accuracy]')")
    bars = page.js("[...document.querySelectorAll('[data-key=accuracy] line.held')].map(e => e.getAttribute('y1') - e.getAttribute('y2'))")
    assert bars == pytest.approx([bars[0]] * 3) and bars[0] > 20
    # what does not move is folded into a line that opens
    assert page.js("document.querySelector('#constant summary').textContent") == (
        "constant: eval_problems 60, kl_coef 0.05, policy_lr 1e−6, tokens 5, timing.seconds 1.5 or 600")
    folded = page.js("[...document.querySelectorAll('#constant figure')].map(e => e.dataset.key)")
    assert folded == ["eval_problems", "kl_coef", "policy_lr", "tokens", "timing.seconds"] and not page.js("document.getElementById('constant').open")
    # the choice of x is that of all panels, and stays after a reload, as do open lists
    set_control(page, "#abscissa", "tokens")
    page.js("document.getElementById('constant').open = true")
    assert panel(page, "accuracy")[0::2] == ["million tokens sampled", ["0.5", "1.0", "1.5", "2.0"]] and panel(page, "loss")[0] == "tokens trained"
    for _ in range(2):
        set_control(page, "#abscissa", "seconds")
        assert panel(page, "accuracy")[0::2] == ["hours", ["2", "4", "6"]] and panel(page, "k1")[0] == "hours"
        page.reload()
    assert panel(page, "k1")[0] == "hours" and page.js("document.getElementById('constant').open") and page.problems == []
    page.point_at("[data-key=accuracy] circle.held:last-of-type")
    tip = page.js("document.querySelector('[data-key=accuracy] .tip').textContent")
    assert "hours" in tip and "held out, ppo" in tip and "(0.4 … 0.6)" in tip


def test_a_live_page_loads_itself_and_keeps_what_was_chosen(page, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.report.LIVE_SECONDS", 1)
    run = ppo_run(tmp_path, "run", steps=30, rollouts=[rollout(s, f"at {s}") for s in range(1, 31)], rollout_batch=2)
    moments, places, place = iter(range(4)), [], "document.querySelector('[data-key=response_length]').getBoundingClientRect().top"

    def in_the_browser(seconds):
        moment = next(moments)
        if moment == 0:
            page.open(tmp_path / "r.html")
            set_control(page, "#abscissa", "tokens")
            set_control(page, "#search", "at")
            page.js("document.getElementById('constant').open = true; scrollTo(0, 700); document.getElementById('search').focus({preventScroll: true})")
            places.append(page.js(place))
            page.js("document.documentElement.dataset.first = 'yes'")
            ppo_run(tmp_path, "more", steps=31, rollouts=[rollout(s, f"at {s}") for s in range(1, 32)], rollout_batch=2)
            for file in ("timing.jsonl", "rollouts.jsonl", "metrics.jsonl"):
                os.replace(tmp_path / "more" / file, run / file)
        else:
            page.wait("!document.documentElement?.dataset.first && document.documentElement?.dataset.ready")
            (run / "done").write_text("")

    monkeypatch.setattr("lib.report.time.sleep", in_the_browser)
    rlsp.run_report(rlsp.Report(runs=[str(run)], out=str(tmp_path / "r.html"), live=True))
    assert page.js("document.querySelector('#live b').textContent") == "live"
    page.wait("document.documentElement?.dataset.ready && !document.querySelector('#live b')")  # the last page does not load itself
    assert page.js("[abscissa.value, search.value, document.activeElement.id, document.getElementById('constant').open]") == ["tokens", "at", "search", True]
    assert page.js(place) == pytest.approx(places[0], abs=3)
    assert cards(page) == ["at 31"] and panel(page, "accuracy")[0] == "thousand tokens sampled" and page.problems == []
    page.js("document.documentElement.dataset.last = 'yes'")
    time.sleep(1.5)
    assert page.js("document.documentElement.dataset.last") == "yes"


def sft_run(out, steps):
    """A run of sft: no rollouts, no tokens; its norm is missing or not a number at some steps."""
    run = out / f"sft-{steps}"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"flags": {"command": "sft", "model": "m", "data": "d", "seed": 0}, "versions": {}}))
    norms = [{}, {"grad_norm": math.nan}, {"grad_norm": math.inf}, {"grad_norm": 1.0}]
    write_jsonl(run / "metrics.jsonl", [{"step": s, "loss": 2.0 / s} | norms[s % 4] for s in range(1, steps + 1)])
    return run


@pytest.mark.parametrize("case", ["evaluation alone", "sft alone", "one step", "200 steps, gaps, seeds, text from right to left, a huge token"])
def test_other_pages_have_no_errors_either(page, tmp_path, case):  # the last test: it takes the browser away from the page above
    rtl, huge = "\u202e עברית Wait. \\boxed{2}", "x" * 20_000
    folders = {"evaluation alone": lambda: [eval_folder(tmp_path, "e")], "sft alone": lambda: [sft_run(tmp_path, 9)],
               "one step": lambda: [sft_run(tmp_path, 1), ppo_run(tmp_path, "p", steps=1)]}.get(case, lambda: [
                   sft_run(tmp_path, 200), *(ppo_run(tmp_path, "p" * 100 + str(s), s, 200 - s, [rollout(t, rtl + huge) for t in range(1, 200 - s)],
                                                     [token_row(199 - s, [rtl, huge, "b"])]) for s in range(3))])()
    report(*folders, out=tmp_path / "r.html")
    page.open(tmp_path / "r.html")
    assert page.js("document.documentElement.dataset.ready") == "yes" and page.problems == []
    head = page.js("[...document.querySelectorAll('#result th')].map(e => e.textContent)")
    assert head == {"evaluation alone": ["", "accuracy", "tokens per response", ""], "sft alone": ["", "loss, before → after", "", ""]}.get(
        case, ["", "loss or accuracy" + ", before → after" * (case != "one step"), "tokens per response", "time"])
    assert page.js("document.querySelectorAll('#curves .curve').length") >= 2 * len(folders) - 2 * (case == "evaluation alone")
    if case.startswith("200"):  # gaps stay gaps: 50 of the 200 norms are numbers
        assert page.js("document.querySelector('[data-key=grad_norm] .curve').getAttribute('d').match(/[ML]/g).length") == 50
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")  # nothing sticks out
    page.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "on a telephone"
    page.call("Emulation.clearDeviceMetricsOverride")
