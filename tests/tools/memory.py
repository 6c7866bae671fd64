"""Measurements with which test_plan.py compares lib/plan.py; each prints one JSON object.

    python tests/tools/memory.py simulate CONFIG.json TOKENS SHARDS
        a training pass of policy and critic on SHARDS fake ranks, by PyTorch's own FSDP memory tracker on
        fake tensors: nothing is allocated
    torchrun ... tests/tools/memory.py update FOLDER PROBLEMS OUT key=value ...
        a real PPO step: bytes in use, by summing tensors
    torchrun ... tests/tools/memory.py load FOLDER OUT [DTYPE]
        the peak of host memory of loading a folder and of saving it
"""
import dataclasses
import json
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib import chat, cpu, hf, parallel, plan  # noqa: E402
import model as M  # noqa: E402
import ppo  # noqa: E402


def local_bytes(tensors):
    """Bytes that tensors hold on this rank; the gradients of an FSDP unit are pieces of one storage."""
    storages = [parallel.local(t).untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def pack_whole(tokens, mask):
    """model.pack for tensors that hold no numbers, fake or meta: every token is an input and an action."""
    B, T = tokens.shape
    lengths = SimpleNamespace(tolist=lambda: [T] * B)
    return tokens.reshape(1, -1), lengths, torch.arange(B * T, device=tokens.device)


def simulate(config, tokens, shards):
    """{network: {item: bytes}} of a training pass over `tokens` tokens, weights sharded over `shards`
    ranks."""
    from torch._subclasses import fake_impls
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def nonzero(mode, func, x):  # fake tensors hold no numbers: let every token be an action
        with mode:
            return torch.empty(x.numel(), x.dim(), dtype=torch.long)

    fake_impls.op_implementations_dict[torch.ops.aten.nonzero.default] = nonzero
    dist.init_process_group("fake", rank=0, world_size=shards, store=FakeStore())
    mesh = init_device_mesh("cpu", (shards,), mesh_dim_names=("shard",))
    M.Llama.forward = M.Llama.logprobs  # the tracker follows forward methods alone
    M.pack = pack_whole
    cpu.kernels = lambda *_: None  # they would read a fake tensor's memory
    out = {}
    with FakeTensorMode(allow_non_fake_inputs=False):
        for name, kind in (("policy", M.Llama), ("critic", M.Critic)):
            with torch.device("cpu"):
                net = kind(config)
            parallel.shard(net, mesh, torch.bfloat16)
            net.model.recompute = True
            adam = torch.optim.Adam(net.parameters(), foreach=False)
            rows = torch.zeros(16, tokens // 16, dtype=torch.long)
            mask = torch.ones(16, tokens // 16, dtype=torch.bool)
            for p in net.parameters():  # as after a first micro-step
                p.grad = torch.zeros_like(p)
            tracker = FSDPMemTracker(net)
            tracker.track_inputs((rows, mask))
            with tracker:
                tree_leaves(net(rows, mask))[0].sum().backward()
            # Adam is kept out of the tracker, which under fake tensors books DTensor's shape inference
            adam.step()
            snapshot = next(s for s in tracker.get_tracker_snapshot("peak").values() if s["Total"])
            out[name] = {getattr(k, "value", k): v for k, v in snapshot.items()}
            out[name]["weights"] = local_bytes(net.parameters())
            out[name]["gradients"] = local_bytes(p.grad for p in net.parameters())
            out[name]["optimizer"] = local_bytes(moments([adam]))
    return out


def moments(optimizers):
    """Adam's moments, as tensors."""
    return [v for o in optimizers for state in o.state.values() for k, v in state.items() if k != "step"]


class Live(TorchDispatchMode):
    """The most bytes that the tensors of all operations ever held at once.

    FSDP frees by resizing, so that sizes are read again each time.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let DTensor turn into operations on local tensors first
        out = func(*args, **(kwargs or {}))
        self.know((args, kwargs, out))
        storages = [ref() for ref in list(self.storages.values())]
        self.peak = max(self.peak, sum(s.nbytes() for s in storages if s is not None))
        return out

    def know(self, tensors):
        """Count these tensors from now on, while they live."""
        for t in tree_leaves(tensors):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                storage = t.untyped_storage()
                key = storage._cdata
                self.storages[key] = weakref.ref(storage, lambda _, key=key: self.storages.pop(key, None))


def update(folder, problem_file, run, **settings):
    """One PPO step in which every response has max_response tokens."""
    settings = {f.name: (f.type if f.type is not bool else json.loads)(settings[f.name])
                for f in dataclasses.fields(ppo.PPOConfig) if f.name in settings}
    config = ppo.PPOConfig(**settings)
    device, mesh = parallel.start(config.shard_ranks)
    problems = [json.loads(line) for line in open(problem_file)][:1]
    trainer = ppo.Trainer(config, folder, problems, chat.Chat(folder), run, device, mesh)
    trainer.eos = []
    config.max_prompt = len(trainer.prompts[0])
    config.micro_tokens *= config.max_prompt + config.max_response  # given as a number of sequences
    live = Live()
    kv = (trainer.cache.k, trainer.cache.v)
    found = {"kv cache": local_bytes(kv), "sampler": local_bytes(trainer.sampler.parameters())}
    samples = trainer.rollout()
    parallel.free_weights(trainer.sampler)
    found["sampler freed"] = local_bytes(trainer.sampler.parameters())
    batch = trainer.experience(samples)
    nets = list(trainer.nets.values())
    step = torch.optim.Adam.step

    def measured_step(optimizer, *args, **kw):
        gradients = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
        found["gradients"] = max(found.get("gradients", 0), local_bytes(gradients))
        return step(optimizer, *args, **kw)

    torch.optim.Adam.step = measured_step
    trainer.update(batch)  # makes Adam's state
    found["weights"] = local_bytes(p for n in nets for p in n.parameters())
    found["reference"] = local_bytes(trainer.reference.parameters())
    found["optimizer"] = local_bytes(moments(trainer.optimizers.values()))
    live.know(kv)
    live.know([parallel.local(p) for n in [*nets, trainer.reference] for p in n.parameters()])
    live.know([parallel.local(v) for o in trainer.optimizers.values()
               for state in o.state.values() for v in state.values()])
    with live:
        trainer.update(batch)
    found["update"] = live.peak
    found["plan"] = plan.phases(hf.read_config(folder), config, parallel.world_size(), mesh["shard"].size())
    return found


def anonymous():
    """Bytes of this process that no file backs: not those of safetensors files that are mapped for
    reading."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def peak_during(function):
    """(result, peak of anonymous memory over its value before), sampled a thousand times per second."""
    before = anonymous()
    most = 0
    done = False

    def watch():
        nonlocal most
        while not done:
            most = max(most, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = function()
    done = True
    watcher.join()
    return result, max(most, anonymous()) - before


def load(folder, out, dtype="float32"):
    """Bytes: of this rank's weights, of the largest tensor, of all, and the peaks of loading and of
    saving."""
    device, mesh = parallel.start()
    if parallel.world_size() > 1:
        dist.barrier()  # gloo's own buffers
    kind = getattr(torch, dtype)
    net, loading = peak_during(lambda: hf.load(folder, M.Llama, kind, device, mesh))
    _, saving = peak_during(lambda: hf.save_tensors(net.named_parameters(), Path(out), torch.float32))
    sizes = [p.numel() * kind.itemsize for p in net.parameters()]
    return {"share": local_bytes(net.parameters()), "largest": max(sizes), "whole": sum(sizes),
            "loading": loading, "saving": saving}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *words = sys.argv[1:]
    if what == "simulate":
        config = M.Config.from_dict(json.loads(words[0]))
        print(json.dumps(simulate(config, int(words[1]), int(words[2]))))
    else:
        pairs = dict(word.split("=", 1) for word in words if "=" in word)
        found = {"update": update, "load": load}[what](*[word for word in words if "=" not in word], **pairs)
        everyone = parallel.gather(found)
        if parallel.rank() == 0:
            print(json.dumps(everyone))
        parallel.stop()
