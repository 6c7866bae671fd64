"""rlsp.py as its users meet it: the stages end to end, and nonsense in."""
import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib import chat, cli, decode, evaluation, files, functions, guards, hf, inputs, logs, parallel
from lib.report import interval
from lib.signals import signals
import ppo
import rlsp
from conftest import ROOT
from test_ppo import folder  # noqa: F401  (the fixture)

TINY = ROOT / "data" / "tiny"


def rlsp_py(*words, cwd=None):
    return subprocess.run([sys.executable, str(ROOT / "rlsp.py"), *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call rlsp.py with words that it must refuse, in this process; returns standard error."""
    def call(*words):
        monkeypatch.setattr(signals, "install", lambda: None)  # this process keeps its own
        monkeypatch.setattr(sys, "argv", ["rlsp.py", *map(str, words)])
        with pytest.raises(SystemExit) as e, monkeypatch.context() as refusal:
            refusal.setattr(ppo.Trainer, "train", lambda self: pytest.fail("not refused"))  # 200 steps of it
            rlsp.main()
        assert e.value.code == 2
        return capsys.readouterr().err
    return call


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SFT from scratch, PPO and evaluation, as train.sh chains them, in the smallest form."""
    out = tmp_path_factory.mktemp("runs")
    for name, rows in (("sft", 48), ("train", 12), ("test", 10)):
        (out / f"{name}.jsonl").write_text("".join((TINY / f"{name}.jsonl").read_text().splitlines(True)[:rows]))
    steps = [
        ["sft", "--model", TINY / "model", "--from-scratch", "--data", out / "sft.jsonl", "--out", out / "s", "--lr", "3e-3",
         "--batch", "16", "--epochs", "2", "--dtype", "float32"],
        ["ppo", "--model", out / "s/model", "--data", out / "train.jsonl", "--out", out / "p", "--steps", "2", "--rollout-batch", "6",
         "--train-batch", "3", "--max-response", "16", "--freeze-steps", "1", "--exploration", "steps", "--dtype", "float32"],
        ["eval", "--model", out / "s/model", out / "p/model", "--data", out / "test.jsonl", "--out", out / "e", "--samples", "4",
         "--max-response", "16", "--temperature", "1", "--dtype", "float32"]]
    for words in steps:
        done = rlsp_py(*words)
        assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_the_stages_run_and_a_run_is_a_folder(runs):
    out, table = runs
    losses = [json.loads(x)["loss"] for x in (out / "s/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0]
    for run in "sp":
        assert hf.load(out / run / "model").config.hidden_size == 128
        config = json.loads((out / run / "config.json").read_text())
        assert config["flags"]["seed"] == 0 and config["versions"]["torch"] == torch.__version__
        assert config["flags"].get("sampler") == {"s": None, "p": "whole"}[run]  # what auto became
    metrics = [json.loads(x) for x in (out / "p/metrics.jsonl").read_text().splitlines()]
    wanted = """reward outcome exploration accuracy response_length response_length_max truncated k1 k3 entropy value_loss
                explained_variance critic_grad_norm critic_lr backtracking verification alternatives self_correction repetition
                sampler_logprob_diff alpha kl_coef""".split()
    assert all(math.isfinite(m[k]) for m in metrics for k in wanted)
    assert all(k in metrics[1] for k in "policy_loss approx_kl clip_frac ratio first_ratio policy_grad_norm policy_lr".split())
    timing = [json.loads(x) for x in (out / "p/timing.jsonl").read_text().splitlines()]
    assert [t["step"] for t in timing] == [1, 2] and all(t["rollout_tokens_per_s"] > 0 and t["update_tokens_per_s"] > 0 for t in timing)
    assert all(0 < t["mfu"] < 2 and t["flops_per_s"] > 0 and t["padding"] == 0 for t in timing)
    assert all(0 < t["kv_use"] <= 1 and t["decode_waste"] == 0 and 0 <= t["prefill_padding"] < 0.2 for t in timing)
    rollouts = [json.loads(x) for x in (out / "p/rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 12 and {"total", "outcome", "exploration", "reason"} <= set(rollouts[0]["reward"])
    assert (out / "p/checkpoints/step-000002/state.json").is_file()
    summary = json.loads((out / "e/summary.json").read_text())
    assert set(summary) == {str(out / "s/model"), str(out / "p/model")} and "pass@4" in table and "maj@4" in table
    outputs = [json.loads(x) for x in (out / "e/outputs-1.jsonl").read_text().splitlines()]
    assert len(outputs) == 10 and all(len(r["responses"]) == 4 for r in outputs)
    groups = summary[str(out / "s/model")]
    assert sum(v["problems"] for k, v in groups.items() if k.startswith("level")) == 10 == groups["all"]["problems"]


def test_a_small_cache_changes_no_response(runs):
    """--kv-gb for two sequences at once, in place of forty."""
    out, _ = runs
    _, row = decode.KVCache.rows(hf.read_config(out / "s/model"), 1, 100, torch.float32, 0)  # one block a row
    done = rlsp_py("eval", "--model", out / "s/model", "--data", out / "test.jsonl", "--out", out / "small", "--samples", "4", "--max-response", "16",
                   "--temperature", "1", "--dtype", "float32", "--kv-gb", 2.5 * row / 1e9)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "small/outputs-1.jsonl").read_bytes() == (out / "e/outputs-1.jsonl").read_bytes()


def test_sample_prints_a_response_and_the_verdict(runs):
    done = rlsp_py("sample", "--model", runs[0] / "s/model", "--problem", "Find x with 2x + 3 = 5 mod 7.", "--answer", "1",
                   "--max-response", "8", "--dtype", "float32")
    assert done.returncode == 0 and "Find x with 2x" in done.stdout and ("right" in done.stdout or "wrong" in done.stdout)
    total, alpha, outcome, rest, exploration = map(float, re.search(
        r"\.\.\. reward (\S+) = (\S+) \* (\S+) \+ (\S+) \* (\S+) \(alpha", done.stdout).groups())
    assert total == pytest.approx(alpha * outcome + rest * exploration, abs=1e-3) and alpha == 0.8 and "\033" not in done.stdout


def test_a_terminal_shows_behaviours_in_colour(monkeypatch):
    text = "x = 2? Wait, let me check. That's wrong"
    assert logs.coloured(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = logs.coloured(text)
    assert re.findall(r"\033\[1;\d+m(.*?)\033\[0m", shown) == ["Wait", "let me check", "That's wrong"]
    assert re.sub(r"\033\[.*?m", "", shown) == text and len(set(re.findall(r"\[1;(\d+)m", shown))) == 3
    monkeypatch.setenv("NO_COLOR", "1")
    assert logs.coloured(text) == text


def bad(tmp_path, text):
    (tmp_path / "bad.jsonl").write_text(text)
    return tmp_path / "bad.jsonl"


GOOD = '{"problem": "What is 1 + 1?", "answer": "2"}\n'


@pytest.mark.parametrize("text, words", [
    ("", "contains no problem"), (GOOD + "{", "bad.jsonl:2: not valid JSON"), (GOOD + "[1]\n", "bad.jsonl:2: expected a JSON object, found list"),
    (GOOD + '{"problem": "x"}\n', "bad.jsonl:2: answer is nothing, expected text"),
    ('{"problem": "x", "answer": [4]}\n', "bad.jsonl:1: answer is [4], expected text"),
    (GOOD + '{"problem": "a\\ud800", "answer": "1"}\n', "bad.jsonl:2: problem has '\\ud800', half a surrogate pair, at character 2, expected"),
    ('{"problem": "x", "answer": "1", "subject": "\\udfff"}\n', "bad.jsonl:1: subject has '\\udfff', half a surrogate pair"),
    ('{"problem": "x", "answer": "1", "level": [3]}\n', "bad.jsonl:1: level is [3], expected a number or text"),
    ('{"problem": "x", "answer": "1", "level": NaN}\n', "bad.jsonl:1: level is nan, expected a number or text"),
    ('{"problem": "x", "answer": "1", "subject": true}\n', "bad.jsonl:1: subject is True, expected a number or text"),
    (json.dumps({"problem": "x" * (files.TEXT + 1), "answer": "1"}), "bad.jsonl:1: problem has 1048577 characters, expected at most 1048576"),
    (GOOD + GOOD.replace("1 + 1", "1 + 1" * 50), "bad.jsonl:2: the prompt has"), ("[" * 100_000, "bad.jsonl:1: not valid JSON")])
def test_bad_data_gets_one_line_and_status_2(folder, tmp_path, refused, text, words):  # noqa: F811
    error = refused("ppo", "--model", folder, "--data", bad(tmp_path, text), "--out", tmp_path / "run", "--max-prompt", "60",
                    "--max-response", "16")
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, message", [
    (["--model", "nowhere"], "nowhere/tokenizer.json: no such file"), (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--clip", "-1"], "--clip: -1 is out of range, expected at least 0"), (["--alpha", "1.5"], "--alpha: 1.5 is out of range"),
    (["--lr", "nan"], "--lr: nan is out of range"), (["--exploration", "wild"], "--exploration: invalid choice"),
    (["--steps", "x"], "--steps: invalid int value"), (["--advantage", "group"], "--samples is 1, expected at least 2"),
    (["--max-response", "2000"], "max_position_embeddings is 1024"), (["--reward", "nowhere.py:f"], "nowhere.py:f: expected an existing"),
    (["--freeze-steps", "9", "--steps", "5"], "--freeze-steps is 9, expected fewer than --steps 5"), (["--resume", "nowhere"], "nowhere/config.json: no such file"),
    (["--checkpoint", "step-000002"], "--checkpoint step-000002: expected --resume RUN"),
    (["--grad-clip", "0"], "--grad-clip: 0 is out of range, expected at least 1e-09"), (["--reward-clip", "0"], "--reward-clip: 0 is out of range"),
    (["--judge-workers", "1000000000"], "--judge-workers: 1000000000 is out of range"),
    (["--rollout-batch", "1000000000"], "--rollout-batch 1000000000 with --samples 1: expected at most 1048576 responses"),
    (["--keep-best", None], "--keep-best: expected --eval-data, which decides"), (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["--eval-data", str(TINY / "facts.jsonl")], "facts.jsonl:1: answer is nothing"),
    (["--eval-data", str(TINY / "test.jsonl"), "--max-prompt", "22"], "test.jsonl:1: the prompt has"),
    (["--eval-data", str(TINY / "test.jsonl"), "--eval-samples", "1000000"], "with --eval-samples 1000000: expected at most 1048576 responses"),
    (["--kv-gb", "1e-6"], "--kv-gb is 1e-06, expected at least"), (["--model", str(TINY / "model")], "--from-scratch")])
def test_bad_flags_get_a_clear_line_and_status_2(folder, tmp_path, refused, words, message):  # noqa: F811
    data = bad(tmp_path, GOOD)
    base = {"--model": folder, "--data": data, "--out": tmp_path / "run", "--max-response": "16"}
    given = dict(zip(words[::2], words[1::2]))
    error = refused("ppo", *[x for k, v in (base | given).items() for x in (k, v) if x])
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [
    ["ppo", "--model", "m", "--data", "d", "--out", ""], ["ppo", "--model", "", "--data", "d"], ["sft", "--model", "m", "--data", ""],
    ["eval", "--data", "d", "--model", "m", ""], ["ppo", "--resume", "r", "--checkpoint", ""], ["report", ""], ["report", "r", "--out", ""]])
def test_a_shells_unset_variable_is_no_folder(tmp_path, monkeypatch, refused, words):
    monkeypatch.chdir(tmp_path)
    error = refused(*words)
    assert "nothing is given, expected" in error and len(error.splitlines()) == 1
    assert not os.listdir()


def test_an_integer_beyond_all_floats_is_no_level(tmp_path):
    for digits, message in (400, "bad.jsonl:1: level is 9+ ... 9+, expected"), (5000, "bad.jsonl:1: not valid JSON: Exceeds the limit"):
        file = bad(tmp_path, '{"problem": "p", "answer": "1", "level": %s}\n' % ("9" * digits))
        with pytest.raises(ValueError, match=message):
            files.load_problems(file)


def test_a_package_of_the_same_name_on_pythons_path_is_not_taken_for_ours(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/__init__.py").write_text("raise SystemExit('taken')\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import lib.signals"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sample_takes_a_problem_or_a_file_and_nothing_in_vain(folder, tmp_path, refused):  # noqa: F811
    for words, message in (([], "expected either --problem TEXT or --data"), (["--problem", "x", "--data", "missing"], "expected either --problem TEXT or --data"),
                           (["--problem", ""], "--problem: nothing is given, expected"), (["--problem", " \n"], "--problem is ' \\n', expected"),
                           (["--problem", "a\udcff"], "half a surrogate pair"), (["--data", "d.jsonl", "--answer", "1"], "--answer belongs to")):
        assert message in refused("sample", "--model", folder, *words)


def test_nothing_of_strangers_moves_the_cursor(folder, tmp_path, refused, capsys):  # noqa: F811
    """Escapes in names, values and messages are made visible, a message is one line, and a value of megabytes is cut."""
    evil = "\033[2J\u202e\nerror: all is well"
    error = refused("ppo", "--model", folder, "--data", tmp_path / evil, "--out", tmp_path / "run")
    assert "\\x1b[2J\\u202e\\nerror" in error and "\033" not in error and len(error.splitlines()) == 1
    shutil.copytree(folder, tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    for change, message in (({"model_type": evil * 10**5}, "model_type"), ({"hidden_act": evil * 10**5}, "hidden_act"),
                            ({"rope_scaling": [evil] * 10**5}, "rope_scaling"), ({"vocab_size": [[]] * 10**6}, "vocab_size")):
        (tmp_path / "m/config.json").write_text(json.dumps(raw | change))
        error = refused("plan", "--model", tmp_path / "m")
        assert message in error and "\033" not in error and len(error) < 1200 and len(error.splitlines()) == 1
    evaluation.print_table({evil: {k: evaluation.summarize([dict(correct=[True], answers=["1"], tokens=[1], truncated=[False], answer="1")], 1)
                             for k in ("all", "subject " + evil)}}, 1)
    assert "\033" not in (table := capsys.readouterr().out) and len(table.splitlines()) == 3 and "\\x1b" in table
    assert files.visible("a" * 50 + "b" * 50, 25) == "a" * 10 + " ... " + "b" * 10 and files.visible("é 漢\u3000🙂\n", None, "\n") == "é 漢\u3000🙂\n"


def test_evaluation_refuses_what_it_would_report_wrongly(folder, tmp_path, refused):  # noqa: F811
    data, run = bad(tmp_path, GOOD), tmp_path / "run"
    assert "--model: a folder is given twice" in refused("eval", "--model", folder, f"{folder}/.", "--data", data, "--out", run)
    # resumed with other problems than those of the outputs that are there
    args = rlsp.read_flags(["eval", "--model", str(folder), "--data", str(data), "--out", str(run), "--max-response", "8"])
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"flags": cli.kept_flags(args)}))
    good = json.loads(GOOD) | dict(correct=[True], answers=["2"], tokens=[3], truncated=[False], responses=["2"])
    for outputs, message in (([good | {"problem": "What is 2 + 2?"}], f"outputs-1.jsonl:1: not the problem of {data}:1, which has changed"),
                             ([good | {"answer": "4"}], "outputs-1.jsonl:1: not the problem of"),
                             ([good] * 2, "outputs-1.jsonl: 2 problems, but"), ([good | {"tokens": [1, 2]}], "lists of different lengths"),
                             ([good | {"correct": True}], "outputs-1.jsonl:1: correct is True, expected list")):
        (run / "outputs-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outputs))
        assert message in refused("eval", "--resume", run)
    (run / "outputs-1.jsonl").write_text(json.dumps(good) + "\n")
    assert evaluation.earlier_results(run / "outputs-1.jsonl", files.load_problems(data), args) == [good]


TINY_TOKENIZER = TINY / "model/tokenizer.json"


def tiny_folder(out, **changes):
    """A folder with the tiny model's tokenizer, of which top-level values are changed."""
    shutil.copytree(TINY / "model", out)
    spec = json.loads(TINY_TOKENIZER.read_text()) | changes
    (out / "tokenizer.json").write_text(json.dumps(spec))
    return out


def test_a_tokenizer_that_multiplies_text_is_refused(tmp_path):
    ten = lambda pattern, a: {"type": "Replace", "pattern": {pattern: a}, "content": a * 10}
    chain = {"type": "Sequence", "normalizers": [ten("String", "a")] * 12}
    for i, (part, value) in enumerate({"normalizer": chain, "decoder": {"type": "Sequence", "decoders": [ten("String", "a")] * 12}}.items()):
        with pytest.raises(ValueError, match=f"tokenizer.json: {part} may lengthen a text more than 64 times"):
            hf.load_tokenizer(tiny_folder(tmp_path / str(i), **{part: value}))
    doubling = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}  # between any two letters
    assert hf.growth({"type": "Sequence", "normalizers": [doubling] * 7}) == 128 and hf.growth(None) == 1
    assert hf.growth({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, ten("String", "a" * 10)]}) == 20
    # Llama 2's and Qwen's are welcome
    llama = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    hf.load_tokenizer(tiny_folder(tmp_path / "llama", normalizer={"type": "Sequence", "normalizers": llama}))
    hf.load_tokenizer(tiny_folder(tmp_path / "qwen", normalizer={"type": "NFC"}))


def test_token_ids_beyond_the_vocabulary_are_refused_before_anything_is_computed(tmp_path):
    spec = json.loads(TINY_TOKENIZER.read_text())
    words = {k: v for k, v in spec["model"]["vocab"].items() if k != "a"}
    folder = tiny_folder(tmp_path / "m", model=spec["model"] | {"vocab": words | {"a": 10**6}, "merges": []})
    with pytest.raises(ValueError, match="tokenizer.json: token 'a' has id 1000000, but config.json's vocab_size is"):
        hf.load_tokenizer(folder)
    folder = tiny_folder(tmp_path / "long", model=spec["model"] | {"vocab": words | {"a" * 5000: spec["model"]["vocab"]["a"]}, "merges": []})
    with pytest.raises(ValueError, match="a' has 5000 characters, expected at most 4096"):
        hf.load_tokenizer(folder)
    folder = tiny_folder(tmp_path / "eos")
    for value in (10**6, -1, [True], "x", [[0]]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id has .*, expected ids below vocab_size"):
            hf.load_tokenizer(folder)


def test_a_strangers_link_is_not_copied_but_hugging_faces_cache_is(tmp_path):
    (tmp_path / "secret").write_text("{}")
    folder, out = tiny_folder(tmp_path / "m"), tmp_path / "out"
    out.mkdir()
    config = folder / "tokenizer_config.json"
    for target in (tmp_path / "secret", "../secret", "/dev/zero", "nowhere"):
        config.unlink()
        config.symlink_to(target)
        with pytest.raises(ValueError, match="tokenizer_config.json: a link that leaves the folder or leads to nothing"):
            hf.copy_tokenizer(folder, out)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(ValueError, match="tokenizer_config.json: expected a regular file"):
        hf.copy_tokenizer(folder, out)
    config.unlink()
    config.symlink_to("generation_config.json")  # inside the folder
    assert not list(out.iterdir())
    hf.copy_tokenizer(folder, out)
    assert (out / "tokenizer_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    # as Hugging Face's library keeps what it has downloaded
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (TINY / "model").iterdir():
        shutil.copyfile(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    (tmp_path / "again").mkdir()
    hf.copy_tokenizer(snapshot, tmp_path / "again")
    copied = list((tmp_path / "again").iterdir())
    assert len(copied) == 3 and all(f.read_bytes() == (TINY / "model" / f.name).read_bytes() and not f.is_symlink() for f in copied)
    # what stands where the copy goes is replaced, not written through
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(tmp_path / "secret")
    hf.copy_tokenizer(TINY / "model", out)
    assert (tmp_path / "secret").read_text() == "{}" and not (out / "tokenizer.json").is_symlink()


def test_a_second_model_that_does_not_fit_is_named_before_the_first_is_evaluated(folder, tmp_path, refused):  # noqa: F811
    shutil.copytree(folder, tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(raw | {"intermediate_size": raw["intermediate_size"] * 2}))
    error = refused("eval", "--model", folder, tmp_path / "m", "--data", bad(tmp_path, GOOD), "--out", tmp_path / "run", "--max-response", "8")
    assert f"{tmp_path}/m/model.safetensors: " in error and "has shape" in error and not (tmp_path / "run").exists()


def test_a_resumed_run_with_links_leads_nowhere(folder, tmp_path, refused):  # noqa: F811
    """If model/ or metrics.jsonl of an untrusted run is a link, we would write where it leads; on a pipe we would wait."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    data = bad(tmp_path, GOOD)
    args = rlsp.read_flags(["ppo", "--model", str(folder), "--data", str(data), "--out", str(run), "--max-response", "8"])
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"flags": cli.kept_flags(args)}))
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    for name, make in (("model", lambda p: p.symlink_to(elsewhere)), ("metrics.jsonl", lambda p: p.symlink_to(elsewhere / "precious")),
                       ("done", lambda p: p.symlink_to("/dev/zero")), ("rollouts.jsonl", os.mkfifo),
                       ("checkpoints", lambda p: p.symlink_to(elsewhere)), ("outputs-1.jsonl", os.mkfifo)):
        make(run / name)
        assert f"{run / name}: expected a file or a folder, not a link" in refused("ppo", "--resume", run)
        (run / name).unlink()
    (run / "model").mkdir()
    (run / "model/.part-0").symlink_to(elsewhere / "precious")
    assert "model/.part-0: expected a file or a folder, not a link" in refused("ppo", "--resume", run)
    # nor does what writes follow one that comes later
    (elsewhere / ".x.json.part").symlink_to(elsewhere / "precious")
    files.write_text(elsewhere / "x.json", "{}")
    (elsewhere / "log.jsonl").symlink_to(elsewhere / "precious")
    with pytest.raises(ValueError, match="log.jsonl: expected a regular file, not a link"):
        files.append_jsonl(elsewhere / "log.jsonl", [{}])
    assert (elsewhere / "precious").read_text() == "x" and (elsewhere / "x.json").read_text() == "{}"
    assert not (elsewhere / ".x.json.part").exists()


def test_a_demonstration_without_a_trained_token_is_refused(tmp_path, refused):
    rows = [{"problem": "a", "solution": [["b", True], ["c", False]]}, {"problem": "a", "solution": [["b", False]]}]
    error = refused("sft", "--model", TINY / "model", "--from-scratch", "--data", bad(tmp_path, "".join(json.dumps(r) + "\n" for r in rows)),
                    "--out", tmp_path / "run")
    assert "bad.jsonl:2: solution has no token to train" in error and not (tmp_path / "run").exists()


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + '{"b": "' + "x" * 10**4)
    with pytest.raises(ValueError, match="a.jsonl:2: expected a line of at most 100 characters"):
        list(files.read_jsonl(tmp_path / "a.jsonl"))
    monkeypatch.setattr(files, "JSON_BYTES", 100)
    with pytest.raises(ValueError, match="a.jsonl: 10016 bytes, expected at most 100"):
        files.read_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="/dev/zero: expected a regular file"):
        files.read_json("/dev/zero")


@pytest.mark.parametrize("environment, message", [
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK 0 of LOCAL_WORLD_SIZE 0 in the environment"), ({"WORLD_SIZE": "2"}, "RANK is not in the environment, but WORLD_SIZE is"),
    ({"RANK": "0"}, "WORLD_SIZE is not in the environment, but RANK is"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": None}, "MASTER_ADDR is not in the environment, but"),
    ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK is 'x' in the environment"), ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK is '-1' in the"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, "MASTER_PORT is '99999' in the environment"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9999")])
def test_a_torn_environment_gets_a_clear_line(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.environment() == (0, 1, 0, 1)
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} | environment).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as e:
        parallel.environment()
    assert message in str(e.value) and len(str(e.value)) < 250


def test_a_taken_port_and_an_isolated_python(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = os.environ | dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        command = [sys.executable, "-I", ROOT / "rlsp.py", "sft", "--model", TINY / "model", "--from-scratch", "--data", TINY / "sft.jsonl",
                   "--out", tmp_path / "run"]  # -I does not look for modules beside the script
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, env=environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("rlsp.py: ")]
    assert done.returncode == 2 and "the processes cannot meet there" in lines[0] and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_never_touched(folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("x")
    for command in ("sft", "ppo", "eval"):
        done = rlsp_py(command, "--model", folder, "--data", bad(tmp_path, GOOD), "--out", run)
        assert done.returncode == 2 and "exists already" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [p.name for p in run.iterdir()] == ["precious"]


def test_the_type_of_auto_is_found_once_and_kept_at_a_resume_elsewhere(monkeypatch, tmp_path):
    seen, run = [], tmp_path / "run"
    monkeypatch.setattr(rlsp, "sft", lambda args: seen.append((args.dtype, cli.new_run(args))))
    monkeypatch.setattr(signals, "install", lambda: None)
    given = ["--model", ROOT / "data/tiny/model", "--data", ROOT / "data/tiny/facts.jsonl", "--out", run]
    for machine, words in (("float32", given), ("bfloat16", ["--resume", run])):
        monkeypatch.setattr(parallel, "compute_type", lambda: machine)
        monkeypatch.setattr(sys, "argv", ["rlsp.py", "sft", *map(str, words)])
        rlsp.main()
        (run / "done").unlink()
    assert [dtype for dtype, _ in seen] == ["float32", "float32"]
    assert json.loads((run / "config.json").read_text())["flags"]["dtype"] == "float32"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.compute_type() == "bfloat16"


def test_resume_needs_the_run_alone_and_refuses_other_flags(runs, refused):
    out, _ = runs
    assert "clip is 0.3, but" in refused("ppo", "--resume", out / "p", "--clip", "0.3")
    assert "--resume: expected one argument" in refused("ppo", "--resume", "--out", out / "p")
    assert "expected the run's folder" in refused("ppo", "--resume", "", "--out", out / "p")
    assert "the run goes on in its own folder" in refused("ppo", "--resume", out / "p", "--out", out / "q")
    assert "not a run of rlsp.py sft" in refused("sft", "--resume", out / "p")
    for command, run in (("ppo", "p"), ("sft", "s"), ("eval", "e")):  # there is nothing left to do
        before = {f: f.read_bytes() for f in (out / run).glob("*.json*")}
        done = rlsp_py(command, "--resume", out / run, *(["--keep", "5"] if command != "eval" else []))
        assert done.returncode == 0, done.stderr
        assert {f: f.read_bytes() for f in (out / run).glob("*.json*")} == before and "eval " not in done.stderr


def test_a_run_is_done_when_its_last_file_is_there(runs, tmp_path, monkeypatch, capsys):
    def resume(*words):
        monkeypatch.setattr(sys, "argv", ["rlsp.py", "sft", "--resume", str(run), *words])
        rlsp.main()
        return capsys.readouterr().out

    monkeypatch.setattr(signals, "install", lambda: None)
    shutil.copytree(runs[0] / "s", tmp_path / "s")
    run, tokenizer = tmp_path / "s", tmp_path / "s/model/tokenizer.json"
    written = {f: f.stat().st_mtime_ns for f in (runs[0] / "s").rglob("*") if f.is_file()}
    assert max(written, key=written.get).name == "done"
    before = tokenizer.stat().st_mtime_ns
    assert resume() == f"{run} is done\n" and tokenizer.stat().st_mtime_ns == before
    # what was killed, or found the disk full, on its last file is not
    (run / "done").unlink()
    tokenizer.unlink()
    tokenizer.mkdir()
    with pytest.raises(SystemExit):
        resume()
    assert not (run / "done").exists()
    tokenizer.rmdir()
    assert "is done" not in resume() and tokenizer.is_file() and (run / "done").is_file()
    # one that goes back to a checkpoint is not done either, as long as it is on its way
    (newest,) = [f.name for f in (run / "checkpoints").iterdir()]
    monkeypatch.setattr(hf, "save", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        resume("--checkpoint", newest)
    assert not (run / "done").exists()


def test_cuda_memory_grows_in_pieces_however_rlsp_is_started():
    """torchrun rlsp.py as well as train.sh; torch reads the variable when it is imported."""
    source = (ROOT / "rlsp.py").read_text()
    assert source.index("expandable_segments:True") < source.index("import torch\n")
    assert "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", os.environ["PYTORCH_CUDA_ALLOC_CONF"])


def test_every_flag_has_help_and_a_default():
    parser = rlsp.parser()
    for name, command in parser._subparsers._group_actions[0].choices.items():
        for action in command._actions:
            assert action.help, (name, action.dest)
        assert "--seed" in command.format_help() or name in ("report", "plan", "export")
    ppo_flags = {a.dest for a in parser._subparsers._group_actions[0].choices["ppo"]._actions}
    assert {f for f in ppo.PPOConfig.__dataclass_fields__} <= ppo_flags


def test_help_comes_in_groups_and_shows_no_empty_default():
    text = rlsp.parser()._subparsers._group_actions[0].choices["ppo"].format_help()
    groups = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options", "model and data", "rollout", "reward", "judge", "advantage", "update", "held-out problems", "memory", "run"]
    assert "(default: 2e-07)" in text and "None" not in text and "ppo --model MODEL --data DATA [flags]" in text


def test_no_command_takes_a_flag_by_half_its_name(refused):
    """--resum and the like went past every check of --resume."""
    whole = {"sft": ["--model", "m", "--data", "d"], "eval": ["--model", "m", "--data", "d"], "ppo": ["--model", "m", "--data", "d"],
             "sample": ["--model", "m"], "plan": ["--model", "m"], "report": ["runs"],
             "export": ["run", "--out", "o"]}
    for name, command in rlsp.parser()._subparsers._group_actions[0].choices.items():
        for flag in {f[:-1] for a in command._actions for f in a.option_strings if len(f) > 3}:
            error = refused(name, *whole[name], f"{flag}=1")
            assert error.startswith("rlsp.py: error: unrecognized arguments") and len(error.splitlines()) == 1, flag


# ---- a run's config.json, maybe a stranger's

def config_json(tmp_path, **flags):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"command": "ppo", "model": "m", "data": "d"} | flags}))
    return tmp_path


@pytest.mark.parametrize("flags, message", [
    ({"seed": ["0", "--reward=/some/evil.py:f"]}, "flags: seed: ['0', '--reward=/some/evil.py:f'] is of the wrong type, expected an integer"),
    ({"steps": 3.0}, "flags: steps: 3.0 is of the wrong type, expected an integer"),
    ({"keep": True}, "flags: keep: True is of the wrong type, expected an integer"),
    ({"steps": None}, "flags: steps: None is of the wrong type"), ({"recompute": "yes"}, "flags: recompute: 'yes' is of the wrong type, expected true or false"),
    ({"alpha": 1.5}, "flags: alpha: 1.5 is out of range, expected at least 0 and at most 1"), ({"lr": 1e999}, "flags: lr: inf is out of range"),
    ({"seed": 10**100}, "flags: seed: 1000"), ({"exploration": "wild"}, "flags: exploration: 'wild' is none of none, length"),
    ({"model": ["m"]}, "flags: model: ['m'] is of the wrong type, expected text"), ({"help": True}, "flags: 'help' is not a flag of rlsp.py ppo"),
    ({"reward": "evil.py:f"}, "the run has --reward evil.py:f; give it again"),
    ({"judge_url": "http://attacker/v1"}, "the run has --judge-url http://attacker/v1; give it again"),
    ({"command": "sft"}, "not a run of rlsp.py ppo"), ({"command": ["ppo"]}, "not a run of rlsp.py ppo")])
def test_saved_flags_are_data_each_checked(tmp_path, refused, flags, message):
    error = refused("ppo", "--resume", config_json(tmp_path, **flags))
    assert message in error and len(error.splitlines()) == 1 and len(error) < 400


def test_nothing_in_a_file_decides_what_code_runs_or_who_gets_a_key(tmp_path):
    """Also not by words in other flags' values; what the command line says holds."""
    again = [f.name for c in rlsp.COMMANDS.values() for f in dataclasses.fields(c) if f.metadata["again"]]
    assert {"reward", "judge_url"} <= set(again)
    run = config_json(tmp_path, model="--reward=evil.py:f", data="d --judge-url=http://attacker", judge_model="-h", reward="evil.py:f",
                      judge_url="http://attacker")
    with pytest.raises(ValueError, match="give it again"):
        rlsp.read_flags(["ppo", "--resume", str(run), "--judge-url", "http://mine"])
    run = config_json(tmp_path, model="--reward=evil.py:f", data="d --judge-url=http://attacker", judge_model="-h", lr=1)
    args = rlsp.read_flags(["ppo", "--resume", str(run), "--judge-url", "http://mine", "--keep", "7"])
    assert (args.model, args.reward, args.judge_url, args.judge_model, args.keep) == ("--reward=evil.py:f", "", "http://mine", "-h", 7)
    assert args.run == args.resume == str(run) and type(args.lr) is float


def test_torchrun_takes_none_of_our_flags_for_its_own():
    """torchrun also reads flags after the script's name if they abbreviate its own: it took --run for --run-path."""
    from torch.distributed.run import get_args_parser
    for name, command in rlsp.parser()._subparsers._group_actions[0].choices.items():
        for flag in (f for a in command._actions for f in a.option_strings if f not in ("-h", "--help")):
            words = [name, flag, "x"]
            assert get_args_parser().parse_args(["--nproc_per_node", "2", "rlsp.py", *words]).training_script_args == words


def test_sft_and_eval_on_two_processes(tmp_path):
    (tmp_path / "sft.jsonl").write_text("".join((TINY / "sft.jsonl").read_text().splitlines(True)[:24]))
    summaries = []
    for ranks in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), ROOT / "rlsp.py"]
        for words in (["sft", "--model", TINY / "model", "--from-scratch", "--data", tmp_path / "sft.jsonl", "--out", tmp_path / f"s{ranks}",
                       "--batch", "8", "--epochs", "1"],
                      ["eval", "--model", tmp_path / "s1/model", "--data", tmp_path / "sft.jsonl", "--out", tmp_path / f"e{ranks}",
                       "--limit", "4"]):
            done = subprocess.run([*map(str, launch), *map(str, words), "--dtype", "float32"], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
        losses = [json.loads(x)["loss"] for x in (tmp_path / f"s{ranks}/metrics.jsonl").read_text().splitlines()]
        summaries.append((losses, json.loads((tmp_path / f"e{ranks}/summary.json").read_text())))
    assert summaries[0][0] == pytest.approx(summaries[1][0], rel=1e-4) and summaries[0][1] == summaries[1][1]


def test_checklist_19_a_broken_reward_function_ends_the_run_with_its_error(folder, tmp_path):  # noqa: F811
    (tmp_path / "mine.py").write_text("def f(response, problem):\n    raise RuntimeError('judge is down')\n")
    done = rlsp_py("ppo", "--model", folder, "--data", bad(tmp_path, GOOD), "--out", tmp_path / "run", "--max-response", "8", "--steps", "1",
                   "--rollout-batch", "2", "--freeze-steps", "0", "--dtype", "float32", "--reward", f"{tmp_path}/mine.py:f")
    assert done.returncode == 1 and "judge is down" in done.stderr


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "GeneratorExit", "type('Mine', (BaseException,), {})"])
def test_no_kind_of_exception_of_a_users_function_gets_past_its_line(tmp_path, error):
    (tmp_path / "mine.py").write_text(f"def f(response, problem):\n    raise {error}('x')\n")
    (tmp_path / "top.py").write_text(f"raise {error}('x')\n")
    function = functions.load("--reward", f"{tmp_path}/mine.py:f", functions.number)
    with pytest.raises(guards.TrainingError, match="mine.py:2: .*x"):
        function("", {})
    with pytest.raises(ValueError, match="top.py:1: .*x"):
        functions.load("--reward", f"{tmp_path}/top.py:f", functions.number)


def test_what_a_users_function_changes_around_it_is_changed_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import os, sys, torch\n"
        "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "def f(response, problem):\n"
        "    problem['list'].append(problem.pop('answer'))\n"
        "    os.chdir('/')\n    sys.stdout = None\n    sys.stderr.close()\n    return 1.0\n")
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))
    function = functions.load("--reward", "mine.py:f", functions.number)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    problem = {"answer": "2", "list": []}
    sample = types.SimpleNamespace(text="", problem=problem)
    assert functions.ask(function, [sample, sample]) == [1.0, 1.0]
    assert problem == {"answer": "2", "list": []}
    assert os.getcwd() == str(tmp_path)
    assert sys.stdout and not sys.stderr.closed


