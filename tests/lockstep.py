"""Run by test_distributed.py under torchrun: sharded weights decode in lock-step; each rank writes what it sampled."""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import decode, hf, parallel  # noqa: E402
import model as M  # noqa: E402

folder, out = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
device, mesh = parallel.start()
net = hf.load(folder, M.Llama, torch.float32, device, mesh, torch.float32) if parallel.world_size() > 1 else hf.load(folder, M.Llama, torch.float32)
prompts = [[5], [9, 8, 7, 6], [9, 8, 7, 6], list(range(3, 60)), [1, 1], [90, 3]]
shares = {1: [range(6)], 2: [range(5), range(5, 6)], 3: [range(5), range(5, 6), []]}[parallel.world_size()]  # the last has no prompt at all
mine = shares[parallel.rank()]
tokens = decode.generate(net, [prompts[i] for i in mine], 40, 0.8, range(300, 340), seed=2, streams=mine, slots=3, lockstep=parallel.world_size() > 1)
(out / f"{parallel.world_size()}-{parallel.rank()}.json").write_text(json.dumps(tokens))
parallel.stop()
