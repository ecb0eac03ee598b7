"""The Muon optimizer (https://kellerjordan.github.io/posts/muon): momentum whose update is made orthogonal.

`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` follows the same rule, but iterates in bfloat16. Measured on random
matrices of the demo model's shapes, [144, 144] to [144, 720]: one of its updates differs from ours by 1.2%, and after
50 steps the weights differ by 0.2% to 0.4% of the distance that they have moved, at the same loss. On a CPU with
bfloat16 instructions it takes half our time. With oneDNN switched off, which is how torch computes on a CPU without
them, it takes 16 to 19 times our time, and each step of the training would take several times as long. So we keep ours.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_RMS = 0.2  # AdamW's typical update, so that both take learning rates of the same size


class Muon(torch.optim.Optimizer):
    """For matrices inside a network; embeddings, norms, biases and output layers are better off with AdamW."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure is taken
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * UPDATE_RMS * max(update.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about 1, of the same shape, by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x: Tensor = (matrix if wide else matrix.T) / (matrix.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
