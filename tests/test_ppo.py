"""ppo.py, line by line of the checklist for PPO on language models: each named test has its own slow, obvious oracle."""
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from lib import chat, decode, evaluation, functions, guards, hf, logs, parallel
import model as M
import ppo
import rlsp
import rewards
from conftest import ROOT

TINY = ROOT / "data" / "tiny" / "model"


def ragged(seed, B=5, T=14):
    """Random [B, T] values and a mask of one run of actions a row, as prompts and pads leave it."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        start = int(torch.randint(1, 6, (), generator=g))
        mask[b, start : start + int(torch.randint(1, T - start + 1, (), generator=g))] = True
    return mask, lambda: torch.randn(B, T, generator=g)


# ---- pure functions

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_checklist_8_gae_equals_its_definition(seed, gamma, lam):
    mask, draw = ragged(seed)
    r, v = draw(), draw()
    advantages, returns = ppo.gae(r, v, mask, gamma, lam)
    for b in range(len(mask)):
        at = mask[b].nonzero()[:, 0].tolist()
        V = [float(v[b, t]) for t in at] + [0.0]
        delta = [float(r[b, t]) + gamma * V[i + 1] - V[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):  # O(T^2)
            a = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
            assert advantages[b, t] == pytest.approx(a, abs=1e-5)
            assert returns[b, t] == pytest.approx(a + V[i], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_checklist_9_whitened_advantages_have_masked_mean_0_and_variance_1():
    mask, draw = ragged(3)
    x = draw() * 7 + 3
    y = ppo.whiten(x, mask)
    values = y[mask].double()
    assert abs(values.mean()) < 1e-6 and abs((values**2).mean() - 1) < 1e-5 and not y[~mask].any()
    x[~mask] = 1e6  # pads must not matter
    assert torch.equal(ppo.whiten(x, mask), y)


def test_checklist_9_whitening_makes_no_update_of_the_critics_errors():
    mask, draw = ragged(3)
    advantages, k1 = draw(), draw() * 0.01
    what = lambda a, scores, samples=5: ppo.policy_advantages(a, torch.tensor(scores), samples, k1, mask, 0.05, 1.0, 0.95)
    # an ordinary rollout, also one with a single response, is whitened, bit for bit
    assert torch.equal(what(advantages, [1.0, 0.0, 0.0, -0.5, 1.0]), ppo.whiten(advantages, mask))
    assert torch.equal(what(advantages, [1.0] * 4 + [1.0001]), ppo.whiten(advantages, mask))
    assert torch.equal(what(advantages, [1.0] * 5, 1), ppo.whiten(advantages, mask))
    # equal scores, but for rounding: whatever the critic says, what is left is the KL penalty, and it is not made larger
    for scores in ([1.0] * 5, [0.3] * 4 + [0.1 + 0.2], [1000.0] * 4 + [1000.0001]):
        left = what(advantages, scores)
        assert torch.equal(left, what(advantages * 100, scores))
        penalty, _ = ppo.gae(-0.05 * k1 * mask, torch.zeros_like(k1), mask, 1.0, 0.95)
        assert torch.allclose(left, (penalty - ppo.masked_mean(penalty, mask)) * mask, atol=1e-7) and 0 < left.abs().max() < 0.1
    k1 = k1 * 1e6  # a large one is made smaller as ever
    assert ppo.masked_mean(what(advantages, [1.0] * 5) ** 2, mask) == pytest.approx(1.0, rel=1e-4)
    # without a critic scores are compared within a prompt
    assert ppo.scores_differ(torch.tensor([1.0, 1.0, 0.0, 0.0]), 4) and not ppo.scores_differ(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2)


def test_checklist_10_k1_and_k3_both_estimate_the_kl():
    """Exact expectations over a categorical policy: E[k1] = E[k3] = KL(p || q)."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(50, generator=g, dtype=torch.double), -1) for _ in range(2))
    kl = (p.exp() * (p - q)).sum()
    k1, k3 = ppo.kl_estimates(p, q)
    assert (p.exp() * k1).sum() == pytest.approx(float(kl)) == float((p.exp() * k3).sum())
    assert (k3 >= 0).all() and (k1 < 0).any() and torch.allclose(k1, p - q)


