"""PPO for a language model with a critic, in one scroll.

    1. Settings          every value of the recipe, with the paper's defaults for an 8B model
    2. The mathematics   KL estimates, GAE, whitening, losses: pure functions of [B, T] tensors
    3. Samples           a response with its reward; a batch of them
    4. Trainer           rollout -> experience -> update

Conventions: a sequence is prompt + response, padded on the right. Every per-token quantity is a
[B, T] tensor aligned with its token: logprob[:, t] is log p(token t | tokens < t), and value[:, t]
is the value of the state in which token t was chosen. mask[:, t] is True where token t is an
action, that is, a sampled token, including the EOS; it is False at prompts and pads.

Weights are sharded over ranks. A rollout's token ids and per-token numbers are small, so every rank
holds all of them. Advantages, whitening and minibatches are therefore the same for any number of
ranks.

References: PPO (1707.06347), GAE (1506.02438), RLHF's KL penalty per token (1909.08593), k1 and k3
(joschu.net/blog/kl-approx.html), "The N implementation details of RLHF with PPO", RLSP (2502.06773;
its official code departs from it where marked).
"""
import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lib import checkpoint, evaluation, functions, guards, hf, judge, logs, parallel, sampling
from lib.flags import flag
from lib.parallel import generator, micro_batches, pad, problems_of_step
from lib.signals import Stopped, signals
import model as M
import rewards


# -------------------------------------------------------------------------------------- 1. Settings

@dataclass
class PPOConfig(judge.Judge, evaluation.HeldOut):
    """Every setting of PPO, each a flag of `rlsp.py ppo`."""
    # The paper: 512 prompts, one sample each, temperature 0.7, top-p 1.
    steps: int = flag("rollout", 200, "PPO steps, each a rollout and updates", 1, resume="longer")
    rollout_batch: int = flag("rollout", 512, "prompts per step, over all ranks", 1)
    samples: int = flag("rollout", 1, "responses per prompt", 1)
    max_prompt: int = flag("rollout", 2048, "longest prompt allowed, tokens", 1)
    max_response: int = flag("rollout", 4096, "longest response, tokens; it is cut off there", 1)
    temperature: float = flag("rollout", 0.7, "temperature of sampling and of all log-probs", 1e-3)
    slots: int = flag("rollout", 64, "sequences decoded at once on each rank, or by the ranks that "
                      "share a tensor sampler", 1, resume="any")
    sampler: str = flag("rollout", "auto", "the rollout's copy of the policy. whole: each rank has "
                        "one; tensor: a node's ranks share one; sharded: none, all weights are "
                        "gathered for every token; auto: the first of these that fits",
                        choices=("auto", "whole", "tensor", "sharded"), resume="any")
    # Eq. 1
    exploration: str = flag("reward", "length", "exploration reward R_ex",
                            choices=rewards.EXPLORATIONS)
    alpha: float = flag("reward", 0.8, "weight of correctness; unused if R_ex is none", 0, 1)
    alpha_end: float | None = flag("reward", None, "alpha moves linearly to this value", 0, 1)
    length_scale: float = flag("reward", 1000.0, "C of the length reward -C/|o|, tokens", 1e-9)
    length_floor: float = flag("reward", 4.0, "the length reward is at least minus this", 1e-9)
    steps_scale: float = flag("reward", 10.0, "S of the steps reward min(1, steps/S)", 1e-9)
    verifier: str = flag("reward", "", "FILE.py:FUNCTION(response, problem) -> bool that replaces "
                         "the verifier; it is called in threads", resume="content", again=True)
    reward: str = flag("reward", "", "FILE.py:FUNCTION(response, problem) -> float that replaces "
                       "Eq. 1; it is called in threads", resume="content", again=True)
    reward_clip: float = flag("reward", 10.0, "rewards are clipped to plus or minus this", 1e-9)
    kl_coef: float = flag("reward", 0.05, "beta, the weight of the KL penalty per token", 0)
    kl_target: float = flag("reward", 0.0, "if positive, beta adapts to this KL per response", 0)
    advantage: str = flag("advantage", "gae", "gae (with a critic) or group (the baseline is the "
                          "mean score of a prompt's responses)", choices=("gae", "group"))
    gamma: float = flag("advantage", 1.0, "discount", 0, 1)
    lam: float = flag("advantage", 0.95, "lambda of GAE", 0, 1)
    train_batch: int = flag("update", 128, "responses per minibatch, over all ranks", 1)
    epochs: int = flag("update", 1, "passes over a rollout", 1)
    lr: float = flag("update", 2e-7, "learning rate of the policy", 0)
    critic_lr: float = flag("update", 2e-6, "learning rate of the critic", 0)
    warmup: float = flag("update", 0.03, "share of updates in which the learning rate rises", 0, 1)
    lr_end: float = flag("update", 0.1, "the cosine decay ends at this share of the rate", 0, 1)
    clip: float = flag("update", 0.2, "clip range of the probability ratio", 0)
    value_clip: float = flag("update", 0.2, "clip range of the value around the old value", 0)
    adam_eps: float = flag("update", 1e-8, "epsilon of Adam; it damps gradients that are not far "
                           "above it (norm 1 over 8e9 parameters is 1e-5 for each)", 1e-16)
    grad_clip: float = flag("update", 1.0, "gradients are scaled down to this norm", 1e-9)
    freeze_steps: int = flag("update", 4, "initial steps that train only the critic", 0)
    dtype: str = flag("memory", "bfloat16", "compute type", choices=("bfloat16", "float32"))
    micro_tokens: int = flag("memory", 16384, "tokens per forward pass of a rank", 1, resume="any")
    kv_gb: float = flag("memory", 24.0, "largest KV cache on each rank, GB; fewer sequences are "
                        "decoded at once if it is full; 0: what --slots needs", 0, resume="any")
    recompute: bool = flag("memory", True, "recompute activations to save memory", resume="any")
    offload: bool = flag("memory", False, "keep trained networks in host memory", resume="any")
    shard_ranks: int = flag("memory", 0, "ranks to shard over; 0: those of a node", 0, resume="any")
    compile: bool = flag("memory", False, "torch.compile each block; needs a C++ compiler, on GPUs "
                         "also Triton; not for bfloat16 on CPU (lib/cpu.py)")
    seed: int = flag("run", 0, "seed of everything random", 0)
    save_every: int = flag("run", 20, "steps between checkpoints; 0: last only", 0, resume="any")
    keep: int = flag("run", 2, "newest checkpoints to keep", 1, resume="any")
    log_rollouts: int = flag("run", 16, "responses per step in rollouts.jsonl", 0, resume="any")
    log_tokens: int = flag("run", 2, "responses per step in tokens.jsonl", 0, resume="any")


