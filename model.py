"""The language model in one file: Llama 2 / 3 / 3.1 / 3.2, SmolLM2, TinyLlama and Qwen2.5.

    1. Config                what a Hugging Face config.json says, checked
    2. Llama and Critic      RMSNorm, RoPE, grouped-query attention, SwiGLU; a token head or a value head
    3. Folders               safetensors in and out, each rank reading only its own rows
    4. Chat prompts          Llama 3 headers or ChatML, by the tokenizer's own special tokens
    5. Many processes        one mesh, plain FSDP; a single process does without

Sampling from it is in decode.py: generate, with a KV cache and slots that are refilled as sequences finish.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, H query heads, K key/value heads, d = head size.
References: Llama (2302.13971), RoPE (2104.09864), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467);
the numbers follow transformers' modeling_llama.py and modeling_qwen2.py, against which tests/test_model.py checks them.
"""
import ctypes
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import cpu
from decode import PREFILL_TOKENS, KVCache, generate, sample, uniforms  # noqa: F401  (sampling, a file of its own)

SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
LOGIT_CHUNK = 512  # tokens whose [chunk, V] logits exist at once: 0.25 GB in float32 for Llama 3's 128k vocabulary


# ---------------------------------------------------------------------------------------------------- 1. Config

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
    rope_factor: float = 1.0  # Llama 3.1's rope scaling; a factor of 1 is plain RoPE
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max: int = 8192
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as read, written back by save

    @classmethod
    def from_pretrained(cls, folder):
        """Read folder/config.json. Raises FileNotFoundError, or ValueError naming file, key, value and what was expected."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face model folder")
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, raw, path="config"):
        def get(key, kind, default=None, source=raw):
            value = source.get(key) if source.get(key) is not None else default
            ok = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
            if not ok or (kind is not bool and not 0 < value < 2**31):
                raise ValueError(f"{path}: {key} is {value!r}, expected a {'boolean' if kind is bool else 'positive number'}")
            return value

        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise ValueError(f"{path}: model_type is {kind!r}, expected 'llama' or 'qwen2'")
        for key, allowed in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
            if raw.get(key, allowed) != allowed:
                raise ValueError(f"{path}: {key} is {raw[key]!r}, only {allowed!r} is supported")
        # transformers 4 writes rope_theta and rope_scaling, transformers 5 one dictionary rope_parameters
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: rope_scaling is {rope!r}, expected a JSON object or null")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"{path}: rope_scaling's rope_type is {rope_type!r}, expected 'default' or 'llama3'")
        theta = get("rope_theta", (int, float), raw.get("rope_theta", 10000.0), rope)
        scaled = {}
        if rope_type == "llama3":
            scaled = {ours: get(theirs, (int, float), None, rope) for ours, theirs in (
                ("rope_factor", "factor"), ("rope_low_freq_factor", "low_freq_factor"),
                ("rope_high_freq_factor", "high_freq_factor"), ("rope_original_max", "original_max_position_embeddings"))}
        hidden, heads = get("hidden_size", int), get("num_attention_heads", int)
        bias = get("attention_bias", bool, False)
        config = cls(
            vocab_size=get("vocab_size", int), hidden_size=hidden, intermediate_size=get("intermediate_size", int),
            num_hidden_layers=get("num_hidden_layers", int), num_attention_heads=heads,
            num_key_value_heads=get("num_key_value_heads", int, heads), head_dim=get("head_dim", int, max(hidden // heads, 1)),
            max_position_embeddings=get("max_position_embeddings", int, 2048),
            rms_norm_eps=get("rms_norm_eps", float, 1e-6), rope_theta=float(theta), **scaled,
            tie_word_embeddings=get("tie_word_embeddings", bool, False),
            qkv_bias=kind == "qwen2" or bias, o_bias=kind == "llama" and bias, raw=raw)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(f"{path}: num_attention_heads {config.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads {config.num_key_value_heads}, and head_dim {config.head_dim} even")
        return config


@functools.lru_cache(maxsize=16)
def rope_frequencies(config, device):
    """Rotation per position of each pair of channels, radians, float32 [d/2]; low ones slowed down as Llama 3.1 does."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim)
    if config.rope_factor == 1.0:
        return freq
    # Wavelengths beyond original_max / low_freq_factor are stretched by the factor, those under
    # original_max / high_freq_factor kept, those between interpolated (transformers' _compute_llama3_parameters).
    turns = config.rope_original_max * freq / (2 * math.pi)
    smooth = (turns - config.rope_low_freq_factor) / (config.rope_high_freq_factor - config.rope_low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freq / config.rope_factor + smooth * freq


# ---------------------------------------------------------------------------------------------------- 2. Llama and Critic

class Linear(nn.Linear):
    """A linear layer whose weights, where they are float32 masters, are rounded to the type of its input, x [..., in] -> [..., out]."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):  # inside in float32 whatever the compute type: the mean of squares overflows half precision
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """Apply RoPE to x [B, heads, T, d]; channel i is paired with i + d/2 (Hugging Face's layout), cos and sin are [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.head_dim, self.layer = c.head_dim, layer
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)

    def forward(self, x, cos, sin, lengths=None, attend=None):
        """Attention is the one place where tokens meet: inside sequences that lie end to end (lengths), with those that a
        KVCache holds (attend), or, the plain case, inside each row."""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, d], [B, K, T, d]
        if attend is not None:
            y = attend(self.layer, q, k, v)
        elif lengths is not None:
            y = attend_each(q, k, v, lengths)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