def test_checklist_6_and_10_the_score_lands_on_the_last_action_and_the_kl_is_detached():
    mask, draw = ragged(4)
    k1, scores = draw().requires_grad_(), torch.randn(5, generator=torch.Generator().manual_seed(1))
    r = ppo.token_rewards(scores, k1, mask, 0.05)
    assert not r.requires_grad
    for b in range(5):
        last = max(t for t in range(14) if mask[b, t])
        for t in range(14):
            expected = (-0.05 * float(k1[b, t].detach()) if mask[b, t] else 0.0) + (float(scores[b]) if t == last else 0.0)
            assert r[b, t] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_checklist_12_losses_equal_slow_loops(seed):
    mask, draw = ragged(seed)
    new, old, adv, value, old_value, ret = (draw() for _ in range(6))
    p_sum = v_sum = n = 0
    for b, t in mask.nonzero().tolist():
        ratio, a = math.exp(new[b, t] - old[b, t]), float(adv[b, t])
        p_sum += max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        v, ov, g = float(value[b, t]), float(old_value[b, t]), float(ret[b, t])
        v_sum += max((v - g) ** 2, (min(max(v, ov - 0.2), ov + 0.2) - g) ** 2)
        n += 1
    assert float(ppo.policy_loss(new, old, adv, mask, 0.2)) == pytest.approx(p_sum / n, rel=1e-5)
    assert float(ppo.value_loss(value, old_value, ret, mask, 0.2)) == pytest.approx(0.5 * v_sum / n, rel=1e-5)
    assert float(ppo.policy_loss(new, old, adv, mask, 0.2, count=100)) == pytest.approx(p_sum / 100, rel=1e-5)


def test_policy_gradient_by_finite_differences():
    mask, draw = ragged(7, 2, 6)
    new, old, adv = draw().double() * 0.1, draw().double() * 0.1, draw().double()
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, adv, mask), new.requires_grad_())


def test_group_advantage_is_the_reward_to_go_minus_the_group_mean():
    mask, draw = ragged(2, B=6)
    scores, k1 = torch.tensor([1.0, 0.0, 0.0, -0.5, 1.0, 1.0]), draw()
    a = ppo.group_advantages(ppo.token_rewards(scores, k1, mask, 0.05), scores, mask, 3, 1.0)
    for b, t in mask.nonzero().tolist():
        mean = scores[b // 3 * 3 : b // 3 * 3 + 3].mean()
        kl = sum(float(k1[b, u]) for u in range(t, 14) if mask[b, u])
        assert a[b, t] == pytest.approx(float(scores[b] - mean) - 0.05 * kl, abs=1e-5)
    assert not a[~mask].any()


def test_explained_variance():
    mask, draw = ragged(5)
    g = draw()
    assert ppo.explained_variance(g, g, mask) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full_like(g, 4.0), g, mask) == pytest.approx(0.0, abs=1e-5)
    v = draw()
    expected = 1 - (g - v)[mask].var(unbiased=False) / g[mask].var(unbiased=False)
    assert ppo.explained_variance(v, g, mask) == pytest.approx(float(expected), abs=1e-5)


def test_learning_rate_rises_then_falls_to_a_tenth():
    factors = [ppo.lr_factor(u, 100, 0.03, 0.1) for u in range(100)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and factors[3] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1) and all(a >= b for a, b in zip(factors[3:], factors[4:]))
    assert factors[51] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 48 / 96)))
    assert ppo.lr_factor(0, 1, 0.0, 0.1) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_keep_the_budget_and_every_sample_once(seed):
    r = random.Random(seed)
    lengths = [r.randint(1, 50) for _ in range(r.randint(1, 40))]
    chosen, ranks, budget = r.sample(range(len(lengths)), r.randint(1, len(lengths))), r.choice([1, 2, 4]), r.choice([1, 60, 500])
    plan = ppo.micro_batches(chosen, lengths, budget, ranks)
    assert sorted(i for shares in plan for share in shares for i in share) == sorted(chosen)
    for shares in plan:
        assert len(shares) == ranks
        for share in filter(None, shares):
            assert len(share) == 1 or sum(lengths[i] for i in share) <= budget
    full = [sum(sum(lengths[i] for i in share) for share in shares) for shares in plan]
    slots = sum(max(sum(lengths[i] for i in share) for share in shares) * ranks for shares in plan)
    assert parallel.idle_share(plan, lengths) == pytest.approx(1 - sum(full) / slots) and (ranks > 1 or sum(full) == slots)


def test_checklist_18_shuffles_are_shared_and_streams_are_distinct():
    steps = [ppo.problems_of_step(10, s, 4, seed=3) for s in range(1, 6)]
    assert sorted(sum(steps, [])[:10]) == list(range(10)) == sorted(sum(steps, [])[10:20])
    assert sum(steps, [])[:10] != sum(steps, [])[10:20]
    torch.manual_seed(0)
    first = ppo.generator(1, "minibatch", 2).initial_seed()
    torch.manual_seed(1)
    assert ppo.generator(1, "minibatch", 2).initial_seed() == first  # no global random state
    numbers = {tuple(decode.uniforms(seed, stream, 4).tolist()) for seed in range(10) for stream in range(200)}
    assert len(numbers) == 2000


# ---- the trainer on a tiny random model

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    net = M.Llama(hf.read_config(TINY))
    M.init_weights(net, 0)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.mul_(1.5)
    hf.save(net, out)
    hf.copy_tokenizer(TINY, out)
    return out


def problems():
    return [json.loads(line) for line in (ROOT / "data" / "tiny" / "train.jsonl").read_text().splitlines()[:20]]