@pytest.fixture
def call(monkeypatch, capsys):
    """Call rlsp.py in this process; returns (exit status, standard output, standard error)."""
    def run(*words):
        monkeypatch.setattr(signals, "install", lambda: None)
        monkeypatch.setattr(sys, "argv", ["rlsp.py", *map(str, words)])
        capsys.readouterr()
        try:
            rlsp.main()
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return run


def test_eval_and_sample_with_a_verifier_of_ones_own(folder, tmp_path, call):  # noqa: F811
    (tmp_path / "mine.py").write_text(
        "import rewards\n\ndef same(response, problem):\n    return rewards.verify(response, problem['answer'])\n\n"
        "def even(response, problem):\n    return len(response) % 2 == 0\n\ndef broken(response, problem):\n    raise KeyError('tests')\n")
    (tmp_path / "test.jsonl").write_text(GOOD * 3)
    common = ["--model", folder, "--max-response", "8", "--dtype", "float32", "--temperature", "1"]
    ev = lambda name, *words: call("eval", *common, "--data", tmp_path / "test.jsonl", "--samples", "4", "--out", tmp_path / name, *words)
    result = lambda name: json.loads((tmp_path / name / "summary.json").read_text())[str(folder)]["all"]
    assert ev("math")[0] == ev("same", "--verifier", f"{tmp_path}/mine.py:same")[0] == 0
    assert {**result("same"), "answered": 0} == {**result("math"), "answered": 0}
    (tmp_path / "test.jsonl").write_text(GOOD + GOOD.replace('"2"', '"((2"'))
    status, _, error = ev("unread", "--samples", "1")
    assert status == 0 and f"rlsp.py: warning: the verifier cannot read 1 of 2 answers of {tmp_path}/test.jsonl, first in line 2: '((2'" in error
    # without answers and boxes: the vote is over whole texts
    (tmp_path / "test.jsonl").write_text('{"problem": "What?"}\n' * 3)
    assert ev("even", "--verifier", f"{tmp_path}/mine.py:even")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "even/outputs-1.jsonl").read_text().splitlines()]
    texts = [text for r in rows for text in r["responses"]]
    assert [c for r in rows for c in r["correct"]] == [len(text) % 2 == 0 for text in texts]
    assert result("even")["accuracy"] == sum(len(text) % 2 == 0 for text in texts) / 12 and result("even")["maj@4"] > 0
    status, _, error = ev("broken", "--verifier", f"{tmp_path}/mine.py:broken")
    assert status == 1 and error.splitlines()[-1] == f"rlsp.py: --verifier {tmp_path}/mine.py:10: KeyError: 'tests'"
    status, out, _ = call("sample", *common, "--problem", "What?", "--samples", "3", "--verifier", f"{tmp_path}/mine.py:even")
    assert status == 0 and out.count("(--verifier)") == 3 and "against None" in out
    status, out, error = call("eval", "--resume", tmp_path / "even")
    assert status == 2 and "give it again, since it is not taken from a file" in error