@torch.compiler.disable  # the number of sequences differs from call to call; the layers around are compiled without it
def attend_each(q, k, v, lengths):
    """Causal attention inside each of the sequences that lie end to end in q [1, H, N, d], k and v [1, K, N, d] -> [1, H, N, d].

    One call a sequence computes no pads and copies nothing on its way in. Sequences are hundreds to thousands of tokens long,
    so on a GPU, too, the calls are few against the work in each."""
    each = zip(*(x.split(lengths.tolist(), dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).transpose(1, 2) for qkv in each], dim=1).transpose(1, 2)


class MLP(nn.Module):
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

    def forward(self, x, cos, sin, lengths=None, attend=None):
        if lengths is not None and (library := cpu.kernels(x, self.config)):
            return cpu.block(library, self, x, cos, sin, lengths)  # the same, faster
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Tokens [B, T] to normalised hidden states [B, T, D]. Sequences are padded on the right: causal attention never sees pads.

    With lengths (LongTensor [S] on the CPU), tokens [1, N] are S sequences end to end, without any pad (`pack`); with attend, of a
    KVCache, tokens [B, T] go on at positions [B or 1, T] after what the cache holds."""

    def __init__(self, c):
        super().__init__()
        self.config, self.recompute = c, False  # recompute: activation checkpointing of each block
        self.dtype = None  # to compute in, if not that of the weights (FSDP hands them over in the compute type)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens, positions=None, lengths=None, attend=None):
        if lengths is not None:
            positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None].to(tokens.device)
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.embed(tokens)
        cos, sin = self.rotation(positions, x.dtype)
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, lengths, use_reentrant=False)
            else:
                x = block(x, cos, sin, lengths, attend)
        return self.norm(x)

    def embed(self, tokens):
        weight = self.embed_tokens.weight
        if self.dtype == torch.bfloat16 and weight.device.type == "cpu" and cpu.is_master(weight):
            return cpu.Embedding.apply(weight, tokens, self.dtype)  # the same, without a gradient [V, D] of zeros
        x = self.embed_tokens(tokens)
        return x.to(self.dtype or x.dtype)

    def rotation(self, positions, dtype):
        """RoPE's cosine and sine at positions [B, T]: [B, 1, T, d/2]."""
        angle = positions[:, None, :, None] * rope_frequencies(self.config, positions.device)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def states(self, tokens, mask):
        """The hidden state before each token under `mask` [B, T], in row-major order: [N, D], computed without pads."""
        packed, lengths, chosen = pack(tokens, mask)
        return self(packed, lengths=lengths)[0][chosen]


