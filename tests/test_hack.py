"""Each recipe of docs/hack.md, taken from the page itself, applied to a copy of the code and run: what stands there cannot go stale."""
import importlib
import importlib.util
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager, redirect_stdout
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import commands
import model as M
from lib import decode
from conftest import ROOT, TINY, tiny_llama
from test_judge import chat, serve, user_text
from test_ppo import folder  # noqa: F401  (the fixture)
from test_tracking import FAKE

PAGE = (ROOT / "docs" / "hack.md").read_text(encoding="utf-8")
SMALL = dict(model=None, steps=2, rollout_batch=6, train_batch=24, max_response=12, slots=8, freeze_steps=0, dtype="float32", micro_tokens=200,
             save_every=0, lr=1e-4, critic_lr=1e-3, temperature=1, alpha=0.5)


def section(number):
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, re.S | re.M)[0]


def blocks(text, language):
    """The contents of the fenced blocks of a language."""
    return [content for _, found, content in commands.BLOCK.findall(text) if found == language]


def command(number, of="rlsp.py ppo"):
    """The words after rlsp.py ppo, or train.sh, in a recipe's command, split by bash itself."""
    text = "".join(blocks(section(number), "bash"))
    line = next(line for line in text.replace("\\\n", " ").splitlines() if of in line)
    return subprocess.run(["bash", "-c", f"printf '%s\\0' {line.split(of, 1)[1]}"], check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


def files_of(number, into):
    """Write the whole files of a recipe into a folder."""
    for mark, _, content in commands.BLOCK.findall(section(number)):
        if mark.startswith("file: "):
            (into / mark.removeprefix("file: ")).write_text(content, encoding="utf-8")


def printed(script, *words):
    """What `python SCRIPT WORDS` writes, in this process."""
    with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()) as out:
        m.setattr(sys, "argv", [script, *words])
        runpy.run_path(script, run_name="__main__")
    return out.getvalue()


def recipe(number, copy, *flags):
    """The page's own shell function, called in a copy of the project."""
    function = next(text for text in blocks(PAGE, "bash") if text.startswith("recipe()"))
    done = subprocess.run(["bash", "-c", f'{function}\nrecipe "$@"', "bash", str(number), *flags], cwd=copy, capture_output=True, text=True,
                          env=os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)})
    assert done.returncode == 0, done.stderr
    return copy