def test_a_model_whose_log_probs_are_not_finite_is_neither_evaluated_nor_sampled(folder, tmp_path, call):  # noqa: F811
    """It was, without a word: the accuracy of noise."""
    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    words = ["--model", spoiled, "--max-response", "8", "--dtype", "float32"]
    line = (f"rlsp.py: {spoiled}: the log-probability of token 1 of response 1 is nan; "
            "its model.layers.1.mlp.up_proj.weight is not finite")
    for temperature in "01":
        status, out, error = call("sample", *words, "--problem", "What?", "--temperature", temperature)
        assert status == 1 and out == "" and error.splitlines()[-1] == line
    status, _, error = call("eval", *words, "--data", bad(tmp_path, GOOD), "--out", tmp_path / "e")
    assert status == 1 and error.splitlines()[-1] == line and not (tmp_path / "e/summary.json").exists()


@pytest.mark.parametrize("command", ["sft", "ppo", "eval", "sample"])
def test_absurd_seeds_are_refused_in_one_line_and_the_largest_works(folder, tmp_path, call, command):  # noqa: F811
    data = bad(tmp_path, GOOD.replace("}", ', "solution": "2"}'))
    words = [command, "--model", folder, *(["--problem", "What?"] if command == "sample" else ["--data", data, "--out", tmp_path / "run"])]
    for seed in (10**100, 2**63, -1, "1" * 5000, "one"):
        status, _, error = call(*words, "--seed", seed)
        assert status == 2 and "--seed" in error and len(error.splitlines()) == 1 and len(error) < 1100
    more = {"sft": ["--from-scratch"], "ppo": ["--steps", "1", "--rollout-batch", "2", "--freeze-steps", "0", "--max-response", "4"]}
    status, _, error = call(*words, "--dtype", "float32", "--seed", 2**63 - 1, *more.get(command, ["--max-response", "4"]))
    assert status == 0, error