def trainer(folder, run, function=None, held_out=(), asked=None, **changes):
    config = ppo.PPOConfig(**(dict(
        steps=4, rollout_batch=6, train_batch=3, max_response=12, slots=4, freeze_steps=0, dtype="float32", lr=1e-3,
        critic_lr=1e-3, temperature=0.7, micro_tokens=200, save_every=2, length_scale=8.0, recompute=False, warmup=0.0) | changes))
    device, mesh = parallel.start()
    run.mkdir(exist_ok=True)
    return ppo.Trainer(config, folder, problems(), asked or chat.Chat(folder), run, device, mesh, function, held_out=held_out)


def weights(net):
    return torch.cat([parallel.full(p).flatten() for p in net.parameters()]).clone()


def test_checklist_17_a_rollout_behind_a_prefill_is_what_the_definition_samples(folder, tmp_path):
    """The prefill is the prompt's end: no action, no part of the text, and model.generate goes on from the same ids."""
    t = trainer(folder, tmp_path, asked=chat.Chat(folder, chat.Prompting(system="Count.", prompt="Q: {problem} !", prefill="1 + 1 = 2.\n")))
    _, samples, batch = t.train_step()
    sampler = hf.load(folder, M.Llama, torch.float32).eval()
    start = t.tokenizer.token_to_id("<|end_header_id|>")
    expected = M.generate(sampler, [s.prompt for s in samples], 12, 0.7, t.eos)
    assert [s.response for s in samples] == expected
    for s, tokens, mask in zip(samples, batch["tokens"].tolist(), batch["mask"].tolist()):
        behind = s.prompt[len(s.prompt) - s.prompt[::-1].index(start):]
        assert t.tokenizer.decode(behind) == "\n\n1 + 1 = 2.\n"
        assert "system" in t.tokenizer.decode(s.prompt) and f"Q: {s.problem['problem']} !" in t.tokenizer.decode(s.prompt)
        assert s.text == t.tokenizer.decode(s.response)
        assert tokens[: len(s.prompt + s.response)] == s.prompt + s.response
        assert mask == [len(s.prompt) <= i < len(s.prompt + s.response) for i in range(len(mask))]


def test_a_gradient_as_small_as_a_large_model_s_is_not_damped(folder, tmp_path):
    """The root mean square of a gradient of norm 1 over 8e9 parameters is 1.1e-5; Adam's first step is lr g / (|g| + eps)."""
    t = trainer(folder, tmp_path)
    before = weights(t.policy)
    for p in t.policy.parameters():
        p.grad = torch.full_like(p, 1.1e-5)
    t.optimizers["policy"].step()
    assert (before - weights(t.policy)).mean() == pytest.approx(t.config.lr, rel=0.01)
    sft = rlsp.read_flags(["sft", "--model", "m", "--data", "d"])
    assert sft.adam_eps == t.config.adam_eps == t.optimizers["critic"].param_groups[0]["eps"] == 1e-8


def test_checklist_1_everything_is_scored_at_the_sampling_temperature(folder, tmp_path):
    t = trainer(folder, tmp_path, temperature=0.5)
    samples = t.rollout()
    batch = t.experience(samples)
    mask = batch["mask"]
    assert (batch["sampler_logprob"] - batch["old_logprob"])[mask].abs().max() < 1e-4
    assert (batch["ref_logprob"] - batch["old_logprob"])[mask].abs().max() < 1e-5  # the reference is the policy's start
    net = hf.load(folder, M.Llama, torch.float32)
    for i, s in enumerate(samples):  # the oracle: one full forward a sequence
        with torch.no_grad():
            dense = torch.log_softmax(net(torch.tensor([s.prompt + s.response]))[0] / 0.5, -1)
        for j, token in enumerate(s.response):
            t_ = len(s.prompt) + j
            assert batch["old_logprob"][i, t_] == pytest.approx(float(dense[t_ - 1, token]), abs=1e-4)


def test_checklist_3_and_4_the_eos_is_an_action_and_masks_come_from_lengths(folder, tmp_path):
    t = trainer(folder, tmp_path)
    eos = t.eos[0]
    parts = [rewards.score(text, "1") for text in ("x", r"\boxed{1}")]  # equal rewards would leave no advantage
    mk = lambda response: ppo.Sample(problems()[0], [5, 6, 7], response, [-1.0] * len(response), "x", False, parts[len(response) == 2])
    # token 0 is also the pad; the EOS also stands inside the prompt of the template
    batch = t.experience([mk([0, 0, 9, eos]), mk([0, eos]), mk([4, 0, 0, 0, 0, 0, eos])])
    assert batch["mask"].sum(1).tolist() == [4, 2, 7]
    assert [int(batch["tokens"][i, batch["mask"][i]][-1]) for i in range(3)] == [eos] * 3
    assert batch["reward"][0, 6] != 0 and batch["advantage"][0, 6] != 0 and not batch["advantage"][0, 7:].any()
    for key in ("old_logprob", "ref_logprob", "entropy", "value", "reward", "return", "advantage"):
        assert not batch[key][~batch["mask"]].any(), key
    metrics = t.describe([mk([0, 0, 9, eos]), mk([0, eos]), mk([4, 0, 0, 0, 0, 0, eos])], batch)
    slow = [float(batch["entropy"][b, u]) for b in range(3) for u in range(10) if batch["mask"][b, u]]
    assert metrics["entropy"] == pytest.approx(sum(slow) / 13) and metrics["response_length"] == pytest.approx(13 / 3)


