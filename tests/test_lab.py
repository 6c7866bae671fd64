"""tests/lab.py: each of its mistakes is still one, a test catches it, and docs/lab.md says what the kept numbers say."""
import importlib
import inspect
import itertools
import json
import math
import re
import sys
import xml.etree.ElementTree

import pytest

from conftest import ROOT
from test_ppo import folder  # noqa: F401
from lib import guards

sys.path.insert(0, str(ROOT))
from tests import lab  # noqa: E402

KEPT = ROOT / "docs" / "results" / "lab"
PAGE = (ROOT / "docs" / "lab.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", lab.MISTAKES)
def test_each_mistake_makes_its_test_fail(name, request, tmp_path, capsys):
    """The test that is named for it, called with its fixtures and the first of its parameters."""
    mistake = lab.MISTAKES[name]
    file, _, test = mistake.test.partition("::")
    function = getattr(importlib.import_module(file.removesuffix(".py")), test)
    marks = [mark.args for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    given = {}
    for names, values in marks:
        names = [n.strip() for n in names.split(",")]
        given |= dict(zip(names, values[0] if len(names) > 1 else values[:1]))
    asked = inspect.signature(function).parameters.keys() - given.keys()
    given |= {fixture: request.getfixturevalue(fixture) for fixture in asked}
    sound = getattr(mistake.owner, mistake.attribute)
    with lab.broken(name, guarded=True):
        assert getattr(mistake.owner, mistake.attribute) is not sound
        with pytest.raises((AssertionError, pytest.fail.Exception, guards.TrainingError)) as failure:
            function(**given)
    assert getattr(mistake.owner, mistake.attribute) is sound
    if mistake.stops:
        assert mistake.stops in str(failure.value)


def test_the_guard_that_stops_a_mistake_is_switched_off_to_see_its_harm():
    stopped = [name for name, mistake in lab.MISTAKES.items() if mistake.stops]
    for name in stopped:
        with lab.broken(name):
            assert guards.first_ratio(3, 2.0, 1.0, None) == {"first_ratio": 2.0, "first_ratio_error": 1.0}
    with pytest.raises(guards.TrainingError, match=lab.MISTAKES[stopped[0]].stops):
        guards.first_ratio(3, 2.0, 1.0, None)


def test_a_mistake_can_be_tried_on_a_toy(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """`python -m tests.lab NAME`: it trains with the mistake, evaluates, and compares with the sound run, which is done already."""
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tiny / name).write_text("\n".join((ROOT / "data/tiny" / name).read_text().splitlines()[:2]))
    start = tmp_path / "sft/seed-7/sft"
    start.mkdir(parents=True)
    (start / "model").symlink_to(folder)
    out = tmp_path / "out/seed-7"
    out.mkdir(parents=True)
    (out / "sound-cool.json").write_text(json.dumps({"accuracy": 0.25, "metrics": {"sampler_logprob_diff": [0.0] * 4}}))
    words = "--steps 4 --rollout-batch 2 --train-batch 2 --max-response 8 --freeze-steps 1"
    monkeypatch.setenv("TINY", str(tiny))
    folders = ["--out", str(tmp_path / "out"), "--sft", str(tmp_path / "sft"), "--figure", str(tmp_path / "f.svg")]
    lab.main(["temperature-1", "--seeds", "7", *folders, *words.split()])
    printed = capsys.readouterr().out
    assert (out / "temperature-1.json").is_file(), printed + (out / "temperature-1/log.txt").read_text()
    kept = json.loads((out / "temperature-1.json").read_text())
    assert len(kept["metrics"]["reward"]) == 4 and kept["metrics"]["policy_loss"][0] is None and kept["accuracy"] == 0.0
    assert "| `temperature-1` | 1 | 0.0 | -25.0 | `sampler_logprob_diff` above, step 1" in printed
    texts = [e.text for e in xml.etree.ElementTree.parse(tmp_path / "f.svg").getroot() if e.tag.endswith("text")]
    assert "temperature-1" in texts and {"-25", "0"} <= set(texts)
    config = json.loads((out / "temperature-1/ppo/config.json").read_text())["flags"]
    assert (config["temperature"], config["steps"], config["seed"], config["kl_coef"]) == (0.7, 4, 7, 0.02)


def test_a_metric_gives_a_mistake_away_when_all_seeds_stay_outside():
    sound = [[1.0] * 9, [2.0] * 9, [1.5] * 9]  # the margin is half of 1 to 2: from 0.5 to 2.5 all is sound
    assert lab.leaves([[1.0, 2.4, 3.0, 3.0, 3.0, 3.0]] * 3, sound) == (3, pytest.approx(2.0, rel=1e-4))
    assert lab.leaves([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 3, sound) == (4, pytest.approx(-2.0, rel=1e-4))
    assert lab.leaves([[3.0] * 6, [3.0] * 6, [2.4] * 6], sound) is None  # one seed is not
    assert lab.leaves([[3.0, 3.0, 0.0, 3.0, 3.0, 0.0]] * 3, sound) is None  # not three steps on one side
    assert lab.leaves([[1.5, 1.6, 1.7, 1.7, 1.7, 1.8]] * 3, sound) == (3, math.inf)  # stuck at what no sound run has
    assert lab.leaves([[1.5, 1.5, 1.5, 1.6]] * 3, sound) is None
    assert lab.leaves([[None, 3.0, 3.0, 3.0, None, 3.0]] * 3, sound)[0] == 2  # not logged while the policy is frozen


def test_sound_runs_do_not_give_each_other_away():
    """Five sound runs, any three against the other two: of 10 x 32 metrics over 20 steps two leave, as docs/lab.md says."""
    runs = {}
    for seed in range(5):
        file = ROOT / f"docs/results/experiment/seed-{seed}/length/metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()[:20]]
        names = {name for row in rows for name in row if name not in lab.LEFT_OUT}
        runs[seed] = {"metrics": {name: [row.get(name) for row in rows] for name in names}}
    found = []
    for sound in itertools.combinations(runs, 3):
        others = {seed: run for seed, run in runs.items() if seed not in sound}
        found += lab.signs(others, {seed: runs[seed] for seed in sound})
    assert len(names) == 32 and [name for _, name, _ in found] == ["entropy", "value"]


def test_the_page_has_the_table_of_the_kept_numbers():
    found = lab.read(KEPT, [*lab.SOUND, *lab.MISTAKES], [0, 1, 2])
    assert lab.table(found) in PAGE
    assert lab.figure(found) == (KEPT / "figure.svg").read_text(encoding="utf-8")
    for name in lab.MISTAKES:
        assert re.search(rf"^### .*`{name}`", PAGE, re.M), f"docs/lab.md says nothing of {name}"
    assert sum(file.stat().st_size for file in KEPT.rglob("*.json")) < 500_000