def pack(tokens, mask):
    """The inputs that the scores of tokens under `mask` [B, T] depend on, end to end: (tokens [1, N], lengths [B], chosen [N]).

    Each row's inputs end before its last token under the mask, for token t is scored by the state at t - 1; what comes after,
    pads among it, is left out. At least one a row stays. `chosen` marks the states that score something."""
    T = mask.shape[1]
    at = torch.arange(T, device=mask.device)
    lengths = (mask * at).amax(1).clamp(min=1)
    keep = at[: T - 1] < lengths[:, None]  # [B, T - 1]
    return tokens[:, :-1][keep][None], lengths.cpu(), mask[:, 1:][keep].nonzero()[:, 0]


class TokenLogprob(torch.autograd.Function):
    """(log softmax(h W^T / temperature) at the targets, its entropy or zeros): h [N, D], W [V, D], targets [N] -> [N], [N].

    Logits are float32 and exist for LOGIT_CHUNK tokens at a time; backward computes them again, which costs one product of
    four with W. By hand and in place since each pass over [chunk, V] numbers counts: autograd would take three times as many."""

    @staticmethod
    def chunks(h, weight):
        for start in range(0, len(h), LOGIT_CHUNK):
            part = slice(start, start + LOGIT_CHUNK)
            yield part, F.linear(h[part], weight)

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, with_entropy):
        logprob, total, entropy = torch.zeros(3, len(h), device=h.device).unbind()
        for part, logits in TokenLogprob.chunks(h, weight):
            logits = logits.float().div_(temperature)
            total[part] = logits.logsumexp(-1)
            logprob[part] = logits.gather(-1, targets[part, None])[:, 0] - total[part]
            if with_entropy:
                entropy[part] = total[part] - (logits - total[part, None]).exp_().mul_(logits).sum(-1)
        ctx.save_for_backward(h, weight, targets, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)  # logged, not trained
        return logprob.clone(), entropy

    @staticmethod
    def backward(ctx, grad, _):  # d logprob / d logits = onehot(target) - softmax
        h, weight, targets, total = ctx.saved_tensors
        grad = grad.contiguous()
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
        for part, d in TokenLogprob.chunks(h, weight):
            g = grad[part, None] / ctx.temperature
            d = d.float().div_(ctx.temperature).sub_(total[part, None]).exp_().mul_(-g).scatter_add_(-1, targets[part, None], g).to(h.dtype)
            torch.mm(d, weight, out=grad_h[part])
            grad_weight.addmm_(d.T, h[part])
        return grad_h, grad_weight, None, None, None


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def head_weight(self):  # [V, D]
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def head(self, h):  # [..., D] -> logits [..., V]
        return F.linear(h, self.head_weight().to(h.dtype))

    def forward(self, tokens):
        """LongTensor [B, T] -> float32 logits [B, T, V]; logits[:, t] are for token t + 1."""
        return self.head(self.model(tokens)).float()

    def prefill(self, tokens, cache, row, start):
        """Put tokens [n, T] into rows row, row + 1, ... of the cache, which hold `start` positions already."""
        n, T = tokens.shape
        positions = torch.arange(start, start + T, device=tokens.device)[None]
        self.model(tokens, positions, attend=cache.attend(row, positions, (n,) * cache.blocks(start + T)))

    def decode(self, tokens, positions, cache, counts):
        """Logits [n, V] after tokens [n] of the sequences in the cache's first n rows, which take positions [n] there.
        counts[j]: how many of these rows reach the cache's block j."""
        attend = cache.attend(0, positions[:, None], counts)
        return self.head(self.model(tokens[:, None], positions[:, None], attend=attend)[:, 0])

    def logprobs(self, tokens, mask, temperature=1.0, entropy=True):
        """Log-probability and entropy (nats) of every token under `mask` [B, T]; both [B, T], zero elsewhere.

        Token t is scored by the hidden state at t - 1, so mask[:, 0] must be False. Logits are float32, divided by the
        temperature that the sampler used. Without `entropy` its passes over the logits are saved, and zeros stand for it.
        """
        h = self.model.states(tokens, mask)
        if library := cpu.kernels(h, self.config):  # the same, faster
            parts = cpu.TokenLogprob.apply(library, h, self.head_weight(), tokens[mask], temperature, entropy)
        else:
            parts = TokenLogprob.apply(h, self.head_weight().to(h.dtype), tokens[mask], temperature, entropy)
        return tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, p) for p in parts)

    def reshard(self):
        """Give up whole weights that a forward without backward left behind: FSDP's own method, once sharded; else nothing."""

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.bfloat16, device="cpu"):
        """Load a Hugging Face folder. Raises FileNotFoundError or ValueError (key, expected, found) before reading a weight."""
        return load_model(cls, folder, dtype, device)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and safetensors that transformers and vLLM load unchanged; dtype: of the file, default as held."""
        folder = Path(folder)
        save_tensors(((n, p) for n, p in self.named_parameters()), folder, dtype)
        if rank() == 0:
            name = str(dtype or next(self.parameters()).dtype).removeprefix("torch.")
            raw = {k: v for k, v in self.config.raw.items() if k != "dtype"} | {"torch_dtype": name}
            write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")


class Critic(nn.Module):
    """The policy's trunk under a scalar head without bias (standard deviation 1 / (D + 1), as in the official code)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Trunk(config)
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, tokens, mask):
        """Value of the state before each token under `mask` [B, T]: float32 [B, T], zero elsewhere. Aligned with logprobs."""
        values = self.value_head(self.model.states(tokens, mask).float())  # the head computes in float32: returns need its digits
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)

    reshard = Llama.reshard


