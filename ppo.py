"""PPO for a language model with a critic, in one scroll.

    1. Settings              every value of the recipe, with the paper's defaults for an 8B model
    2. The mathematics       KL estimates, GAE, whitening, the clipped losses: pure functions of [B, T] tensors
    3. Dealing work          micro-batches under a token budget, the same on every rank
    4. Trainer               rollout -> experience -> update, checkpoints

Conventions: a sequence is prompt + response, padded on the right. Everything "a token" is a [B, T] tensor aligned with the
token it speaks of: logprob[:, t] is log p(token t | tokens < t), value[:, t] the value of the state in which token t was
chosen. mask[:, t] is True where token t is an action, that is a sampled token, the EOS among them; prompts and pads are False.

Weights are sharded over ranks; a rollout's ids and per-token numbers are small, so every rank holds all of them. Advantages,
whitening and minibatches are then the same for any number of ranks by construction.

References: PPO (1707.06347), GAE (1506.02438), RLHF's per-token KL (1909.08593), k1 and k3 (joschu.net/blog/kl-approx.html),
"The N implementation details of RLHF with PPO", RLSP (2502.06773; its official code departs from it where marked).
"""
import contextlib
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lib import checkpoint, cpu, decode, functions, guards, hf, judge, logs, parallel
from lib.cli import flag
from lib.signals import Stopped, signals
import model as M
import rewards


# ---------------------------------------------------------------------------------------------------- 1. Settings

@dataclass
class PPOConfig:
    # Rollout. The paper: 512 prompts, one sample each, temperature 0.7, top-p 1.
    steps: int = flag(200, "PPO steps; each is one rollout and its updates", 1)
    rollout_batch: int = flag(512, "prompts a step, over all ranks", 1)
    samples: int = flag(1, "responses a prompt", 1)
    max_prompt: int = flag(2048, "longest prompt allowed, tokens", 1)
    max_response: int = flag(4096, "longest response, tokens; longer ones are truncated", 1)
    temperature: float = flag(0.7, "sampling temperature; log-probs are scored at the same one", 1e-3)
    slots: int = flag(64, "sequences decoded at once on each rank", 1)
    kv_gb: float = flag(24.0, "most GB of keys and values on each rank, which then limit the slots; 0: what the slots need", 0)
    sampler: str = flag("whole", "the rollout's copy of the policy: whole on each rank, or sharded as the reference is, which "
                        "gathers all weights for every token", choices=("whole", "sharded"))
    # Reward, Eq. 1
    exploration: str = flag("length", "exploration reward R_ex", choices=("none", "length", "steps", "judge"))
    alpha: float = flag(0.8, "weight of correctness in Eq. 1 (ignored by exploration none)", 0, 1)
    alpha_end: float = flag(None, "alpha at the last step, reached linearly; default: alpha stays", 0, 1, kind=float)
    length_scale: float = flag(1000.0, "C of the length reward -C/|o|, tokens", 1e-9)
    length_floor: float = flag(4.0, "the length reward never falls below minus this", 1e-9)
    steps_scale: float = flag(10.0, "S of the steps reward min(1, steps/S)", 1e-9)
    judge_url: str = flag("", "OpenAI-compatible endpoint, such as http://localhost:8000/v1; its key is read from RLSP_JUDGE_KEY")
    judge_model: str = flag("", "model that grades effort for exploration judge")
    judge_rubric: str = flag("", "text file with the judge's instructions in place of lib/judge.py's RUBRIC; it shows the JSON to "
                             'reply with, such as {"depth": n}, and the effort is the mean of these grades from 0 to 10')
    judge_tokens: int = flag(2000, "longest reply of the judge, tokens; models that think first need more", 1)
    judge_workers: int = flag(16, "requests to the judge at once, on each rank", 1)
    judge_failures: float = flag(0.02, "largest share of a step's responses that may stay unjudged (R_ex = 0)", 0, 1)
    verifier: str = flag("", "FILE.py:FUNCTION(response, problem) -> bool that says what is right, in place of the mathematics "
                         "verifier; called from several threads at once")
    reward: str = flag("", "FILE.py:FUNCTION(response, problem) -> float that replaces Eq. 1; called from several threads at once")
    reward_clip: float = flag(10.0, "rewards are clipped to plus or minus this", 0)
    kl_coef: float = flag(0.05, "beta, the weight of the per-token KL penalty", 0)
    kl_target: float = flag(0.0, "if positive, beta adapts towards this KL a response, in nats", 0)
    # Advantage
    advantage: str = flag("gae", "gae (with a critic), or group (group mean as the baseline, no critic)", choices=("gae", "group"))
    gamma: float = flag(1.0, "discount", 0, 1)
    lam: float = flag(0.95, "lambda of GAE", 0, 1)
    # Update
    train_batch: int = flag(128, "responses a minibatch, over all ranks", 1)
    epochs: int = flag(1, "passes over a rollout", 1)
    micro_tokens: int = flag(16384, "tokens in one forward and backward pass on each rank", 1)
    lr: float = flag(2e-7, "learning rate of the policy", 0)
    critic_lr: float = flag(2e-6, "learning rate of the critic", 0)
    warmup: float = flag(0.03, "share of all updates over which the learning rates rise", 0, 1)
    lr_end: float = flag(0.1, "learning rates fall along a cosine to this share", 0, 1)
    clip: float = flag(0.2, "clip range of the probability ratio", 0)
    value_clip: float = flag(0.2, "clip range of the value around the old value", 0)
    adam_eps: float = flag(1e-8, "epsilon of Adam; the root mean square of a gradient of norm 1 over 8e9 parameters "
                           "is 1e-5, and is damped by a larger one", 1e-16)
    grad_clip: float = flag(1.0, "largest gradient norm", 0)
    freeze_steps: int = flag(4, "first steps that train the critic alone (ignored by advantage group)", 0)
    dtype: str = flag("bfloat16", "compute type; master weights are float32", choices=("bfloat16", "float32"))
    recompute: bool = flag(True, "activation checkpointing: less memory, a third more compute")
    offload: bool = flag(False, "policy and critic with gradients and optimizer stay in host memory, for few GPUs")
    shard_ranks: int = flag(0, "processes over which weights are sharded, the rest are replicas; 0: those of a node", 0)
    compile: bool = flag(False, "torch.compile of the blocks of policy and critic; needs a C++ compiler, on a GPU Triton; bfloat16 on CPU has "
                         "kernels of its own (cpu.py) and ignores it")
    # Run
    seed: int = flag(0, "seed of everything random", 0)
    save_every: int = flag(20, "steps between checkpoints; 0: only at the end", 0)
    keep: int = flag(2, "checkpoints kept", 1)
    log_rollouts: int = flag(16, "responses a step written to rollouts.jsonl", 0)
    log_tokens: int = flag(2, "responses a step written to tokens.jsonl with every number of every token", 0)


