"""Many processes: rank and collectives, joining and leaving torchrun's job, plain FSDP.

Every function also works for a single process, a group of one.
"""
import contextlib
import ctypes
import hashlib
import os
import re
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

from lib import files, threads
from model import Critic, Llama


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x):
    """Sum a CPU tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """[x of rank 0, x of rank 1, ...], the same on every rank."""
    everyone = [x] * world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, x)  # it unpickles, but only objects of our own processes
    return everyone


def together(f, all_ranks=False):
    """Call f on rank 0, or with all_ranks on every rank. Returns [f() of each rank], with None where it was
    not called.

    An OSError or ValueError that one rank raises is raised on every rank, so that no rank waits in vain.
    """
    result = None
    error = None
    if all_ranks or rank() == 0:
        try:
            result = f()
        except (OSError, ValueError) as e:
            error = e
    results, errors = zip(*gather((result, error)))
    for error in filter(None, errors):
        error.everywhere = True  # every rank raises it, so that it is enough for one to print it
        raise error
    return results


def compute_type():
    """The type for `--dtype auto`: bfloat16 on GPUs and where oneDNN supports products in it, else float32.

    A processor that emulates products in bfloat16 takes a hundred times as long for them.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if torch.cuda.is_available() or onednn else "float32"


def environment():
    """(rank, ranks, rank on this node, ranks on this node), from the variables that torchrun sets.

    Raises ValueError if they do not fit together, which would otherwise cause a hang or a division by zero.
    """
    found = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name)
        if text is not None and not (re.fullmatch("[0-9]{1,5}", text) and int(text) < 65536):
            raise ValueError(f"{name} is {files.visible(repr(text))} in the environment, "
                             "expected a number below 65536")
        found[name] = None if text is None else int(text)
    rank, ranks, local_rank, local_ranks, port = found.values()
    needed = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": os.environ.get("MASTER_ADDR"),
              "MASTER_PORT": port}
    missing = [name for name, value in needed.items() if value is None]
    local_ranks = (ranks or 1) if local_ranks is None else local_ranks
    if rank is None and ranks is None:  # a single process, whatever else torchrun may have left
        rank = 0
        ranks = 1
        most = local_ranks
    elif missing:
        present = "WORLD_SIZE" if ranks else "RANK"
        raise ValueError(f"{missing[0]} is not in the environment, but {present} is: "
                         "expected all variables that torchrun sets, or none")
    else:
        most = ranks
    local_rank = 0 if local_rank is None else local_rank
    if not (rank < ranks and 1 <= local_ranks <= most and local_rank < local_ranks):
        raise ValueError(f"RANK {rank} of WORLD_SIZE {ranks}, LOCAL_RANK {local_rank} of "
                         f"LOCAL_WORLD_SIZE {local_ranks} in the environment: "
                         "expected each rank below its size, as torchrun sets them")
    return rank, ranks, local_rank, local_ranks


@contextlib.contextmanager
def alike():
    """An OSError or ValueError that one rank raises in this block is raised on every rank at its end.

    So no rank waits for one that has ended. The block must not contain collectives.
    """
    error = None
    try:
        yield
    except (OSError, ValueError) as e:
        error = e
    if world_size() == 1:
        if error:
            raise error
        return
    errors = gather(error and str(error))
    for number, line in enumerate(errors):
        if line:
            error = ValueError(line if all(errors) else f"rank {number}: {line}")
            error.everywhere = True
            raise error


def join():
    """Connect to the other processes of torchrun, or of any launcher that sets RANK. A single process does
    nothing."""
    environment()
    if "RANK" in os.environ and not dist.is_initialized():
        connect()