def test_held_out_problems_that_are_trained_on_or_that_nobody_can_answer_are_told(folder, tmp_path, call):  # noqa: F811
    data = bad(tmp_path, GOOD)
    (tmp_path / "held.jsonl").write_text(GOOD.replace("1 + 1", "2 + 2") + GOOD.replace("What is", "what\u00a0\\n is") + GOOD.replace('"2"', '"}{"'))
    status, out, error = call("ppo", "--model", folder, "--data", data, "--out", tmp_path / "run", "--eval-data", tmp_path / "held.jsonl", "--max-response", "8",
                              "--steps", "1", "--rollout-batch", "2", "--freeze-steps", "0", "--dtype", "float32")
    assert status == 0, error
    held = tmp_path / "held.jsonl"
    assert f"rlsp.py: warning: 2 of 3 problems of {held} are also in {data}, first line 2: they are trained on, not held out\n" in error
    assert f"rlsp.py: warning: the verifier cannot read 1 of 3 answers of {held}, first in line 3: '}}{{'\n" in error
    assert re.search(r"rlsp.py: step 0: 0.0 % of the answers to 3 held-out problems are right \(standard error 0.0 %\); \d tokens per response; \d s\n", error)
    assert json.loads((tmp_path / "run/config.json").read_text())["inputs"]["eval_data"] == files.measure(held)


