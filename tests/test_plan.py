"""plan.py against arithmetic by hand, against PyTorch's memory tracker on the 8B model, and against runs; memory of loading and saving;
what can be shown of the large models and of train.sh's GPU part without a GPU."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import checkpoint, decode, evaluation, hf, parallel, plan, recipe
from lib.signals import signals
import memory
import model as M
import ppo
import rlsp
from conftest import ROOT, TINY, tiny_llama
from test_cli import refused  # noqa: F401  (the fixture)
from test_model import QWEN3
from test_ppo import folder  # noqa: F401

LLAMA_8B = dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072, tie_word_embeddings=False)
QWEN3_8B = LLAMA_8B | dict(model_type="qwen3", vocab_size=151936, intermediate_size=12288, num_hidden_layers=36, head_dim=128, rms_norm_eps=1e-6)
MISTRAL_7B = LLAMA_8B | dict(model_type="mistral", vocab_size=32000, sliding_window=None)
LLAMA_70B = LLAMA_8B | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
QWEN_32B = dict(model_type="qwen2", vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0, max_position_embeddings=32768, tie_word_embeddings=False)
TRACKED = dict(max_prompt=2048, max_response=4096, micro_tokens=16384)


def measure(*words, ranks=1):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launch, str(ROOT / "tests/tools/memory.py"), *map(str, words)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# ---- by hand

@pytest.mark.parametrize("raw, parameters, a_block, outside", [
    (LLAMA_8B, 8_030_261_248, 218_112_000, 1_050_677_248),
    (LLAMA_70B, 70_553_706_496, 855_654_400, 2_101_354_496),
    (QWEN_32B, 32_763_876_352, 2 * 5120**2 + 5120 + 2 * (5120 * 1024 + 1024) + 3 * 5120 * 27648 + 2 * 5120, 1_557_140_480),
    (QWEN3_8B, 8_190_735_360, 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128, 1_244_663_808),
    (MISTRAL_7B, 7_241_732_096, 218_112_000, 262_148_096)], ids=["8B", "70B", "32B", "qwen3", "mistral"])
def test_each_quantity_is_the_arithmetic(raw, parameters, a_block, outside):
    config, c = M.Config.from_dict(raw), ppo.PPOConfig(rollout_batch=64)
    policy, critic = plan.shapes(config), plan.shapes(config, critic=True)
    assert plan.elements(policy) == parameters  # the publishers' counts
    assert plan.elements(plan.block(policy)) == a_block and plan.elements(plan.root(policy)) == outside
    assert plan.elements(critic) == parameters - (raw["vocab_size"] - 1) * raw["hidden_size"]
    assert plan.elements({"w": (10, 3)}, 4) == 3 * 3  # ten rows over four ranks: three at most
    assert plan.weights([policy], 8) == plan.gradients([policy], 8) == parameters * 4 / 8 and plan.optimizer([policy], 8) == parameters * 8 / 8
    assert plan.frozen_copy(config, c, 8) == parameters * 2 / 8 and plan.frozen_copy(config, c, 1) == parameters * 2
    layers = raw["num_hidden_layers"]
    row = layers * 4096 * (2048 + 4096)  # keys and values of a token and layer are 4 KiB
    assert plan.kv_cache(config, c, 8) == 8 * row  # 8 prompts a rank, fewer than slots
    assert plan.kv_cache(config, ppo.PPOConfig(kv_gb=3.3 * row / 1e9), 8) == 3 * row
    assert plan.kv_cache(config, ppo.PPOConfig(rollout_batch=8, max_response=4000, samples=1), 8) == layers * 4096 * 6144 * 1  # 48 blocks of 128
    D, F = raw["hidden_size"], raw["intermediate_size"]
    found = plan.phases(config, c, 8, 8)
    assert found["update"]["weights"] == plan.weights([policy, critic], 8) and found["update"]["optimizer"] == 2 * found["update"]["weights"]
    assert {items["kv cache"] for items in found.values()} == {8 * row}  # it stays
    heads = raw["num_attention_heads"]
    scores = 4096 * heads * 2048 * (4 + 4 + 2)  # a prefill's, before and after the softmax and in bfloat16
    assert found["rollout"]["activations"] == pytest.approx(scores + 4096 * (2 * D + 3 * heads * 128) * 2, rel=0.05)
    inputs, mlp, norms = layers * 16384 * D * 2, 16384 * 6 * F * 2, 16384 * D * 20  # six widths of the MLP, two norms
    assert found["update"]["activations"] == pytest.approx(inputs + mlp + norms, rel=0.15)
    tokens = 512 * 1150  # 2 FLOPs a parameter forward, of which the embedding has none
    assert plan.flops(config, ppo.PPOConfig(), 150, 1000)["rollout"] == pytest.approx(2 * tokens * (parameters - raw["vocab_size"] * D), rel=0.05)
    assert plan.flops(config, ppo.PPOConfig(), 150, 1000)["update"] == pytest.approx(8 * tokens * 2 * parameters, rel=0.15)


def test_weights_and_outputs_of_the_large_models_have_their_shapes(monkeypatch):
    """The device-independent path on the meta device: shapes of Hugging Face's tensors, of logits, log-probs and values."""
    from torch.fx.experimental import _config
    monkeypatch.setattr(M, "pack", memory.pack_whole)
    for raw in (LLAMA_8B, QWEN_32B):
        D, F, V, heads = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"], raw["num_attention_heads"]
        of_a_block = {"self_attn.q_proj": (heads * 128, D), "self_attn.k_proj": (1024, D), "self_attn.v_proj": (1024, D),
                      "self_attn.o_proj": (D, heads * 128), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
                      "input_layernorm": (D,), "post_attention_layernorm": (D,)}
        expected = {f"model.layers.{i}.{n}.weight": s for i in range(raw["num_hidden_layers"]) for n, s in of_a_block.items()}
        if raw["model_type"] == "qwen2":
            expected |= {f"model.layers.{i}.self_attn.{n}_proj.bias": (s,) for i in range(64) for n, s in (("q", D), ("k", 1024), ("v", 1024))}
        expected |= {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
        config = M.Config.from_dict(raw)
        assert plan.shapes(config) == expected
        with torch.device("meta"), _config.patch(meta_nonzero_assume_all_nonzero=True):
            policy, critic = M.Llama(config).to(torch.bfloat16), M.Critic(config).to(torch.bfloat16)
            critic.value_head.float()
            tokens, mask = torch.zeros(2, 50, dtype=torch.long), torch.ones(2, 50, dtype=torch.bool)
            logits = policy(tokens)
            assert logits.shape == (2, 50, V) and logits.dtype == torch.float32
            for x in (*policy.logprobs(tokens, mask), critic(tokens, mask)):
                assert x.shape == (2, 50) and x.dtype == torch.float32


# ---- by PyTorch's tracker, and by measuring

def test_the_plan_agrees_with_pytorchs_memory_tracker_on_llama_8b_over_8_ranks():
    found, config, c = measure("simulate", json.dumps(LLAMA_8B), 16384, 8), M.Config.from_dict(LLAMA_8B), ppo.PPOConfig(**TRACKED)
    moments = {}
    for name, critic in (("policy", False), ("critic", True)):
        net, tracked = plan.shapes(config, critic), found[name]
        for item in ("weights", "gradients", "optimizer"):
            assert getattr(plan, item)([net], 8) == pytest.approx(tracked[item], rel=1e-3), item
        head = 0 if critic else 2 * 128256 * 4096  # its gradient is "Temp" to the tracker, "gathered" to the plan
        gathered, activations = moments[name] = plan.backward(config, c, 8, 16384, net)
        assert gathered == pytest.approx(head + sum(tracked[k] for k in ("Unsharded Param", "All Gather", "Reduce Scatter", "Unsharded Grad")), rel=0.15)
        assert activations == pytest.approx(tracked["Activation"] + tracked["Temp"] - head, rel=0.15)
        assert 2 * plan.weights([net], 8) + gathered + activations == pytest.approx(tracked["Total"], rel=0.15)
    stays = sum(found[n][k] for n in found for k in ("weights", "gradients", "optimizer")) + 2 * 8_030_261_248 / 8
    passing = max(t["Total"] - t["Sharded Param"] - t["Sharded Grad"] for t in found.values())
    update = plan.phases(config, c, 8, 8)["update"]
    assert sum(update.values()) - update["kv cache"] == pytest.approx(stays + passing, rel=0.15)  # the tracker saw no rollout


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """4 million parameters, so that weights, logits and activations all count."""
    out = tmp_path_factory.mktemp("wide")
    raw = json.loads((ROOT / "data/tiny/model/config.json").read_text())
    raw |= dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, head_dim=64, vocab_size=4096)
    net = M.Llama(M.Config.from_dict(raw))
    M.init_weights(net, 0)
    hf.save(net, out)
    hf.copy_tokenizer(ROOT / "data/tiny/model", out)
    return out


