"""The language model in one file: Llama 2 / 3 / 3.1 / 3.2, SmolLM2, Qwen2.5, Qwen3 and Mistral.

    1. Config                what a Hugging Face config.json says, checked
    2. Llama and Critic      RMSNorm, RoPE, grouped-query attention, SwiGLU; a token or a value head
    3. generate              the definition of sampling: one whole forward pass per token

This file imports nothing else of the project. It defines the numbers; lib/ takes a finished network
and loads it (lib/hf.py), shards it (lib/parallel.py), samples from it with a KV cache
(lib/decode.py) and makes it faster on CPU (lib/cpu.py).

Shapes: B sequences, T tokens, N tokens of all sequences end to end, D hidden size, V vocabulary,
H query heads, K key/value heads, d = head size.

References: Llama (2302.13971), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm
(1910.07467), norms of queries and keys (2302.05442). The numbers agree with those of transformers'
models of the same model_type; tests/test_model.py compares the two.
"""
import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# The most that a config.json may ask for. A larger number is a mistake, or an attempt to exhaust
# the machine's memory.
LARGEST = dict(vocab_size=2**21, hidden_size=2**16, intermediate_size=2**19,
               num_hidden_layers=2**10, num_attention_heads=2**10, num_key_value_heads=2**10,
               head_dim=2**12, max_position_embeddings=2**26)

# The number of tokens whose logits, [LOGIT_CHUNK, V], exist at once: 0.25 GB in float32 for
# Llama 3's vocabulary of 128k tokens.
LOGIT_CHUNK = 512


# ----------------------------------------------------------------------------------------------
# 1. Config

