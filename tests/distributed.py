"""Run by test_distributed.py in one process or under torchrun: a short PPO run, its metrics and weights written to a file; then
SFT and evaluation, through the command line's functions.

    distributed.py FOLDER OUT DATA [resume] [setting=value of ppo.PPOConfig ...]
"""
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import chat, parallel  # noqa: E402
import model as M  # noqa: E402
import ppo  # noqa: E402
import rlsp  # noqa: E402

folder, out, data = map(Path, sys.argv[1:4])
torch.set_num_threads(1)
words = dict(word.split("=") for word in sys.argv[4:] if "=" in word)
changes = {name: json.loads(value) if value[0] in "0123456789" or value in ("true", "false") else value for name, value in words.items()}
node = changes.pop("node", 0)  # as if each node had so many ranks
if node and "RANK" in os.environ:
    os.environ |= {"LOCAL_WORLD_SIZE": str(node), "LOCAL_RANK": str(int(os.environ["RANK"]) % node)}
device, mesh = parallel.start(changes.get("shard_ranks", 0))
config = ppo.PPOConfig(**dict(steps=3, rollout_batch=7, train_batch=3, max_response=12, slots=4, freeze_steps=1, dtype="float32", lr=1e-3,
                       critic_lr=1e-3, adam_eps=1e-5, temperature=0.7, micro_tokens=120, length_scale=8.0, warmup=0.0, save_every=2) | changes)
problems = [json.loads(line) for line in data.read_text().splitlines()[:20]]
held_out = [json.loads(line) for line in data.with_name("test.jsonl").read_text().splitlines()[:3]]
trainer = ppo.Trainer(config, folder, problems, chat.Chat(folder), out, device, mesh,
                      held_out=held_out)
if "resume" in sys.argv:
    trainer.resume()
metrics, samples, batch = trainer.train_step()
tensors = {f"batch.{k}": v.contiguous() for k, v in batch.items()}
trainer.train()
for name, net in trainer.nets.items():
    tensors |= {f"{name}.{k}": parallel.full(p) for k, p in net.named_parameters()}
if parallel.rank() == 0:
    save_file(tensors, out / "tensors.safetensors")
    (out / "first.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "timing"}))

def command(function, *words):
    again = [f"--{k.replace('_', '-')}={v}" for k, v in changes.items() if k in ("shard_ranks", "sampler")]
    function(rlsp.read_flags([*map(str, words), *again]))


if "stages" in sys.argv:
    if parallel.rank() == 0:
        (out / "data.jsonl").write_text("".join((data.parent / "sft.jsonl").read_text().splitlines(True)[:10]))
    parallel.gather(0)  # the others wait
    sharded = changes.pop("sampler", None)  # SFT has no sampler
    command(rlsp.sft, "sft", "--model", folder, "--data", out / "data.jsonl", "--out", out / "sft", "--batch", "5", "--epochs", "1", "--dtype", "float32",
            "--lr", "1e-3", "--micro-tokens", "200", *(["--offload"] if config.offload else []))
    changes |= {"sampler": sharded} if sharded else {}
    command(rlsp.run_eval, "eval", "--model", folder, "--data", out / "data.jsonl", "--limit", "3", "--out", out / "eval", "--max-response", "12", "--dtype", "float32")
parallel.stop()
