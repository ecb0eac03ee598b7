"""One training loop for every part. Each step has its own seed, so a stopped run continues as if it had not stopped."""

import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINTS = Path(__file__).parent / "checkpoints"  # git-ignored
SAVE_EVERY = 180.0  # seconds
WARM_UP = 100  # steps
COOL_DOWN = 0.5  # the share of the steps at the end over which the learning rate falls to 0
MAX_GRADIENT = 1.0

log = logging.getLogger("demo")


def train(
    name: str,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    loss: Callable[[random.Random, float], Tensor],
    *,
    average: float = 0.0,
) -> nn.Module:
    """Minimise `loss` and leave the result in `model`; with `average` the result is the weights' moving average.

    `loss` gets a `random.Random` and the progress of the training, from 0 to 1. In every step that generator and torch
    are seeded with (name, step). The state is saved in `checkpoints/<name>.pt`; a run that finds one continues from it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in trained]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    path = CHECKPOINTS / f"{name}.pt"
    first = _restore(path, trained, averages, optimizers) if path.exists() else 0
    shown, saved, recent = time.monotonic(), time.monotonic(), []
    for step in range(first, steps):
        rng = random.Random(f"{name} {step}")
        torch.manual_seed(rng.getrandbits(63))
        for optimizer, own_rates in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own_rates, strict=True):
                group["lr"] = rate * _schedule(step, steps)
            optimizer.zero_grad(set_to_none=True)
        value = loss(rng, step / steps)
        value.backward()  # type: ignore[no-untyped-call] # torch's
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [p.detach() for p in trained], 1 - decay)
        recent.append(float(value.detach()))
        if time.monotonic() - shown > 15 or step == steps - 1:
            log.info("%s: step %d of %d, loss %.4f", name, step + 1, steps, sum(recent) / len(recent))
            shown, recent = time.monotonic(), []
        if time.monotonic() - saved > SAVE_EVERY or step == steps - 1:
            _save(path, step + 1, trained, averages, optimizers)
            saved = time.monotonic()
    with torch.no_grad():
        for parameter, mean in zip(trained, averages, strict=True):
            parameter.copy_(mean)
    return model.eval()


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1.0, COOL_DOWN * steps))


def _save(
    path: Path,
    step: int,
    trained: list[nn.Parameter],
    averages: list[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    path.parent.mkdir(exist_ok=True)
    state = {
        "step": step,
        "weights": [p.detach() for p in trained],
        "averages": averages,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def _restore(
    path: Path, trained: list[nn.Parameter], averages: list[Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Load the state that `_save` wrote; returns the number of steps done."""
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for target, value in zip([*trained, *averages], [*state["weights"], *state["averages"]], strict=True):
            target.copy_(value)
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    log.info("%s: continuing from step %d", path.stem, state["step"])
    return int(state["step"])