def connect(**alone):
    """Create the process group: NCCL on GPUs, gloo on CPU and for CPU tensors."""
    kind = "gloo"
    if torch.cuda.is_available():
        kind = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # If a rank dies, torchrun ends the others at once. The limit is for a rank that hangs: no rollout and no
    # judge takes so long.
    limit = timedelta(hours=2)
    try:
        dist.init_process_group(kind, timeout=limit, **alone)
    except dist.DistError as e:  # such as a port that is taken
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(e).splitlines()[0]
        raise ConnectionError(f"{where}: the processes cannot meet there: {reason}") from None


def start(shard_ranks=0, offload=False):
    """Join the other processes, or form a group of one. Returns (device, mesh).

    Weights are sharded over shard_ranks processes (0: those of a node) and replicated over such groups. If
    there is more than one group, the mesh is two-dimensional (HSDP). With offload, much of the work runs on
    the processor. Raises ValueError if shard_ranks does not divide the number of processes.
    """
    _, ranks, local_rank, local_ranks = environment()
    shards = shard_ranks or min(local_ranks, ranks)
    if ranks % shards:
        raise ValueError(f"--shard-ranks is {shards}, expected a divisor of the number of processes, {ranks}")
    if offload:
        threads.divide_cores()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        # On some GPUs torch prefers cuDNN's attention, which builds a plan for every new length and stride,
        # that is, for every sequence of a packed micro-batch. The other kernels build none.
        torch.backends.cuda.enable_cudnn_sdp(False)
    join()
    if not dist.is_initialized():
        connect(store=dist.HashStore(), rank=0, world_size=1)
    if shards < ranks:
        mesh = init_device_mesh(device.type, (ranks // shards, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return device, mesh


def stop():
    """End a run that succeeded.

    With more than one process it also ends the process. torch's gloo threads outlive the group and sometimes
    abort while the interpreter shuts down (pytorch issue 190489), and torchrun would report that as a
    failure.
    """
    many = world_size() > 1
    if many:
        dist.barrier()  # the first to finish must not close connections that others still use
    dist.destroy_process_group()
    if many:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def memory():
    """(bytes of this process's GPU or None, its part of the machine's memory in bytes, both in words)."""
    *_, n = environment()
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = f"{host / 1e9:.1f} GB of memory for {n} process{'es' * (n > 1)}"
    if not torch.cuda.is_available():
        return None, host // n, words
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return gpu.total_memory, host // n, f"{gpu.name} with {gpu.total_memory / 1e9:.1f} GB, {words}"


def keep_freed_memory():
    """Under Linux's glibc, keep the memory of freed tensors, and put large tensors on huge pages.

    By default the memory of every tensor of some MB is returned to the kernel, which clears each page again
    for the next tensor. On CPU that takes a quarter of an update's time.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks also come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation


def shard(model, mesh, compute_dtype, offload=False):
    """Shard a model by FSDP, in place. Each block is a unit, and the root is one.

    The master weights keep their type, float32 in training; each unit computes in compute_dtype and reduces
    gradients in float32. With offload, weights, gradients and optimizer state stay in host memory, and a
    unit's weights are transferred when it computes. Unlike FSDP's default, the root is also resharded after
    its forward pass, so that a model consists only of its shards outside of forward and backward passes.
    """
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    placement = dict(mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=precision, **placement)
    if isinstance(model, Critic):
        fully_shard(model.value_head, **placement)  # stays in float32
    fully_shard(model, mp_policy=precision, **placement)
    if isinstance(model, Llama):
        for method in ("logprobs", "prefill", "decode"):  # these gather weights as forward does
            register_fsdp_forward_method(model, method)


def compile_blocks(model):
    """Compile each block's forward method for --compile; FSDP's hooks around it stay as they are."""
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True)


def my_part(p):
    """The part of a parameter that this rank holds, as a slice per dimension; all of it for a plain
    tensor."""
    part = [slice(0, n) for n in p.shape]
    if isinstance(p, DTensor):
        for axis, placed in enumerate(p.placements):
            if placed.is_shard():  # split as by torch.chunk; FSDP shards dimension 0
                n = p.shape[placed.dim]
                size = -(-n // p.device_mesh.size(axis))
                start = p.device_mesh.get_local_rank(axis) * size
                part[placed.dim] = slice(min(start, n), min(start + size, n))
    return tuple(part)


def is_shard(p):
    """Whether FSDP has sharded this parameter (lib.tensor splits parameters too, which do not count)."""
    return isinstance(p, DTensor) and "shard" in p.device_mesh.mesh_dim_names


def local(p):
    """The part of a parameter that this rank holds: its shard, or all of a plain tensor."""
    return p.to_local() if isinstance(p, DTensor) else p


def full(p):
    """The whole tensor on every rank, on the mesh's device. If p is sharded, this is a collective."""
    return p.detach().to(p.device_mesh.device_type).full_tensor() if isinstance(p, DTensor) else p.detach()


@torch.no_grad()
def copy_weights(source, target):
    """Refresh `target`, a copy of the model `source`.

    A sharded copy is updated shard by shard, in place. A whole or split copy, whose memory may have been
    freed by free_weights, is filled one parameter at a time, so that only one more whole tensor is in memory.
    """
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        mine = local(q)
        if is_shard(q):
            mine.copy_(local(p))
        else:
            mine.untyped_storage().resize_(mine.nbytes)
            mine.copy_(full(p.to(q.dtype))[my_part(q)])


def free_weights(model):
    """Free the memory of a whole or split copy until copy_weights fills it again."""
    for p in model.parameters():
        if not is_shard(p):
            local(p).untyped_storage().resize_(0)


# --------------------------------------------------------------------------------------------------------
# Distributing work

def micro_batches(indices, lengths, budget, ranks):
    """Split samples into micro-steps: lists with one micro-batch, a list of indices, for each rank.

    A micro-batch has at most `budget` tokens, or a single longer sample. Pads do not count, since nothing is
    computed for them. The longest sample comes first, and each goes to the rank with the least work. Every
    rank takes part in every micro-step, as FSDP's collectives require; its micro-batch may be empty.
    """
    steps = []
    loads = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if not steps or min(loads) + lengths[i] > budget and min(loads) > 0:
            steps.append([[] for _ in range(ranks)])
            loads = [0] * ranks
        least = loads.index(min(loads))
        steps[-1][least].append(i)
        loads[least] += lengths[i]
    return steps


def idle_share(steps, lengths):
    """The share of time, from 0 to 1, in which ranks wait for the one with the most work in a micro-step."""
    loads = [[sum(lengths[i] for i in batch) for batch in step] for step in steps]
    return 1 - sum(map(sum, loads)) / sum(max(load) * len(load) for load in loads)


def pad(rows, dtype):
    """Lists of numbers as one tensor [B, T], with zeros on the right."""
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def share(batch, indices, device):
    """This rank's rows of a batch on its device, cut to the length of the longest; if it has none, one row
    that is masked completely."""
    rows = torch.tensor(indices or [0])
    T = max(1, int(batch["length"][rows].max())) if indices else 2
    part = {k: v[rows, :T].to(device) for k, v in batch.items() if k != "length"}
    if not indices:
        part["mask"] = torch.zeros_like(part["mask"])
    return part


def generator(seed, *purpose):
    """A separate random generator for each purpose, such as the order of an epoch.

    It is a function of (seed, purpose), so that resuming needs no random state."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_order(n, seed, epoch):
    """The order of n problems in an epoch, a list of indices."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def problems_of_step(n, step, batch, seed):
    """Indices of the `batch` problems of a step, which is counted from 1.

    Each epoch has the n problems in a new order, and a batch may cross the end of an epoch."""
    first = (step - 1) * batch
    places = [divmod(first + k, n) for k in range(batch)]  # (epoch, place in its order)
    orders = {epoch: epoch_order(n, seed, epoch) for epoch in {e for e, _ in places}}
    return [orders[epoch][i] for epoch, i in places]