# ---------------------------------------------------------------------------------------------------- 2. The mathematics

def kl_estimates(logprob, ref_logprob):
    """Per-token estimates (k1, k3) of KL(policy || reference) from samples of the policy, nats. k1 is unbiased and may be
    negative, k3 is unbiased, too, never negative and less noisy. k1 goes into the reward, both are logged."""
    log_ratio = ref_logprob - logprob
    return -log_ratio, torch.expm1(log_ratio) - log_ratio


def token_rewards(scores, k1, mask, kl_coef):
    """r_t = R * 1[t is the last action] - beta * k1_t. scores [B]; k1, mask [B, T] -> [B, T], without gradient."""
    rewards_ = -kl_coef * k1.detach() * mask
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)  # the EOS, or the last token of a truncated response
    rewards_[torch.arange(len(scores)), last] += scores
    return rewards_


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (1506.02438, eq. 16). All [B, T]; positions outside the mask are skipped.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1}; after the last action V and A are 0.
    Returns (advantages, returns = advantages + values), raw and zero outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        m = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(m, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(m, values[:, t], next_value)
        advantages[:, t] = next_advantage
    return advantages * mask, (advantages + values) * mask


def group_advantages(rewards, scores, mask, samples, gamma):
    """The alternative without a critic: reward to go minus the mean score of the `samples` responses to the same prompt.

    rewards, mask [B, T]; scores [B], responses to one prompt next to each other -> [B, T]. (GRPO without its division by
    the group's standard deviation, which whitening over the rollout replaces.)
    """
    baseline = scores.view(-1, samples).mean(1).repeat_interleave(samples)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return (to_go - baseline[:, None]) * mask


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Masked mean 0 and (population) variance 1; zero outside the mask."""
    x = (x - masked_mean(x, mask)) * mask
    return x * torch.rsqrt(masked_mean(x * x, mask) + 1e-8)


def policy_loss(logprob, old_logprob, advantage, mask, clip=0.2, count=None):
    """Sum over the mask of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), divided by count (default: the mask's tokens).

    All [B, T]. With count = the tokens of the whole optimizer step, the micro-batches' losses add up to the step's loss.
    """
    ratio = torch.exp(logprob - old_logprob)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return (loss * mask).sum() / (mask.sum() if count is None else count)


def value_loss(value, old_value, ret, mask, clip=0.2, count=None):
    """Half the sum of max((V - G)^2, (V_clipped - G)^2), V_clipped within clip of the old value; divided as in policy_loss."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    loss = torch.maximum((value - ret) ** 2, (clipped - ret) ** 2)
    return 0.5 * (loss * mask).sum() / (mask.sum() if count is None else count)


def explained_variance(value, ret, mask):
    """1 - Var[G - V] / Var[G]: 1 is a perfect critic, 0 no better than a constant; 0 where the returns do not vary."""
    variance = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    total = variance(ret)
    return float(1 - variance(ret - value) / total) if total > 0 else 0.0


def lr_factor(update, total, warmup, end):
    """Linear rise over the first `warmup` share of `total` updates, then a cosine from 1 to `end`. update counts from 0."""
    rise = math.ceil(warmup * total)
    if update < rise:
        return (update + 1) / rise
    progress = (update - rise) / max(1, total - 1 - rise)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---------------------------------------------------------------------------------------------------- 3. Dealing work

def generator(seed, *purpose):
    """One generator for each purpose and place, a function of (seed, purpose) alone: resuming needs no random state."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def problems_of_step(n, step, batch, seed):
    """Indices of the `batch` problems of a step, counted from 1: the data in a new order each epoch; a batch may
    cross an epoch's end."""
    first = (step - 1) * batch
    places = [divmod(first + k, n) for k in range(batch)]  # (epoch, place in its order)
    orders = {epoch: epoch_order(n, seed, epoch) for epoch in {e for e, _ in places}}
    return [orders[epoch][i] for epoch, i in places]


def micro_batches(indices, lengths, budget, ranks):
    """Split samples into micro-steps: a list of lists of one share (a list of indices) for each rank.

    A share has at most `budget` tokens, or one sample that is longer: pads are not counted, since nothing computes them.
    Longest first, each to the rank with the least to do. Every rank takes part in every micro-step, as FSDP's collectives
    ask; a share may be empty.
    """
    steps, loads = [], []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if not steps or min(loads) + lengths[i] > budget and min(loads) > 0:
            steps.append([[] for _ in range(ranks)])
            loads = [0] * ranks
        least = loads.index(min(loads))
        steps[-1][least].append(i)
        loads[least] += lengths[i]
    return steps


def idle_share(steps, lengths):
    """The share of a plan's time that ranks wait for the fullest of each micro-step: all that is left of padding."""
    loads = [[sum(lengths[i] for i in share) for share in shares] for shares in steps]
    return 1 - sum(map(sum, loads)) / sum(max(load) * len(load) for load in loads)


def pad(rows, dtype):  # lists of numbers -> [B, T], zeros on the right
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r, dtype=dtype) for r in rows], batch_first=True)