@pytest.mark.parametrize("ranks, recompute", [(2, "true"), (1, "false")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_agrees_with_a_ppo_step(wide, tmp_path, dtype, ranks, recompute, monkeypatch):
    if dtype == "bfloat16" and parallel.compute_type() != "bfloat16":
        pytest.skip("no bfloat16 products here: emulated ones take minutes, float32 is tested")
    monkeypatch.setenv("CC", "false")  # as on a GPU: the kernels of cpu.c keep less
    (tmp_path / "run").mkdir()
    sampler = "tensor" if ranks == 2 and dtype == "float32" else "whole"
    for rank in measure("update", wide, ROOT / "data/tiny/train.jsonl", tmp_path / "run", f"dtype={dtype}", f"sampler={sampler}", "rollout_batch=8", "train_batch=8",
                        "max_response=200", "micro_tokens=2", "freeze_steps=0", "steps=1", f"recompute={recompute}", ranks=ranks):
        planned = rank["plan"]["update"]
        for item in ("weights", "gradients", "optimizer", "reference"):
            assert planned[item] == pytest.approx(rank[item], rel=1e-3), item
        rollout = rank["plan"]["rollout"]
        assert rollout["sampler"] == rank["sampler"] and rank["sampler freed"] == 0 and planned["kv cache"] == rank["kv cache"]
        assert sum(planned.values()) == pytest.approx(rank["update"], rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompt, response, vocab", [(400, 20, 97), (20, 500, 97), (3, 20, 8192)], ids=["prefill", "decode", "logits"])
def test_the_plan_agrees_with_a_rollout(prompt, response, vocab, dtype):
    """Where a prefill's scores, decoding's scores and the logits are most of a rollout's live bytes. As on a GPU: by the plain step."""
    net = tiny_llama(vocab_size=vocab, num_attention_heads=8).to(getattr(torch, dtype))
    c = ppo.PPOConfig(rollout_batch=16, samples=1, max_prompt=prompt + 1, max_response=response, dtype=dtype)
    cache, live = decode.KVCache.sized(net.config, 16, prompt + 1 + response, getattr(torch, dtype), "cpu", 0), memory.Live()
    stays = [*net.parameters(), cache.k, cache.v]
    live.know(stays)
    with live:
        decode.generate(net, [[(i + j * j) % 97 for j in range(prompt + 1)] for i in range(16)], response, slots=16, cache=cache)
    assert live.peak - memory.local_bytes(stays) == pytest.approx(plan.phases(net.config, c, 1, 1)["rollout"]["activations"], rel=0.15)


@pytest.mark.parametrize("config", [TINY, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_keeps_of_a_block_what_the_plan_says(dtype, config):
    net, kept = tiny_llama(**config).to(dtype), {}
    x, cos = torch.zeros(1, 100, 32, dtype=dtype, requires_grad=True), torch.ones(1, 1, 100, config["head_dim"] // 2, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        y = net.model.layers[0](x, cos, cos, torch.tensor([30, 70]))  # noqa: F841  (its graph lives as long)
    ours = [t for t in kept.values() if t.untyped_storage()._cdata not in {p.untyped_storage()._cdata for p in (*net.parameters(), cos)}]
    assert memory.local_bytes(ours) == plan.saved(net.config, ppo.PPOConfig(dtype=str(dtype).removeprefix("torch.")), 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_agrees_with_the_logits_of_several_chunks(dtype):
    h, weight = (torch.zeros(n, 4, dtype=dtype, requires_grad=True) for n in (1200, 4096))
    live = memory.Live()
    with live:
        M.TokenLogprob.apply(h, weight, torch.zeros(1200, dtype=torch.long), 1.0, True)[0].sum().backward()
    planned = plan.logits(M.Config.from_dict(LLAMA_8B | dict(vocab_size=4096)), 1200)
    assert live.peak == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("ranks", [2, 4])
def test_loading_holds_the_share_and_saving_one_tensor(wide, tmp_path, ranks):
    raw = json.loads((wide / "config.json").read_text()) | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=32768)
    with torch.device("meta"):
        empty = M.Llama(M.Config.from_dict(raw))
    tmp_path.joinpath("config.json").write_text(json.dumps(raw))
    hf.save_tensors(((n, torch.zeros(p.shape, dtype=torch.bfloat16)) for n, p in empty.named_parameters()), tmp_path, max_bytes=10**8)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    slack = 40e6  # gloo's buffers, the allocator, this interpreter
    for rank in measure("load", tmp_path, tmp_path / "out", ranks=ranks):
        assert rank["whole"] > 4e8 and rank["share"] == pytest.approx(rank["whole"] / ranks, rel=0.01)
        assert rank["loading"] < rank["share"] + rank["largest"] + slack
        assert rank["saving"] < 3 * rank["largest"] + slack  # gathered pieces, the whole, its bytes


# ---- refusing, and advice

@pytest.fixture
def plan_words(tmp_path, monkeypatch, capsys):
    def call(raw, *words):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        monkeypatch.setattr(sys, "argv", ["rlsp.py", "plan", "--model", str(tmp_path), *map(str, words)])
        with pytest.raises(SystemExit) as e:
            rlsp.main()
            raise SystemExit(0)
        return SimpleNamespace(returncode=e.value.code, **dict(zip(("stdout", "stderr"), capsys.readouterr())))
    return call


@pytest.mark.parametrize("raw, words", [(LLAMA_8B, "--gpus 8 --kv-gb 0 --sampler whole"), (LLAMA_8B, "--gpus 2"), (QWEN_32B, "--gpus 32"), (LLAMA_70B, "--gpus 64")],
                         ids=["8B on 8", "8B on 2", "32B on 32", "70B on 64"])
def test_what_does_not_fit_gets_flags_with_which_it_fits(plan_words, raw, words):
    first = plan_words(raw, *words.split())
    assert first.returncode == 2 and "DOES NOT FIT" in first.stdout
    flags = re.search(r"it fits with (.*)", first.stdout)[1].split()
    again = plan_words(raw, *words.split(), *flags)
    assert again.returncode == 0 and ": fits" in again.stdout and "hours" in again.stdout


SPLIT = {"32B": (QWEN_32B, 32, ["--shard-ranks", 32]), "70B": (LLAMA_70B, 64, ["--shard-ranks", 64, "--micro-tokens", 6144, "--kv-gb", 15])}


@pytest.mark.parametrize("size", SPLIT)
def test_a_sampler_split_over_a_node_is_the_arithmetic(plan_words, size):
    raw, gpus, words = SPLIT[size]
    config = M.Config.from_dict(raw)
    c = rlsp.Plan(model="", sampler="tensor", kv_gb=15, mean_response=1000)
    layers, D, V = raw["num_hidden_layers"], raw["hidden_size"], raw["vocab_size"]
    parameters, norms = plan.elements(plan.shapes(config)), (2 * layers + 1) * D
    found = plan.phases(config, c, gpus, gpus, "ppo", 8)
    weights = 2 * ((parameters - norms) / 8 + norms)  # bfloat16; each rank has all norms
    row = 2 * layers * 1 * 128 * 2 * 6144  # keys and values of one of eight heads
    rows = min(64, int(15e9 / row))  # of 512 / (gpus / 8) responses that a node decodes
    assert found["rollout"]["sampler"] == found["save"]["sampler"] == weights and "sampler" not in found["update"]
    assert found["rollout"]["kv cache"] == rows * row and found["rollout"].get("gathered", 0) == 0
    pages = int(15e9 / (2 * layers * 128 * 2 * 256)) - 1  # of 256 positions, one of them nobody's
    at_once = min(64, pages / (650 / 256 + 0.5))  # a sequence holds 150 + 1000 / 2 positions on average, its last page half full
    turns = max(4096, math.ceil(512 * 8 / gpus * 1000 / at_once))
    mean = 512 * 8 / gpus * 1000 / turns  # sequences in a turn
    sums, logits = (2 * layers + 1) * 2 * 7 / 8 * mean * D * 2, 7 / 8 * mean * V * 4
    token = (weights + mean * row * 650 / 6144) / 1e12 + (2 * layers + 3) * 2e-5 + (sums + logits) / 5e10
    prefill = plan.flops(config, c, 150, 1000)["rollout"] / gpus / 1.5e14
    assert plan.seconds(config, c, gpus, gpus, 150, 1000, 8)["rollout"] == pytest.approx(turns * token + prefill, rel=1e-6)
    done = plan_words(raw, "--gpus", gpus, *words)  # chosen by itself
    assert done.returncode == 0 and "\nsampler tensor over 8 ranks: whole needs" in done.stdout
    assert int(re.search(r"network per GPU: (\d+) s \(rollout", done.stdout)[1]) < 300
    assert "\n".join([*done.stdout.splitlines()[:20], "..."]) in (ROOT / "docs/gpus.md").read_text()


def test_the_sampler_is_the_first_that_fits(plan_words):
    config, c = M.Config.from_dict(QWEN_32B), ppo.PPOConfig(sampler="auto", max_prompt=300, max_response=1000, kv_gb=10)
    call = lambda config, c=c, gb=77, shards=32, node=8: plan.choose_sampler([config], c, 32, shards, gb * 1e9, "ppo", node)
    assert call(M.Config.from_dict(LLAMA_8B)) == ("whole", "sampler whole: it fits")
    sampler, why = call(config)
    assert sampler == "tensor" and re.fullmatch(r"sampler tensor over 8 ranks: whole needs [\d.]+ GB", why)
    odd = M.Config.from_dict(QWEN_32B | {"num_key_value_heads": 5})
    sampler, why = call(odd)
    assert sampler == "sharded" and "tensor: num_key_value_heads is 5, expected a multiple of the 8 ranks that share it" in why
    assert call(config, node=1)[0] == "sharded"  # one GPU per node: a sum over the network for each layer and token is not tried
    sampler, why = call(config, gb=20)
    assert sampler == "tensor" and "none fits: whole needs" in why and "sharded needs" in why
    assert call(config, gb=1, shards=1)[0] == "whole"
    line, sampler = plan.check(config, c, 32, 32, int(80e9), 10**12, "a GPU", "ppo", 8)
    assert sampler == "tensor" and line.endswith(call(config)[1])
    for words in (["--sampler", "tensor"], ["--sampler", "tensor", "--vocabulary"]):
        raw = QWEN_32B | ({"vocab_size": 152065} if "--vocabulary" in words else {"num_key_value_heads": 5})
        error = plan_words(raw, "--gpus", 32, *words[:2])
        assert error.returncode == 2 and len(error.stderr.splitlines()) == 1
        key = "vocab_size is 152065" if "--vocabulary" in words else "num_key_value_heads is 5"
        assert f"--sampler tensor: {key}, expected a multiple of the 8 ranks that share it" in error.stderr


def test_an_evaluation_of_several_models_takes_the_sampler_that_fits_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "environment", lambda: (0, 8, 0, 8))
    monkeypatch.setattr(parallel, "memory", lambda: (int(80e9), 10**12, "a GPU"))
    for name, raw in (("small", LLAMA_8B), ("large", QWEN_32B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
    chosen = []
    for names in (["small"], ["small", "large"]):
        args = rlsp.Eval(model=[str(tmp_path / name) for name in names], data="", dtype="bfloat16", max_response=1000)
        chosen.append(evaluation.choose_sampler(args, 500, 2048, {"shard": SimpleNamespace(size=lambda: 8)}))
    assert chosen == ["whole", "tensor"]
    assert re.fullmatch(r"rlsp.py: plan: sampler tensor over 8 ranks: whole needs [\d.]+ GB\n", capsys.readouterr().err)


def test_the_defaults_are_for_8b_on_eight_gpus(plan_words):
    done = plan_words(LLAMA_8B)
    assert done.returncode == 0 and "8 GPU(s)" in done.stdout and "of 80.0: fits" in done.stdout


def test_nothing_helps_where_nothing_helps(plan_words):
    done = plan_words(LLAMA_70B, "--gpus", 1, "--gpu-memory", 24)
    assert done.returncode == 2 and "needs more GPUs" in done.stdout
    assert "divisor of --gpus 8" in plan_words(LLAMA_8B, "--shard-ranks", 3).stderr


def test_a_run_that_cannot_fit_is_refused_with_the_arithmetic(folder, tmp_path, refused, monkeypatch):  # noqa: F811
    monkeypatch.setattr(parallel, "memory", lambda: (3_100_000_000, 10**12, "a GPU with 3.1 GB"))
    data = ROOT / "data/tiny/train.jsonl"
    error = refused("ppo", "--model", folder, "--data", data, "--out", tmp_path / "run", "--max-response", "500")
    assert "does not fit into a GPU with 3.1 GB: each process needs" in error and "optimizer" in error and "it fits with" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_runs_of_the_readme_are_not_refused():
    """tiny and SmolLM2-135M on a machine of 16 GB, as many processes as two."""
    tiny = hf.read_config(ROOT / "data/tiny/model")
    smol = M.Config.from_dict(dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                   num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))
    small = ppo.PPOConfig(rollout_batch=96, train_batch=24, max_prompt=40, max_response=400, slots=96, micro_tokens=2500, dtype="float32", recompute=False)
    real = ppo.PPOConfig(rollout_batch=24, train_batch=12, max_prompt=250, max_response=200, slots=24, micro_tokens=2048)
    for config, c in ((tiny, small), (smol, real)):
        for ranks in (1, 2):
            line, sampler = plan.check(config, c, ranks, ranks, None, int(16e9) // ranks, "16 GB", "ppo")
            assert line.startswith("plan: each process needs") and sampler == "whole"


# ---- the whole recipe: SFT, PPO, evaluation; hours, dollars and disk

PLAN = dict(model="Llama-3.1-8B-Instruct", dtype="bfloat16")


def test_hours_of_each_stage_are_the_arithmetic():
    """By hand, 8B on 8 GPUs: FLOPs over FLOP/s, bytes read over bytes per second, replies over requests at once."""
    config = M.Config.from_dict(LLAMA_8B)
    c = rlsp.Plan(**PLAN, steps=100, sft_examples=50_000, sft_tokens=2000, sft_epochs=3, judge_workers=4, judge_seconds=6, flops=1e14, bandwidth=2e12,
                  test_problems=400, test_samples=2, test_response=3000, kv_gb=0)
    took = recipe.stage_seconds(config, c, 8)
    products = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # all parameters but the embedding and the norms
    a_token = 2 * products + 2 * 32 * 4096 * 2000  # attention: scores and sums of values, 2 FLOPs each, over half of the context
    assert took["sft"] == pytest.approx(50_000 * 2000 * 3 * 4 * a_token / 8 / 1e14, rel=1e-12)  # backward is 2, recomputing 1
    assert took["judge"] == 100 * 16 * 6  # 64 responses of a GPU in 16 rounds of 4
    turns = 8192  # 100 responses of 3000 in 64 slots are fewer: somebody writes to the end
    cache = 100 * 3000 / turns * 32 * 4096 * (150 + 1500)  # of those in a turn; keys and values of a token and layer are 4 KiB
    reading = turns * (8_030_261_248 * 2 + cache) / 2e12
    computing = 800 * 3150 * (2 * products + 2 * 32 * 4096 * 3150) / 8 / 1e14
    assert took["eval"] == pytest.approx(3 * (reading + computing), rel=1e-3)
    assert recipe.stage_seconds(config, rlsp.Plan(**PLAN | dict(sft_examples=0, test_problems=0)), 8).keys() == {"ppo", "judge"}


@pytest.mark.parametrize("every, times", [(20, 6), (30, 5), (0, 2), (500, 2)])  # the start, each `every` steps, the end
def test_evaluations_in_ppo_are_counted(tmp_path, every, times):
    config, data = M.Config.from_dict(LLAMA_8B), tmp_path / "held.jsonl"
    data.write_text('{"problem": "What?", "answer": "1"}\n' * 16)
    c = rlsp.Plan(**PLAN, steps=100, eval_data=str(data), eval_every=every, eval_samples=3, kv_gb=0)
    reading = (4096 * 8_030_261_248 * 2 + 6 * 1000 * 32 * 4096 * 650) / 1e12  # 6 responses of a GPU, one of which is as long as allowed
    assert recipe.stage_seconds(config, c, 8)["held"] == pytest.approx(times * reading, rel=0.02)
    assert f"held   {times} evaluations in PPO, 16 problems x 3 " in "\n".join(recipe.recipe_lines(config, c, 8))


def test_memory_of_sft_and_evaluation_is_that_of_their_own_settings():
    config, c = M.Config.from_dict(LLAMA_8B), rlsp.Plan(**PLAN, test_problems=80, sft_max_tokens=20_000)
    settings = recipe.stages(c)
    sft = plan.phases(config, settings["sft"], 8, 8, "sft")["update"]
    assert sft["weights"] + sft["gradients"] + sft["optimizer"] == 16 * 8_030_261_248 / 8  # no critic, no reference
    assert sft["activations"] == pytest.approx(20_000 / 16_384 * plan.phases(config, c, 8, 8)["update"]["activations"], rel=0.05)  # no sequence is cut
    test = plan.phases(config, settings["eval"], 8, 8, "eval")["rollout"]
    assert test["weights"] == 2 * 8_030_261_248 and test["kv cache"] == 10 * 32 * 4096 * (2048 + 8192)  # 10 problems a GPU


def test_the_table_adds_up_and_says_what_is_assumed(plan_words):
    out = plan_words(LLAMA_8B, "--price", 3).stdout
    rows = {line[:59].strip(): [float(x) for x in line[59:].split()] for line in out.splitlines() if re.match("(sft|ppo|eval|judge|all) +[0-9a-z]", line)
            and "peak" not in line}
    sft, ppo_, test, without, judge, with_judge = rows.values()
    for row in rows.values():
        assert row[1] == pytest.approx(8 * row[0], abs=0.5) and row[2] == pytest.approx(3 * row[1], abs=0.6)
    assert without[0] == pytest.approx(sft[0] + ppo_[0] + test[0], abs=0.11) and with_judge[0] == pytest.approx(without[0] + judge[0], abs=0.11)
    assert sft[3:] == [305.1, 208.8] and ppo_[3:] == [575.3, 388.9] and without[3:] == [784.1, 597.7]
    assert "a checkpoint of PPO has 186.4 GB" in out and "Assumed, each a flag" in out and "nothing was timed on GPUs" in out
    assert "dollars" not in plan_words(LLAMA_8B).stdout
    assert not re.search("^(sft|eval) ", plan_words(LLAMA_8B, "--sft-examples", 0, "--test-problems", 0).stdout, re.M)


@pytest.mark.parametrize("stage, words", [("sft", "--sft-max-tokens 400000"), ("eval", "--rollout-batch 8 --train-batch 8 --kv-gb 0")])
def test_each_stage_has_to_fit(plan_words, stage, words):
    done = plan_words(LLAMA_8B, *words.split())
    assert done.returncode == 2 and re.findall("^(.*) peak: .*DOES NOT FIT$", done.stdout, re.M) == [stage]
    fits = plan_words(LLAMA_8B, *words.split(), *(re.search("it fits with (.*)", done.stdout) or ["", "--sft-examples 0"])[1].split())
    assert fits.returncode == 0


@pytest.mark.parametrize("stage, keep_best", [("sft", False), ("ppo", False), ("ppo", True)])
def test_the_disk_of_a_run_is_the_planned_one(folder, tmp_path, monkeypatch, stage, keep_best):  # noqa: F811
    (tmp_path / "sft.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:8]))
    words = {"sft": ["--data", tmp_path / "sft.jsonl", "--batch", 2, "--epochs", 1],
             "ppo": ["--data", ROOT / "data/tiny/train.jsonl", "--steps", 4, "--rollout-batch", 2, "--train-batch", 2, "--max-response", 8,
                     "--freeze-steps", 0]}[stage]
    run, seen, remove = tmp_path / "run", [], checkpoint.remove
    size = lambda: sum(f.stat().st_size for f in run.rglob("*.safetensors"))  # noqa: E731
    monkeypatch.setattr(checkpoint, "remove", lambda folders: (seen.append(size()), remove(folders)))
    monkeypatch.setattr(signals, "install", lambda: None)  # this process keeps its own
    if keep_best:
        monkeypatch.setattr(checkpoint, "best", lambda run: 1)
        words += ["--eval-data", ROOT / "data/tiny/validation.jsonl", "--keep-best", "--eval-every", 0]
    words = [stage, "--model", folder, "--out", run, "--dtype", "float32", "--save-every", 1, "--keep", 2, *words]
    monkeypatch.setattr(sys, "argv", ["rlsp.py", *map(str, words)])
    rlsp.main()
    config, c = hf.read_config(folder), rlsp.Plan(**PLAN | dict(dtype="float32", keep_best=keep_best))
    most, kept = recipe.disk(config, c, stage)
    model = plan.frozen_copy(config, c, 1)
    assert (run / "model/model.safetensors").stat().st_size == pytest.approx(model, rel=0.03)
    assert size() == pytest.approx(kept, rel=0.03)
    assert max(seen) == pytest.approx(most - model, rel=0.03)  # there is no model yet while checkpoints are written


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("every, checkpoints", [(0, 1), (3, 2), (2, 3), (1, 3)])
def test_a_run_that_the_disk_cannot_hold_does_not_start(folder, tmp_path, monkeypatch, refused, stage, every, checkpoints):  # noqa: F811
    """Six steps, of which --save-every says how many write a checkpoint, --keep 2 and one more while it is written. With room for all
    and the model the run begins, which loading shows; with one byte less it is refused before. What a stopped run left counts as its
    own, also behind a link to another disk."""
    (tmp_path / "sft.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:6]))
    words = {"sft": ["--data", tmp_path / "sft.jsonl", "--batch", 1, "--epochs", 1],
             "ppo": ["--data", ROOT / "data/tiny/train.jsonl", "--steps", 6, "--rollout-batch", 2, "--train-batch", 2, "--max-response", 8]}[stage]
    words = [stage, "--model", folder, "--out", tmp_path / "not/yet/run", "--dtype", "float32", "--keep", 2, "--save-every", every, *words]
    config = hf.read_config(folder)
    numbers = [sum(p.numel() for p in net(config).parameters()) for net in (M.Llama, M.Critic)][: 1 if stage == "sft" else 2]
    need = checkpoints * 3 * 4 * sum(numbers) + 4 * numbers[0]  # weights and two moments of each network; the model

    def free(size, where):
        asked = []
        monkeypatch.setattr(shutil, "disk_usage", lambda place: (asked.append(place), SimpleNamespace(free=size, total=1e12))[1])
        monkeypatch.setattr(hf, "load", lambda *a, **k: (_ for _ in ()).throw(ValueError("it begins")))
        error = refused(*words)
        assert asked == [where]
        return error

    short = free(need - 1, tmp_path)
    assert short.startswith(f"rlsp.py: error: {tmp_path}/not/yet/run: the run needs {need / 1e9:.4g} GB of disk") and short.count("\n") == 1
    assert "it begins" in free(need, tmp_path)
    (tmp_path / "big/.step-000002.part").mkdir(parents=True)
    (tmp_path / "big/.step-000002.part/part").write_bytes(bytes(1000))
    run = tmp_path / "not/yet/run"
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to(tmp_path / "big")
    c = ppo.PPOConfig(dtype="float32", keep=2, save_every=every)

    def check(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(
            free=size if place == run / "checkpoints" else 0, total=1e12))
        recipe.check_disk(run, config, c, stage, 6)

    check(need - 1000)
    with pytest.raises(ValueError, match="of disk"):
        check(need - 1001)
    (tmp_path / "big/step-000006").mkdir()  # after the last checkpoint the model alone is missing
    with open(tmp_path / "big/step-000006/part", "wb") as f:
        f.truncate(3 * 4 * sum(numbers) - 1000)
    check(4 * numbers[0])
    with pytest.raises(ValueError, match="of disk"):
        check(4 * numbers[0] - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0, total=0))  # a mounted object store may say so
    recipe.check_disk(run, config, c, stage, 6)


# ---- train.sh inside a job of torchrun

def test_train_sh_joins_the_job_of_torchrun(folder, tmp_path):  # noqa: F811
    for name in (*(f.name for f in ROOT.glob("*.py")), "requirements.txt", "data", "lib"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "train.sh").write_text((ROOT / "train.sh").read_text())  # it works where it lies
    (tmp_path / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    (tmp_path / ".venv/installed").write_text(subprocess.run("cksum < requirements.txt", shell=True, cwd=ROOT, capture_output=True, text=True).stdout)
    (tmp_path / "sft.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:64]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", "bash", "train.sh", "--steps", "1",
         "--rollout-batch", "2", "--train-batch", "2", "--max-response", "8", "--freeze-steps", "0", "--dtype", "float32"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1", MODEL=str(folder), SFT_DATA="sft.jsonl", DATA="data/tiny/train.jsonl"))
    assert done.returncode == 0, done.stderr[-3000:]
    runs = list((tmp_path / "runs").iterdir())  # one, whatever second each rank started in
    assert len(runs) == 1 and (runs[0] / "ppo/model/config.json").is_file()
    for stage in ("sft", "ppo"):
        assert "2 process(es)" in json.loads((runs[0] / stage / "config.json").read_text())["versions"]["machine"]
    # a job that is started again goes on: SFT is done, PPO stopped before its end
    model = (runs[0] / "ppo/model/model.safetensors").read_bytes()
    (runs[0] / "ppo/model/tokenizer.json").unlink()
    (runs[0] / "ppo/done").unlink()
    done = subprocess.run(["bash", "train.sh", "--steps", "1", "--rollout-batch", "2", "--train-batch", "2", "--max-response", "8", "--freeze-steps", "0",
                           "--dtype", "float32"], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env=os.environ | dict(OMP_NUM_THREADS="1", MODEL=str(folder), SFT_DATA="sft.jsonl", DATA="data/tiny/train.jsonl", RUN=f"runs/{runs[0].name}"))
    assert done.returncode == 0 and "sft is done" in done.stdout, done.stderr[-3000:]
    assert (runs[0] / "ppo/model/model.safetensors").read_bytes() == model and (runs[0] / "ppo/model/tokenizer.json").is_file()
