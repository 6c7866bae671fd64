"""Many processes: rank and collectives, joining and leaving torchrun's job, plain FSDP. A single process does without."""
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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lib import files, threads
from model import Critic, Llama


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x):
    """Sum a CPU tensor over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """[x of rank 0, x of rank 1, ...], the same on every rank."""
    everyone = [x] * world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, x)  # objects of our own processes, not of strangers
    return everyone


def together(f, all_ranks=False):
    """[f() of each rank], or with rank 0 alone calling it. What it raises there is raised on every rank alike: nobody is left waiting."""
    result = error = None
    if all_ranks or rank() == 0:
        try:
            result = f()
        except (OSError, ValueError) as e:
            error = e
    results, errors = zip(*gather((result, error)))
    for error in filter(None, errors):
        error.everywhere = True  # one rank speaking is enough
        raise error
    return results


def compute_type():
    """The type for `--dtype auto`: bfloat16 on GPUs and where oneDNN multiplies it, else float32. A processor that emulates bfloat16
    products takes a hundred times as long for them."""
    fast = torch.cuda.is_available() or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "bfloat16" if fast else "float32"


def environment():
    """(rank, ranks, rank on this node, ranks on this node) as torchrun's variables have them; a ValueError where they do
    not fit together, which else shows as a hang or as a division by zero."""
    found = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name)
        if text is not None and not (re.fullmatch("[0-9]{1,5}", text) and int(text) < 65536):
            raise ValueError(f"{name} is {files.visible(repr(text))} in the environment, expected a number below 65536")
        found[name] = None if text is None else int(text)
    rank, ranks, local_rank, local_ranks, port = found.values()
    needed = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": os.environ.get("MASTER_ADDR"), "MASTER_PORT": port}
    missing = [name for name, value in needed.items() if value is None]
    local_ranks = (ranks or 1) if local_ranks is None else local_ranks
    if rank is None and ranks is None:  # a process alone, whatever torchrun may have left of a node's
        rank, ranks, most = 0, 1, local_ranks
    elif missing:
        raise ValueError(f"{missing[0]} is not in the environment, but {'WORLD_SIZE' if ranks else 'RANK'} is: "
                         "expected all that torchrun sets, or nothing of it")
    else:
        most = ranks
    local_rank = 0 if local_rank is None else local_rank
    if not (rank < ranks and 1 <= local_ranks <= most and local_rank < local_ranks):
        raise ValueError(f"RANK {rank} of WORLD_SIZE {ranks}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_ranks} "
                         "in the environment: expected each rank below its size, as torchrun sets them")
    return rank, ranks, local_rank, local_ranks


@contextlib.contextmanager
def alike():
    """What one rank cannot do in here (OSError, ValueError) is an error of every rank at the end of it: nobody waits for one
    that has left. No collectives inside."""
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
    """Meet the other processes, those of torchrun or of any launcher that sets RANK; one that was started alone meets nobody."""
    environment()
    if "RANK" in os.environ and not dist.is_initialized():
        connect()


def connect(**alone):
    """The process group: NCCL on GPUs, gloo on CPU and for CPU tensors."""
    kind = "gloo"
    if torch.cuda.is_available():
        kind = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # torchrun ends the others of a dead rank at once; the limit is for one that hangs, and no rollout or judge may take so long
    try:
        dist.init_process_group(kind, timeout=timedelta(hours=2), **alone)
    except dist.DistError as e:  # such as a port that is taken
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(f"{where}: the processes cannot meet there: {str(e).splitlines()[0]}") from None


def start(shard_ranks=0, offload=False):
    """Join the other processes, or be a group of one. Returns (device, mesh). offload: much of the work is the processor's.

    Weights are sharded over shard_ranks processes (0: those of a node) and replicated over such groups: if there is more than
    one group, the mesh is two-dimensional (HSDP).
    """
    _, ranks, local_rank, local_ranks = environment()
    shards = shard_ranks or min(local_ranks, ranks)
    if ranks % shards:
        raise ValueError(f"--shard-ranks is {shards}, expected a divisor of the number of processes, {ranks}")
    if offload:
        threads.take_share()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        # torch prefers cuDNN's attention on some GPUs, which builds a plan for every new length and stride, that is for every
        # sequence of a packed micro-batch; the others of scaled_dot_product_attention build none
        torch.backends.cuda.enable_cudnn_sdp(False)
    join()
    if not dist.is_initialized():
        connect(store=dist.HashStore(), rank=0, world_size=1)
    shape, names = ((ranks // shards, shards), ("replicate", "shard")) if shards < ranks else ((ranks,), ("shard",))
    return device, init_device_mesh(device.type, shape, mesh_dim_names=names)


def stop():
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


def memory():
    """(bytes of this process's GPU, or None; its share of the machine's memory; both in words)."""
    *_, n = environment()
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = f"{host / 1e9:.1f} GB of memory for {n} process{'es' * (n > 1)}"
    if not torch.cuda.is_available():
        return None, host // n, words
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return gpu.total_memory, host // n, f"{gpu.name} with {gpu.total_memory / 1e9:.1f} GB, {words}"


def keep_freed_memory():
    """Under Linux's glibc: freed tensors stay with the process, and large ones lie on huge pages. By default the memory of every
    tensor of some MB goes back to the kernel, which clears each page anew for the next one: a quarter of an update's time on CPU."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation


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


# ---------------------------------------------------------------------------------------------------- dealing work

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


def share(batch, indices, device):
    """This rank's rows of a batch on its device, cut to their longest; one fully masked row where it has none."""
    rows = torch.tensor(indices or [0])
    T = max(1, int(batch["length"][rows].max())) if indices else 2
    part = {k: v[rows, :T].to(device) for k, v in batch.items() if k != "length"}
    if not indices:
        part["mask"] = torch.zeros_like(part["mask"])
    return part


def generator(seed, *purpose):
    """One generator for each purpose and place, a function of (seed, purpose): resuming needs no
    random state."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def problems_of_step(n, step, batch, seed):
    """Indices of the `batch` problems of a step, counted from 1: the data in a new order each
    epoch; a batch may cross an epoch's end."""
    first = (step - 1) * batch
    places = [divmod(first + k, n) for k in range(batch)]  # (epoch, place in its order)
    orders = {epoch: epoch_order(n, seed, epoch) for epoch in {e for e, _ in places}}
    return [orders[epoch][i] for epoch, i in places]