def test_export_makes_a_folder_of_any_checkpoint(runs, tmp_path, call):
    """The last one is RUN/model, file for file; the type is the run's, the model it began with may have moved."""
    out = runs[0]
    for run, last in ("s", "step-000006"), ("p", "step-000002"):
        for words in [], ["--checkpoint", last]:
            target = tmp_path / f"{run}{len(words)}"
            status, text, error = call("export", out / run, "--out", target, *words)
            assert status == 0 and error == "", error
            assert text.startswith(f"wrote {target}: step {int(last[5:])} of {out / run}, 0.00 GB, float32")
            expected = {f.name: f.read_bytes() for f in (out / run / "model").iterdir()}
            assert {f.name: f.read_bytes() for f in target.iterdir()} == expected and "model.safetensors" in expected
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p0", "p2", "s0", "s2"]  # nothing aside is left
    # in bfloat16, of a run that was copied away from a model that has moved
    moved = shutil.copytree(out / "p", tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["flags"] |= {"dtype": "bfloat16", "model": str(tmp_path / "gone")}
    (moved / "config.json").write_text(json.dumps(config))
    status, _, error = call("export", moved, "--out", tmp_path / "b")
    assert status == 2 and f"{tmp_path / 'gone'}/config.json: no such file; give the folder of the model" in error
    assert call("export", moved, "--out", tmp_path / "b", "--model", out / "s/model")[0] == 0
    assert call("export", moved, "--out", tmp_path / "b2", "--model", moved / "model")[0] == 0
    found, whole = load_file(tmp_path / "b/model.safetensors"), load_file(out / "p/model/model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(x, whole[k].bfloat16()) for k, x in found.items())
    assert (tmp_path / "b2/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert hf.load(tmp_path / "b").config.raw["torch_dtype"] == "bfloat16"


def test_export_says_what_is_wrong_in_one_line_and_writes_nothing(runs, tmp_path, refused, monkeypatch, call):
    run = shutil.copytree(runs[0] / "p", tmp_path / "run")
    out = ["--out", tmp_path / "out"]
    other, wider = (shutil.copytree(runs[0] / "s/model", tmp_path / name) for name in ("other", "wider"))
    (wider / "config.json").write_text((wider / "config.json").read_text().replace("torch_dtype", "dtype"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    for words, message in (
            ([tmp_path / "nowhere", *out], "nowhere/config.json: no such file; expected the folder of a run"), ([runs[0] / "e", *out], "a run of eval, expected one of sft or ppo"),
            ([run, "--out", run], f"{run}: exists already; nothing was overwritten"), ([run], "arguments are required: --out"),
            ([run, *out, "--checkpoint", "step-000007"], "--checkpoint step-000007: not one of step-000002 in"),
            ([run, *out, "--checkpoint", "best"], "--checkpoint best: no step of"),
            ([run, *out, "--model", tmp_path], f"{tmp_path}/config.json: no such file"),
            ([run, *out, "--model", other], "tokenizer.json is not what the run was started with"),
            ([run, *out, "--model", wider], "config.json is not what the run was started with")):
        error = refused("export", *words)
        assert message in error and len(error.splitlines()) == 1, (words, error)
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 0, "eval_accuracy": 0.9}) + "\n" + json.dumps({"step": 1, "eval_accuracy": 0.5}) + "\n")
    assert "best: by " in (error := refused("export", run, *out, "--checkpoint", "best")) and "it is step-000001, which has no checkpoint" in error
    monkeypatch.setattr(files, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    status, _, error = call("export", run, *out)
    assert status == 1 and error.splitlines()[-1] == f"rlsp.py: [Errno 28] No space left on device: '{tmp_path}/out'"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "run", "wider"]
    shard = next((run / "checkpoints/step-000002").glob("shard-*"))
    os.truncate(shard, 1000)
    assert f"{shard}: truncated or altered" in refused("export", run, *out)
    shutil.rmtree(run / "checkpoints")
    assert "checkpoints: no checkpoint there yet" in refused("export", run, *out)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(SystemExit):
        monkeypatch.setattr(cli, "leave", lambda status, line, error: sys.exit(line))
        rlsp.export(rlsp.Export(folder=str(run), out=str(tmp_path / "out")))


def test_pass_at_k_is_unbiased():
    """Against all subsets of size k of n samples, c of them right."""
    from itertools import combinations
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_counts_equal_answers_together_and_none_never_wins():
    assert evaluation.majority(["1/2", "3", r"\frac{1}{2}", "4"]) == "1/2"
    assert evaluation.majority(["3", "4"]) == "3" and evaluation.majority([None, None, "4"]) == "4" and evaluation.majority([None]) is None


def test_summary_by_hand():
    row = lambda correct, answers: dict(correct=correct, answers=answers, tokens=[10, 20], truncated=[False, True], answer="4")
    s = evaluation.summarize([row([True, False], ["4", "5"]), row([True, True], ["4", "4.0"]), row([False, False], [None, "6"])], 2)
    assert s["accuracy"] == pytest.approx(0.5) and s["pass@2"] == pytest.approx(2 / 3) and s["maj@2"] == pytest.approx(2 / 3)
    assert s["standard_error"] == pytest.approx(0.5 / math.sqrt(3)) and s["tokens"] == 15 and s["answered"] == pytest.approx(5 / 6)


def test_the_table_has_an_interval_that_is_honest_about_few_problems(capsys):
    """Ten problems with one right of ten samples each agree by luck: the interval is not [10, 10]."""
    row = dict(correct=[True] + [False] * 9, answers=["4"] * 10, tokens=[10] * 10, truncated=[False] * 10, answer="4")
    s = evaluation.summarize([row] * 10, 10)
    low, high = interval(s, 10)
    assert s["standard_error"] == pytest.approx(0, abs=1e-9) and 0.02 < low < 0.06 and 0.2 < high < 0.3
    evaluation.print_table({"m": {"all": s}}, 10)
    assert f"10.0  {100 * low:5.1f} to {100 * high:5.1f}" in capsys.readouterr().out
    # coverage, of problems that differ much and not at all: in 400 draws 95 % are 380
    generator = torch.Generator().manual_seed(0)
    for odds, problems in ((lambda n: torch.rand(n, generator=generator), 8), (lambda n: torch.full((n,), 0.5), 30)):
        covered = 0
        for _ in range(400):
            right = (torch.rand(problems, 10, generator=generator) < odds(problems)[:, None]).double().mean(1)
            low, high = interval(dict(accuracy=float(right.mean()), problems=problems,
                                             standard_error=float(right.std()) / problems**0.5), 10)
            covered += low <= 0.5 <= high
        assert covered >= 375, covered


def test_sft_trains_responses_and_the_end_of_turn_only():
    asked = chat.Chat(TINY / "model")
    tokenizer = asked.tokenizer
    ids, mask = rlsp.sft_example(asked, {"problem": "a", "solution": "b 7."})
    trained = [i for i, m in zip(ids, mask) if m]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "b 7.<|eot_id|>" and not any(mask[: -len(trained)])
    ids, mask = rlsp.sft_example(asked, {"problem": "a", "solution": [["2 + 3 = ", False], ["5", True], [".", False]]})
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "5"


SAME_ROW = ('{"problem": "p é", "answer": "25", "solution": "s"}\n', '\ufeff{"problem": "p é", "answer": 25, "solution": "s"}\r\n\r\n',
            '{"problem": "p é", "answer": 25.0, "solution": "s"}', '\ufeff\n{"answer": "25", "problem": "p \\u00e9", "solution": "s"}\n')


def test_integer_answers_a_byte_order_mark_and_crlf_make_no_other_row(tmp_path):
    """All commands read their rows here; the answer is the verifier's and the example SFT's."""
    for text in SAME_ROW:
        file = tmp_path / "data.jsonl"
        file.write_bytes(text.encode())
        row = {"problem": "p é", "answer": "25", "solution": "s"}
        assert [r | {"line": 1} for r in files.load_problems(file)] == [row | {"line": 1}]
        assert [r["problem"] for r in files.read_problems(file, ("problem", "solution"))] == ["p é"]
    for value, text in (-7, "-7"), (0.5, "0.5"), (0, "0"), (True, True), (1e22, 1e22), (float("nan"), None), ([1], [1]):
        assert files.answer_text(value) == text or text is None
    file.write_text('{"problem": "p", "answer": true}\n')
    with pytest.raises(ValueError, match="data.jsonl:1: answer is True, expected text"):
        files.load_problems(file)
    file.write_text('{"problem": "p", "answer": {"user": "own"}}\n')  # with --verifier
    assert files.load_problems(file, ("problem",))[0]["answer"] == {"user": "own"}
    file.write_text('{"problem": "p", "answer": "1"}\n\ufeff{"problem": "p", "answer": "1"}\n')
    with pytest.raises(ValueError, match="data.jsonl:2: not valid JSON"):  # the mark belongs at the beginning
        files.load_problems(file)


def sft_flags(data, **more):
    return rlsp.SFT(model=str(TINY / "model"), data=str(data), from_scratch=True, run="nowhere", **more)


def test_sft_drop_long_leaves_out_what_is_longer_and_says_it(tmp_path, capsys):
    file = tmp_path / "demos.jsonl"
    rows = [{"problem": "p", "solution": "7 " * n} for n in (3, 200, 5, 300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"demos.jsonl:2: \d+ tokens, expected at most 100 \(--max-tokens; --drop-long leaves"):
        inputs.for_sft(sft_flags(file, max_tokens=100), rlsp.sft_example)
    asked, examples = inputs.for_sft(sft_flags(file, max_tokens=100, drop_long=True), rlsp.sft_example)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in examples] == [rlsp.sft_example(asked, rows[i]) for i in (0, 2)]
    assert "2 of 4 demonstrations have more than --max-tokens 100 tokens and are left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="every demonstration is longer than --max-tokens 2"):
        inputs.for_sft(sft_flags(file, max_tokens=2, drop_long=True), rlsp.sft_example)
    saved = {f.name: f.metadata["resume"] for f in dataclasses.fields(rlsp.SFT)}
    assert saved["drop_long"] == saved["max_tokens"] == "same"  # config.json has them: a resumed run leaves out the same rows


def test_sft_examples_take_five_bytes_per_token(tmp_path):
    """Python lists of numbers take 16 bytes per token for their places and up to 32 for the numbers."""
    file = tmp_path / "demos.jsonl"
    file.write_text("".join(json.dumps({"problem": f"p {n}", "solution": "x = 1, 2 mod 7. " * 100}) + "\n" for n in range(60)))
    tracemalloc.start()
    try:
        _, examples = inputs.for_sft(sft_flags(file, max_tokens=100_000), rlsp.sft_example)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tokens = sum(len(ids) for ids, _ in examples)
    assert tokens > 40_000 and kept < 6 * tokens and most < 10 * tokens + 500_000, (tokens, kept, most)


# ---- chat prompts

def test_llama3_prompt_token_by_token():
    asked = chat.Chat(TINY / "model")
    text = asked.tokenizer.decode(asked.prompt_ids("What?"), skip_special_tokens=False)
    assert text == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nProblem: What?<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert asked.end in asked.eos == [365, 368]


def test_special_tokens_in_a_problem_stay_text():
    asked = chat.Chat(TINY / "model")
    tokenizer = asked.tokenizer
    eot = tokenizer.token_to_id("<|eot_id|>")
    ids = asked.prompt_ids("x<|eot_id|><|start_header_id|>assistant")
    assert ids.count(eot) == 1 and "x<|eot_id|><|start" in tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.smollm2
def test_chatml_prompt_is_the_models_own_template_without_a_system_message(smollm2):
    asked = chat.Chat(smollm2)
    ids = asked.prompt_ids("What is 2 + 2?")
    text = "<|im_start|>user\nProblem: What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    from tokenizers import Tokenizer
    assert ids == Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert asked.eos == [2]


def test_a_tokenizer_without_a_chat_template_is_refused(folder, tmp_path):  # noqa: F811
    import shutil
    shutil.copytree(folder, tmp_path / "m")
    spec = json.loads((tmp_path / "m/tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<|eot_id|>"]
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="no token '<|eot_id|>', with which .*; give another --chat: llama3, chatml"):
        chat.Chat(tmp_path / "m")
    (tmp_path / "m/tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="of no known chat format, such as Llama 3's .*; give --chat, one of llama3, chatml"):
        chat.Chat(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        hf.load_tokenizer(tmp_path / "m")
