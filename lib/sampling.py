"""The rollout's copy of the policy, its cache, and sampling from it. By --sampler the copy is whole on each
rank, shared by the ranks of a node (lib/tensor.py), or sharded."""
import torch.distributed as dist

from lib import cpu, decode, parallel, tensor


def mesh_of(sampler, config, mesh):
    """The mesh that lib.hf.load takes for a sampler: None for a whole copy, the mesh of training for a
    sharded one. Raises ValueError if a model cannot be split."""
    if sampler != "tensor":
        return mesh if sampler == "sharded" else None
    n = tensor.ranks(sampler, mesh["shard"].size(), parallel.environment()[3])
    objection = tensor.objection(config, n)
    if objection:
        raise ValueError(f"--sampler tensor: {objection} (--shard-ranks, or those of a node)")
    return tensor.group(mesh.device_type, n)


def new_cache(config, c, responses, length, dtype, device, mesh):
    """The KV cache of a rank for its share of `responses` sequences, limited by c.slots and c.kv_gb. For a
    split network it has this rank's heads of all sequences of the group."""
    n = tensor.ranks(c.sampler, mesh["shard"].size(), parallel.environment()[3])
    rows = n * -(-responses // parallel.world_size())
    slots = max(1, min(c.slots, rows))
    return decode.new_cache(tensor.part(config, n), slots, length, dtype, device, c.kv_gb)


def generate(net, prompts, *how, streams, progress=None, return_logprobs=False, **more):
    """decode.generate with the fastest decoder of the network.

    The ranks that share a split network gather their prompts, decode all of them together, and each keeps the
    responses to its own prompts.
    """
    if not hasattr(net, "mesh"):
        return decode.generate(net, prompts, *how, streams=streams, progress=progress,
                               return_logprobs=return_logprobs, decoder=cpu.CPUDecoder.of(net), **more)
    ranks = net.mesh.get_group()
    parts = [None] * net.mesh.size()
    dist.all_gather_object(parts, (prompts, list(streams)), group=ranks)
    first = sum(len(prompts) for prompts, _ in parts[: dist.get_rank(ranks)])
    mine = slice(first, first + len(prompts))
    prompts, streams = (sum(lists, []) for lists in zip(*parts))
    if progress is not None:
        progress.total = len(prompts)
    found = decode.generate(net, prompts, *how, streams=streams, progress=progress, return_logprobs=True,
                            decoder=tensor.Decoder(net), **more)
    responses, logprobs = (lists[mine] for lists in found)
    return (responses, logprobs) if return_logprobs else responses
