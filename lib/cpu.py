"""The model on CPU in bfloat16, faster: the same numbers up to rounding, with cpu.c between the matrix products.

    1. kernels     cpu.c, compiled for this machine at first use
    2. accelerate  forward and backward of a block and of the token head, for scoring and training; model.py is the definition
    3. CPUDecoder  a decode step (model.Llama.decode is the definition), by packed weights

A reader of the recipe needs nothing of it: elsewhere than on CPU, in float32 or without a C compiler the definitions run. It is there
because on processors with fast bfloat16 products torch's attention and the operations between products take most of the time.
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
from torch.distributed.tensor import DTensor

from lib import files
from lib.decode import BLOCK, Decoder

VOCABULARY = 2048  # tokens of it whose logits exist at once in training


# ---------------------------------------------------------------------------------------------------- 1. kernels

class Pointer:
    """An argument of a kernel: the address of a contiguous tensor, or NULL for None."""

    @staticmethod
    def from_param(x):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"a kernel was given a tensor of strides {x.stride()}, expected a contiguous one")
        return ctypes.c_void_p(None if x is None else x.data_ptr())


ARGUMENTS = dict(  # l int64, f float, p a tensor
    rms_norm="llfppp", rms_norm_backward="llfppppppp", swiglu="llpp", swiglu_backward="llppp", attention="llpppppplpl",
    attention_backward="llpppppppplpl", turn="llpp", add="lpp", add_turned="llllpp", token_logprob="lllfpppppp", token_logprob_backward="lllfpppp",
    sample="llfpppp", decode_attention="llpppppplp")


@functools.lru_cache
def compiled(D, G):
    """cpu.c, compiled for this machine and these sizes, as a ctypes library; None, and a line that says why, where that fails."""
    source = Path(__file__).with_name("cpu.c")
    with tempfile.TemporaryDirectory() as folder:  # a private one: nobody else's binary is ever loaded
        flags = ["-O3", "-march=native", "-funroll-loops", "-fopenmp", "-shared", "-fPIC",
                   f"-DD={D}", f"-DG={G}", f"-DBLOCK={BLOCK}",
                   # sums in any order, or loops could not become vectors; -ffast-math would change the whole process's floats,
                   # and with -ffinite-math-only a NaN could get lost
                   "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
                   str(source), "-o", f"{folder}/cpu.so", "-lm"]
        try:
            command = [*shlex.split(os.environ.get("CC", "cc")), *flags]
            subprocess.run(command, check=True, capture_output=True, errors="replace", timeout=120)
            library = ctypes.CDLL(f"{folder}/cpu.so")  # its OpenMP threads are torch's: the same library, loaded already
        except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a quote of $CC stays open
            words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            said = files.visible(words[0] if words else error, 300)
            print(f"{source.name}: not compiled ({said}); bfloat16 on CPU is slower without it", file=sys.stderr)
            return None
    for name, kinds in ARGUMENTS.items():
        getattr(library, name).argtypes = [dict(l=ctypes.c_int64, f=ctypes.c_float, p=Pointer)[kind] for kind in kinds]
        getattr(library, name).restype = None
    library.attention_room.argtypes, library.attention_room.restype = [ctypes.c_int64], ctypes.c_int64
    library.use_tiles(1)  # attention takes the processor's matrix unit, where there is one
    return library


@torch.compiler.disable
def kernels(x, config):
    """The library for a tensor of a model of this Config, or None: elsewhere than on CPU, in float32 (whose numbers are the definition's,
    bit for bit), where oneDNN has no products in bfloat16, or without a compiler."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return compiled(config.head_dim, config.num_attention_heads // config.num_key_value_heads)


# ---------------------------------------------------------------------------------------------------- 2. accelerate

