"""1, 2 and 4 gloo processes do the same training (checklist 9, 13, 18), and one's checkpoint is another's."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lib import decode, hf, parallel
import rlsp
from conftest import ROOT, tiny_llama
from test_ppo import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model with a vocabulary that 4 ranks can share."""
    out = tmp_path_factory.mktemp("tiny")
    net = tiny_llama(scale=1.5, **json.loads((TINY / "config.json").read_text()) | {"vocab_size": 372})
    hf.save(net, out)
    hf.copy_tokenizer(TINY, out)
    return out


def run(ranks, folder, out, *words):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else [sys.executable]
    done = subprocess.run([*command, str(ROOT / "tests" / "distributed.py"), str(folder), str(out), str(ROOT / "data/tiny/train.jsonl"), *words],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = [json.loads(line) for line in (out / "tokens.jsonl").read_text().splitlines()]
    return load_file(out / "tensors.safetensors"), json.loads((out / "first.json").read_text()), tokens


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return *run(1, folder, out, "stages"), out


@pytest.mark.parametrize("ranks, words", [(2, ["offload=true"]), (4, []), (4, ["shard_ranks=2"]),
                                          (4, ["sampler=sharded", "shard_ranks=2"]), (4, ["sampler=tensor", "node=2"])],
                         ids=["2, offload", "4", "2 x 2", "sharded sampler", "tensor sampler on two nodes of 2"])
def test_checklist_9_13_18_any_number_of_ranks_trains_the_same(folder, alone, tmp_path, ranks, words):
    out = tmp_path / str(ranks)
    tensors, metrics, tokens = run(ranks, folder, out, "stages", *words)
    assert torch.equal(tensors["batch.tokens"], alone[0]["batch.tokens"])  # shuffle and every sample's stream are the same
    assert (tensors["batch.advantage"] - alone[0]["batch.advantage"]).abs().max() < 1e-4
    mask = tensors["batch.mask"]
    assert abs(tensors["batch.advantage"][mask].mean()) < 1e-6
    for k, v in alone[1].items():
        assert metrics[k] == (v if k == "warnings" else pytest.approx(v, rel=1e-3, abs=1e-5)), k
    assert [row["step"] for row in tokens] == [2, 2, 3, 3]  # tokens.jsonl: with 4 ranks, some score nothing
    for mine, theirs in zip(tokens, alone[2], strict=True):
        assert mine["tokens"] == theirs["tokens"] and mine["problem"] == theirs["problem"]
        for k in ("old_logprob", "new_logprob", "ref_logprob", "entropy", "value", "reward", "advantage", "raw_advantage", "return"):
            assert mine[k] == pytest.approx(theirs[k], rel=1e-3, abs=1e-3), k
        assert mine["new_logprob"] != pytest.approx(mine["old_logprob"], abs=1e-3)
    for k, v in alone[0].items():  # after three steps of updates of about the learning rate, 1e-3
        if not k.startswith("batch."):
            assert (tensors[k] - v).abs().max() < 1e-4, k
    rows = lambda out, file: [json.loads(line) for line in (out / file).read_text().splitlines()]
    for mine, theirs in zip(rows(out, "sft/metrics.jsonl"), rows(alone[3], "sft/metrics.jsonl"), strict=True):
        for k in ("step", "loss", "grad_norm", "lr", "tokens"):
            assert mine[k] == pytest.approx(theirs[k], rel=1e-4), k
    found, expected = ({k: v for k, v in rows(place, "metrics.jsonl")[-1].items() if k.startswith("eval_")} for place in (out, alone[3]))
    assert found == pytest.approx(expected) and len(found) == 6 and found["eval_problems"] == 3 and found["eval_tokens"] > 3
    assert rows(out, "eval/outputs-1.jsonl") == rows(alone[3], "eval/outputs-1.jsonl")  # three problems: one of 4 ranks has none


@pytest.mark.parametrize("words", [[], ["sampler=sharded"], ["sampler=tensor", "node=2"]], ids=["whole", "sharded", "tensor"])
def test_ranks_without_prompts_do_not_hang(folder, tmp_path, words):
    """One prompt a step for four ranks. Sharded, three of them still take part in every forward of the sampler; tensor, one does, and the other
    node has none."""
    few = ["rollout_batch=1", "steps=2", *words]
    tensors, metrics, _ = run(4, folder, tmp_path / "four", *few)
    alone = run(1, folder, tmp_path / "one", *few)
    assert torch.equal(tensors["batch.tokens"], alone[0]["batch.tokens"])
    numbers, expected = ({k: v for k, v in found.items() if k != "warnings"} for found in (metrics, alone[1]))
    assert numbers == pytest.approx(expected, rel=1e-3, abs=1e-5) and metrics["warnings"] == alone[1]["warnings"]


@pytest.mark.parametrize("writers, readers, words", [(2, 1, []), (2, 4, ["sampler=tensor", "shard_ranks=2"]), (1, 2, [])])
def test_a_checkpoint_resumes_on_any_number_of_ranks(folder, alone, tmp_path, writers, readers, words):
    run(writers, folder, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list((checkpoints / "step-000002").glob("shard-*.safetensors"))) == writers  # each rank wrote its own shards
    if writers > readers:
        (tmp_path / "run/config.json").write_text(json.dumps({"flags": {"command": "ppo", "model": str(folder), "dtype": "float32"}}))
        rlsp.export(rlsp.read_flags(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]))
        for file in (tmp_path / "run/model").iterdir():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(checkpoints / "step-000003")
    tensors, _, tokens = run(readers, folder, tmp_path / "run", "resume", *words)
    assert [row["step"] for row in tokens] == [2, 2]  # step 3 is the one that tests/distributed.py takes by itself
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][:1] == [2]
    for k, v in alone[0].items():
        if not k.startswith("batch."):
            assert (tensors[k] - v).abs().max() < 1e-4, k