def test_checklist_7_truncated_responses_are_counted_and_scored_as_they_stand(folder, tmp_path):
    t = trainer(folder, tmp_path, max_response=2)
    metrics, samples, _ = t.train_step()
    for s in samples:
        assert s.truncated == (s.response[-1] not in t.eos) and len(s.response) <= 2
    assert metrics["truncated"] == sum(s.truncated for s in samples) / 6 > 0.5
    assert all(s.parts.outcome == rewards.NO_ANSWER for s in samples if s.truncated)
    assert t.reward_of(ppo.Sample({"problem": "", "answer": "4"}, [], [], [], "so \\boxed{4} and then", True), None, None).correct


def test_checklist_11_the_first_ratio_is_1_or_training_stops(folder, tmp_path):
    t = trainer(folder, tmp_path)
    metrics, _, batch = t.train_step()
    assert metrics["first_ratio"] == pytest.approx(1.0, abs=1e-4) and metrics["first_ratio_error"] < 1e-4
    assert t.train_step()[0]["sampler_logprob_diff"] < 1e-4  # the sampler holds the updated weights
    batch["old_logprob"] = batch["old_logprob"] * 0.9
    with pytest.raises(guards.TrainingError, match="ratio on the first minibatch"):
        t.update(batch)


def test_checklist_11_old_logprobs_come_from_the_training_forward(folder, tmp_path):
    t = trainer(folder, tmp_path)
    samples = t.rollout()
    batch = t.experience(samples)
    for s in samples:
        s.sampler_logprob = [x - 1.0 for x in s.sampler_logprob]  # a sampler that is off
    again = t.experience(samples)
    assert torch.equal(again["old_logprob"], batch["old_logprob"])
    assert t.describe(samples, again)["sampler_logprob_diff"] == pytest.approx(1.0, abs=1e-3)


def test_checklist_10_the_reference_stays_as_it_started(folder, tmp_path):
    t = trainer(folder, tmp_path)
    before = weights(t.reference)
    assert t.train_step()[0]["k1"] == 0.0
    metrics, _, _ = t.train_step()
    assert torch.equal(weights(t.reference), before) and metrics["k3"] > 0.0


@pytest.mark.parametrize("recompute", [False, True])
def test_checklist_13_the_micro_batch_size_does_not_change_the_update(folder, tmp_path, recompute):
    result = []
    for i, tokens in enumerate((1, 150, 100_000)):
        t = trainer(folder, tmp_path / str(i), micro_tokens=tokens, recompute=recompute)
        batch = t.experience(t.rollout())
        before = weights(t.policy)
        t.update(batch)
        result.append((weights(t.policy), weights(t.critic), before))
    for policy, critic, before in result[1:]:
        assert (policy - result[0][0]).abs().max() < 2e-5 and (critic - result[0][1]).abs().max() < 2e-5
    assert (result[0][0] - result[0][2]).abs().max() > 5e-4  # against updates of about the learning rate, 1e-3


def test_checklist_14_the_critic_learns_alone_first(folder, tmp_path):
    t = trainer(folder, tmp_path, freeze_steps=2, critic_lr=5e-4)
    head = parallel.full(t.critic.value_head.weight)
    hidden = hf.read_config(folder).hidden_size
    assert t.critic.value_head.bias is None and float(head.std()) == pytest.approx(1 / (hidden + 1), rel=0.2)
    assert torch.equal(weights(t.critic.model), weights(t.policy.model))  # a copy of the policy below the head
    policy, critic = weights(t.policy), weights(t.critic)
    for _ in range(2):
        m, _, _ = t.train_step()
        assert "policy_loss" not in m and math.isfinite(m["value_loss"]) and math.isfinite(m["explained_variance"])
    assert torch.equal(policy, weights(t.policy)) and not torch.equal(critic, weights(t.critic))
    m, _, _ = t.train_step()
    assert not torch.equal(policy, weights(t.policy))
    # both on their cosines: the policy at its first of 4 updates, the critic at its fifth of 8
    assert m["policy_lr"] == pytest.approx(1e-3 * sum(ppo.lr_factor(u, 4, 0, 0.1) for u in (0, 1)) / 2)
    assert m["critic_lr"] == pytest.approx(5e-4 * sum(ppo.lr_factor(u, 8, 0, 0.1) for u in (4, 5)) / 2)