# ------------------------------------------------------------------------------- 2. The mathematics

def kl_estimates(logprob, ref_logprob):
    """Per-token estimates (k1, k3) of KL(policy || reference), in nats, from samples of the policy.

    Both are [B, T] and unbiased. k1 may be negative; k3 is never negative and less noisy. k1 goes
    into the reward, and both are logged."""
    log_ratio = ref_logprob - logprob
    return -log_ratio, torch.expm1(log_ratio) - log_ratio


def token_rewards(scores, k1, mask, kl_coef):
    """r_t = R * 1[t is the last action] - beta * k1_t. scores [B]; k1, mask [B, T] -> [B, T],
    without gradient."""
    reward = -kl_coef * k1.detach() * mask
    # The last action is the EOS, or the last token of a truncated response
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    reward[torch.arange(len(scores)), last] += scores
    return reward


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (1506.02438, eq. 16). All [B, T]; positions outside the mask
    are skipped.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1}; after the last
    action V and A are 0. Returns (advantages, returns = advantages + values), not whitened and
    zero outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    return advantages * mask, (advantages + values) * mask


def group_advantages(rewards, scores, mask, samples, gamma):
    """The alternative without a critic: the reward to go minus the mean score of the `samples`
    responses to the same prompt.

    rewards, mask [B, T]; scores [B], with the responses to one prompt side by side -> [B, T]. This
    is GRPO, except that whitening over the rollout replaces its division by the group's standard
    deviation.
    """
    baseline = scores.view(-1, samples).mean(1).repeat_interleave(samples)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return (to_go - baseline[:, None]) * mask


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, most=None):
    """Shift and scale x [B, T] to mean 0 and (population) variance 1 over the mask; it is zero
    elsewhere. With `most`, the scale factor is at most that."""
    x = (x - masked_mean(x, mask)) * mask
    scale = torch.rsqrt(masked_mean(x * x, mask) + 1e-8)
    return x * (scale if most is None else scale.clamp(max=most))