def test_a_checkpoint_of_a_frozen_policy_has_its_float32_weights(folder, tmp_path):
    """Only scored, not trained: FSDP's root then holds whole bfloat16 copies, from which a resumed run must not start."""
    run(2, folder, tmp_path / "run", "dtype=bfloat16", "freeze_steps=3", "save_every=1")
    before, saved = load_file(folder / "model.safetensors"), tmp_path / "run" / "checkpoints" / "step-000002"
    shards = [load_file(saved / f"shard-0000{r}-model-00001-of-00001.safetensors") for r in (1, 2)]
    for name, p in before.items():
        assert torch.equal(torch.cat([shard[f"policy.{name}"] for shard in shards if f"policy.{name}" in shard]), p.float()), name


def test_sharded_weights_decode_in_lockstep(folder, tmp_path):
    """Ranks with many, few and no prompts make the same number of forwards: nobody waits for ever, and the tokens are one process's."""
    for ranks in (1, 2, 3):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(ROOT / "tests" / "lockstep.py"),
                               str(folder), str(tmp_path)], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    read = lambda ranks: sum((json.loads((tmp_path / f"{ranks}-{r}.json").read_text()) for r in range(ranks)), [])
    assert len({len(t) for t in read(1)}) > 1
    assert read(1) == read(2) == read(3)


@pytest.mark.parametrize("ranks, changes", [(2, {"model_type": "qwen2"}), (4, {"attention_bias": True, "tie_word_embeddings": True})])
def test_ranks_that_share_a_copy_sample_as_one_process(tmp_path, ranks, changes):
    """Tokens and log-probs in float32, and what a rank holds of weights and cache; one rank brings no prompt. Then all of it from refreshed weights."""
    net = tiny_llama(vocab_size=96, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, **changes)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    hf.save(net, tmp_path)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(ROOT / "tests" / "split.py"),
                           str(tmp_path), str(tmp_path)], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(ranks)]
    prompts = sum((each["prompts"] for each in found), [])
    assert [] in [each["prompts"] for each in found] and len(prompts) == 6
    tokens, logprobs = decode.generate(net, prompts, 40, 0.8, range(5), seed=2, slots=3, return_logprobs=True)
    assert len({len(t) for t in tokens}) > 1  # some end by an EOS
    norms = sum(p.nbytes for n, p in net.named_parameters() if n.endswith(("norm.weight", "o_proj.bias")))
    share = (sum(p.nbytes for p in net.parameters()) - norms) / ranks + norms
    for time in ("loaded", "refreshed"):
        assert sum((each[time]["tokens"] for each in found), []) == tokens
        for mine, theirs in zip(sum((each[time]["logprobs"] for each in found), []), logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert {each[time]["weights"] for each in found} == {share}
    assert {each["freed"] for each in found} == {0}
    whole = decode.KVCache(net.config, 3, 57 + 40, torch.float32, "cpu")
    assert {each["cache"] for each in found} == {(whole.k.nbytes + whole.v.nbytes) / ranks}


def test_on_a_gpu_attention_is_not_cudnn_s(monkeypatch):
    """It builds a plan for each new length and stride of a packed sequence: seconds to minutes a step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *args, **kw: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        parallel.start()
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
