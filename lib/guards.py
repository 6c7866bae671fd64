"""Checks that stop a training that cannot continue, because gradients or other numbers are not finite, and
signs of a training that learns nothing."""
import contextlib
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib import parallel


class TrainingError(RuntimeError):
    """Training cannot continue. The message names the quantity and the step. everywhere: every rank raises
    the same error."""

    def __init__(self, message, everywhere=True):
        super().__init__(message)
        self.everywhere = everywhere


def clip_gradients(net, limit):
    """Scale gradients down to a norm of at most `limit`, and return the norm before. A norm that is not
    finite scales nothing, since it would spread to all gradients; so first_nonfinite can still name the
    parameter."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(parallel.full(total))
    if math.isfinite(norm) and norm + 1e-6 > limit:  # otherwise every factor would be 1
        torch.nn.utils.clip_grads_with_norm_(net.parameters(), limit, total)
    return norm


def first_nonfinite(nets):
    """The name of the first tensor that is not finite among the weights, then the gradients, of nets
    {name: net}; "" if all are finite."""
    held = [(f"{name}'s {key}", p) for name, net in nets.items() for key, p in net.named_parameters()]
    held += [(f"the gradient of {name}", p.grad) for name, p in held if p.grad is not None]
    mine = torch.tensor([float(not torch.isfinite(parallel.local(x)).all()) for _, x in held])
    return next((name for (name, _), n in zip(held, parallel.all_reduce(mine)) if n), "")


def check_saved(where, named):
    """Raise a TrainingError if any of the (name, tensor) pairs is not finite, so that no useless checkpoint
    is written. Every rank checks its own part, and all raise the same error."""
    found = [(name, float(not torch.isfinite(parallel.local(x)).all())) for name, x in named]
    names, bad = zip(*found)
    for name, n in zip(names, parallel.all_reduce(torch.tensor(bad))):
        if n:
            raise TrainingError(f"{where}: {name} is not finite; nothing was written, what was saved before "
                                "is still there")


def check_finite(name, x, step, run, batch, nets):
    """If x is not finite, save the batch and raise a TrainingError. Every rank has the same x and raises the
    same error."""
    if not torch.isfinite(torch.as_tensor(x)).all():
        file = Path(run) / f"nonfinite-step-{step}.safetensors"
        first = first_nonfinite(nets)
        parallel.together(lambda: save_file({k: v.contiguous() for k, v in batch.items()}, file))
        also = f", nor is {first}" if first else ""
        raise TrainingError(f"step {step}: {name} is not finite{also}; the batch is in {file}")


@contextlib.contextmanager
def sampling_from(what, net):
    """Let errors of sampling name the model, and the first of its weights on this rank that is not finite."""
    try:
        yield
    except TrainingError as e:
        bad = next((name for name, p in net.named_parameters()
                    if not torch.isfinite(parallel.local(p)).all()), None)
        also = f"; its {bad} is not finite" if bad else ""
        raise TrainingError(f"{what}: {e}{also}", e.everywhere) from None


def unhealthy(samples, differ, config, boxes):
    """Reasons, in words, why a step's samples teach nothing or the wrong thing. The losses and norms of such
    a step look like those of any other. differ: whether any reward differs from those it is compared with.
    boxes: whether the reward asks for an answer in a box."""
    found = []
    n = len(samples)
    cut = sum(s.truncated for s in samples)
    if boxes and all(s.parts.answer is None for s in samples):
        found.append("no response has a \\boxed answer; does anything in the prompt ask for one?")
    if n > 1 and not differ:
        rewards = {s.parts.total for s in samples}
        if len(rewards) == 1:
            each = f"are {rewards.pop() + 0.0:.6g}"
        elif config.advantage == "group":
            each = "are equal within each prompt"
        else:
            each = "are equal"
        found.append(f"all rewards {each}: the policy learns from the KL penalty alone")
    if 2 * cut > n:
        found.append(f"{cut} of {n} responses are cut off at --max-response {config.max_response}")
    return found


def first_ratio(step, ratio, error, dtype):
    """Metrics of the first minibatch. The old log-probs are those of the model that is trained, so a mean
    ratio other than 1 before any update is a bug. Some tolerance is needed, because batches of different
    shapes are rounded differently, in bfloat16 by some percent."""
    limit = 1e-3 if dtype == torch.float32 else 0.1
    if math.isnan(error) or error >= limit:
        raise TrainingError(f"step {step}: the ratio on the first minibatch is off 1 "
                            f"by {error:.2g} on average")
    return dict(first_ratio=ratio, first_ratio_error=error)