@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # a factor of 1 is plain RoPE
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = math.inf
    rope_original_max: int = 8192
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    # config.json as it was read; lib.hf.save writes it back
    raw: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw, path="config"):
        """The Config that a config.json, read as the dict `raw`, describes.

        Raises ValueError for an architecture that is not supported and for a value of the wrong
        type or size; the message begins with `path`.
        """
        def get(key, kind, default=None, source=raw):
            value = source.get(key) if source.get(key) is not None else default
            ok = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
            if not ok or (kind is not bool and not 0 < value < 2**31):
                expected = "boolean" if kind is bool else "positive number"
                raise ValueError(f"{path}: {key} is {value!r:.80}, expected a {expected}")
            if value > LARGEST.get(key, value):
                raise ValueError(f"{path}: {key} is {value}, expected at most {LARGEST[key]}")
            return value

        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3", "mistral"):
            raise ValueError(f"{path}: model_type is {kind!r:.80}, "
                             "expected 'llama', 'qwen2', 'qwen3' or 'mistral'")
        layers = get("num_hidden_layers", int)
        supported = (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False),
                     ("layer_types", ["full_attention"] * layers))
        for key, allowed in supported:
            if raw.get(key, allowed) != allowed:
                only = f"only {allowed!r:.80} is supported"
                raise ValueError(f"{path}: {key} is {raw[key]!r:.80}, {only}")

        # transformers 4 writes rope_theta and rope_scaling, transformers 5 one dictionary,
        # rope_parameters
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: rope_scaling is {rope!r:.80}, expected an object or null")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"{path}: rope_scaling's rope_type is {rope_type!r:.80}, "
                             "expected 'default', 'linear' or 'llama3'")
        theta = get("rope_theta", (int, float), raw.get("rope_theta", 10000.0), rope)
        names = {} if rope_type == "default" else dict(rope_factor="factor")
        if rope_type == "llama3":
            names |= dict(rope_low_freq_factor="low_freq_factor",
                          rope_high_freq_factor="high_freq_factor",
                          rope_original_max="original_max_position_embeddings")
        scaled = {ours: get(theirs, (int, float), None, rope) for ours, theirs in names.items()}

        hidden = get("hidden_size", int)
        heads = get("num_attention_heads", int)
        bias = kind in ("llama", "qwen3") and get("attention_bias", bool, False)
        config = cls(
            vocab_size=get("vocab_size", int), hidden_size=hidden, num_hidden_layers=layers,
            intermediate_size=get("intermediate_size", int), num_attention_heads=heads,
            num_key_value_heads=get("num_key_value_heads", int, heads),
            head_dim=get("head_dim", int, None if kind == "qwen3" else max(hidden // heads, 1)),
            max_position_embeddings=get("max_position_embeddings", int, 2048),
            rms_norm_eps=get("rms_norm_eps", float, 1e-6), rope_theta=float(theta), **scaled,
            tie_word_embeddings=get("tie_word_embeddings", bool, False),
            qkv_bias=kind == "qwen2" or bias, o_bias=bias, qk_norm=kind == "qwen3", raw=raw)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(
                f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
                f"{config.num_key_value_heads}, and head_dim {config.head_dim} even")
        # Our attention has no sliding window. A window that holds all positions changes nothing
        # and is accepted. Without the key, transformers' Mistral has a window of 4096.
        longest = config.max_position_embeddings
        window = raw.get("sliding_window", 4096) if kind == "mistral" else None
        if window is not None and not (isinstance(window, int) and window >= longest):
            raise ValueError(f"{path}: sliding_window is {window!r:.80}, expected null or at least "
                             f"max_position_embeddings, {longest} (or lower that to the window)")
        return config


@functools.lru_cache(maxsize=16)
def rope_frequencies(config, device):
    """The rotation of each pair of channels per position, in radians: float32 [d/2].

    Llama 3.1 slows the low frequencies down. Wavelengths beyond original_max / low_freq_factor
    are stretched by the factor, those under original_max / high_freq_factor stay as they are, and
    those between are interpolated (transformers' _compute_llama3_parameters). Linear scaling
    stretches all of them, because its high_freq_factor is infinite.
    """
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freq = config.rope_theta ** -(channel / config.head_dim)
    if config.rope_factor == 1.0:
        return freq
    low = config.rope_low_freq_factor
    high = config.rope_high_freq_factor
    turns = config.rope_original_max * freq / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / config.rope_factor + smooth * freq


# ----------------------------------------------------------------------------------------------
# 2. Llama and Critic

class Linear(nn.Linear):
    """A linear layer, x [..., in] -> [..., out], that computes in the type of x.

    Float32 master weights are rounded to that type at each call."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension of x [..., D].

    torch computes the mean in float32 whatever the type of x, because squares overflow half
    precision."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """Apply RoPE to x [B, heads, T, d]; cos and sin are [B, 1, T, d/2].

    Channel i is paired with channel i + d/2, as in Hugging Face's layout of the weights."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: H / K query heads share each key and value head. Qwen3 normalises
    each head of q and k."""

    def __init__(self, c, layer):
        super().__init__()
        self.head_dim = c.head_dim
        self.layer = layer
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, lengths=None, cached=None):
        """x [B, T, D] -> [B, T, D]. Only here does one token see another.

        In the plain case a token attends to the tokens before it in its row. With `lengths` the
        row holds several sequences end to end, and a token attends within its own sequence. With
        `cached`, the attention of a KVCache, it also attends to the tokens in the cache.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, d]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, d]
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cached is not None:
            y = cached(self.layer, q, k, v)
        elif lengths is not None:
            y = self.packed(q, k, v, lengths)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # [B, H, T, d] -> [B, T, D]

    # The number of sequences differs from call to call, so this is left out of torch.compile; the
    # layers around it are compiled.
    @torch.compiler.disable
    def packed(self, q, k, v, lengths):
        """Causal attention inside each of the sequences that lie end to end.

        q [1, H, N, d], k and v [1, K, N, d], lengths [S] with sum N -> [1, H, N, d]. One call per
        sequence needs no pads and no copies of its inputs. On GPUs lib/varlen.py makes one call
        for all sequences.
        """
        sizes = lengths.tolist()
        outputs = []
        for qkv in zip(q.split(sizes, dim=2), k.split(sizes, dim=2), v.split(sizes, dim=2)):
            y = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
            outputs.append(y.transpose(1, 2))  # [1, length, H, d]
        return torch.cat(outputs, dim=1).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.config = c
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, lengths=None, cached=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Tokens [B, T] to normalised hidden states [B, T, D].

    Sequences are padded on the right: causal attention never sees the pads. With `lengths`
    (LongTensor [S] on the CPU), tokens [1, N] are S sequences end to end without any pad (see
    `pack`). With `cached`, the attention of a KVCache, tokens [B, T] stand at `positions`
    [B or 1, T] and follow the tokens in the cache.
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.recompute = False  # activation checkpointing of each block
        # The type to compute in, if it is not that of the weights. (FSDP passes the weights in the
        # compute type.)
        self.dtype = None
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens, positions=None, lengths=None, cached=None):
        if lengths is not None:
            each = [torch.arange(n) for n in lengths.tolist()]
            positions = torch.cat(each)[None].to(tokens.device)  # [1, N]
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        x = self.embed(tokens)  # [B, T, D]
        cos, sin = self.rotation(positions, x.dtype)
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, lengths, use_reentrant=False)
            else:
                x = block(x, cos, sin, lengths, cached)
        return self.norm(x)

    def embed(self, tokens):
        x = self.embed_tokens(tokens)
        return x.to(self.dtype or x.dtype)

    def rotation(self, positions, dtype):
        """RoPE's cosine and sine at positions [B, T]: both [B, 1, T, d/2]."""
        angle = positions[:, None, :, None] * rope_frequencies(self.config, positions.device)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def states(self, tokens, mask):
        """The hidden state before each token under `mask` [B, T], row by row: [N, D].

        Nothing is computed for pads."""
        packed, lengths, chosen = pack(tokens, mask)
        return self(packed, lengths=lengths)[0][chosen]