def init_weights(model, seed):
    """Random start for --from-scratch: normal of standard deviation 1/sqrt(D), output projections scaled down by depth (GPT-2).

    GPT-2's 0.02 is about 1/sqrt(D) at its own width; at D = 128 it starts too small, and the tiny model learns its facts
    several times slower."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            depth = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, 0.0, model.config.hidden_size**-0.5 / (math.sqrt(2 * model.config.num_hidden_layers) if depth else 1.0), generator=g)


# ---------------------------------------------------------------------------------------------------- 3. Folders

def weight_files(folder):
    """{tensor name: file} of a folder's model.safetensors or model.safetensors.index.json; no path leaves the folder."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index}: weight_map is {type(names).__name__}, expected an object of tensor names to file names")
        for name, file in names.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file:
                raise ValueError(f"{index}: weight_map sends {name} to {file!r}, expected a file name without a folder")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file}: no such file, but {index.name} names it for {name}")
        return {name: folder / file for name, file in names.items()}
    if not single.is_file():
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json there "
                                "(for a random start give --from-scratch)")
    with open_weights(single) as f:
        return {name: single for name in f.keys()}


def read_json(path):
    """A JSON object from a file, or a ValueError that names the file."""
    if path.stat().st_size > 2**26:  # the index of a model of a trillion parameters has a few MB
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {2**26}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path, growing=False):
    """(line number, object) of each line of a jsonl file; growing: a last line still being written is left out."""
    with open(path, encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    if growing and not line.endswith("\n"):
                        return
                    raise ValueError(f"{path}:{number}: not valid JSON: {e}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8 text: {e}") from None


def open_weights(file):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{file}: not a readable safetensors file: {e}") from None


def my_rows(p):
    """The rows of a sharded parameter that this rank holds, as a slice; all rows of a plain tensor."""
    if isinstance(p, DTensor):
        for axis, placement in enumerate(p.placements):
            if placement.is_shard():  # FSDP shards dimension 0 the way torch.chunk does
                size = -(-p.shape[0] // p.device_mesh.size(axis))
                start = p.device_mesh.get_local_rank(axis) * size
                return slice(min(start, p.shape[0]), min(start + size, p.shape[0]))
    return slice(0, p.shape[0])


def local(p):
    return p.to_local() if isinstance(p, DTensor) else p


def full(p):
    """The whole tensor on every rank, on the mesh's device; a collective call where p is sharded."""
    return p.detach().to(p.device_mesh.device_type).full_tensor() if isinstance(p, DTensor) else p.detach()


@torch.no_grad()
def load_tensors(targets, folder, ignore=()):
    """Fill the tensors {name: tensor} from a folder's safetensors; sharded ones read only their own rows.

    All names and shapes are compared before the first weight is read. `ignore`: endings of names that may be there unused.
    """
    files = weight_files(folder)
    missing = [n for n in targets if n not in files]
    extra = [n for n in files if n not in targets and not n.endswith(tuple(ignore))]
    for what, names in (("lacks tensor", missing), ("has the unexpected tensor", extra)):
        if names:
            raise ValueError(f"{folder}: {what} {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
                             + "; the weights do not fit config.json")
    by_file = {}
    for name in targets:
        by_file.setdefault(files[name], []).append(name)
    for read in (False, True):
        for file, names in by_file.items():
            with open_weights(file) as f:
                for name in names:
                    try:
                        source, target = f.get_slice(name), targets[name]
                        shape = source.get_shape()
                        if list(shape) != list(target.shape):
                            raise ValueError(f"{file}: {name} has shape {list(shape)}, expected {list(target.shape)}")
                        rows = my_rows(target)
                        if read and rows.start < rows.stop:
                            local(target).copy_(source[rows])
                    except SafetensorError as e:
                        raise ValueError(f"{file}: {name}: {e}") from None


def load_model(cls, folder, dtype=torch.bfloat16, device="cpu", mesh=None, compute_dtype=None, init_seed=None, offload=False):
    """A Llama or Critic from a Hugging Face folder, sharded over a `mesh` of more than one process; offload: as in shard.

    A Critic takes the policy's trunk, and its head from `init_seed`. A Llama with `init_seed` starts at random.
    """
    config = Config.from_pretrained(folder)
    scratch = cls is Llama and init_seed is not None
    with torch.device("cpu" if scratch else "meta"):
        model = cls(config).to(dtype)
    if scratch:
        init_weights(model, init_seed)
    compute_dtype = compute_dtype or dtype
    if mesh is not None and (mesh.size() > 1 or offload):
        shard(model, mesh, compute_dtype, offload)
    elif compute_dtype != dtype:  # one process needs no FSDP, whose copies cost a tenth of an update on CPU
        model.model.dtype = compute_dtype
    device = "cpu" if offload else device
    if scratch:
        return model.to(device)
    model.to_empty(device=device)
    targets = {n: p for n, p in model.named_parameters() if not n.startswith("value_head")}
    ignore = ["rotary_emb.inv_freq"] + (["lm_head.weight"] if config.tie_word_embeddings or cls is Critic else [])
    load_tensors(targets, folder, ignore)
    if cls is Critic:
        weight = torch.empty(1, config.hidden_size).normal_(
            0.0, 1 / (config.hidden_size + 1), generator=torch.Generator().manual_seed(init_seed or 0))
        with torch.no_grad():
            local(model.value_head.weight).copy_(weight[my_rows(model.value_head.weight)])
    return model


@torch.no_grad()
def save_tensors(named, folder, dtype=None, max_bytes=5 * 10**9):
    """Write (name, tensor) pairs as safetensors, in several files with an index beyond max_bytes. Called by every rank. Sharded
    tensors are gathered one by one and rank 0 writes each at once: never more than one whole tensor is in memory. Files are
    written aside and then renamed."""
    folder, files, size = Path(folder), [[]], 0  # files: lists of (name, tensor, type in the file, bytes)
    for name, p in named:
        kind = dtype or p.dtype
        n = p.numel() * kind.itemsize
        if files[-1] and size + n > max_bytes:
            files.append([])
            size = 0
        files[-1].append((name, p, kind, n))
        size += n
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    for i, entries in enumerate(files):
        with open(folder / f".part-{i}" if rank() == 0 else os.devnull, "wb") as f:
            # the format: 8 bytes of length, a header in JSON padded to a multiple of 8, the tensors' bytes one after the other
            header, at = {"__metadata__": {"format": "pt"}}, 0
            for name, p, kind, n in entries:
                header[name] = {"dtype": SAFETENSORS_TYPES[kind], "shape": list(p.shape), "data_offsets": [at, at + n]}
                at += n
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            f.write(len(text).to_bytes(8, "little") + text)
            for _, p, kind, _ in entries:
                tensor = full(p.to(kind))
                if rank() == 0:
                    f.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                del tensor
    if rank() == 0:
        for i in range(len(files)):
            os.replace(folder / f".part-{i}", folder / shard_name(i, len(files)))
        index = folder / "model.safetensors.index.json"
        if len(files) > 1:
            write_text(index, json.dumps({
                "metadata": {"total_size": sum(n for entries in files for *_, n in entries)},
                "weight_map": {e[0]: shard_name(i, len(files)) for i, entries in enumerate(files) for e in entries}}, indent=2) + "\n")
        else:
            index.unlink(missing_ok=True)


def shard_name(i, n):
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def write_text(path, text):
    """Write aside and rename, so that no reader and no crash ever sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# ---------------------------------------------------------------------------------------------------- 4. Chat prompts

def chat_style(tokenizer):
    """(start of turn, end of role, end of turn) as text, by the special tokens that the tokenizer has."""
    has = lambda *names: all(tokenizer.token_to_id(n) is not None for n in names)
    if has("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"):
        return "llama3"
    if has("<|im_start|>", "<|im_end|>"):
        return "chatml"
    raise ValueError("tokenizer.json: neither Llama 3's <|start_header_id|>, <|end_header_id|>, <|eot_id|>, <|begin_of_text|> "
                     "nor ChatML's <|im_start|>, <|im_end|> among its tokens; expected a chat model's tokenizer")


def chat_prompt(tokenizer, problem):
    """Token ids of one user turn `Problem: {problem}` and the opening of the assistant's turn; no system message.

    Only the template's own special tokens become special: text such as <|eot_id|> inside a problem stays text.
    """
    text = lambda s: tokenizer.encode(s, add_special_tokens=False).ids
    special = tokenizer.token_to_id
    if chat_style(tokenizer) == "llama3":
        turn = lambda role: [special("<|start_header_id|>"), *text(role), special("<|end_header_id|>")]
        return [special("<|begin_of_text|>"), *turn("user"), *text(f"\n\nProblem: {problem}"), special("<|eot_id|>"),
                *turn("assistant"), *text("\n\n")]
    return [special("<|im_start|>"), *text(f"user\nProblem: {problem}"), special("<|im_end|>"), *text("\n"),
            special("<|im_start|>"), *text("assistant\n")]


def end_of_turn(tokenizer):
    return tokenizer.token_to_id("<|eot_id|>" if chat_style(tokenizer) == "llama3" else "<|im_end|>")


def eos_ids(folder, tokenizer):
    """Ids that end a response: the chat template's end of turn, and what generation_config.json or config.json name."""
    ids = {end_of_turn(tokenizer)}
    for file in ("generation_config.json", "config.json"):
        path = Path(folder) / file
        if path.is_file():
            value = read_json(path).get("eos_token_id")
            ids |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return sorted(ids)


# ---------------------------------------------------------------------------------------------------- 5. Many processes

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def keep_freed_memory():
    """Under Linux's glibc: freed tensors stay with the process, and large ones lie on huge pages. By default the memory of every
    tensor of some MB goes back to the kernel, which clears each page anew for the next one: a quarter of an update's time on CPU."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation


@functools.lru_cache
def matrix_peak(device, dtype):
    """FLOP/s of a large matrix product, measured: the best of five, some tenths of a second in all. What `mfu` is a share of."""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.ones(n, n, dtype=dtype, device=device), math.inf
    for _ in range(5):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # float() waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def flops(config, lengths, scored):
    """Model FLOPs of one forward and backward pass over sequences of these lengths, `scored` tokens of which need the token head.

    A weight costs 6 a token, 2 forward and 4 backward. Causal attention over t tokens multiplies t (t + 1) / 2 pairs of H x d
    numbers in each of two products (Q K^T, P V), backward twice that: 6 H d t (t + 1) a layer. What is computed a second time
    (activation checkpointing, the head's logits, attention's own backward) does not count; norms and embeddings neither."""
    c = config
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * width + 2 * kv_width + 3 * c.intermediate_size)
    pairs = sum(t * (t + 1) for t in lengths)
    return 6 * (c.num_hidden_layers * (layer * sum(lengths) + width * pairs) + c.vocab_size * c.hidden_size * scored)


def start_processes(shard_ranks=0):
    """Join torchrun's processes, or be a group of one. Returns (device, mesh): NCCL on GPUs, gloo on CPU and for CPU tensors.

    Weights are sharded over shard_ranks processes (0: those of a node) and replicated over such groups: if there is more than
    one group, the mesh is two-dimensional (HSDP).
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    shards = shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % shards:
        raise ValueError(f"--shard-ranks is {shards}, expected a divisor of the number of processes, {ranks}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        # torchrun ends the others of a dead rank at once; the limit is for one that hangs, and no rollout or judge may take so long
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone)
    shape, names = ((ranks // shards, shards), ("replicate", "shard")) if shards < ranks else ((ranks,), ("shard",))
    return device, init_device_mesh(device.type, shape, mesh_dim_names=names)


def memory():
    """(bytes of this process's GPU, or None; its share of the machine's memory; both in words)."""
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = f"{host / 1e9:.1f} GB of memory for {n} process{'es' * (n > 1)}"
    if not torch.cuda.is_available():
        return None, host // n, words
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return gpu.total_memory, host // n, f"{gpu.name} with {gpu.total_memory / 1e9:.1f} GB, {words}"


def stop_processes():
    """The end of a run that went well. With more than one process it ends the process itself: torch's gloo threads outlive the
    group, and now and then abort in the interpreter's teardown (pytorch issue 190489), so that torchrun reports a failure."""
    many = world_size() > 1
    if many:
        dist.barrier()  # who is done first must not close connections that others still use
    dist.destroy_process_group()
    if many:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def shard(model, mesh, compute_dtype, offload=False):
    """FSDP: float32 (or given) master weights, each block and the root a unit, compute in compute_dtype, reduce in float32.

    offload: weights, gradients and optimizer state stay in host memory, and a unit's weights travel when it computes. The root
    is resharded after its forward, too, unlike FSDP's default, so that outside of forward and backward a model is its shards alone.
    """
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    how = dict(mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=precision, **how)
    if isinstance(model, Critic):
        fully_shard(model.value_head, **how)  # stays in float32
    fully_shard(model, mp_policy=precision, **how)
    if isinstance(model, Llama):
        for method in "logprobs", "prefill", "decode":  # gather weights as forward does
            register_fsdp_forward_method(model, method)


def compile_blocks(model):
    """torch.compile of each block for --compile. Of its forward alone: FSDP's hooks around it stay as they are."""
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True)


@torch.no_grad()
def copy_weights(source, target):
    """Refresh a copy of the model: shards from shards in place, a whole copy (of which free_weights may have taken the memory)
    one parameter at a time, so that only one whole tensor more is in memory."""
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        if isinstance(q, DTensor):
            local(q).copy_(local(p))
        else:
            q.untyped_storage().resize_(q.nbytes)
            q.copy_(full(p.to(q.dtype)))


def free_weights(model):
    """Give back the memory of a whole copy until copy_weights fills it again."""
    for p in model.parameters():
        if not isinstance(p, DTensor):
            p.untyped_storage().resize_(0)