def test_checklist_15_no_dropout_adams_eps_and_the_clipped_norm(folder, tmp_path):
    t = trainer(folder, tmp_path, grad_clip=1e-12)
    assert not any("ropout" in type(m).__name__ for net in (t.policy, t.critic) for m in net.modules())
    assert all(g["eps"] == 1e-8 and g["betas"] == (0.9, 0.95) and not g["weight_decay"]
               for o in t.optimizers.values() for g in o.param_groups)
    before = weights(t.policy)
    m, _, _ = t.train_step()
    assert m["policy_grad_norm"] > 1e-4 and m["critic_grad_norm"] > 1e-4  # logged before clipping
    assert (weights(t.policy) - before).abs().max() < 1e-6  # a norm of 1e-12 is nothing against Adam's eps


def test_checklist_16_float32_master_weights_keep_a_tiny_update(folder, tmp_path):
    t = trainer(folder, tmp_path, dtype="bfloat16", lr=2e-7)
    assert all(p.dtype == torch.float32 for net in (t.policy, t.critic) for p in net.parameters())
    assert {p.dtype for p in t.reference.parameters()} == {torch.bfloat16} == {p.dtype for p in t.sampler.parameters()}
    norm = dict(t.policy.named_parameters())["model.norm.weight"]
    before = parallel.full(norm).clone()
    assert (before == 1).all()
    t.train_step()
    moved = (parallel.full(norm) - before).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-6  # bfloat16 knows nothing between 1 and 1.0078


def test_checklist_19_an_error_in_a_reward_never_pays(folder, tmp_path):
    def broken(response, problem):
        raise KeyError("no such thing")
    with pytest.raises(KeyError, match="no such thing"):
        trainer(folder, tmp_path, broken).rollout()
    with pytest.raises(guards.TrainingError, match="step 1: the reward .* is nan"):
        trainer(folder, tmp_path, lambda response, problem: float("nan")).rollout()


def test_a_plain_function_replaces_the_reward_and_rewards_are_clipped(folder, tmp_path):
    t = trainer(folder, tmp_path, lambda response, problem: 100.0 if problem["subject"] == "linear" else -0.25)
    for s in t.rollout():
        assert s.parts.total == (10.0 if s.problem["subject"] == "linear" else -0.25)


@pytest.mark.parametrize("changes", [dict(reward_clip=0.0), dict(advantage="group", samples=2, rollout_batch=3)])
def test_where_all_rewards_are_equal_the_policy_stays_at_the_reference(folder, tmp_path, changes, capsys):
    """It made full updates out of the critic's errors, or of rounding, with a rising KL, and nobody heard of it."""
    constant = (lambda response, problem: float(len(problem["problem"]))) if "samples" in changes else None
    t = trainer(folder, tmp_path, constant, **(dict(reward_clip=1e9, max_response=3) | changes))
    before = weights(t.policy)
    metrics = [t.train_step()[0] for _ in range(2)]
    assert torch.equal(weights(t.policy), before) and metrics[1]["k1"] == 0.0
    equal = "all rewards are equal within each prompt" if constant else "all rewards are 0"
    first, second = metrics[0]["warnings"].split("; ")[-2:]
    assert first == f"{equal}: the policy learns from the KL penalty alone" and second == "6 of 6 responses are cut off at --max-response 3"
    assert capsys.readouterr().err.count("warning") == 1 and "warnings" not in metrics[1]
    t.step, t.gold_warning = 9, "never said here"
    assert "never said here" not in t.train_step()[0]["warnings"]  # step 10
    t.step = 0
    assert t.train_step()[0]["warnings"].endswith("; never said here")


def test_a_healthy_step_has_no_warning_and_each_trouble_one():
    class Config:
        max_response, advantage = 12, "gae"
    def found(texts, cut=0, differ=True, boxes=True):
        samples = [ppo.Sample({}, [], [], [], text, i < cut, rewards.score(text, "4")) for i, text in enumerate(texts)]
        return guards.unhealthy(samples, differ, Config, boxes)
    assert found([r"\boxed{4}", "no"]) == found([r"\boxed{4}", "no"], cut=1) == found(["no", "no"], boxes=False) == []
    assert found(["no", "no"]) == [r"no response has a \boxed answer; does anything in the prompt ask for one?"]
    assert found([r"\boxed{4}"] * 3, cut=2) == ["2 of 3 responses are cut off at --max-response 12"]
    assert found([r"\boxed{4}"] * 2, differ=False) == ["all rewards are 1: the policy learns from the KL penalty alone"]