class RMSNormFunction(Function):
    """x [1, N, size] -> (x, its norm): what goes around the norm passes through it, so that both gradients meet in one kernel."""

    @staticmethod
    def forward(ctx, library, x, weight, eps):
        out = torch.empty_like(x)
        library.rms_norm(x.shape[1], x.shape[2], eps, x, weight, out)
        ctx.save_for_backward(x, weight)
        ctx.library, ctx.eps = library, eps
        return x.view_as(x), out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_around, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, sums = torch.empty_like(x), torch.empty_like(weight), torch.empty(-(-x.shape[1] // 64), x.shape[2])
        ctx.library.rms_norm_backward(*x.shape[1:], ctx.eps, x, weight, grad.contiguous(), grad_around.contiguous(), grad_x, grad_weight, sums)
        return None, grad_x, grad_weight, None


def is_master(weight):  # not FSDP's copy of it, whose gradient FSDP wants to see
    return weight.is_leaf and weight.dtype == torch.float32 and weight.requires_grad


def gradient_of(master):
    """A master's gradient, to which kernels add what they find: autograd would write that in float32 and read it again for the sum."""
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad


def turned(library, x):  # [n, m] -> [m, n]; torch's copy takes three times as long
    out = x.new_empty(x.shape[1], x.shape[0])
    library.turn(*x.shape, x, out)
    return out


class LinearFunction(Function):
    """Linear layers of the same input as one: x [1, N, in], then a weight [out, in] and a bias or None of each -> [1, N, sum of out],
    plus `add`, of that shape, or None."""

    @staticmethod
    def forward(ctx, library, x, add, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        weight = x.new_empty(sum(map(len, weights)), x.shape[2])
        for part, w in zip(weight.split([len(w) for w in weights]), weights):
            part.copy_(w)  # float32 masters are rounded here
        ctx.save_for_backward(x, weight)
        ctx.library, ctx.weights, ctx.biased = library, weights, biases[0] is not None
        bias = torch.cat(biases).to(x.dtype) if ctx.biased else None
        if add is None:
            return F.linear(x, weight, bias)
        out = torch.empty_like(add)
        torch.addmm(add[0], x[0], weight.t(), out=out[0])
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), sizes = ctx.saved_tensors, [len(w) for w in ctx.weights]
        grad = grad.contiguous()
        biases = grad[0].sum(0).split(sizes) if ctx.biased else [None] * len(sizes)
        gradients, masters = [None] * len(sizes), all(map(is_master, ctx.weights))
        if masters and x.shape[2] <= grad.shape[2]:  # the smaller one is turned
            product, first = turned(ctx.library, x[0]) @ grad[0], 0  # [in, sum of out]
            for w in ctx.weights:
                ctx.library.add_turned(*product.shape, first, len(w), product, gradient_of(w))
                first += len(w)
        else:
            products = (turned(ctx.library, grad[0]) @ x[0]).split(sizes)
            if masters:
                for w, product in zip(ctx.weights, products):
                    ctx.library.add(product.numel(), product, gradient_of(w))
            else:
                gradients = products
        return None, grad @ weight, grad if ctx.needs_input_grad[2] else None, *(g for pair in zip(gradients, biases) for g in pair)


class EmbeddingFunction(Function):
    """Rows of a master, tokens [B, T] -> [B, T, D] of a type; the gradient is added to these rows alone."""

    @staticmethod
    def forward(ctx, weight, tokens, dtype):
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return F.embedding(tokens, weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tokens, = ctx.saved_tensors
        gradient_of(ctx.weight).index_add_(0, tokens.flatten(), grad.flatten(0, 1).float())
        return None, None, None


class TokenLogprobFunction(Function):
    """model.TokenLogprob, by pieces of the vocabulary instead of tokens: logits [N, VOCABULARY] stay in the processor's cache, and a
    piece's weights are read once."""

    @staticmethod
    def pieces(h, weight):
        for first in range(0, len(weight), VOCABULARY):
            w = weight[first : first + VOCABULARY].to(h.dtype)
            yield first, w, F.linear(h, w)

    @staticmethod
    def forward(ctx, library, h, weight, targets, temperature, with_entropy):  # h [N, D], weight [V, D], targets [N]
        top, (sum, mean, logit) = torch.full((len(h),), -1e30), torch.zeros(3, len(h))
        for first, _, logits in TokenLogprobFunction.pieces(h, weight):
            library.token_logprob(*logits.shape, first, 1 / temperature, logits, targets, top, sum, mean if with_entropy else None, logit)
        total = top + sum.log()
        ctx.save_for_backward(h, targets, total)
        ctx.library, ctx.temperature, ctx.weight = library, temperature, weight
        entropy = sum.log() - mean / sum if with_entropy else mean
        ctx.mark_non_differentiable(entropy)
        return logit - total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (h, targets, total), weight, library = ctx.saved_tensors, ctx.weight, ctx.library
        grad, grad_h, h_turned = grad.contiguous(), torch.zeros(h.shape), turned(library, h)
        master = is_master(weight)
        grad_weight = gradient_of(weight) if master else torch.empty_like(weight)
        for first, w, d in TokenLogprobFunction.pieces(h, weight):
            library.token_logprob_backward(*d.shape, first, 1 / ctx.temperature, d, targets, total, grad)
            library.add(h.numel(), d @ w, grad_h)
            product, part = h_turned @ d, grad_weight[first : first + len(w)]
            if master:
                library.add_turned(*product.shape, 0, len(w), product, part)
            else:
                part.copy_(product.t())
        return None, grad_h.to(h.dtype), None if master else grad_weight, None, None, None


class SwiGLUFunction(Function):
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


class AttentionFunction(Function):
    """RoPE and causal attention inside each of the sequences that lie end to end: qkv [1, N, (H + 2 K) d] -> [1, N, H d]."""

    @staticmethod
    def forward(ctx, library, qkv, K, G, d, cos, sin, lengths):  # cos, sin [1, 1, N, d / 2]
        out, total = qkv.new_empty(1, qkv.shape[1], K * G * d), qkv.new_empty(qkv.shape[1], K * G, dtype=torch.float32)
        library.attention(len(lengths), K, lengths, qkv, cos, sin, out, total, *AttentionFunction.room(library, lengths))
        ctx.save_for_backward(qkv, cos, sin, lengths, out, total)
        ctx.library, ctx.K = library, K
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, cos, sin, lengths, out, total = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        ctx.library.attention_backward(len(lengths), ctx.K, lengths, qkv, cos, sin, out, total, grad.contiguous(), grad_qkv,
                                       *AttentionFunction.room(ctx.library, lengths))
        return None, grad_qkv, *[None] * 6

    @staticmethod
    def room(library, lengths):  # threads, numbers for each, how many
        threads, size = torch.get_num_threads(), library.attention_room(int(lengths.max()))
        return threads, torch.empty(threads, size), size


@torch.compiler.disable
def block(library, layer, x, cos, sin, lengths):
    """model.Block's forward on sequences that lie end to end: x [1, N, D] -> [1, N, D]."""
    attention, mlp, config = layer.self_attn, layer.mlp, layer.config
    K, d = config.num_key_value_heads, config.head_dim

    def norm(module, x):
        return RMSNormFunction.apply(library, x, module.weight.to(x.dtype), module.eps)

    def linear(x, add, *modules):
        parameters = [p for module in modules for p in (module.weight, module.bias)]
        return LinearFunction.apply(library, x, add, *parameters)

    x, y = norm(layer.input_layernorm, x)
    qkv = linear(y, None, attention.q_proj, attention.k_proj, attention.v_proj)
    y = AttentionFunction.apply(library, qkv, K, config.num_attention_heads // K, d, cos, sin, lengths)
    x, y = norm(layer.post_attention_layernorm, linear(y, x, attention.o_proj))
    y = SwiGLUFunction.apply(library, linear(y, None, mlp.gate_proj, mlp.up_proj))
    return linear(y, x, mlp.down_proj)


def accelerate(net):
    """Give a finished Llama or Critic the kernels: its blocks, its embedding and its token log-probs are replaced by
    functions that compute the same up to rounding, and that call what was there before for tensors that no kernel
    takes (on another device, in float32, without a compiler). Returns net.

    This is done from outside, so that model.py stays the definition and knows nothing of it.
    """
    for layer in net.model.layers:
        layer.forward = fast_block(layer, layer.forward)
    net.model.embed = fast_embed(net.model, net.model.embed)
    if hasattr(net, "token_logprobs"):
        net.token_logprobs = fast_token_logprobs(net, net.token_logprobs)
    return net


def fast_block(layer, plain):
    def forward(x, cos, sin, lengths=None, cached=None):
        library = kernels(x, layer.config) if lengths is not None else None
        if library is None:
            return plain(x, cos, sin, lengths, cached)
        return block(library, layer, x, cos, sin, lengths)
    return forward


def fast_embed(trunk, plain):
    def embed(tokens):
        weight = trunk.embed_tokens.weight
        if trunk.dtype != torch.bfloat16 or weight.device.type != "cpu" or not is_master(weight):
            return plain(tokens)
        return EmbeddingFunction.apply(weight, tokens, trunk.dtype)  # without a gradient [V, D] of zeros
    return embed


def fast_token_logprobs(net, plain):
    def token_logprobs(h, targets, temperature, entropy):
        library = kernels(h, net.config)
        if library is None:
            return plain(h, targets, temperature, entropy)
        return TokenLogprobFunction.apply(library, h, net.head_weight(), targets, temperature, entropy)
    return token_logprobs


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


class CPUDecoder(Decoder):
    """Llama.decode on CPU in bfloat16: the same step with packed weights, as they are now (their memory a second time), and the
    kernels, which write into tensors that Python allocates."""

    def __init__(self, model, library):
        super().__init__(model)
        self.library = library
        self.layers = []
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            self.layers.append((block.input_layernorm.weight, PackedLinear(a.q_proj, a.k_proj, a.v_proj), PackedLinear(a.o_proj),
                                block.post_attention_layernorm.weight, PackedLinear(m.gate_proj, m.up_proj), PackedLinear(m.down_proj)))
        self.head = PackedLinear(model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens)

    @staticmethod
    def of(model):
        """A decoder of the model, or None where there are no kernels for it or its weights are sharded."""
        weight = model.model.embed_tokens.weight
        library = None if isinstance(weight, DTensor) else kernels(weight, model.config)
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
            self.library.decode_attention(n, c.num_key_value_heads, heads, cos, sin, positions, cache.k[i], cache.v[i], cache.k.stride(1), y)
            x = o(y, add=x)
            inner, y = gate_up(self.norm(x, norm_2)), x.new_empty(n, c.intermediate_size)
            self.library.swiglu(n, c.intermediate_size, inner, y)
            x = down(y, add=x)
        return self.head(self.norm(x, self.model.model.norm.weight))

    def sample(self, logits, temperature, u):
        if temperature == 0:
            return super().sample(logits, temperature, u)
        token, logprob = torch.empty(len(u), dtype=torch.long), torch.empty(len(u))
        self.library.sample(*logits.shape, 1 / temperature, logits, u, token, logprob)
        return token, logprob
