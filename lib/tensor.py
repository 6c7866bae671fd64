"""Tensor parallelism: the ranks of a node share one copy of the policy to sample from (Megatron, 1909.08053).

Each rank has some of the heads with their keys and values, some of the MLP's channels and some of the
vocabulary. Every rank computes its part of each token, and sums over the ranks join the parts: two per block,
one for the embedding, and a gathering of the logits. So a rank reads only its share of the weights and of the
cache for a token, and the ranks of a group decode the same sequences in lock-step.

model.py knows nothing of this: `split` cuts a finished network. Its weights become DTensors, so that loading
and refreshing know which rank has which part. The sums are plain collectives over the local parts, because
with parallelize_module a product of a small decode step takes 0.36 ms of Python instead of 0.01.
"""
import functools
import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lib import decode, parallel
from lib.parallel import local
from model import product


# --------------------------------------------------------------------------------------------------------
# Who shares a copy

def ranks(sampler, shards, node):
    """The number of ranks that share a copy of the policy: those of a node, or fewer by --shard-ranks; one,
    unless the sampler is "tensor"."""
    return math.gcd(shards, node) if sampler == "tensor" else 1


def objection(config, n):
    """Why a model cannot be split over n ranks, in words; "" if it can."""
    for key in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, key) % n:
            return f"{key} is {getattr(config, key)}, expected a multiple of the {n} ranks that share it"
    return ""


def part(config, n):
    """The Config of the part that one of n ranks computes: its heads and channels, but all logits."""
    return replace(config, num_attention_heads=config.num_attention_heads // n,
                   num_key_value_heads=config.num_key_value_heads // n,
                   intermediate_size=config.intermediate_size // n)


@functools.lru_cache(maxsize=1)
def group(device_type, n):
    """The mesh of the n ranks, side by side, that share a copy with this one."""
    shape = parallel.world_size() // n, n
    return init_device_mesh(device_type, shape, mesh_dim_names=("group", "tensor"))["tensor"]


# --------------------------------------------------------------------------------------------------------
# The network

def split(net, mesh):
    """Cut a Llama over the ranks of a mesh, in place.

    Norms and the bias of an output projection stay whole.
    """
    ranks = mesh.get_group()

    def cut(module, dim, forward):
        for name, p in list(module.named_parameters(recurse=False)):
            if name == "weight" or dim == 0:
                setattr(module, name, nn.Parameter(distribute_tensor(p, mesh, [Shard(dim)]), False))
        module.forward = functools.partial(forward, module, ranks)

    for block in net.model.layers:
        attention = block.self_attn
        mlp = block.mlp
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            cut(module, 0, by_outputs)
        for module in (attention.o_proj, mlp.down_proj):
            cut(module, 1, by_inputs)
    cut(net.model.embed_tokens, 0, by_vocabulary)
    if hasattr(net, "lm_head"):
        cut(net.lm_head, 0, by_outputs)
    net.head = functools.partial(head, net, ranks)
    net.config = part(net.config, mesh.size())  # by which a KV cache is made
    net.mesh = mesh


def by_outputs(module, ranks, x):
    """x [..., in] -> [..., out / ranks]: whole heads, or channels of the MLP."""
    bias = None if module.bias is None else local(module.bias)
    return F.linear(x, local(module.weight), bias)


def by_inputs(module, ranks, x):
    """x [..., in / ranks] -> [..., out]: the sum over the ranks of their inputs' contributions."""
    y = F.linear(x, local(module.weight))
    dist.all_reduce(y, group=ranks)
    return y if module.bias is None else y + module.bias


def by_vocabulary(module, ranks, tokens):
    """tokens [...] -> [..., D]: the rank that has a token's row contributes it, the others add zeros."""
    weight = local(module.weight)
    index = tokens - dist.get_rank(ranks) * len(weight)
    elsewhere = (index < 0) | (index >= len(weight))
    x = F.embedding(index.clamp(0, len(weight) - 1), weight).masked_fill_(elsewhere[..., None], 0.0)
    dist.all_reduce(x, group=ranks)
    return x


def head(net, ranks, h):
    """h [n, D] -> float32 logits [n, V], the same bit for bit on every rank, since each part is computed
    once."""
    logits = product(h, local(net.head_weight()).T)  # [n, V / ranks]
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(parts, logits, group=ranks)
    return torch.cat(parts, -1)


# --------------------------------------------------------------------------------------------------------
# Sampling

class Decoder(decode.Decoder):
    """Decoding of a split network. All ranks take the tokens that the first one samples: a GPU does not fix
    the order of a sum over the vocabulary, so otherwise ranks could sample different tokens."""

    def sample(self, logits, temperature, u):
        token, logprob = super().sample(logits, temperature, u)
        found = torch.stack([token.double(), logprob.double()])  # [2, n]; float64 holds both
        ranks = self.model.mesh.get_group()
        dist.broadcast(found, dist.get_global_rank(ranks, 0), group=ranks)
        return found[0].long(), found[1].float()
