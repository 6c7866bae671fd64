"""A faster version of the model on CPU in bfloat16, equal up to rounding: cpu.c computes what lies between
the matrix products.

    1. kernels     cpu.c, compiled for this machine at first use
    2. accelerate  forward and backward passes of a block and of the token head, for scoring and training
    3. CPUDecoder  a decode step by packed weights

model.py defines all of it, and a reader of the recipe does not need this file: on other devices, in float32
or without a C compiler the definitions run. This file exists because, on processors with fast products in
bfloat16, torch's attention and the operations between products take most of the time.

Shapes: N tokens of sequences that lie end to end, D hidden size, V vocabulary, H query heads, K key/value
heads, G = H / K, d = head size.
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

VOCABULARY = 2048  # how many tokens of the vocabulary have their logits at once in training


# --------------------------------------------------------------------------------------------------------
# 1. kernels

class Pointer:
    """An argument of a kernel: the address of a contiguous tensor, or NULL for None."""

    @staticmethod
    def from_param(x):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"a kernel was given a tensor of strides {x.stride()}, "
                             "expected a contiguous one")
        return ctypes.c_void_p(None if x is None else x.data_ptr())


# The arguments of each kernel: l is an int64, f a float, p a tensor.
ARGUMENTS = dict(rms_norm="llfppp", rms_norm_backward="llfppppppp", swiglu="llpp", swiglu_backward="llppp",
                 attention="llpppppplpl", attention_backward="llpppppppplpl", turn="llpp", add="lpp",
                 add_turned="llllpp", token_logprob="lllfpppppp", token_logprob_backward="lllfpppppp",
                 sample="llfpppp", decode_attention="llpppppplp")


@functools.lru_cache
def compiled(D, G):
    """cpu.c as a ctypes library, compiled for this machine, head size D and G query heads per key head.

    If that fails, it prints a line that says why, and returns None.
    """
    source = Path(__file__).with_name("cpu.c")
    with tempfile.TemporaryDirectory() as folder:  # private, so that no other user's binary is loaded
        # Sums may take any order, or loops could not become vectors. -ffast-math would change the floats of
        # the whole process, and with -ffinite-math-only a NaN could get lost.
        flags = ["-O3", "-march=native", "-funroll-loops", "-fopenmp", "-shared", "-fPIC",
                 f"-DD={D}", f"-DG={G}", f"-DBLOCK={BLOCK}",
                 "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
                 str(source), "-o", f"{folder}/cpu.so", "-lm"]
        try:
            command = [*shlex.split(os.environ.get("CC", "cc")), *flags]
            subprocess.run(command, check=True, capture_output=True, errors="replace", timeout=120)
            library = ctypes.CDLL(f"{folder}/cpu.so")  # its OpenMP is torch's, which is loaded already
        except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: an open quote in $CC
            words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            said = files.visible(words[0] if words else error, 300)
            print(f"{source.name}: not compiled ({said}); bfloat16 on CPU is slower without it",
                  file=sys.stderr)
            return None
    types = dict(l=ctypes.c_int64, f=ctypes.c_float, p=Pointer)
    for name, letters in ARGUMENTS.items():
        getattr(library, name).argtypes = [types[letter] for letter in letters]
        getattr(library, name).restype = None
    library.attention_room.argtypes = [ctypes.c_int64]
    library.attention_room.restype = ctypes.c_int64
    library.use_tiles(1)  # attention takes the processor's matrix unit, where there is one
    return library


@torch.compiler.disable
def kernels(x, config):
    """The library for a tensor x of a model of this Config, or None.

    There is none for other devices than the CPU, for float32 (whose numbers are the definition's, bit for
    bit), if oneDNN has no products in bfloat16, and without a compiler.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return None
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return compiled(config.head_dim, config.num_attention_heads // config.num_key_value_heads)


# --------------------------------------------------------------------------------------------------------
# 2. accelerate

class RMSNormFunction(Function):
    """x [1, N, D] -> (x, its norm).

    What goes around the norm also passes through it, so that both gradients meet in one kernel.
    """

    @staticmethod
    def forward(ctx, library, x, weight, eps):
        out = torch.empty_like(x)
        library.rms_norm(x.shape[1], x.shape[2], eps, x, weight, out)
        ctx.save_for_backward(x, weight)
        ctx.library = library
        ctx.eps = eps
        return x.view_as(x), out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_around, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty_like(weight)
        sums = torch.empty(-(-x.shape[1] // 64), x.shape[2])  # over 64 tokens each, before they are added up
        ctx.library.rms_norm_backward(*x.shape[1:], ctx.eps, x, weight, grad.contiguous(),
                                      grad_around.contiguous(), grad_x, grad_weight, sums)
        return None, grad_x, grad_weight, None


def is_master(weight):
    """Whether p is a float32 master, and not FSDP's copy of one, whose gradient FSDP needs."""
    return weight.is_leaf and weight.dtype == torch.float32 and weight.requires_grad


def gradient_of(master):
    """A master's gradient, to which kernels add.

    Autograd would write what is to be added in float32, and read it again for the sum.
    """
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad


def turned(library, x):
    """The transpose [m, n] of x [n, m], contiguous. (torch's copy takes three times as long.)"""
    out = x.new_empty(x.shape[1], x.shape[0])
    library.turn(*x.shape, x, out)
    return out


class LinearFunction(Function):
    """Linear layers of the same input as one: x [1, N, in] -> [1, N, sum of out], plus `add` if not None.

    The parameters are a weight [out, in] and a bias [out] or None of each layer.
    """

    @staticmethod
    def forward(ctx, library, x, add, *parameters):
        weights = parameters[::2]
        biases = parameters[1::2]
        weight = x.new_empty(sum(map(len, weights)), x.shape[2])
        for part, w in zip(weight.split([len(w) for w in weights]), weights):
            part.copy_(w)  # float32 masters are rounded here
        ctx.save_for_backward(x, weight)
        ctx.library = library
        ctx.weights = weights
        ctx.biased = biases[0] is not None
        bias = torch.cat(biases).to(x.dtype) if ctx.biased else None
        if add is None:
            return F.linear(x, weight, bias)
        out = torch.empty_like(add)
        torch.addmm(add[0], x[0], weight.t(), out=out[0])
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        sizes = [len(w) for w in ctx.weights]
        grad = grad.contiguous()
        grad_biases = grad[0].sum(0).split(sizes) if ctx.biased else [None] * len(sizes)
        grad_weights = [None] * len(sizes)
        masters = all(map(is_master, ctx.weights))
        if masters and x.shape[2] <= grad.shape[2]:  # the smaller one is turned
            product = turned(ctx.library, x[0]) @ grad[0]  # [in, sum of out]
            first = 0
            for w in ctx.weights:
                ctx.library.add_turned(*product.shape, first, len(w), product, gradient_of(w))
                first += len(w)
        else:
            products = (turned(ctx.library, grad[0]) @ x[0]).split(sizes)
            if masters:
                for w, product in zip(ctx.weights, products):
                    ctx.library.add(product.numel(), product, gradient_of(w))
            else:
                grad_weights = products
        grad_add = grad if ctx.needs_input_grad[2] else None
        return None, grad @ weight, grad_add, *(g for pair in zip(grad_weights, grad_biases) for g in pair)


class EmbeddingFunction(Function):
    """Rows of a master, in a given type: tokens [B, T] -> [B, T, D]. The gradient is added only to these
    rows."""

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
    """model.TokenLogprob by pieces of the vocabulary instead of tokens.

    Logits [N, VOCABULARY] stay in the processor's cache, and a piece's weights are read once.
    """

    @staticmethod
    def pieces(h, weight):
        for first in range(0, len(weight), VOCABULARY):
            w = weight[first : first + VOCABULARY].to(h.dtype)
            yield first, w, F.linear(h, w)  # [N, VOCABULARY]

    @staticmethod
    def forward(ctx, library, h, weight, targets, temperature, with_entropy):  # [N, D], [V, D], [N]
        top = torch.full((len(h),), -1e30)  # the largest logit z so far
        exp_sum, weighted, logit = torch.zeros(3, len(h))  # sums of e = exp(z - top) and of (z - top) e
        for first, _, logits in TokenLogprobFunction.pieces(h, weight):
            library.token_logprob(*logits.shape, first, 1 / temperature, logits, targets, top, exp_sum,
                                  weighted if with_entropy else None, logit)
        total = top + exp_sum.log()
        entropy = exp_sum.log() - weighted / exp_sum if with_entropy else None
        ctx.save_for_backward(h, targets, total, entropy)
        ctx.library = library
        ctx.temperature = temperature
        ctx.weight = weight
        return logit - total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy):
        h, targets, total, entropy = ctx.saved_tensors
        weight = ctx.weight
        library = ctx.library
        grad = grad.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        grad_h = torch.zeros(h.shape)  # in float32
        h_turned = turned(library, h)
        master = is_master(weight)
        grad_weight = gradient_of(weight) if master else torch.empty_like(weight)
        for first, w, d in TokenLogprobFunction.pieces(h, weight):
            library.token_logprob_backward(*d.shape, first, 1 / ctx.temperature, d, targets, total, grad,
                                           entropy, grad_entropy)
            library.add(h.numel(), d @ w, grad_h)
            product = h_turned @ d  # [D, VOCABULARY]
            part = grad_weight[first : first + len(w)]
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
    """RoPE and causal attention inside each of the sequences that lie end to end.

    qkv [1, N, (H + 2 K) d] -> [1, N, H d]; lengths of the sequences int64 on the CPU.
    """

    @staticmethod
    def forward(ctx, library, qkv, K, G, d, cos, sin, lengths):  # cos, sin [1, 1, N, d / 2]
        N = qkv.shape[1]
        out = qkv.new_empty(1, N, K * G * d)
        total = qkv.new_empty(N, K * G, dtype=torch.float32)  # log-sum-exp of each query's scores
        room = AttentionFunction.room(library, lengths)
        library.attention(len(lengths), K, lengths, qkv, cos, sin, out, total, *room)
        ctx.save_for_backward(qkv, cos, sin, lengths, out, total)
        ctx.library = library
        ctx.K = K
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, cos, sin, lengths, out, total = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        room = AttentionFunction.room(ctx.library, lengths)
        ctx.library.attention_backward(len(lengths), ctx.K, lengths, qkv, cos, sin, out, total,
                                       grad.contiguous(), grad_qkv, *room)
        return None, grad_qkv, *[None] * 6

    @staticmethod
    def room(library, lengths):
        """(threads, room for the intermediate numbers of each, its size per thread)."""
        threads = torch.get_num_threads()
        size = library.attention_room(int(lengths.max()))
        return threads, torch.empty(threads, size), size


def normed_heads(attention, qkv):
    """qkv [..., (H + 2 K) d] with each head of q and k normalised by the definition, if the model does so."""
    if isinstance(attention.q_norm, torch.nn.Identity):
        return qkv
    sizes = [len(module.weight) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in qkv.split(sizes, dim=-1))
    return torch.cat((attention.q_norm(q), attention.k_norm(k), v), dim=-2).flatten(-2)


@torch.compiler.disable
def packed_block(library, layer, x, cos, sin, lengths):
    """The forward pass of model.Block on sequences that lie end to end: x [1, N, D] -> [1, N, D]."""
    attention = layer.self_attn
    mlp = layer.mlp
    config = layer.config
    K = config.num_key_value_heads
    G = config.num_attention_heads // K

    def norm(module, x):
        return RMSNormFunction.apply(library, x, module.weight.to(x.dtype), module.eps)

    def linear(x, add, *modules):
        parameters = [p for module in modules for p in (module.weight, module.bias)]
        return LinearFunction.apply(library, x, add, *parameters)

    x, y = norm(layer.input_layernorm, x)
    qkv = normed_heads(attention, linear(y, None, attention.q_proj, attention.k_proj, attention.v_proj))
    y = AttentionFunction.apply(library, qkv, K, G, config.head_dim, cos, sin, lengths)
    x, y = norm(layer.post_attention_layernorm, linear(y, x, attention.o_proj))
    y = SwiGLUFunction.apply(library, linear(y, None, mlp.gate_proj, mlp.up_proj))
    return linear(y, x, mlp.down_proj)


def accelerate(net):
    """Give a finished Llama or Critic the kernels: its blocks, its embedding and its token log-probs are
    replaced by functions that compute the same up to rounding, and that call what was there before for
    tensors that no kernel takes (on another device, in float32, without a compiler). Returns net.

    This is done from outside, so that model.py stays the definition and knows nothing of it.
    """
    for layer in net.model.layers:
        layer.forward = fast_block(layer, layer.forward)
    net.model.embed = fast_embed(net.model, net.model.embed)
    if hasattr(net, "token_logprobs"):
        net.token_logprobs = fast_token_logprobs(net, net.token_logprobs)
    return net


def fast_block(layer, plain):
    """A forward method for a block: by kernels on sequences that lie end to end, else `plain`."""
    def forward(x, cos, sin, lengths=None, cached=None):
        library = kernels(x, layer.config) if lengths is not None else None
        if library is None:
            return plain(x, cos, sin, lengths, cached)
        return packed_block(library, layer, x, cos, sin, lengths)
    return forward


def fast_embed(trunk, plain):
    """A method in place of Trunk.embed that makes no gradient [V, D] of zeros for few tokens."""
    def embed(tokens):
        weight = trunk.embed_tokens.weight
        if trunk.dtype != torch.bfloat16 or weight.device.type != "cpu" or not is_master(weight):
            return plain(tokens)
        return EmbeddingFunction.apply(weight, tokens, trunk.dtype)
    return embed


def fast_token_logprobs(net, plain):
    """A method in place of Llama.token_logprobs."""
    def token_logprobs(h, targets, temperature, entropy):
        library = kernels(h, net.config)
        if library is None:
            return plain(h, targets, temperature, entropy)
        return TokenLogprobFunction.apply(library, h, net.head_weight(), targets, temperature, entropy)
    return token_logprobs


# --------------------------------------------------------------------------------------------------------
# 3. CPUDecoder

class PackedLinear:
    """Linear layers of the same input as one, on CPU, whose weight is laid out once for oneDNN.

    oneDNN would otherwise lay it out again at every call, which for few rows takes longer than the product.
    torch.compile's freezing uses the same functions.
    """

    def __init__(self, *layers):
        biases = [getattr(layer, "bias", None) for layer in layers]  # an embedding, as a token head, has none
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64)

    def __call__(self, x, add=None):  # [n, in] -> [n, out], plus `add` of that shape
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self.weight, self.bias, "add")


