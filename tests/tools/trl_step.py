"""One PPO step of TRL, for `python -m tests.tools.bench step --peer trl`; run by a Python that has trl==1.9.2, torch and transformers.

    python tests/trl_step.py MODEL_FOLDER STEP.json

STEP.json: {"prompts", "responses": token lists, "eos", "pad", "batch", "max_response", "temperature", "lr"}. Every response is
forced through a logits processor, so that TRL decodes exactly the given tokens, at its own cost. Prints one line of JSON.
"""
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, LogitsProcessorList, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

folder, given = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left")
tokenizer.eos_token, tokenizer.pad_token = (tokenizer.convert_ids_to_tokens(given[k]) for k in ("eos", "pad"))
load = lambda cls, **kw: cls.from_pretrained(folder, dtype=torch.bfloat16, **kw)
policy, reference = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
value = load(LlamaForSequenceClassification, num_labels=1)
shape = LlamaConfig.from_pretrained(folder)
shape.num_hidden_layers, shape.num_labels = 1, 1
reward = LlamaForSequenceClassification(shape).to(torch.bfloat16)

answers = {tuple(p): r for p, r in zip(given["prompts"], given["responses"])}
rollout_seconds, generate = 0.0, policy.generate


def replayed(input_ids, **kw):
    global rollout_seconds
    start, rows = input_ids.shape[1], [answers[tuple(t for t in row if t != given["pad"])] for row in input_ids.tolist()]

    def force(ids, scores):
        at = ids.shape[1] - start
        tokens = torch.tensor([row[at] if at < len(row) else given["eos"] for row in rows])
        return scores.scatter_add(1, tokens[:, None], torch.full((len(rows), 1), 1e4, dtype=scores.dtype))

    started = time.perf_counter()
    out = generate(input_ids=input_ids, logits_processor=LogitsProcessorList([force]), **kw)
    rollout_seconds += time.perf_counter() - started
    return out


policy.generate = replayed
n = len(given["prompts"])
with tempfile.TemporaryDirectory() as out:
    config = PPOConfig(
        output_dir=out, use_cpu=True, bf16=False, per_device_train_batch_size=given["batch"], gradient_accumulation_steps=n // given["batch"],
        num_mini_batches=1, num_ppo_epochs=1, total_episodes=n, response_length=given["max_response"], stop_token_id=given["eos"],
        local_rollout_forward_batch_size=given["batch"], temperature=given["temperature"], learning_rate=given["lr"],
        gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True)
    data = Dataset.from_dict({"input_ids": given["prompts"]})
    trainer = PPOTrainer(config, tokenizer, policy, reference, reward, data, value, eval_dataset=data)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
print(json.dumps(dict(seconds=seconds, rollout_seconds=rollout_seconds, rest_seconds=seconds - rollout_seconds,
                      peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)))
