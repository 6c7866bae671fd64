"""tokens.jsonl against slow loops, what `report` gathers and refuses, and the page in a real browser."""
import csv
import json
import math
import os
import shutil
import subprocess

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
    runs.append(ppo_run(tmp_path, "longer", 0, exploration="length", length_scale=8.0))
    data, _ = report(*runs, out=tmp_path / "r.html")
    assert [run["group"] for run in data["runs"]] == [0, 0, 1, 1, 2]
    assert labels(data) == {"none-0": "exploration=none", "none-1": "exploration=none", "length-0": "exploration=length, length_scale=1000.0",
                            "length-1": "exploration=length, length_scale=1000.0", "longer": "exploration=length, length_scale=8.0"}
    same_seed = [ppo_run(tmp_path, name, 0, model=name) for name in ("a", "b")]  # other models, not other seeds
    data, _ = report(*same_seed, out=tmp_path / "r.html")
    assert [run["group"] for run in data["runs"]] == [0, 1] and labels(data) == {"a": "a", "b": "b"}
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
    (lambda run: (run / "metrics.jsonl").unlink(), "not a run of sft, ppo or eval"), (break_file("metrics.jsonl", ""), "holds no step yet"),
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
    for out, words in ((run / "metrics.jsonl", "exists and is no report"), (tmp_path / "page.html", "exists and is no report"),
                       (tmp_path / "link", "no link"), (tmp_path / "pipe", "expected a file"), ("/dev/null", "expected a file"), (tmp_path, "expected a file")):
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
    for name, words in (("mine.csv", "exists and is no table of a report; nothing was overwritten, give another --csv"), ("link", "no link"),
                        ("t.html", "no table of a report"), ("new.html", "expected another one"), (".", "expected a file")):
        there = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        error = refused("report", run, "--out", tmp_path / "new.html", "--csv", tmp_path / name)
        assert words in error and len(error.splitlines()) == 1
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == there
    assert "an evaluation has no curves" in refused("report", eval_folder(tmp_path, "e"), "--csv", tmp_path / "new.csv")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused("report", run, "--csv", tmp_path / "new.csv")
    assert not [f for f in tmp_path.rglob("*") if "new" in f.name]


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
                   sft_run(tmp_path, 200), *(ppo_run(tmp_path, f"p{s}", s, 200 - s, [rollout(t, rtl + huge) for t in range(1, 200 - s)],
                                                     [token_row(199 - s, [rtl, huge, "b"])]) for s in range(3))])()
    report(*folders, out=tmp_path / "r.html")
    page.open(tmp_path / "r.html")
    assert page.js("document.documentElement.dataset.ready") == "yes" and page.problems == []
    assert page.js("document.querySelectorAll('#curves .curve').length") >= 2 * len(folders) - 2 * (case == "evaluation alone")
    if case.startswith("200"):  # gaps stay gaps: 50 of the 200 norms are numbers
        assert page.js("document.querySelector('[data-key=grad_norm] .curve').getAttribute('d').match(/[ML]/g).length") == 50
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")  # nothing sticks out