class CPUDecoder(Decoder):
    """Llama.decode on CPU in bfloat16: the same step with packed weights and the kernels.

    The packed weights are a copy of the model's as they are now. The kernels write into tensors that Python
    allocates.
    """

    def __init__(self, model, library):
        super().__init__(model)
        self.library = library
        self.layers = []
        for block in model.model.layers:
            a = block.self_attn
            m = block.mlp
            qkv = PackedLinear(a.q_proj, a.k_proj, a.v_proj)
            gate_up = PackedLinear(m.gate_proj, m.up_proj)
            self.layers.append((block.input_layernorm.weight, a, qkv, PackedLinear(a.o_proj),
                                block.post_attention_layernorm.weight, gate_up, PackedLinear(m.down_proj)))
        self.head = PackedLinear(model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens)

    @staticmethod
    def of(model):
        """A decoder for the model, or None if there are no kernels for it or its weights are sharded."""
        weight = model.model.embed_tokens.weight
        library = None if isinstance(weight, DTensor) else kernels(weight, model.config)
        return library and CPUDecoder(model, library)

    def norm(self, x, weight):
        out = torch.empty_like(x)
        self.library.rms_norm(*x.shape, self.model.config.rms_norm_eps, x, weight, out)
        return out

    def decode(self, tokens, positions, cache, counts):
        """As Llama.decode, logits [n, V]. counts is not needed: each row is read up to its own position."""
        c = self.model.config
        n = len(tokens)
        positions = positions.contiguous()
        rotation = self.model.model.rotation(positions[:, None], torch.bfloat16)
        cos, sin = (x[:, 0, 0].contiguous() for x in rotation)  # [n, d / 2]
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)
        for i, (norm_1, attention, qkv, o, norm_2, gate_up, down) in enumerate(self.layers):
            heads = normed_heads(attention, qkv(self.norm(x, norm_1)))  # [n, (H + 2 K) d]
            y = x.new_empty(n, c.num_attention_heads * c.head_dim)
            self.library.decode_attention(n, c.num_key_value_heads, heads, cos, sin, positions,
                                          cache.k[i], cache.v[i], cache.k.stride(1), y)
            x = o(y, add=x)
            inner = gate_up(self.norm(x, norm_2))
            y = x.new_empty(n, c.intermediate_size)
            self.library.swiglu(n, c.intermediate_size, inner, y)
            x = down(y, add=x)
        return self.head(self.norm(x, self.model.model.norm.weight))

    def sample(self, logits, temperature, u):
        if temperature == 0:
            return super().sample(logits, temperature, u)
        token = torch.empty(len(u), dtype=torch.long)
        logprob = torch.empty(len(u))
        self.library.sample(*logits.shape, 1 / temperature, logits, u, token, logprob)
        return token, logprob