def scores_differ(scores, samples):
    """Whether the scores of any group differ by more than rounding. scores [B]; `samples` of them,
    side by side, are a group."""
    groups = scores.view(-1, samples)
    spread = groups.max(1).values - groups.min(1).values
    return bool((spread > 1e-6 * groups.abs().max().clamp(min=1.0)).any())


def policy_advantages(advantages, scores, samples, k1, mask, kl_coef, gamma, lam):
    """The whitened advantages, from which the policy learns. All are [B, T] except scores [B],
    which are compared in groups of `samples`.

    If the scores within each group are equal, they prefer no response to another. Advantages then
    differ only by the critic's errors and by rounding, and whitening would turn that noise into
    full updates. Only the KL penalty is left to learn from. It is exact, so its own advantages are
    used instead, and they are never scaled up.
    """
    # A rollout of a single response can only be compared with the critic's values
    if samples == 1 or scores_differ(scores, samples):
        return whiten(advantages, mask)
    penalty = token_rewards(torch.zeros_like(scores), k1, mask, kl_coef)
    advantages, _ = gae(penalty, torch.zeros_like(penalty), mask, gamma, lam)
    return whiten(advantages, mask, most=1.0)


def policy_loss(logprob, old_logprob, advantage, mask, clip=0.2, count=None):
    """Sum over the mask of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), divided by count
    (default: the number of actions in the mask).

    All [B, T]. If count is the number of actions of a whole optimizer step, the losses of its
    micro-batches add up to the loss of the step.
    """
    ratio = torch.exp(logprob - old_logprob)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return (loss * mask).sum() / (mask.sum() if count is None else count)


def value_loss(value, old_value, ret, mask, clip=0.2, count=None):
    """Half the sum of max((V - G)^2, (V_clipped - G)^2), divided by count as in policy_loss.
    V_clipped stays within clip of the old value. All [B, T]."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    loss = torch.maximum((value - ret) ** 2, (clipped - ret) ** 2)
    return 0.5 * (loss * mask).sum() / (mask.sum() if count is None else count)


def explained_variance(value, ret, mask):
    """1 - Var[G - V] / Var[G]: 1 for a perfect critic, 0 for one no better than a constant, and 0
    if the returns do not vary."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(ret)
    return float(1 - variance(ret - value) / total) if total > 0 else 0.0


def lr_factor(update, total, warmup, end):
    """The factor on the learning rate: it rises linearly over the first `warmup` share of `total`
    updates, then falls along a cosine from 1 to `end`. `update` counts from 0."""
    rise = math.ceil(warmup * total)
    if update < rise:
        return (update + 1) / rise
    progress = (update - rise) / max(1, total - 1 - rise)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# -------------------------------------------------------------------------------------- 3. Samples

@dataclass
class Sample:
    """One response with its reward."""
    problem: dict
    prompt: list  # token ids
    response: list  # token ids, EOS included
    sampler_logprob: list  # nats, as the sampler computed them
    text: str
    truncated: bool
    parts: rewards.RewardParts | None = None
    effort: float | None = None  # a judge's grade, in [0, 1]


def as_batch(samples):
    """{tokens, mask, sampler_logprob: [N, T], length: [N]}. The mask is made from lengths, never
    from ids, because pads may have the id of the EOS."""
    tokens = [s.prompt + s.response for s in samples]
    mask = [[False] * len(s.prompt) + [True] * len(s.response) for s in samples]
    logprob = [[0.0] * len(s.prompt) + s.sampler_logprob for s in samples]
    return {"tokens": pad(tokens, torch.long), "mask": pad(mask, torch.bool),
            "sampler_logprob": pad(logprob, torch.float32),
            "length": torch.tensor([len(row) for row in tokens])}


# --------------------------------------------------------------------------------------- 4. Trainer

