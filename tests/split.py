"""Run by test_distributed.py under torchrun: the ranks share one copy of the model; each writes what it sampled and what it holds."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import hf, parallel, sampling  # noqa: E402
import model as M  # noqa: E402

folder, out = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
device, mesh = parallel.start()
ranks, rank = parallel.world_size(), parallel.rank()
config = hf.read_config(folder)
net = hf.load(folder, M.Llama, torch.float32, device, sampling.mesh_of("tensor", config, mesh))
trained = hf.load(folder, M.Llama, torch.float32, device, mesh)
prompts = [[5], [9, 8, 7, 6], [9, 8, 7, 6], list(range(3, 60)), [1, 1], [90, 3]]
shares = {2: [range(6), []], 4: [range(4), [], [4], [5]]}[ranks]
cache = sampling.new_cache(config, SimpleNamespace(sampler="tensor", slots=3, kv_gb=0), 6, 57 + 40, torch.float32, device, mesh)
mine = [prompts[i] for i in shares[rank]]
found = {"prompts": mine, "cache": cache.k.nbytes + cache.v.nbytes}


def held():
    return sum(parallel.local(p).untyped_storage().nbytes() for p in net.parameters())


def sample():
    tokens, logprobs = sampling.generate(net, mine, 40, 0.8, range(5), seed=2, streams=shares[rank], return_logprobs=True, cache=cache)
    return {"tokens": tokens, "logprobs": logprobs, "weights": held()}


found["loaded"] = sample()
parallel.free_weights(net)
found["freed"] = held()
parallel.copy_weights(trained, net)
found["refreshed"] = sample()
(out / f"{rank}.json").write_text(json.dumps(found))
parallel.stop()