def test_answers_that_the_verifier_cannot_read_are_counted_and_the_first_is_named():
    rows = lambda *golds: [{"answer": gold, "line": i} for i, gold in enumerate(golds, 1)]
    good = ["4", r"\frac{1}{2}", "(A)", "x^2 + 1", "the empty set", "8:30 pm", "1,000", "All powers of 2", r"\{1, 2\}"]
    assert logs.gold_warning("f.jsonl", rows(*good)) == ""
    for gold in ("He has 3*2=<<3*2=6>>6 pages\n#### 6", "}{", "{}", "4}", r"\frac{1}{2", "((3"):
        assert logs.gold_warning("f.jsonl", rows(*good, gold, gold)) == (
            f"the verifier cannot read 2 of {len(good) + 2} answers of f.jsonl, first in line {len(good) + 1}: {gold!r}")


def test_a_users_functions_run_at_once_and_keep_their_order(folder, tmp_path):
    """Each call waits until all six have begun: one after the other would never get through."""
    together = threading.Barrier(6)

    def waits(response, problem):
        together.wait(10)
        time.sleep(0.05 if problem is problems_[0] else 0.0)  # the first may end last
        return float(len(response))

    t = trainer(folder, tmp_path, waits, reward_clip=1e9)
    problems_ = t.problems
    samples = t.rollout()
    assert [s.parts.total for s in samples] == [len(s.text) for s in samples] and len({s.parts.total for s in samples}) > 1


@pytest.mark.parametrize("exploration", ["none", "length", "steps"])
def test_a_users_verifier_takes_the_place_of_c(folder, tmp_path, exploration):
    accepts = lambda text: sum(map(ord, text)) % 2 == 0
    t = trainer(folder, tmp_path, exploration=exploration)
    t.verifier = lambda response, problem: accepts(response)
    for p in t.problems:
        del p["answer"]  # it may do without
    metrics, samples, batch = t.train_step()
    assert 0 < metrics["accuracy"] < 1 and metrics["accuracy"] == pytest.approx(sum(accepts(s.text) for s in samples) / 6)
    count = lambda text: len(t.tokenizer.encode(text, add_special_tokens=False).ids)
    for s in samples:
        plain = rewards.score(s.text, "", exploration=exploration, length_scale=8.0, count_tokens=count)
        assert s.parts.correct == accepts(s.text) and s.parts.outcome == float(accepts(s.text))  # without a box 0, not less
        assert s.parts.exploration == plain.exploration and s.parts.alpha == plain.alpha
        assert s.parts.total == pytest.approx(plain.alpha * s.parts.outcome + (1 - plain.alpha) * plain.exploration)
        assert logs.rollout_row(1, samples[0], None, t.verifier)["reward"]["correct"] == samples[0].parts.correct
    assert logs.token_rows(t, samples, batch)[0]["gold"] is None


def test_with_a_reward_of_ones_own_accuracy_is_named_for_what_it_is(folder, tmp_path):
    run = tmp_path / "run"
    t = trainer(folder, run, lambda response, problem: 0.5 * len(response), steps=1)
    t.train()
    (metrics,), rollouts = lines(run), [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert "math_accuracy" in metrics and not {"accuracy", "outcome", "exploration", "alpha", "floored"} & set(metrics)
    assert {tuple(r["reward"]) for r in rollouts} == {("total", "answer", "reason", "length", "steps", "math_correct")}
    t.verifier = lambda response, problem: True
    metrics, samples, _ = t.train_step()
    assert metrics["accuracy"] == 1.0 and "math_accuracy" not in metrics and "outcome" not in metrics
    assert logs.rollout_row(1, samples[0], True, True)["reward"]["correct"] is True


@pytest.mark.parametrize("source, words", [
    ("def f(response, problem):\n    x = 1\n    raise RuntimeError('down\\n\\x1b[31m')\n", ":3: RuntimeError: down \\x1b[31m"),
    ("import sys\ndef f(response, problem):\n    sys.exit(0)\n", ":3: sys.exit(0) was called, but it must not end the run"),
    ("\ndef f(response, problem):\n    x = 1\n", ":2: TypeError: returned None, expected a number"),
    ("def f(response, problem):\n    return '1'\n", ":1: TypeError: returned '1', expected a number"),
    ("def f(response):\n    return 1\n", ":1: TypeError: f() takes 1 positional argument but 2 were given"),
    ("def f(response, problem):\n    return 10**400\n", ":1: OverflowError: int too large to convert to float"),
    ("import json\ndef f(response, problem):\n    return json.loads('{')\n", ":3: JSONDecodeError: Expecting property name")])
def test_checklist_19_what_goes_wrong_in_a_users_function_is_one_line_of_its_file(tmp_path, source, words):
    file = tmp_path / "mine.py"
    file.write_text(source)
    f = functions.load("--reward", f"{file}:f", functions.number)
    with pytest.raises(guards.TrainingError) as e:
        functions.call_all(f, [("a", {})] * 3)
    message = str(e.value).replace("json.decoder.", "")
    assert message.startswith(f"--reward {file}{words}") and len(message.splitlines()) == 1 and "\x1b" not in message


@pytest.mark.parametrize("source, words", [
    ("x = 1\ndef f(:\n", ":2: SyntaxError: "), ("\nimport nowhere_at_all\n", ":2: ModuleNotFoundError: "), ("x = 1\n", " has no function 'f'"),
    ("import sys\nsys.exit('bye')\n", ":2: sys.exit('bye') was called"), ("f = 3\n", " has no function 'f'")])
def test_a_users_file_that_cannot_be_loaded_is_bad_input(tmp_path, source, words):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError) as e:
        functions.load("--verifier", f"{file}:f", functions.verdict)
    assert f"{file}{words}" in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_users_file_may_hold_dataclasses_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("LIMIT = 2\n")
    (tmp_path / "mine.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\nimport neighbour_of_mine\n"
                                      "@dataclass\nclass A:\n    x: int\ndef f(response, problem):\n    return A(len(response)).x > neighbour_of_mine.LIMIT\n")
    f = functions.load("--verifier", f"{tmp_path}/mine.py:f", functions.verdict)
    assert functions.call_all(f, [("abc", {}), ("a", {})]) == [True, False]
    for value in (None, 1, "yes"):
        with pytest.raises(TypeError, match="expected True or False"):
            functions.verdict(value)
    assert functions.number(torch.tensor(0.5)) == 0.5 and functions.number(True) == 1.0 and functions.load("--reward", "", None) is None