class Trainer:
    """Policy, critic, reference and sampler of one run.

    folder: the Hugging Face model to start from; problems: dicts with `problem` and `answer`; chat:
    the folder's lib.chat.Chat; run: the run's folder; reward_function and verifier: the user's own
    functions of (response, problem), which replace Eq. 1 and the mathematics verifier; held_out:
    problems for evaluation, which are never trained on.
    """

    def __init__(self, config, folder, problems, chat, run, device, mesh,
                 reward_function=None, verifier=None, held_out=()):
        self.config = config
        self.folder = folder
        self.problems = [*problems, *held_out]
        self.training = len(problems)  # the problems to train on come first
        self.chat = chat
        self.tokenizer = chat.tokenizer
        self.run = Path(run)
        self.device = device
        self.reward_function = reward_function
        self.verifier = verifier
        self.gold_warning = ""  # what logs.gold_warning said
        self.dtype = getattr(torch, config.dtype)
        self.prompts = [chat.prompt_ids(p["problem"]) for p in self.problems]
        self.eos = chat.eos
        self.step = 0  # the last finished step
        self.saved = 0  # the last step that has a checkpoint
        self.updates = {"policy": 0, "critic": 0}
        self.kl_coef = config.kl_coef
        self.rubric = judge.read_rubric(config.judge_rubric)
        # Grades that the judge gave before a resume are not asked for again
        self.judged = judge.read_judged(self.run, self.rubric)
        # The KV cache comes first, so that a run without room for it ends at once
        length = max(map(len, self.prompts)) + config.max_response
        self.cache = sampling.new_cache(
            hf.read_config(folder), config, config.rollout_batch * config.samples, length,
            self.dtype, device, mesh)
        self.load_networks(mesh)

    def load_networks(self, mesh):
        """Load policy and critic with float32 weights and Adam, the frozen reference, and the
        sampler, which is a copy of the policy. All start from the same folder."""
        c = self.config

        def load(cls, dtype, mesh=mesh, **how):
            return hf.load(self.folder, cls, dtype, self.device, mesh, self.dtype, **how)

        self.policy = load(M.Llama, torch.float32, offload=c.offload)
        self.reference = load(M.Llama, self.dtype).requires_grad_(False)
        sampler_mesh = sampling.mesh_of(c.sampler, self.policy.config, mesh)
        self.sampler = load(M.Llama, self.dtype, sampler_mesh).requires_grad_(False)
        self.nets = {"policy": self.policy}  # the networks to train
        if c.advantage == "gae":
            self.critic = load(M.Critic, torch.float32, init_seed=c.seed, offload=c.offload)
            self.nets["critic"] = self.critic
        self.lr = {"policy": c.lr, "critic": c.critic_lr}
        self.optimizers = {}
        for name, net in self.nets.items():
            net.model.recompute = c.recompute
            if c.compile:
                parallel.compile_blocks(net)
            self.optimizers[name] = torch.optim.Adam(
                net.parameters(), lr=self.lr[name], betas=(0.9, 0.95), eps=c.adam_eps, fused=True)

    # -- rollout

    def rollout(self):
        """Sample responses and reward them. Returns the same list of Samples on every rank; the
        responses to one prompt are side by side."""
        c = self.config
        chosen = problems_of_step(self.training, self.current, c.rollout_batch, c.seed)
        chosen = [i for i in chosen for _ in range(c.samples)]
        # The indices of the responses that this rank samples
        mine = range(parallel.rank(), len(chosen), parallel.world_size())
        # Each response of a run has its own stream of random numbers
        first = (self.current - 1) * len(chosen)
        samples, stats = self.sample([chosen[i] for i in mine], [first + i for i in mine],
                                     f"step {self.current}")
        self.reward(samples)
        gathered = parallel.gather((samples, stats))
        ranks = len(gathered)
        self.decoding = {k: sum(rank_stats[k] for _, rank_stats in gathered) / ranks for k in stats}
        return [gathered[i % ranks][0][i // ranks] for i in range(len(chosen))]

    def sample(self, chosen, streams, title):
        """Sample a response to each of these problems. Returns (Samples that have no reward yet,
        statistics of the decoding)."""
        c = self.config
        stats = {}
        # When ranks decode in lock-step, none may leave on its own when a signal comes
        lockstep = c.sampler in ("tensor", "sharded")
        leave = contextlib.nullcontext() if lockstep else signals.may_interrupt()
        responses = logprobs = []
        named = guards.sampling_from(title, self.sampler)
        with logs.bar(f"{title}: sampling", len(chosen), inner=True) as bar, leave, named:
            responses, logprobs = sampling.generate(
                self.sampler, [self.prompts[i] for i in chosen], c.max_response, c.temperature,
                self.eos, seed=c.seed, streams=streams, slots=c.slots, return_logprobs=True,
                progress=bar, cache=self.cache, stats=stats, lockstep=c.sampler == "sharded")
        signals.stop_if_asked()
        samples = []
        for i, response, logprob in zip(chosen, responses, logprobs):
            text = self.tokenizer.decode(response, skip_special_tokens=True)
            samples.append(Sample(self.problems[i], self.prompts[i], response, logprob, text,
                                  truncated=response[-1] not in self.eos))
        return samples, stats

    def reward(self, samples):
        """Give this rank's samples their reward, by Eq. 1 or by the functions that --verifier and
        --reward name."""
        c = self.config
        if c.exploration == "judge":
            judge.give_efforts(samples, c, self.current, self.judged, self.run, self.rubric)
        verdicts = functions.ask(self.verifier, samples)
        totals = functions.ask(self.reward_function, samples)
        for sample, verdict, total in zip(samples, verdicts, totals):
            sample.parts = self.reward_of(sample, verdict, total)

    def reward_of(self, sample, verdict, total):
        """The parts of Eq. 1 for a response. verdict: the result of --verifier; total: that of
        --reward; each is None without its flag."""
        c = self.config
        parts = rewards.score(
            sample.text, sample.problem.get("answer", ""), exploration=c.exploration,
            alpha=self.alpha(), length_scale=c.length_scale, length_floor=c.length_floor,
            steps_scale=c.steps_scale, truncated=sample.truncated, effort=sample.effort or 0.0,
            verdict=verdict,
            count_tokens=lambda s: len(self.tokenizer.encode(s, add_special_tokens=False).ids))
        total = parts.total if total is None else total
        if not math.isfinite(total):
            shown = repr(sample.problem["problem"][:60])
            raise guards.TrainingError(
                f"step {self.current}: the reward of a response to {shown} is {total}", False)
        return replace(parts, total=max(-c.reward_clip, min(c.reward_clip, total)))

    def alpha(self):
        """The weight of correctness at this step; it moves linearly from alpha to alpha_end."""
        c = self.config
        end = c.alpha if c.alpha_end is None else c.alpha_end
        return c.alpha + (end - c.alpha) * (self.current - 1) / max(1, c.steps - 1)

    # -- experience

    def micro_steps(self, batch, rows=None):
        """The micro-batches of these rows of a batch (default: of all rows)."""
        lengths = batch["length"].tolist()
        rows = range(len(lengths)) if rows is None else rows
        return micro_batches(rows, lengths, self.config.micro_tokens, parallel.world_size())

    @torch.no_grad()
    def experience(self, samples):
        """Score samples with policy, reference and critic, and turn rewards into advantages.

        Returns a batch on the CPU: {tokens, mask, sampler_logprob, old_logprob, entropy,
        ref_logprob, value, k1, k3, reward, raw_advantage, advantage, return: [N, T], length: [N]}.
        """
        c = self.config
        batch = as_batch(samples)
        batch |= self.scores(batch)
        mask = batch["mask"]
        score = torch.tensor([s.parts.total for s in samples])  # [N]
        k1, k3 = kl_estimates(batch["old_logprob"], batch["ref_logprob"])
        reward = token_rewards(score, k1, mask, self.kl_coef)
        raw, ret = gae(reward, batch["value"], mask, c.gamma, c.lam)
        if c.advantage == "group":
            raw = group_advantages(reward, score, mask, c.samples, c.gamma)
        whitened = policy_advantages(
            raw, score, self.compared(samples), k1, mask, self.kl_coef, c.gamma, c.lam)
        return batch | {"k1": k1, "k3": k3, "reward": reward, "return": ret, "raw_advantage": raw,
                        "advantage": whitened}

    def compared(self, samples):
        """How many responses are compared with each other: those to one prompt, or with a critic
        all responses of a rollout."""
        return self.config.samples if self.config.advantage == "group" else len(samples)

    def scores(self, batch):
        """{old_logprob, entropy, ref_logprob, value: [N, T]}, zero outside the mask."""
        def score(tokens, mask):
            signals.stop_if_asked()
            found = {}
            found["old_logprob"], found["entropy"] = self.policy.logprobs(tokens, mask, temperature)
            found["ref_logprob"], _ = self.reference.logprobs(
                tokens, mask, temperature, entropy=False)
            found["value"] = torch.zeros(mask.shape)
            if "critic" in self.nets:
                found["value"] = self.critic(tokens, mask)
            return found

        temperature = self.config.temperature
        scores = self.fill(batch, score, "scoring")
        for name, x in scores.items():
            self.check(name, x, batch | scores)
        return scores

    def fill(self, batch, score, what):
        """Call score(tokens, mask) -> {name: [B, T]} on micro-batches, each rank on its own rows.
        Returns {name: [N, T]}, the same on every rank."""
        filled = {}
        micro_steps = self.micro_steps(batch)
        for shares in logs.bar(f"step {self.current} {what}", inner=True, iterable=micro_steps):
            mine = shares[parallel.rank()]
            part = parallel.share(batch, mine, self.device)
            for name, x in score(part["tokens"], part["mask"]).items():
                whole = filled.setdefault(name, torch.zeros(batch["tokens"].shape))
                if mine:
                    whole[mine, : x.shape[1]] = x.cpu()
        return {name: parallel.all_reduce(x) for name, x in filled.items()}

    def check(self, name, x, batch):
        guards.check_finite(name, x, self.current, self.run, batch, self.nets)

    # -- update

    def update(self, batch):
        """Epochs x minibatches of clipped PPO. Returns the metrics, each averaged over the updates
        that have it."""
        history = []
        for epoch in range(self.config.epochs):
            g = generator(self.config.seed, "minibatch", self.current - 1, epoch)
            order = torch.randperm(len(batch["length"]), generator=g)
            for rows in order.split(self.config.train_batch):
                history.append(self.minibatch(batch, rows.tolist(), first=not history))
        names = dict.fromkeys(name for metrics in history for name in metrics)
        values = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
        return {name: sum(v) / len(v) for name, v in values.items()}

    def minibatch(self, batch, rows, first):
        """One optimizer step of every network that is trained, on these rows of the batch. Returns
        its metrics."""
        trained = self.trained()
        # The number of actions in the whole optimizer step, by which every loss is divided
        count = float(batch["mask"][rows].sum())
        sums = {}
        for shares in self.micro_steps(batch, rows):
            if first:  # no weight has changed yet; after that the step is finished first
                signals.stop_if_asked()
            part = parallel.share(batch, shares[parallel.rank()], self.device)
            found = self.policy_step(part, count) if "policy" in trained else {}
            found |= self.value_step(part, count) if "critic" in trained else {}
            for name, x in found.items():
                sums[name] = sums.get(name, 0) + x.detach().float().cpu()
        metrics = dict(zip(sums, parallel.all_reduce(torch.stack(list(sums.values()))).tolist()))
        if "policy" in trained:
            error = metrics.pop("ratio_error")
            if first:
                metrics |= guards.first_ratio(self.current, metrics["ratio"], error, self.dtype)
        for name in trained:
            metrics |= self.optimizer_step(name, metrics, batch)
        return metrics

    def trained(self):
        """Names of the networks that this step trains; the first steps train only the critic."""
        frozen = "critic" in self.nets and self.current <= self.config.freeze_steps
        return [name for name in self.nets if name != "policy" or not frozen]

    def policy_step(self, part, count):
        """Forward and backward of the policy's loss on this rank's share. Returns sums over the
        share, each divided by the number of actions in the whole optimizer step. (The loss is
        multiplied by the number of ranks, because FSDP averages gradients over them.)"""
        c = self.config
        mask = part["mask"]
        logprob, _ = self.policy.logprobs(part["tokens"], mask, c.temperature, entropy=False)
        loss = policy_loss(logprob, part["old_logprob"], part["advantage"], mask, c.clip, count)
        (loss * parallel.world_size()).backward()
        log_ratio = (logprob.detach() - part["old_logprob"])[mask]
        ratio = log_ratio.exp()
        return dict(policy_loss=loss, approx_kl=(ratio - 1 - log_ratio).sum() / count,
                    clip_frac=((ratio - 1).abs() > c.clip).sum() / count, ratio=ratio.sum() / count,
                    ratio_error=(ratio - 1).abs().sum() / count)

    def value_step(self, part, count):
        """The same for the critic."""
        value = self.critic(part["tokens"], part["mask"])
        loss = value_loss(value, part["value"], part["return"], part["mask"],
                          self.config.value_clip, count)
        (loss * parallel.world_size()).backward()
        return dict(value_loss=loss)

    def optimizer_step(self, name, metrics, batch):
        """Clip the gradients of a network and take an optimizer step. A loss or norm that is not
        finite raises TrainingError before any weight changes."""
        c = self.config
        norm = guards.clip_gradients(self.nets[name], c.grad_clip)
        loss = "policy_loss" if name == "policy" else "value_loss"
        self.check(loss, metrics[loss], batch)
        self.check(f"{name}_grad_norm", norm, batch)
        # The policy's schedule starts when it is no longer frozen
        frozen = c.freeze_steps if name == "policy" and "critic" in self.nets else 0
        updates = (c.steps - frozen) * c.epochs * math.ceil(len(batch["length"]) / c.train_batch)
        lr = self.lr[name] * lr_factor(self.updates[name], updates, c.warmup, c.lr_end)
        optimizer = self.optimizers[name]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        self.updates[name] += 1
        return {f"{name}_grad_norm": norm, f"{name}_lr": lr}

    # -- one step

    @property
    def current(self):
        """The step in progress, counted from 1; self.step is the last finished one."""
        return self.step + 1

    def train_step(self):
        """Rollout, experience, update, sampler refresh. Returns (metrics, samples, batch)."""
        timer = logs.Timer()
        with timer("rollout"):
            samples = self.rollout()
            parallel.free_weights(self.sampler)  # the update needs their memory
        with timer("scoring"):
            batch = self.experience(samples)
        with timer("update"):
            metrics = self.describe(samples, batch) | self.update(batch)
        with timer("copy"):
            parallel.copy_weights(self.policy, self.sampler)
        self.adapt_kl_coef(metrics["kl_response"], len(samples))
        self.step += 1
        score = torch.tensor([s.parts.total for s in samples])
        metrics |= logs.warnings(self, samples, scores_differ(score, self.compared(samples)))
        metrics = {"step": self.step, **metrics, "timing": logs.timing(self, timer, batch, metrics)}
        return metrics, samples, batch

    def adapt_kl_coef(self, kl_response, responses):
        """The adaptive controller of 1909.08593, with its horizon of 10,000 responses."""
        if self.config.kl_target:
            error = max(-0.2, min(0.2, kl_response / self.config.kl_target - 1))
            self.kl_coef *= 1 + error * responses / 10_000

    def describe(self, samples, batch):
        """The metrics of a rollout, of its rewards and of the networks that scored it."""
        explained = explained_variance(batch["value"], batch["return"], batch["mask"])
        return logs.describe(self, samples, batch, explained)

    def train(self):
        """Run to the last step, writing metrics.jsonl, timing.jsonl, rollouts.jsonl, tokens.jsonl,
        checkpoints/ and at the end model/."""
        c = self.config
        signals.leave = False
        with logs.bar("ppo", c.steps, self.step) as bar:
            while self.step < c.steps:
                try:
                    evaluation.held_out(self)
                    metrics, samples, batch = self.train_step()
                # No weight has changed yet, so this is still the state at the step's start
                except Stopped:
                    if self.step > self.saved:
                        self.save()
                    raise
                logs.log_step(self, metrics, samples, batch)
                bar.update()
                bar.set_postfix(logs.shown(metrics))
                checkpoint.after_step(self.step, c.steps, c.save_every, self.save)
        hf.save(self.policy, self.run / "model", self.dtype)
        parallel.together(lambda: self.chat.write(self.run / "model"))
        evaluation.held_out(self)

    def save(self):
        """Write everything that a resumed run needs to checkpoints/step-N."""
        checkpoint.save(self.run, self.nets, self.optimizers, self.step, self.updates,
                        self.config.keep, self.config.keep_best, kl_coef=self.kl_coef)
        self.saved = self.step

    def resume(self, found=None):
        """Continue from `found`, a checkpoint that checkpoint.find returned (default: the newest);
        without any checkpoint, from the start."""
        found = found or checkpoint.find(self.run)
        state = checkpoint.resume(self.run, self.nets, self.optimizers, found)
        self.step = state["step"]
        self.saved = state["step"]
        self.updates = state["updates"]
        self.kl_coef = state.get("kl_coef", self.kl_coef)
        parallel.copy_weights(self.policy, self.sampler)