def pack(tokens, mask):
    """The inputs that the scores of the tokens under `mask` [B, T] depend on, end to end.

    Returns (tokens [1, N], lengths [B], chosen): `chosen` holds the indices in N of the states that
    score a token. The state at t - 1 scores token t, so the inputs of a row end before its last
    token under the mask; pads and all else after it are left out. Each row keeps at least one
    input.
    """
    T = mask.shape[1]
    index = torch.arange(T, device=mask.device)
    lengths = (mask * index).amax(1).clamp(min=1)  # [B]
    keep = index[: T - 1] < lengths[:, None]  # [B, T - 1]
    packed = tokens[:, :-1][keep][None]
    chosen = mask[:, 1:][keep].nonzero()[:, 0]
    return packed, lengths.cpu(), chosen


def product(a, b):
    """a @ b in float32, of two matrices or two stacks of them.

    Logits and attention scores are summed in float32; a result in bfloat16 would round them to
    three digits afterwards.
    """
    if not a.is_cuda or a.dtype == torch.float32:
        return a.float() @ b.float()  # float() copies nothing that is float32
    if a.dim() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    stacked = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return stacked.view(*a.shape[:-1], b.shape[-1])


class TokenLogprob(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature) at the targets, and the softmax's entropy or None.

    h [N, D], W [V, D], targets [N] -> [N], [N], in nats. Logits are float32 and exist for
    LOGIT_CHUNK tokens at a time; the backward pass computes them again, which makes four products
    with W instead of three. Both passes are written by hand and in place, because each sweep over
    [chunk, V] numbers takes time and autograd would make three times as many.
    """

    @staticmethod
    def chunks(h, weight, temperature):
        for start in range(0, len(h), LOGIT_CHUNK):
            part = slice(start, start + LOGIT_CHUNK)
            yield part, product(h[part], weight.T).div_(temperature)  # [chunk, V]

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, with_entropy):
        logprob, total, entropy = torch.zeros(3, len(h), device=h.device).unbind()
        for part, logits in TokenLogprob.chunks(h, weight, temperature):
            total[part] = logits.logsumexp(-1)
            logprob[part] = logits.gather(-1, targets[part, None])[:, 0] - total[part]
            if with_entropy:
                # the [chunk, V] product gets no name, so its memory is free for the next chunk
                mean = (logits - total[part, None]).exp_().mul_(logits).sum(-1)
                entropy[part] = total[part] - mean
        ctx.save_for_backward(h, weight, targets, total, entropy)
        ctx.temperature = temperature
        return logprob.clone(), entropy.clone() if with_entropy else None

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """d logprob / d logits = onehot(target) - softmax, and
        d entropy / d logits = -softmax * (log softmax + entropy)."""
        h, weight, targets, total, entropy = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        grad_h = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part, d in TokenLogprob.chunks(h, weight, ctx.temperature):
            d.sub_(total[part, None])  # log softmax
            if grad_entropy is None:
                d.exp_().mul_(-grad[part])
            else:  # the softmax is taken first, then d is changed in place
                slope = grad_entropy[part, None] / -ctx.temperature
                d = d.exp().mul_(d.add_(entropy[part, None]).mul_(slope).sub_(grad[part]))
            d = d.scatter_add_(-1, targets[part, None], grad[part]).to(h.dtype)
            torch.mm(d, weight, out=grad_h[part])
            if h.dtype == torch.float32:
                grad_weight.addmm_(d.T, h[part])
            else:  # dozens of chunks are summed; in bfloat16 the sum would lose small ones
                for i in range(0, len(weight), 8192):
                    grad_weight[i : i + 8192].add_(product(d[:, i : i + 8192].T, h[part]))
        return grad_h, grad_weight.to(weight.dtype), None, None, None


class Llama(nn.Module):
    """The policy: the trunk under a head of V logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def head_weight(self):  # [V, D]
        return getattr(self, "lm_head", self.model.embed_tokens).weight  # the same one if tied

    def head(self, h):  # [..., D] -> float32 logits [..., V]
        logits = product(h.flatten(0, -2), self.head_weight().to(h.dtype).T)
        return logits.view(*h.shape[:-1], -1)

    def forward(self, tokens):
        """LongTensor [B, T] -> float32 logits [B, T, V]; logits[:, t] are for token t + 1."""
        return self.head(self.model(tokens))

    def prefill(self, tokens, cache, row, start):
        """Put tokens [n, T] into the n cache rows from `row` on, which hold `start` positions."""
        n, T = tokens.shape
        positions = torch.arange(start, start + T, device=tokens.device)[None]  # [1, T]
        cached = cache.attention(row, positions, (n,) * cache.blocks(start + T))
        self.model(tokens, positions, cached=cached)

    def decode(self, tokens, positions, cache, counts):
        """Append one token to each of the cache's first n rows: tokens [n] -> logits [n, V].

        The tokens stand at positions [n]; counts[j] of the rows reach the cache's block j.
        """
        cached = cache.attention(0, positions[:, None], counts)
        h = self.model(tokens[:, None], positions[:, None], cached=cached)  # [n, 1, D]
        return self.head(h[:, 0])

    def logprobs(self, tokens, mask, temperature=1.0, entropy=True):
        """Log-probability and entropy, in nats, of every token under `mask` [B, T].

        Both are [B, T], and zero elsewhere. The hidden state at t - 1 scores token t, so
        mask[:, 0] must be False. Logits are float32, divided by the temperature that the sampler
        used. Both results can be trained. Without `entropy` its passes over the logits are saved,
        and None takes its place.
        """
        h = self.model.states(tokens, mask)
        scores = self.token_logprobs(h, tokens[mask], temperature, entropy)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return tuple(x if x is None else zeros.masked_scatter(mask, x) for x in scores)

    def token_logprobs(self, h, targets, temperature, entropy):
        """Log-probabilities of targets [N] after hidden states h [N, D], and entropies or None."""
        return TokenLogprob.apply(h, self.head_weight().to(h.dtype), targets, temperature, entropy)

    def reshard(self):
        """Free the whole weights that a forward pass leaves behind if no backward pass follows.

        There are none here. Once the model is sharded, FSDP's own method replaces this one."""


