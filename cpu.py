"""The model on CPU in bfloat16, faster: the same numbers up to rounding, with cpu.c between the matrix products.

    1. kernels     cpu.c, compiled for this machine at first use
    2. block       forward and backward of one block, for scoring and training (model.Block is the definition)
    3. CPUDecoder  a decode step (model.Llama.decode is the definition), by packed weights

A reader of the recipe needs nothing of it: elsewhere than on CPU, in float32 or without a C compiler the definitions run. It is there
because on processors with fast bfloat16 products torch's operations between them, attention above all, take most of the time.
Shapes: N tokens, H query heads, K key/value heads, G = H / K, d = head size.
"""
import ctypes
import functools
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 128  # positions of a block of the KV cache
QUERIES = 512  # whose probabilities [K, QUERIES * G, positions] exist at once


# ---------------------------------------------------------------------------------------------------- 1. kernels

class Pointer:
    """An argument of a kernel: the address of a contiguous tensor, or NULL for None."""

    @staticmethod
    def from_param(x):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"a kernel was given a tensor of strides {x.stride()}, expected a contiguous one")
        return ctypes.c_void_p(None if x is None else x.data_ptr())


ARGUMENTS = dict(  # l int64, f float, p a tensor
    rms_norm="llfppp", rms_norm_backward="llfpppppp", swiglu="llpp", swiglu_backward="llppp", split_heads="lllpppppp",
    join_heads="lllpppppp", softmax="llllp", softmax_backward="llllpp", token_logprob="llfppppp", token_logprob_backward="llfpppp",
    sample="llfpppp", attend="llpppppplp")


@functools.lru_cache
def compiled(D, G):
    """cpu.c, compiled for this machine and these sizes, as a ctypes library; None, and a line that says why, where that fails."""
    source = Path(__file__).with_name("cpu.c")
    with tempfile.TemporaryDirectory() as folder:  # a private one: nobody else's binary is ever loaded
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
                   f"-DD={D}", f"-DG={G}", f"-DBLOCK={BLOCK}",
                   # sums in any order, or loops could not become vectors; -ffast-math would change the whole process's floats,
                   # and with -ffinite-math-only a NaN could get lost
                   "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
                   str(source), "-o", f"{folder}/cpu.so", "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            library = ctypes.CDLL(f"{folder}/cpu.so")  # its OpenMP threads are torch's: the same library, loaded already
        except (OSError, subprocess.SubprocessError) as error:
            words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            print(f"{source.name}: not compiled ({words[0] if words else error}); bfloat16 on CPU is slower without it", file=sys.stderr)
            return None
    for name, kinds in ARGUMENTS.items():
        getattr(library, name).argtypes = [dict(l=ctypes.c_int64, f=ctypes.c_float, p=Pointer)[kind] for kind in kinds]
        getattr(library, name).restype = None
    return library


