"""Run by test_distributed.py in one process or under torchrun: a short PPO run, its metrics and weights written to a file."""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as M  # noqa: E402
import ppo  # noqa: E402

folder, out, data = map(Path, sys.argv[1:4])
torch.set_num_threads(1)
device, mesh = M.start_processes()
config = ppo.PPOConfig(steps=3, rollout_batch=7, train_batch=3, max_response=12, slots=4, freeze_steps=1, dtype="float32", lr=1e-3,
                       critic_lr=1e-3, temperature=0.7, micro_tokens=120, length_scale=8.0, warmup=0.0, save_every=2)
problems = [json.loads(line) for line in data.read_text().splitlines()[:20]]
trainer = ppo.Trainer(config, folder, problems, Tokenizer.from_file(str(folder / "tokenizer.json")), out, device, mesh)
if sys.argv[4:] == ["resume"]:
    trainer.resume()
metrics, samples, batch = trainer.train_step()
tensors = {f"batch.{k}": v.contiguous() for k, v in batch.items()}
trainer.train()
for name, (net, _) in trainer.trained.items():
    tensors |= {f"{name}.{k}": M.full(p) for k, p in net.named_parameters()}
if M.rank() == 0:
    save_file(tensors, out / "tensors.safetensors")
    (out / "first.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "timing"}))
M.stop_processes()
