"""README.md is the lesson's first page: its worked example is computed here, its length, names and tables are held to the code."""
import json
import re

import pytest
import torch

from conftest import ROOT
from lib import parallel, report
import model
import ppo
import rewards
import rlsp

README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = ["action", "k1", "r", "V", "δ", "A", "G", "Â", "ratio", "loss"]
LENGTHS = [5, 2]  # the rows of the first response and of the second


def worked_example():
    """({column: [2, 5], zero after a response's end}, mask [2, 5], texts of the responses) of the table in README.md."""
    section = README.split("## A worked example")[1].split("## ")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
                      if line.startswith("|")]
    assert head == COLUMNS and len(rows) == sum(LENGTHS)
    responses = [rows[: LENGTHS[0]], rows[LENGTHS[0] :]]
    column = lambda i: parallel.pad([[float(row[i].replace("−", "-")) for row in rows] for rows in responses], torch.float32)
    texts = ["".join(re.sub("^`|`$", "", row[0]) for row in rows[:-1]) for rows in responses]
    assert all(f"`{text}`" in section for text in texts) and all(rows[-1][0] == "EOS" for rows in responses)
    return ({name: column(i) for i, name in enumerate(COLUMNS) if name != "action"},
            parallel.pad([[True] * n for n in LENGTHS], torch.bool), texts)


def test_the_worked_example_is_what_the_code_computes():
    shown, mask, texts = worked_example()
    scores = [rewards.score(text, "5", exploration="steps", alpha=0.8, steps_scale=10) for text in texts]
    assert [score.correct for score in scores] == [True, False]
    total = torch.tensor([score.total for score in scores])
    assert total.tolist() == pytest.approx([0.82, 0.0])
    reward = ppo.token_rewards(total, shown["k1"], mask, 0.05)
    advantage, ret = ppo.gae(reward, shown["V"], mask, 1.0, 0.95)
    next_value = torch.cat([shown["V"][:, 1:], torch.zeros(2, 1)], 1)
    whitened = ppo.whiten(advantage, mask)
    log_ratio = shown["ratio"].clamp(min=1e-9).log()
    loss = torch.zeros(2, 5)
    for i, t in mask.nonzero().tolist():
        one = [x[i : i + 1, t : t + 1] for x in (log_ratio, torch.zeros(2, 5), whitened, mask)]
        loss[i, t] = ppo.policy_loss(*one, clip=0.2)
    computed = {"r": reward, "δ": (reward + next_value - shown["V"]) * mask, "A": advantage, "G": ret, "Â": whitened,
                "loss": loss}
    for name, x in computed.items():
        digits = 2 if name in ("r", "δ") else 3
        torch.testing.assert_close(shown[name], x, rtol=0, atol=0.5001 * 10**-digits, msg=lambda m: f"{name}: {m}")


def test_the_worked_example_is_also_right_by_hand():
    """The sums that the text writes out, as sums of the table's own numbers, and the gradients that it calls zero."""
    shown, mask, _ = worked_example()
    delta = shown["r"][0, 2] + shown["V"][0, 3] - shown["V"][0, 2]
    assert float(delta) == pytest.approx(0.48) and "δ = −0.02 + 0.60 − 0.10 = 0.48" in README
    advantage = shown["δ"][0, 1] + 0.95 * shown["A"][0, 2]
    assert float(advantage) == pytest.approx(0.427, abs=5e-4) and "A = −0.20 + 0.95 · 0.660 = 0.427" in README
    assert float(shown["loss"][0, 2]) == pytest.approx(-1.239 * 1.2, abs=1e-3) and "−1.239 · 1.2" in README
    logprob = shown["ratio"].clamp(min=1e-9).log().requires_grad_()
    ppo.policy_loss(logprob, torch.zeros(2, 5), shown["Â"], mask).backward()
    assert (logprob.grad[mask] == 0).tolist() == [False, False, True, False, False, True, False]


def test_it_is_short():
    assert len(README.splitlines()) <= 250
    assert len(re.sub("<!--.*?-->", "", README).split()) <= 2500  # comments are for tests/tools/commands.py


def test_the_names_on_the_walk_through_a_step_exist():
    walk = "rlsp.run_ppo" + README.split("```\nrlsp.run_ppo")[1].split("```")[0]
    words = re.findall(r"\w{3,}", walk.split("    copy ")[0])
    beside_equations = re.findall(r"\(`([\w.]+)`(?:, `(\w+)`)?\)", README)
    names = {*words, *(name.split(".")[-1] for pair in beside_equations for name in pair if name)}
    places = (rlsp, ppo, ppo.Trainer, rewards, model, model.Llama, parallel)
    missing = {name for name in names if not any(hasattr(place, name) for place in places)}
    assert len(beside_equations) >= 7 and missing == {"rlsp", "model", "sampler_logprob_diff"}  # the last one is a metric


def test_the_metrics_that_it_explains_are_logged():
    table = README.split("| metric | healthy | otherwise |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    names += re.findall(r"is logged \(`(\w+)`\)", README)
    row = json.loads((ROOT / "docs/results/experiment/seed-0/length/metrics.jsonl").read_text().splitlines()[-1])
    assert len(names) >= 7 and set(names) <= set(row), set(names) - set(row)


def test_the_sample_report_is_a_page_of_ours_and_small():
    page = (ROOT / "docs/sample-report.html").read_text(encoding="utf-8")
    assert report.TITLE in page and len(page.encode()) < 1_000_000
    assert "runs/tiny/ppo" in page and not re.search(r"/(home|root|tmp|work|Users)/", page)