@torch.compiler.disable
def kernels(x, config):
    """The library for a tensor of a model of this Config, or None: elsewhere than on CPU, in float32 (whose numbers are the definition's,
    bit for bit), where oneDNN has no products in bfloat16, or without a compiler."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return compiled(config.head_dim, config.num_attention_heads // config.num_key_value_heads)


# ---------------------------------------------------------------------------------------------------- 2. block

class RMSNorm(Function):
    @staticmethod
    def forward(ctx, library, x, weight, eps):  # x [1, N, size]
        out = torch.empty_like(x)
        library.rms_norm(x.shape[1], x.shape[2], eps, x, weight, out)
        ctx.save_for_backward(x, weight)
        ctx.library, ctx.eps = library, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, scale = torch.empty_like(x), torch.empty_like(weight), x.new_empty(x.shape[1], dtype=torch.float32)
        ctx.library.rms_norm_backward(x.shape[1], x.shape[2], ctx.eps, x, weight, grad.contiguous(), grad_x, grad_weight, scale)
        return None, grad_x, grad_weight, None


class Linear(Function):
    """Linear layers of the same input as one: x [1, N, in], then a weight [out, in] and a bias or None of each -> [1, N, sum of out]."""

    @staticmethod
    def forward(ctx, x, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        weight = x.new_empty(sum(map(len, weights)), x.shape[2])
        for part, w in zip(weight.split([len(w) for w in weights]), weights):
            part.copy_(w)  # float32 masters are rounded here
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.biased = [len(w) for w in weights], biases[0] is not None
        return F.linear(x, weight, torch.cat(biases).to(x.dtype) if ctx.biased else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = grad @ weight, grad[0].t() @ x[0]
        biases = grad[0].sum(0).split(ctx.sizes) if ctx.biased else [None] * len(ctx.sizes)
        return grad_x, *(g for pair in zip(grad_weight.split(ctx.sizes), biases) for g in pair)


class SwiGLU(Function):
    @staticmethod
    def forward(ctx, library, gate_up):  # [1, N, 2 size] -> [1, N, size]
        out = gate_up.new_empty(1, gate_up.shape[1], gate_up.shape[2] // 2)
        library.swiglu(*out.shape[1:], gate_up, out)
        ctx.save_for_backward(gate_up)
        ctx.library = library
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate_up, = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        ctx.library.swiglu_backward(*grad.shape[1:], gate_up, grad.contiguous(), grad_gate_up)
        return None, grad_gate_up


class Attention(Function):
    """RoPE and causal attention inside each of the sequences that lie end to end: qkv [1, N, (H + 2 K) d] -> [1, N, H d].

    The query heads of one key head are rows of one product. Probabilities are computed for QUERIES queries at a time, up to the
    last one's position, and again in backward."""
    STEP = 32  # keys are taken in multiples of it, beyond a sequence's end, too, where probabilities are 0: vectors are whole, shapes few

    @staticmethod
    def pieces(lengths, G):
        """(rows of these queries, positions of the keys that they see, how many keys lie before the first query)"""
        start = 0
        for n in lengths.tolist():
            for first in range(0, n, QUERIES):
                end = min(first + QUERIES, n)
                yield slice((start + first) * G, (start + end) * G), slice(start, start + -(-end // Attention.STEP) * Attention.STEP), first
            start += n

    @staticmethod
    def probabilities(library, q, k, first, G):  # [K, n * G, d], [K, size, d] -> [K, n * G, size]
        p = q @ k.mT
        library.softmax(len(k), q.shape[1] // G, k.shape[1], first, p)
        return p

    @staticmethod
    def forward(ctx, library, qkv, K, G, d, cos, sin, lengths):  # cos, sin [1, 1, N, d / 2]
        N, size = qkv.shape[1], qkv.shape[1] + Attention.STEP - 1
        q, y, (k, v) = qkv.new_empty(K, N * G, d), qkv.new_empty(K, N * G, d), qkv.new_empty(2, K, size, d)
        library.split_heads(N, K, size, qkv, cos, sin, q, k, v)
        for rows, seen, first in Attention.pieces(lengths, G):
            y[:, rows] = Attention.probabilities(library, q[:, rows], k[:, seen], first, G) @ v[:, seen]
        ctx.save_for_backward(q, k, v, cos, sin, lengths)
        ctx.library = library
        return y.view(K, N, G * d).transpose(0, 1).reshape(1, N, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, cos, sin, lengths = ctx.saved_tensors
        (K, size, d), N = k.shape, grad.shape[1]
        G = q.shape[1] // N
        grad = grad.view(N, K, G * d).transpose(0, 1).reshape(K, N * G, d)
        grad_q, (grad_k, grad_v) = torch.empty_like(q), torch.zeros(2, K, size, d)  # float32: a key gets parts from many queries
        for rows, seen, first in Attention.pieces(lengths, G):
            p, dy = Attention.probabilities(ctx.library, q[:, rows], k[:, seen], first, G), grad[:, rows]
            grad_v[:, seen] += p.mT @ dy
            dp = dy @ v[:, seen].mT
            ctx.library.softmax_backward(K, dy.shape[1] // G, p.shape[2], first, p, dp)
            grad_q[:, rows] = dp @ k[:, seen]
            grad_k[:, seen] += dp.mT @ q[:, rows]
        grad_qkv = q.new_empty(1, N, (G + 2) * K * d)
        ctx.library.join_heads(N, K, size, grad_q, grad_k.to(q.dtype), grad_v.to(q.dtype), cos, sin, grad_qkv)
        return None, grad_qkv, *[None] * 6


@torch.compiler.disable
def block(library, layer, x, cos, sin, lengths):
    """Block.forward on sequences that lie end to end: x [1, N, D] -> [1, N, D]."""
    a, m, c = layer.self_attn, layer.mlp, layer.config
    norm = lambda layer, x: RMSNorm.apply(library, x, layer.weight.to(x.dtype), layer.eps)
    linear = lambda x, *layers: Linear.apply(x, *(p for layer in layers for p in (layer.weight, layer.bias)))
    qkv = linear(norm(layer.input_layernorm, x), a.q_proj, a.k_proj, a.v_proj)
    K, d = c.num_key_value_heads, c.head_dim
    y = Attention.apply(library, qkv, K, c.num_attention_heads // K, d, cos, sin, lengths)
    x = x + linear(y, a.o_proj)
    y = SwiGLU.apply(library, linear(norm(layer.post_attention_layernorm, x), m.gate_proj, m.up_proj))
    return x + linear(y, m.down_proj)


# ---------------------------------------------------------------------------------------------------- 3. CPUDecoder

class PackedLinear:
    """Linear layers of the same input as one, on CPU, the weight laid out once for oneDNN, which else lays it out anew at every
    call: for few rows that takes longer than the product. torch.compile's freezing uses the same functions."""

    def __init__(self, *layers):
        join = lambda tensors: None if tensors[0] is None else torch.cat([x.detach() for x in tensors])
        self.bias = join([getattr(x, "bias", None) for x in layers])  # an embedding, as a token head, has none
        self.weight = torch.ops.mkldnn._reorder_linear_weight(join([x.weight for x in layers]), 64)

    def __call__(self, x, add=None):  # [n, in] -> [n, out], plus `add` of that shape
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self.weight, self.bias, "add")


class CPUDecoder:
    """Llama.decode on CPU in bfloat16: the same step with packed weights, as they are now (their memory a second time), and the
    kernels, which write into tensors that Python allocates."""

    def __init__(self, model, library):
        self.model, self.library, self.layers = model, library, []
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            self.layers.append((block.input_layernorm.weight, PackedLinear(a.q_proj, a.k_proj, a.v_proj), PackedLinear(a.o_proj),
                                block.post_attention_layernorm.weight, PackedLinear(m.gate_proj, m.up_proj), PackedLinear(m.down_proj)))
        self.head = PackedLinear(model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens)

    @staticmethod
    def of(model):
        """A decoder of the model, or None where there are no kernels for it."""
        library = kernels(model.model.embed_tokens.weight, model.config)
        return library and CPUDecoder(model, library)

    def norm(self, x, weight):
        out = torch.empty_like(x)
        self.library.rms_norm(*x.shape, self.model.config.rms_norm_eps, x, weight, out)
        return out

    def decode(self, tokens, positions, cache, counts):
        """As Llama.decode; counts is not needed: each row is read up to its own position."""
        c, n = self.model.config, len(tokens)
        positions = positions.contiguous()
        cos, sin = (x[:, 0, 0].contiguous() for x in self.model.model.rotation(positions[:, None], torch.bfloat16))  # [n, d / 2]
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)
        for i, (norm_1, qkv, o, norm_2, gate_up, down) in enumerate(self.layers):
            heads, y = qkv(self.norm(x, norm_1)), x.new_empty(n, c.num_attention_heads * c.head_dim)
            self.library.attend(n, c.num_key_value_heads, heads, cos, sin, positions, cache.k[i], cache.v[i], cache.k.stride(1), y)
            x = o(y, add=x)
            inner, y = gate_up(self.norm(x, norm_2)), x.new_empty(n, c.intermediate_size)
            self.library.swiglu(n, c.intermediate_size, inner, y)
            x = down(y, add=x)
        return self.head(self.norm(x, self.model.model.norm.weight))

    def sample(self, logits, temperature, u):
        """As decode.sample, at a positive temperature."""
        token, logprob = torch.empty(len(u), dtype=torch.long), torch.empty(len(u))
        self.library.sample(*logits.shape, 1 / temperature, logits, u, token, logprob)
        return token, logprob