def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_batch(folder, tmp_path):
    t = trainer(folder, tmp_path)
    samples = t.rollout()
    with torch.no_grad():
        parallel.local(t.policy.model.norm.weight)[3] = float("nan")
    with pytest.raises(guards.TrainingError, match="step 1: old_logprob is not finite") as e:
        t.experience(samples)
    saved = load_file(re.search(r"\S+\.safetensors", str(e.value))[0])
    assert saved["tokens"].shape[0] == 6 and not torch.isfinite(saved["old_logprob"]).all()


def test_a_sampler_that_is_not_finite_is_named_with_its_step(folder, tmp_path):
    t = trainer(folder, tmp_path)
    t.sampler.model.norm.weight[3] = math.inf
    with pytest.raises(guards.TrainingError, match=r"step 1: the log-prob\S+ of token 1 of response 1 is nan; its model.norm.weight is not finite"):
        t.rollout()


def test_alpha_moves_linearly_and_the_kl_coefficient_adapts_on_request(folder, tmp_path):
    t = trainer(folder, tmp_path, alpha=0.8, alpha_end=1.0, steps=5, kl_target=1e-6, rollout_batch=20)
    seen = []
    for t.step in range(5):
        seen.append(t.alpha())
    assert seen == pytest.approx([0.8, 0.85, 0.9, 0.95, 1.0])
    t.step = 0
    t.train_step()
    t.train_step()  # by now KL is far from the target in one direction or the other: one bounded step each
    assert t.kl_coef != 0.05 and abs(t.kl_coef / 0.05 - 1) <= 2 * 0.2 * 20 / 10_000 + 1e-9
    assert trainer(folder, tmp_path).kl_coef == 0.05


