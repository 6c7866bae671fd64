"""What a run writes down as it goes: its jsonl logs, and how much of the machine it used."""
import contextlib
import functools
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from lib import files, parallel


LOGS = ("metrics", "rollouts", "tokens", "timing")  # RUN/*.jsonl, each line with its step


def log(run, rows):
    """Append {log's name: rows}."""
    parallel.together(lambda: [files.append_jsonl(run / f"{name}.jsonl", lines) for name, lines in rows.items()])


EQUATION_1 = ("outcome", "exploration", "floored", "alpha")  # what --reward takes the place of


def reward_row(parts, own_reward, own_verifier):
    """A response's reward as rollouts.jsonl has it. With --reward the parts of Eq. 1 were not paid and are left out, and a verdict of
    the mathematics verifier, which decided nothing, is called that."""
    row = asdict(parts)
    if own_reward:
        row = {k: v for k, v in row.items() if k not in EQUATION_1}
        if not own_verifier:
            row["math_correct"] = row.pop("correct")
    return row


@functools.lru_cache
def matrix_peak(device, dtype):
    """FLOP/s of a large matrix product, measured: the best of five. What `mfu` is a share of.

    The product grows until it takes 50 ms, or is of a size at which every GPU is at its best: a processor that emulates a type
    may need a hundred times as long as another, and everything waits for this."""
    n = 8192 if device.type == "cuda" else 256
    while True:
        a = torch.ones(n, n, dtype=dtype, device=device)
        seconds = min(product_seconds(a), product_seconds(a))  # the first one of a size prepares it
        if seconds >= 0.05 or n >= 8192:
            break
        n *= 2
    best = min([seconds] + [product_seconds(a) for _ in range(3)])
    return 2 * n**3 / best


def product_seconds(a):
    started = time.perf_counter()
    float((a @ a)[0, 0])  # float() waits for a GPU
    return time.perf_counter() - started


def flops(config, lengths, scored):
    """Model FLOPs of one forward and backward pass over sequences of these lengths, `scored` tokens of which need the token head.

    A weight costs 6 a token, 2 forward and 4 backward. Causal attention over t tokens multiplies t (t + 1) / 2 pairs of H x d
    numbers in each of two products (Q K^T, P V), backward twice that: 6 H d t (t + 1) a layer. What is computed a second time
    (activation checkpointing, the head's logits, attention's own backward) does not count; norms and embeddings neither."""
    c = config
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * width + 2 * kv_width + 3 * c.intermediate_size)
    pairs = sum(t * (t + 1) for t in lengths)
    return 6 * (c.num_hidden_layers * (layer * sum(lengths) + width * pairs) + c.vocab_size * c.hidden_size * scored)


class Timer:
    """Seconds of each phase of a step: `with timer("rollout"): ...`."""

    def __init__(self):
        self.seconds = {}
        self.cpu_started = time.process_time()

    @contextlib.contextmanager
    def __call__(self, phase):
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    def cpu_seconds(self):
        """Processor time of all threads since the start; other programs do not count."""
        return time.process_time() - self.cpu_started


def bar(iterable=None, desc="", **how):
    """A progress bar of rank 0, gone when it is done."""
    return tqdm(iterable, desc=desc, leave=False, disable=parallel.rank() != 0, **how)