def copied(into):
    """The code and this page, without the data."""
    into.mkdir()
    for file in ("model.py", "ppo.py", "rewards.py", "rlsp.py"):
        shutil.copy(ROOT / file, into)
    shutil.copytree(ROOT / "lib", into / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (into / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "hack.md", into / "docs")
    return into


@contextmanager
def modules_of(copy):
    """The modules of a copy instead of ours, as functions that import by name. One process is enough for all copies: torch is slow to load."""
    def ours():
        return {n: m for n, m in sys.modules.items() if n in ("model", "ppo", "rewards", "rlsp", "lib") or n.startswith("lib.")}

    before, path = ours(), sys.path[:]
    for name in before:
        del sys.modules[name]
    sys.path[:0] = [str(copy)]
    importlib.invalidate_caches()
    try:
        yield importlib.import_module
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path


def ppo_run(get, words, out, monkeypatch, capsys, **changes):
    """rlsp.py ppo with words of the page, made small; returns its rows {log: [...]}, each file of the run read."""
    rlsp = get("rlsp")
    flags = [x for name, value in (SMALL | changes).items() if value is not None for x in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(rlsp.signals, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", ["rlsp.py", "ppo", *words, *flags, "--out", str(out)])
    try:
        rlsp.main()
    except SystemExit as e:
        assert not e.code, capsys.readouterr().err
    return types.SimpleNamespace(**{name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
                                    for name in ("metrics", "rollouts", "tokens")})


def trainer(get, folder, run, **changes):  # noqa: F811
    """A small Trainer of the copy."""
    ppo, chat_of, parallel = get("ppo"), get("lib.chat"), get("lib.parallel")
    settings = {k: v for k, v in SMALL.items() if k not in ("model", "alpha")} | dict(temperature=1.0, recompute=False, exploration="none")
    problems = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").read_text().splitlines()[:20]]
    device, mesh = parallel.start()
    run.mkdir()
    return ppo.Trainer(ppo.PPOConfig(**(settings | changes)), folder, problems, chat_of.Chat(folder), run, device, mesh)


def test_every_diff_of_the_page_applies_and_can_be_taken_back(tmp_path):
    copy = copied(tmp_path / "copy")
    before = {file: file.read_bytes() for file in copy.rglob("*.py")}
    numbers = [n for n in range(1, 10) if "```diff" in section(n)]
    assert numbers == [1, 2, 3, 5, 9]
    for number in numbers:
        recipe(number, copy)
        changed = {file for file, text in before.items() if file.read_bytes() != text}
        assert len(changed) == section(number).count("\n+++ ")
        for file in changed:
            compile(file.read_text(encoding="utf-8"), file, "exec")
        recipe(number, copy, "-R")
        assert {file: file.read_bytes() for file in before} == before


def test_what_the_page_points_to_is_there():
    """Files, functions and links to sections."""
    for name in set(re.findall(r"`((?:tests/|lib/|docs/)?\w+\.(?:py|md|sh))`", PAGE)) - {"countdown.py", "gym_task.py"}:
        assert (ROOT / name).is_file(), name
    headings = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^## (.*)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= headings
    for row in re.findall(r"^\| [^|]+ \| `(\w+\.py|lib/\w+\.py)`[^|]*\| ([^|]+) \|", PAGE, re.M):
        for name in re.findall(r"`(?:\w+\.)?(\w+)(?:\.from_dict)?`", row[1]):
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", (ROOT / row[0]).read_text(encoding="utf-8"), re.M), name


def test_recipe_1_the_entropy_bonus_moves_the_entropy(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Without advantages the loss is the bonus alone: its gradient is that of the mean entropy, computed from whole logits."""
    with modules_of(recipe(1, copied(tmp_path / "copy"))) as get:
        t = trainer(get, folder, tmp_path / "run", entropy_coef=0.5, lr=1e-3)
        batch = t.experience(t.rollout())
        batch["advantage"] = torch.zeros_like(batch["advantage"])
        mask = batch["mask"]
        log_p = torch.log_softmax(t.policy(batch["tokens"])[:, :-1], -1)
        entropy = -(log_p.exp() * log_p).sum(-1)[mask[:, 1:]].mean()
        expected = torch.autograd.grad(0.5 * entropy, list(t.policy.parameters()))
        parts = [t.policy_step(get("lib.parallel").share(batch, rows, t.device), float(mask.sum())) for rows in ([0, 1], [2], [3, 4, 5])]
        assert sum(p["entropy_bonus"].item() for p in parts) == pytest.approx(0.5 * entropy.item(), rel=1e-5)
        for p, g in zip(t.policy.parameters(), expected):
            assert (p.grad + g).abs().max() < 1e-5 * g.abs().max() + 1e-9  # what is minimised is the negative
        t.optimizers["policy"].step()
        after = torch.log_softmax(t.policy(batch["tokens"])[:, :-1], -1)
        assert -(after.exp() * after).sum(-1)[mask[:, 1:]].mean() > entropy + 0.001
        run = ppo_run(get, command(1, "train.sh"), tmp_path / "r", monkeypatch, capsys, model=folder, data=ROOT / "data/tiny/train.jsonl", steps=1)
        [m] = run.metrics
        assert m["entropy_bonus"] == pytest.approx(0.001 * m["entropy"], rel=1e-3)


def test_recipe_2_reinforce_plus_plus_is_its_equation(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    with modules_of(recipe(2, copied(tmp_path / "copy"))) as get:
        t = trainer(get, folder, tmp_path / "run", advantage="reinforce++", exploration="steps", kl_coef=0.3, rollout_batch=5)
        samples = t.rollout()
        with torch.no_grad():
            t.policy.model.norm.weight *= 1.1  # away from the reference
        batch = t.experience(samples)
        raw = {}
        for b, sample in enumerate(samples):
            places = [i for i, m in enumerate(batch["mask"][b].tolist()) if m]
            for i in places:
                penalty = sum(float(batch["old_logprob"][b, j] - batch["ref_logprob"][b, j]) for j in places if j >= i)
                raw[b, i] = sample.parts.total - 0.3 * penalty
        mean = sum(raw.values()) / len(raw)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in raw.values()) / len(raw))
        for at, a in raw.items():
            assert float(batch["raw_advantage"][at]) == pytest.approx(a, abs=1e-5)
            assert float(batch["advantage"][at]) == pytest.approx((a - mean) / deviation, abs=1e-4)
        assert "critic" not in t.nets and int(batch["mask"].sum()) == len(raw)
        run = ppo_run(get, command(2, "train.sh"), tmp_path / "r", monkeypatch, capsys, model=folder, data=ROOT / "data/tiny/train.jsonl", steps=1)
        [m] = run.metrics
        assert not {"value_loss", "explained_variance", "critic_grad_norm"} & set(m) and "policy_loss" in m


def test_recipe_3_dr_grpo_divides_by_neither(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    with modules_of(recipe(3, copied(tmp_path / "copy"))) as get:
        words = command(3, "train.sh")
        run = ppo_run(get, words, tmp_path / "r", monkeypatch, capsys, model=folder, data=ROOT / "data/tiny/train.jsonl", steps=1,
                      rollout_batch=3, exploration="steps", log_rollouts=12, log_tokens=12)
        samples = int(words[words.index("--samples") + 1])
        rewards = [r["reward"]["total"] for r in run.rollouts]
        assert len(rewards) == 3 * samples and len(set(rewards)) > 1
        loss = 0.0
        for i, row in enumerate(run.tokens):
            group = rewards[i // samples * samples:][:samples]
            advantage = rewards[i] - sum(group) / samples
            assert row["advantage"] == pytest.approx([advantage] * len(row["tokens"]), abs=1e-5)
            loss -= sum(row["advantage"]) / (24 * 12)  # --train-batch and --max-response of SMALL; all ratios are 1
        assert run.metrics[0]["policy_loss"] == pytest.approx(loss, abs=1e-6)


def test_recipe_4_countdown(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    files_of(4, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    countdown = importlib.import_module("countdown")
    monkeypatch.delitem(sys.modules, "countdown", raising=False)
    rng = random.Random(0)
    rows = [countdown.problem(rng) for _ in range(200)]
    for row in rows:  # each has the solution that is its answer, by another way of reading it
        assert all(str(n) in row["problem"] for n in (*row["numbers"], row["target"])) and 1 <= row["target"] <= 100
        exact = re.sub(r"\d+", lambda m: f"Fraction({m[0]})", row["answer"])
        assert eval(exact, {"Fraction": Fraction}) == row["target"] and countdown.right(f"So \\boxed{{{row['answer']}}}.", row)
    row = {"numbers": [3, 5, 2, 2], "target": 24}
    right = [r"(5 + 3) * (2*2) - 8", "(5+3)*(2/2)*3"]
    assert not any(countdown.right(f"\\boxed{{{text}}}", row) for text in right)  # other numbers than the given ones
    row = {"numbers": [8, 3, 3, 8], "target": 24}
    for text, verdict in ((r"8 / (3 - 8/3)", True), (r"8 \div (3 - 8 \div 3)", True), (r"8/(3-8/3) = 24", False), ("24", False), ("", False),
                          ("8 * 3", False), ("8*3 + 3*8 - 24", False), ("8**3", False), ("8//3 + 3 + 8", False), ("8/(3-3)*8", False),
                          ("__import__('os')", False), ("(" * 150 + "8", False), ("8 8 3 3", False), ("-" * 190 + "8", False), ("9" * 10**6, False),
                          ("()", False), ("8 +", False), ("٨ / (3 - 8/3)", False)):
        assert countdown.right(f"\\boxed{{{text}}}", row) is verdict, text
    assert countdown.right("no box", row) is False
    words = command(4)
    for name, size in (("countdown.jsonl", 20), ("countdown-test.jsonl", 2)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows[:size]))
    run = ppo_run(importlib.import_module, words, tmp_path / "r", monkeypatch, capsys, model=folder, max_prompt=400)
    assert [m["step"] for m in run.metrics] == [0, 1, 2] and "eval_accuracy" in run.metrics[0]
    assert all(r["reward"]["reason"] == "--verifier" and r["reward"]["outcome"] == 0 for r in run.rollouts)
    rng = random.Random(7)
    assert [json.loads(line) for line in printed("countdown.py", "3", "7").splitlines()] == [countdown.problem(rng) for _ in range(3)]


SMOLLM3 = TINY | dict(model_type="smollm3", num_hidden_layers=5, rms_norm_eps=1e-6, rope_theta=5000.0, tie_word_embeddings=True)


def test_recipe_5_smollm3_is_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="model_type is 'smollm3'"):
        M.Config.from_dict(SMOLLM3)
    torch.manual_seed(0)
    raw = {k: v for k, v in SMOLLM3.items() if k not in ("model_type", "head_dim", "rope_theta")}
    config = transformers.SmolLM3Config(**raw, rope_parameters=dict(rope_type="default", rope_theta=5000.0), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    theirs = transformers.SmolLM3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 2:
                p.mul_(8)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) > 5).expand(2, -1).clone()
    mask[0, 30:] = False
    with modules_of(recipe(5, copied(tmp_path / "copy"))) as get, torch.no_grad():
        hf, cached, cpu = get("lib.hf"), get("lib.decode"), get("lib.cpu")
        ours = hf.load(tmp_path / "theirs", dtype=torch.float32)
        assert ours.config.no_rope == (3,) and get("model").Config.from_dict(SMOLLM3 | dict(no_rope_layer_interval=2)).no_rope == (1, 3)
        logits = theirs(tokens).logits
        assert logits.std() > 0.5 and (ours(tokens) - logits).abs().max() < 1e-4 * logits.abs().max()
        config.no_rope_layers = [1] * 5  # the layers without RoPE do matter
        wrong = transformers.SmolLM3ForCausalLM(config).eval()
        wrong.load_state_dict(theirs.state_dict())
        assert (wrong(tokens).logits - logits).abs().max() > 0.05 * logits.abs().max()
        expected = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
        assert (ours.logprobs(tokens, mask)[0][:, 1:] - expected)[mask[:, 1:]].abs().max() < 1e-4  # sequences end to end
        prompts = [tokens[0, :9].tolist(), tokens[1, :17].tolist()]
        responses = get("model").generate(ours, prompts, 12, 0.0)
        assert cached.generate(ours, prompts, 12, 0.0) == responses
        hf.save(ours, tmp_path / "ours")
        again, report = transformers.SmolLM3ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert torch.equal(again(tokens).logits, logits) and not any(report.values())
        with pytest.raises(ValueError, match="no_rope_layers has 2 numbers, expected one for each of 5 layers"):
            get("model").Config.from_dict(SMOLLM3 | dict(no_rope_layers=[1, 0]))
        net = get("model").Llama(get("model").Config.from_dict(SMOLLM3)).bfloat16()
        net.load_state_dict(ours.state_dict())
        decoder = cpu.CPUDecoder.of(net)
        if decoder is not None:  # a processor with products in bfloat16, and a C compiler
            scores = [cached.generate(net, prompts, 12, 0.0, return_logprobs=True, decoder=d) for d in (decoder, None)]
            first = [lp[0] for lp in scores[0][1]], [lp[0] for lp in scores[1][1]]
            assert first[0] == pytest.approx(first[1], abs=0.05)


def test_recipe_6_a_task_of_reasoning_gym(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed (pip install reasoning-gym)")
    files_of(6, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for task, name in (("leg_counting", "legs.jsonl"), ("countdown", "c.jsonl"), ("simple_equations", "legs-test.jsonl")):
        (tmp_path / name).write_text(printed("gym_task.py", task, "12", "0"))
    gym_task = importlib.import_module("gym_task")
    monkeypatch.delitem(sys.modules, "gym_task", raising=False)
    for name in ("legs.jsonl", "c.jsonl", "legs-test.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(rows) == 12
        for row in rows:
            assert gym_task.right(f"So it is \\boxed{{{row['answer']}}}.", row) is True
            assert gym_task.right("\\boxed{17 - 17}", row) is False and gym_task.right("no box", row) is False
    run = ppo_run(importlib.import_module, command(6), tmp_path / "r", monkeypatch, capsys, model=folder, max_prompt=600, eval_every=0)
    assert {r["reward"]["reason"] for r in run.rollouts} == {"--verifier"} and "eval_accuracy" in run.metrics[0]


def test_recipes_7_and_9_wandb_gets_the_parts_of_a_reward_of_ones_own(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(FAKE)  # a stand-in: the real one wants a network
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "rlsp-tiny")
    wandb = importlib.import_module("wandb")
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with modules_of(recipe(9, copied(tmp_path / "copy"))) as get:
        rewards = get("rewards")
        for text, count in (("3*4 + 5 = 17", 1), ("2+2=4. 2+2=4, and 2 + 3 = 6", 1), ("7 = 7", 0), ("3 - 5 = -2\n6/4 = 2", 1), ("x + 1 = 2", 0),
                            ("1+1=23", 0), ("2 * 21 = 42 so 42 - 2 = 40", 2)):
            assert rewards.right_equations(text) == count, text
        parts = rewards.score("2 + 2 = 4\n3 + 3 = 6\n3 + 3 = 7\n2 + 2 = 4 \\boxed{1} 5 + 5 = 10", "4", exploration="equations", steps_scale=8, alpha=0.5)
        assert parts.equations == 2 and parts.exploration == 2 / 8 and parts.total == 0.5 * 2 / 8
        t = get("ppo").Trainer
        inner = t.sample

        def sample(self, *args):  # a random model writes no equation: every third response is given one
            samples, stats = inner(self, *args)
            for i, s in enumerate(samples):
                s.text = f"2 + {i} = {2 + i}\n" * 2 + s.text if i % 3 == 0 else s.text
            return samples, stats
        monkeypatch.setattr(t, "sample", sample)
        words = command(9, "train.sh") + command(7, "train.sh")
        assert words == ["--exploration", "equations", "--steps-scale", "8", "--wandb"]
        run = ppo_run(get, words, tmp_path / "r", monkeypatch, capsys, model=folder, data=ROOT / "data/tiny/train.jsonl")
        assert [r["reward"]["equations"] for r in run.rollouts] == [1, 0, 0] * 4
        assert all(r["reward"]["exploration"] == r["reward"]["equations"] / 8 for r in run.rollouts)
        assert [(m["equations"], m["exploration"]) for m in run.metrics] == [(pytest.approx(1 / 3), pytest.approx(1 / 24))] * 2
    named = re.search(r"look at (.*?)\.\s", section(7), re.S)[1]
    told = [row for row in wandb.calls if isinstance(row, dict) and "step" in row]
    for name in [*re.findall(r"`([\w/]+)`", named), "equations"]:
        assert sum(name in row for row in told) == 2, name
    assert {name: row[name] for row in told if row["step"] == 1 for name in row if name in run.metrics[0]} == {
        k: v for k, v in run.metrics[0].items() if k != "warnings"}
    assert wandb.calls[0]["project"] == "rlsp-tiny" and wandb.calls[0]["name"] == "r" and wandb.calls[0]["config"]["steps_scale"] == 8


def test_recipe_8_a_judge_on_this_machine(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A stand-in server for vLLM's and llama.cpp's, whose replies have fences and thoughts around them."""
    files_of(8, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLSP_JUDGE_KEY", raising=False)
    words = command(8)

    def reply(request, handler):
        grades = json.dumps({"ideas": len(user_text(request)) % 11, "checks": 4})
        return chat(f"<think>\nWell.\n</think>\n```json\n{grades}\n```" if request["number"] % 2 else grades)
    with serve(reply) as (url, requests):
        where = words.index("--judge-url") + 1
        assert words[where] == "http://localhost:8000/v1"
        words[where] = url
        run = ppo_run(importlib.import_module, words, tmp_path / "r", monkeypatch, capsys, model=folder, data=ROOT / "data/tiny/train.jsonl")
    assert {r["path"] for r in requests} == {"/v1/chat/completions"} and "Authorization" not in requests[0]["headers"]
    assert {r["body"]["model"] for r in requests} == {"Qwen/Qwen2.5-7B-Instruct"}
    assert requests[0]["body"]["messages"][0]["content"] == (tmp_path / "effort.txt").read_text()
    graded = [json.loads(line) for line in (tmp_path / "r/judge-0.jsonl").read_text().splitlines()]
    assert len(graded) == len(requests) and {g["checks"] for g in graded} == {4}
    efforts = {(g["ideas"] + 4) / 20 for g in graded} | {0.0}
    assert all(any(abs(r["reward"]["exploration"] - e) < 1e-9 for e in efforts) for r in run.rollouts)
    assert [m["judge_failed"] for m in run.metrics] == [0.0, 0.0] and len({r["reward"]["exploration"] for r in run.rollouts}) > 1