def test_group_advantage_trains_without_a_critic(folder, tmp_path):
    t = trainer(folder, tmp_path, advantage="group", samples=3, rollout_batch=2)
    metrics, samples, _ = t.train_step()
    assert not hasattr(t, "critic") and "value_loss" not in metrics and "policy_loss" in metrics
    assert [s.problem["unique_id"] for s in samples] == [samples[i // 3 * 3].problem["unique_id"] for i in range(6)]
    t.save()


# ---- held-out problems

def held_out():
    """Seven other problems, one of which has a longer prompt than all that are trained on."""
    rows = [json.loads(line) for line in (ROOT / "data" / "tiny" / "test.jsonl").read_text().splitlines()[:7]]
    return [rows[0] | {"problem": rows[0]["problem"] * 5}, *rows[1:]]


def accepts(response, problem):
    return sum(map(ord, response)) % 3 == 0


def test_an_evaluation_inside_changes_no_training_number_and_is_right(folder, tmp_path):
    runs = {"without": trainer(folder, tmp_path / "without"),
            "with": trainer(folder, tmp_path / "with", held_out=held_out(), eval_every=3, eval_samples=2)}
    for t in runs.values():
        t.verifier = accepts
        t.train()
    metrics = lines(tmp_path / "with")
    evaluated = {m["step"]: {k: m.pop(k) for k in list(m) if k.startswith("eval_")} for m in metrics}
    assert [step for step, found in evaluated.items() if found] == [0, 3, 4]
    assert metrics[0] == {"step": 0} and metrics[1:] == lines(tmp_path / "without")
    for log in ("rollouts.jsonl", "tokens.jsonl"):
        assert (tmp_path / "with" / log).read_bytes() == (tmp_path / "without" / log).read_bytes()
    assert torch.equal(weights(runs["with"].policy), weights(runs["without"].policy))
    timing = [json.loads(line) for line in (tmp_path / "with/timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing if row.get("eval_seconds", 0) > 0] == [0, 3, 4] and len(timing) == 5
    # the oracle: the policy before and after, sampled one response at a time with streams that no rollout has
    t = runs["with"]
    for step, source in (0, folder), (4, tmp_path / "with/model"):
        net = hf.load(source, M.Llama, torch.float32)
        rates, tokens, truncated = [], [], []
        for i, row in enumerate(held_out()):
            found = [decode.generate(net, [t.chat.prompt_ids(row["problem"])], 12, 0.7, t.eos, seed=0, streams=[-1 - 2 * i - j])[0]
                     for j in range(2)]
            rates.append(sum(accepts(t.tokenizer.decode(r, skip_special_tokens=True), row) for r in found) / 2)
            tokens += map(len, found)
            truncated += [r[-1] not in t.eos for r in found]
        mean = sum(rates) / 7
        assert evaluated[step] == pytest.approx(dict(
            eval_problems=7, eval_accuracy=mean, eval_standard_error=math.sqrt(sum((r - mean) ** 2 for r in rates) / 6 / 7),
            eval_tokens=sum(tokens) / 14, eval_truncated=sum(truncated) / 14, eval_answered=1.0))
    assert 0 < evaluated[0]["eval_accuracy"] < 1 and evaluated[0] != evaluated[4]


def test_held_out_accuracy_is_the_verifiers_of_boxes(folder, tmp_path, monkeypatch):
    t = trainer(folder, tmp_path, held_out=held_out(), steps=1, eval_samples=3)
    said = iter([r"\boxed{%s}" % row["answer"] for row in held_out()[:2] for _ in range(3)] + [r"so \boxed{x y z}"] * 3 + ["none"] * 12)
    monkeypatch.setattr(t, "sample", lambda chosen, streams, title: (
        [ppo.Sample(t.problems[i], t.prompts[i], [5] * 4, [], next(said), False) for i in chosen], {}))
    evaluation.held_out(t)
    evaluation.held_out(t)  # it is there already
    (m,) = lines(tmp_path)
    assert m == pytest.approx(dict(step=0, eval_accuracy=2 / 7, eval_standard_error=math.sqrt((2 * 25 + 5 * 4) / 49 / 6 / 7), eval_tokens=4,
                                   eval_truncated=0, eval_answered=3 / 7, eval_problems=7))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, dict(freeze_steps=2, epochs=2, kl_target=0.1)], ids=["plain", "frozen-start"])
def test_checklist_20_a_resumed_run_equals_an_unbroken_one_bit_for_bit(folder, tmp_path, changes):
    whole = trainer(folder, tmp_path / "whole", **changes)
    whole.train()
    broken = trainer(folder, tmp_path / "broken", **changes)
    save = broken.save
    def stop_after_step_2():  # killed after a checkpoint, in the middle of the next step's lines: neither may stay
        save()
        raise KeyboardInterrupt
    broken.save = stop_after_step_2
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    for name in logs.LOGS:
        with open(tmp_path / "broken" / f"{name}.jsonl", "a") as f:
            f.write(json.dumps({"step": 3, "reward": "of a step that a kill took back"}) + '\n{"step": 3, "rew')
    again = trainer(folder, tmp_path / "broken", **changes)
    again.resume()
    assert again.step == 2
    again.train()
    for name in ("metrics", "rollouts", "tokens"):
        assert (tmp_path / "whole" / f"{name}.jsonl").read_bytes() == (tmp_path / "broken" / f"{name}.jsonl").read_bytes()
    assert [row["step"] for row in lines(tmp_path / "broken")] == [1, 2, 3, 4]
    assert torch.equal(weights(whole.policy), weights(again.policy)) and torch.equal(weights(whole.critic), weights(again.critic))
    a, b = (load_file(tmp_path / r / "model" / "model.safetensors") for r in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(list((tmp_path / "whole" / "checkpoints").glob("step-*"))) == 2
    timing = [json.loads(line) for line in (tmp_path / "broken" / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [1, 2, 3, 4] and all(row["seconds"] > 0 for row in timing)


def test_memory_stays_flat_over_50_steps(folder, tmp_path):
    """Resident memory after each of 50 steps, in a process of its own; a kept batch, graph or cache would add its size each step."""
    code = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from lib import logs, parallel
parallel.keep_freed_memory()
import test_ppo
t = test_ppo.trainer(Path(sys.argv[1]), Path(sys.argv[2]), steps=60, log_tokens=2)
for step in range(50):
    _, samples, batch = t.train_step()
    logs.token_rows(t, samples, batch)
    print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path), str(ROOT / "tests"), str(ROOT)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    resident = [int(line) for line in done.stdout.splitlines()]
    assert len(resident) == 50 and max(resident[20:]) - max(resident[:20]) < 4e6, resident


def test_another_seed_gives_another_run(folder, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        t = trainer(folder, tmp_path / name, seed=seed, steps=1)
        t.train()
        runs.append(lines(tmp_path / name))
    assert runs[0] == runs[1] != runs[2]