class Critic(nn.Module):
    """The policy's trunk under a scalar head without bias.

    The head starts with a standard deviation of 1 / (D + 1), as in the official code.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, tokens, mask):
        """The value of the state before each token under `mask` [B, T]: float32 [B, T].

        It is zero elsewhere, and aligned with Llama.logprobs. The head computes in float32, because
        bfloat16 has too few digits for returns.
        """
        values = self.value_head(self.model.states(tokens, mask).float())  # [N, 1]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)

    reshard = Llama.reshard


def init_weights(model, seed):
    """Initialise the weights at random, for --from-scratch.

    Weights are normal with a standard deviation of 1/sqrt(D); output projections are scaled down by
    the depth, as in GPT-2. GPT-2's 0.02 is about 1/sqrt(D) at its own width. At D = 128 it is too
    small, and the tiny model learns its facts several times more slowly.
    """
    g = torch.Generator().manual_seed(seed)
    std = model.config.hidden_size**-0.5
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(p, 0.0, std / depth, generator=g)
        else:
            nn.init.normal_(p, 0.0, std, generator=g)


# ----------------------------------------------------------------------------------------------
# 3. generate

def uniforms(seed, stream, n):
    """n random numbers in [0, 1), float32 [n], that depend only on (seed, stream)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return torch.rand(n, generator=torch.Generator().manual_seed(mixed >> 1))


def draw(logits, temperature, u):
    """A token id from logits [V]: at temperature 0 the likeliest, otherwise the first whose
    cumulative probability exceeds u in [0, 1)."""
    if temperature == 0:
        return int(logits.argmax())
    cdf = torch.softmax(logits.float() / temperature, -1).cumsum(-1)  # [V]
    return int(torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=len(cdf) - 1))


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, eos_ids=(), seed=0):
    """Continue each prompt, a list of token ids, until an EOS id or max_new_tokens.

    Returns the new tokens as lists, including the EOS. Temperature 0 is greedy. Each sequence draws
    from its own stream of random numbers, (seed, index of the prompt). This is the definition of
    sampling; lib.decode.generate gives the same tokens with a KV cache and many sequences at once.
    """
    responses = []
    for stream, prompt in enumerate(prompts):
        tokens = list(prompt)
        for u in uniforms(seed, stream, max_new_tokens):
            inputs = torch.tensor([tokens], device=model.head_weight().device)  # [1, T]
            logits = model(inputs)[0, -1]  # [V]
            tokens.append(draw(logits.cpu(), temperature, u))
            if tokens[-1] in eos_ids:
                break
        responses.append(tokens[len(prompt) :])
    return responses