@dataclass
class Sample:
    """One response with what was thought of it."""
    problem: dict
    prompt: list  # token ids
    response: list  # token ids, EOS included
    sampler_logprob: list  # nats, as the sampler saw them
    text: str
    truncated: bool
    parts: rewards.RewardParts
    effort: float | None = None  # in [0, 1], of a judge


def as_batch(samples):
    """{tokens, mask, sampler_logprob: [N, T], length: [N]}. The mask comes from lengths, never from ids: a pad may well
    have the id of the EOS."""
    return {"tokens": pad([s.prompt + s.response for s in samples], torch.long),
            "mask": pad([[False] * len(s.prompt) + [True] * len(s.response) for s in samples], torch.bool),
            "sampler_logprob": pad([[0.0] * len(s.prompt) + s.sampler_logprob for s in samples], torch.float32),
            "length": torch.tensor([len(s.prompt) + len(s.response) for s in samples])}


# ---------------------------------------------------------------------------------------------------- 4. Trainer

class Trainer:
    """Policy, critic, reference and sampler of one run. problems: dicts with `problem` and `answer`; run: the run's folder."""

    def __init__(self, config, folder, problems, tokenizer, run, device, mesh, reward_function=None, verifier=None):
        self.config, self.folder, self.problems, self.tokenizer, self.run = config, folder, problems, tokenizer, Path(run)
        self.device, self.reward_function, self.verifier = device, reward_function, verifier
        self.dtype = getattr(torch, config.dtype)
        self.prompts = [hf.chat_prompt(tokenizer, p["problem"]) for p in problems]
        self.eos = hf.eos_ids(folder, tokenizer)
        self.step, self.saved, self.updates, self.kl_coef = 0, 0, {"policy": 0, "critic": 0}, config.kl_coef
        self.rubric = judge.read_rubric(config.judge_rubric)
        self.judged = judge.read_judged(self.run, self.rubric)  # what the judge said before a resume is not asked again

        length, rows = max(map(len, self.prompts)) + config.max_response, math.ceil(config.rollout_batch * config.samples / parallel.world_size())
        self.cache = decode.KVCache.sized(hf.read_config(folder), min(config.slots, rows), length, self.dtype, device, config.kv_gb)
        load = lambda cls, dtype, **kw: hf.load(folder, cls, dtype, device, mesh, self.dtype, **kw)
        self.policy = load(M.Llama, torch.float32, offload=config.offload)
        self.reference = load(M.Llama, self.dtype).requires_grad_(False)
        self.sampler = load(M.Llama, self.dtype) if config.sampler == "sharded" else hf.load(folder, M.Llama, self.dtype, device)
        self.sampler.requires_grad_(False)
        self.nets, self.lr = {"policy": self.policy}, {"policy": config.lr, "critic": config.critic_lr}  # nets: those that are trained
        if config.advantage == "gae":
            self.critic = load(M.Critic, torch.float32, init_seed=config.seed, offload=config.offload)
            self.nets["critic"] = self.critic
        for net in self.nets.values():
            net.model.recompute = config.recompute
            if config.compile:
                parallel.compile_blocks(net)
        # no dropout anywhere
        adam = lambda name: torch.optim.Adam(self.nets[name].parameters(), lr=self.lr[name], betas=(0.9, 0.95),
                                             eps=config.adam_eps, fused=True)
        self.optimizers = {name: adam(name) for name in self.nets}

    # -- rollout

    def alpha(self):
        c = self.config
        end = c.alpha if c.alpha_end is None else c.alpha_end
        return c.alpha + (end - c.alpha) * (self.current - 1) / max(1, c.steps - 1)

    def reward(self, problem, text, truncated, effort=None, verdict=None, total=None):
        """Eq. 1 for a response. verdict: what --verifier said; total: what --reward said, in place of Eq. 1."""
        c = self.config
        count = lambda s: len(self.tokenizer.encode(s, add_special_tokens=False).ids)
        parts = rewards.score(text, problem.get("answer", ""), exploration=c.exploration, alpha=self.alpha(),
                              length_scale=c.length_scale, length_floor=c.length_floor, steps_scale=c.steps_scale,
                              truncated=truncated, count_tokens=count, effort=effort, verdict=verdict)
        if total is not None:
            parts = replace(parts, total=total)
        if not math.isfinite(parts.total):
            shown = repr(problem["problem"][:60])
            raise guards.TrainingError(f"step {self.current}: the reward of a response to {shown} is {parts.total}", False)
        return replace(parts, total=max(-c.reward_clip, min(c.reward_clip, parts.total)))

    def ask(self, function, attempts):
        """What a function of the user's own says of this rank's (response, problem) pairs; Nones without a function."""
        if function is None:
            return [None] * len(attempts)
        results = []
        with signals.may_interrupt():
            results = functions.call_all(function, attempts)
        signals.stop_if_asked()
        return results

    def efforts(self, attempts, total):
        """The judged effort of this rank's (problem, text) pairs, None where the judge failed. Where it failed on more than
        the allowed share of all ranks' total, every rank stops."""
        c, rank = self.config, parallel.rank()
        allowed = math.floor(c.judge_failures * total + 1e-6)
        efforts = error = final = None
        with tqdm(total=len(attempts), desc=f"step {self.current} judge", leave=False, disable=rank != 0) as bar, signals.may_interrupt():
            efforts, error, final = judge.judge_efforts(
                attempts, c.judge_url, c.judge_model, self.judged, self.run / f"judge-{rank}.jsonl", c.judge_workers, allowed, bar,
                self.rubric, c.judge_tokens)
        signals.stop_if_asked()
        counts, errors, finals = zip(*parallel.gather((efforts.count(None), error, final)))
        if sum(counts) > allowed or any(finals):  # on every rank alike
            _, error = max(zip(finals, errors))  # a final one before the others
            raise guards.TrainingError(f"step {self.current}: {sum(counts)} of {total} responses stay unjudged, {allowed} may: {error}")
        return efforts

    def rollout(self):
        """Sample responses and reward them: the same list of Samples on every rank, those of one prompt next to each other."""
        c, ranks = self.config, parallel.world_size()
        chosen = problems_of_step(len(self.problems), self.current, c.rollout_batch, c.seed)
        chosen = [i for i in chosen for _ in range(c.samples)]
        mine, stats = range(parallel.rank(), len(chosen), ranks), {}
        alone = contextlib.nullcontext() if c.sampler == "sharded" else signals.may_interrupt()  # in lock-step nobody may leave alone
        with tqdm(total=len(mine), desc=f"step {self.current} rollout", leave=False, disable=parallel.rank() != 0) as bar, alone:
            responses, logprobs = decode.generate(
                self.sampler, [self.prompts[chosen[i]] for i in mine], c.max_response, c.temperature, self.eos,
                seed=c.seed, streams=[(self.current - 1) * len(chosen) + i for i in mine], slots=c.slots, return_logprobs=True, progress=bar,
                cache=self.cache, stats=stats, lockstep=c.sampler == "sharded", decoder=cpu.CPUDecoder.of(self.sampler))
        signals.stop_if_asked()
        texts = [self.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
        efforts = [None] * len(mine)
        if c.exploration == "judge":
            efforts = self.efforts([(self.problems[chosen[i]]["problem"], rewards.reasoning_of(text)) for i, text in zip(mine, texts)], len(chosen))
        attempts = [(text, self.problems[chosen[i]]) for i, text in zip(mine, texts)]
        verdicts = self.ask(self.verifier, attempts)
        totals = self.ask(self.reward_function, attempts)
        samples = []
        for i, response, logprob, text, effort, verdict, total in zip(mine, responses, logprobs, texts, efforts, verdicts, totals):
            problem = self.problems[chosen[i]]
            truncated = response[-1] not in self.eos
            parts = self.reward(problem, text, truncated, effort or 0.0, verdict, total)
            samples.append(Sample(problem, self.prompts[chosen[i]], response, logprob, text, truncated, parts, effort))
        gathered, every = zip(*parallel.gather((samples, stats)))
        self.decoding = {k: sum(s[k] for s in every) / ranks for k in stats}
        return [gathered[i % ranks][i // ranks] for i in range(len(chosen))]

    # -- experience

    def share(self, batch, indices):
        """This rank's rows of a batch on its device, cut to their longest; one fully masked row where it has none."""
        rows = torch.tensor(indices or [0])
        T = max(1, int(batch["length"][rows].max())) if indices else 2
        part = {k: v[rows, :T].to(self.device) for k, v in batch.items() if k != "length"}
        if not indices:
            part["mask"] = torch.zeros_like(part["mask"])
        return part

    @torch.no_grad()
    def experience(self, samples):
        """Score samples with policy, reference and critic, and turn rewards into advantages.

        Returns a batch on the CPU: {tokens, mask, sampler_logprob, old_logprob, entropy, ref_logprob, value, k1, k3,
        reward, raw_advantage, advantage, return: [N, T], length: [N]}.
        """
        c = self.config
        batch = as_batch(samples)
        batch |= self.scores(batch)
        score = torch.tensor([s.parts.total for s in samples])  # [N]
        k1, k3 = kl_estimates(batch["old_logprob"], batch["ref_logprob"])
        reward = token_rewards(score, k1, batch["mask"], self.kl_coef)
        advantage, ret = gae(reward, batch["value"], batch["mask"], c.gamma, c.lam)
        if c.advantage == "group":
            advantage = group_advantages(reward, score, batch["mask"], c.samples, c.gamma)
        return batch | {"k1": k1, "k3": k3, "reward": reward, "return": ret, "raw_advantage": advantage,
                        "advantage": whiten(advantage, batch["mask"])}

    def scores(self, batch):
        """{old_logprob, entropy, ref_logprob, value: [N, T]}, zero outside the mask. Every rank fills its own rows."""
        scores = {k: torch.zeros(batch["tokens"].shape) for k in ("old_logprob", "entropy", "ref_logprob", "value")}
        micro_steps = micro_batches(range(len(batch["length"])), batch["length"].tolist(), self.config.micro_tokens,
                                    parallel.world_size())
        for shares in logs.bar(micro_steps, f"step {self.current} scoring"):
            signals.stop_if_asked()
            mine = shares[parallel.rank()]
            part = self.share(batch, mine)
            scored = part["tokens"], part["mask"]
            result = {}
            result["old_logprob"], result["entropy"] = self.policy.logprobs(*scored, self.config.temperature)
            result["ref_logprob"], _ = self.reference.logprobs(*scored, self.config.temperature, entropy=False)
            if "critic" in self.nets:
                result["value"] = self.critic(*scored)
            for name, x in result.items():
                if mine:
                    scores[name][mine, : x.shape[1]] = x.cpu()
        for name, x in scores.items():
            parallel.all_reduce(x)
            self.check(name, x, batch | scores)
        return scores

    def check(self, name, x, batch):
        guards.check_finite(name, x, self.current, self.run, batch, self.nets)

    # -- update

    def update(self, batch):
        """Epochs x minibatches of clipped PPO. Returns the metrics, each a mean over the updates that have it."""
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
        """One optimizer step of every network that is trained, on these rows of the batch. Returns its metrics."""
        trained = self.trained()
        count = float(batch["mask"][rows].sum())  # actions of the whole optimizer step: every loss divides by it
        sums = {}
        for shares in micro_batches(rows, batch["length"].tolist(), self.config.micro_tokens, parallel.world_size()):
            if first:  # no weight has changed yet; later the step is finished
                signals.stop_if_asked()
            part = self.share(batch, shares[parallel.rank()])
            found = self.policy_step(part, count) if "policy" in trained else {}
            found |= self.value_step(part, count) if "critic" in trained else {}
            for name, x in found.items():
                sums[name] = sums.get(name, 0) + x.detach().float().cpu()
        metrics = dict(zip(sums, parallel.all_reduce(torch.stack(list(sums.values()))).tolist()))
        if "policy" in trained:
            error = metrics.pop("ratio_error")
            if first:
                metrics |= self.first_ratio(metrics["ratio"], error)
        for name in trained:
            metrics |= self.optimizer_step(name, metrics, batch)
        return metrics

    def trained(self):
        """Names of the networks that this step trains: at first the critic alone."""
        frozen = "critic" in self.nets and self.current <= self.config.freeze_steps
        return [name for name in self.nets if name != "policy" or not frozen]

    def policy_step(self, part, count):
        """Forward and backward of the policy's loss on this rank's share. Returns sums over the share, each divided by
        the actions of the whole optimizer step. (The loss is multiplied by the ranks: FSDP averages gradients over them.)"""
        c, mask = self.config, part["mask"]
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
        loss = value_loss(value, part["value"], part["return"], part["mask"], self.config.value_clip, count)
        (loss * parallel.world_size()).backward()
        return dict(value_loss=loss)

    def first_ratio(self, ratio, error):
        """The old log-probs are this very model's: a ratio away from 1 before any update is a bug. Other batch shapes
        round otherwise, bfloat16 by percents."""
        limit = 1e-3 if self.dtype == torch.float32 else 0.1
        if math.isnan(error) or error >= limit:
            raise guards.TrainingError(f"step {self.current}: the ratio on the first minibatch is off 1 by {error:.2g} "
                                       "on average")
        return dict(first_ratio=ratio, first_ratio_error=error)

    def optimizer_step(self, name, metrics, batch):
        """Clip the gradients of a network and take its step; nothing is changed where a number is not finite."""
        c = self.config
        norm = guards.clip_gradients(self.nets[name], c.grad_clip)
        loss = "policy_loss" if name == "policy" else "value_loss"
        self.check(loss, metrics[loss], batch)
        self.check(f"{name}_grad_norm", norm, batch)
        steps = c.steps - (c.freeze_steps if name == "policy" and "critic" in self.nets else 0)  # it starts when it thaws
        updates = steps * c.epochs * math.ceil(len(batch["length"]) / c.train_batch)
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
        """The number of the step that is being done, counted from 1; self.step is the last one that is finished."""
        return self.step + 1

    def train_step(self):
        """Rollout, experience, update, refreshed sampler. Returns (metrics, samples, batch)."""
        timer = logs.Timer()
        with timer("rollout"):
            samples = self.rollout()
            parallel.free_weights(self.sampler)  # until its refresh: the update needs the memory
        with timer("scoring"):
            batch = self.experience(samples)
        with timer("update"):
            metrics = self.describe(samples, batch) | self.update(batch)
        with timer("copy"):
            parallel.copy_weights(self.policy, self.sampler)
        self.adapt_kl_coef(metrics["kl_response"], len(samples))
        self.step += 1
        return {"step": self.step, **metrics, "timing": self.timing(timer, batch, metrics)}, samples, batch

    def adapt_kl_coef(self, kl_response, responses):
        """The adaptive controller of 1909.08593, with its horizon of 10,000 responses."""
        if self.config.kl_target:
            error = max(-0.2, min(0.2, kl_response / self.config.kl_target - 1))
            self.kl_coef *= 1 + error * responses / 10_000

    def timing(self, timer, batch, metrics):
        """A line of timing.jsonl: seconds of each phase, what was reached in it, and how decoding used its rows."""
        c, ranks = self.config, parallel.world_size()
        lengths, actions = batch["length"].tolist(), int(batch["mask"].sum())
        micro_steps = micro_batches(range(len(lengths)), lengths, c.micro_tokens, ranks)
        flops_per_s = self.flops(lengths, actions, metrics) / timer.seconds["update"]
        return dict(
            seconds=sum(timer.seconds.values()), cpu_seconds=timer.cpu_seconds(),
            **{f"{phase}_seconds": seconds for phase, seconds in timer.seconds.items()},
            rollout_tokens_per_s=actions / timer.seconds["rollout"],
            update_tokens_per_s=sum(lengths) * c.epochs / timer.seconds["update"],
            flops_per_s=flops_per_s, mfu=flops_per_s / ranks / logs.matrix_peak(self.device, self.dtype),
            padding=idle_share(micro_steps, lengths), **self.decoding)

    def flops(self, lengths, actions, metrics):
        """Model FLOPs of a step's update, over all ranks (model.flops): what was trained, each net over every epoch."""
        heads = {"policy": actions, "critic": 0}
        return self.config.epochs * sum(logs.flops(net.config, lengths, heads[name]) for name, net in self.nets.items()
                                        if f"{name}_lr" in metrics)

    def describe(self, samples, batch):
        """Metrics of a rollout; everything a token is a mean over actions, everything else a mean over responses."""
        mask = batch["mask"]
        mean = lambda values: sum(values) / len(samples)
        lengths = [len(s.response) for s in samples]
        per_token = dict(k1=batch["k1"], k3=batch["k3"], entropy=batch["entropy"], value=batch["value"], advantage=batch["raw_advantage"],
                         sampler_logprob_diff=(batch["sampler_logprob"] - batch["old_logprob"]).abs())
        counts = [rewards.behaviours(s.text) for s in samples]
        metrics = dict(
            reward=mean([s.parts.total for s in samples]), outcome=mean([s.parts.outcome for s in samples]),
            exploration=mean([s.parts.exploration for s in samples]), floored=mean([s.parts.floored for s in samples]),
            alpha=samples[0].parts.alpha, accuracy=mean([s.parts.correct for s in samples]),
            answered=mean([s.parts.answer is not None for s in samples]), reasoning_length=mean([s.parts.length for s in samples]),
            reasoning_steps=mean([s.parts.steps for s in samples]), response_length=mean(lengths), response_length_max=max(lengths),
            truncated=mean([s.truncated for s in samples]), repetition=mean([rewards.repetition(s.text) for s in samples]),
            **{k: mean([c[k] > 0 for c in counts]) for k in counts[0]},  # share of responses that show the behaviour
            **{k: float(masked_mean(v, mask)) for k, v in per_token.items()},
            kl_response=float((batch["k1"] * mask).sum() / len(samples)), kl_coef=self.kl_coef)
        if "critic" in self.nets:
            metrics["explained_variance"] = explained_variance(batch["value"], batch["return"], mask)
        else:
            del metrics["value"]
        if self.reward_function:
            metrics = {k: v for k, v in metrics.items() if k not in logs.EQUATION_1}
            if not self.verifier:  # the mathematics verifier has decided nothing here
                metrics["math_accuracy"] = metrics.pop("accuracy")
        if self.config.exploration == "judge":
            metrics["judge_failed"] = mean([s.effort is None for s in samples])
        return metrics

    @torch.no_grad()
    def token_rows(self, samples, batch):
        """The first log_tokens responses token by token, for tokens.jsonl. new_logprob is of the policy as it is now, after
        the step's updates: one more scoring, which all ranks do together and which changes no number of the training."""
        samples = samples[: self.config.log_tokens]
        if not samples:
            return []
        batch = {k: v[: len(samples)] for k, v in batch.items()}
        new = torch.zeros(batch["tokens"].shape)
        for shares in micro_batches(range(len(samples)), batch["length"].tolist(), self.config.micro_tokens, parallel.world_size()):
            mine = shares[parallel.rank()]
            part = self.share(batch, mine)
            logprob, _ = self.policy.logprobs(part["tokens"], part["mask"], self.config.temperature)
            if mine:
                new[mine, : logprob.shape[1]] = logprob.cpu()
        batch["new_logprob"] = parallel.all_reduce(new)
        names = ["old_logprob", "new_logprob", "ref_logprob", "entropy", "reward", "advantage", "raw_advantage"]
        names += ["value", "return"] if "critic" in self.nets else []
        return [{"step": self.step, "problem": s.problem["problem"], "gold": s.problem.get("answer"), "score": s.parts.total,
                 "tokens": hf.token_texts(self.tokenizer, s.response)}
                | {k: [float(f"{x:.6g}") for x in batch[k][i, batch["mask"][i]].tolist()] for k in names}
                for i, s in enumerate(samples)]

    def train(self):
        """Run to the last step, writing metrics.jsonl, timing.jsonl, rollouts.jsonl, tokens.jsonl, checkpoints/ and at the end model/."""
        c, last, signals.leave = self.config, self.config.steps, False
        with tqdm(total=last, initial=self.step, desc="ppo", disable=parallel.rank() != 0) as bar:
            while self.step < last:
                try:
                    metrics, samples, batch = self.train_step()
                except Stopped:  # no weight had been changed: this is still the state at the step's start
                    if self.step > self.saved:
                        self.save()
                    raise
                rows = {"metrics": [metrics], "timing": [{"step": self.step, **metrics.pop("timing")}], "tokens": self.token_rows(samples, batch),
                        "rollouts": [{"step": self.step, "problem": s.problem["problem"], "gold": s.problem.get("answer"), "response": s.text,
                                      "tokens": len(s.response), "truncated": s.truncated,
                                      "reward": logs.reward_row(s.parts, self.reward_function, self.verifier)}
                                     for s in samples[: c.log_rollouts]]}
                logs.log(self.run, rows)
                bar.update()
                bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "accuracy", "k1", "explained_variance") if k in metrics}
                                | {"length": f"{metrics['response_length']:.0f}"})
                checkpoint.after_step(self.step, last, c.save_every, self.save)
        hf.save(self.policy, self.run / "model", self.dtype)
        parallel.together(lambda: hf.copy_tokenizer(self.folder, self.run / "model"))

    def save(self):
        """Everything a resumed run needs, in checkpoints/step-N."""
        checkpoint.save(self.run, self.nets, self.optimizers, self.step, self.updates, self.config.keep, kl_coef=self.kl_coef)
        self.saved = self.step

    def resume(self, found=None):
        """Go on from the checkpoint that checkpoint.find has found, by default the newest; without one from the start."""
        state = checkpoint.resume(self.run, self.nets, self.optimizers, found or checkpoint.find(self.run))
        self.step = self.saved = state["step"]
        self.updates, self.kl_coef = state["updates"], state.get("kl_coef", self.kl_coef)
        parallel.copy_weights(self.policy, self.sampler)


