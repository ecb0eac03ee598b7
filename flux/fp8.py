"""The fp8 linear layer, and a transformer's fp8 twin made from its pristine weights.

A weight is kept as float8_e4m3fn with one float32 scale per output row; activations are scaled per token when they
arrive, so nothing is calibrated and the same input always gives the same output. The product is torch's scaled matrix
product, the same call on every device; where its kernel cannot be used, the weight alone is fp8 (`weight_only`).
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST_AMPLITUDE = 1e-12  # of a row, so that a row of zeros has a scale
KERNEL_MULTIPLE = 16  # scaled_mm's kernels take sides that are multiples of this
CPU_CHUNK = 2**19  # numbers that a CPU quantizes at a time: few enough to stay in its cache
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")  # inside them every linear layer is fp8, outside none


class Fp8Linear(nn.Module):
    """y = x W^T + bias with W in fp8. x: [..., in_features]; y: [..., out_features] in x's dtype.

    A single row, such as the modulation layers get, is multiplied unquantized: one row is bound by reading the weight,
    which stays fp8, and what modulates every token is best left exact. So are layers whose sides are not multiples of
    16. `weight_only` does so for every input, for GPUs without fp8 matrix units.
    """

    def __init__(self, in_features: int, out_features: int, *, weight_only: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_only = weight_only or bool(in_features % KERNEL_MULTIPLE or out_features % KERNEL_MULTIPLE)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=E4M3), requires_grad=False)
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        if self.weight_only or rows.shape[0] == 1:
            product = F.linear(rows, self.weight.to(x.dtype)) * self.scale.squeeze(1) + self.bias
            return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        quantized, scale = quantize_rows(rows)
        product = torch._scaled_mm(
            quantized, self.weight.t(), scale, self.scale.t(), self.bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return product.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def quantize_rows_(self, first_row: int, rows: Tensor) -> None:
        """Write `rows`, [n, in_features] of any float dtype, over the weight's rows from `first_row` on, in place."""
        on_cpu = self.weight.device.type == "cpu"
        for some in torch.split(rows, max(1, CPU_CHUNK // self.in_features) if on_cpu else len(rows)):
            weight, scale = quantize_rows(some.to(self.weight.device))
            self.weight[first_row : first_row + len(some)].copy_(weight)
            self.scale[first_row : first_row + len(some)].copy_(scale)
            first_row += len(some)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight_only={self.weight_only}"


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, width] of any float dtype -> float8_e4m3fn [n, width] and float32 scales [n, 1] that give the rows back."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_AMPLITUDE) / LARGEST
    return (rows / scale).to(E4M3), scale


def new_twin(
    transformer: FluxTransformer2DModel, *, weight_only: bool, layers: Collection[str] | None = None
) -> FluxTransformer2DModel:
    """A transformer of the same shape in which `layers` (None: all inside the blocks) are fp8. It has no weights yet:
    they are on the meta device."""
    dtype = transformer.dtype
    with torch.device("meta"):
        twin = FluxTransformer2DModel.from_config(transformer.config)
        nn.Module.to(twin, dtype)
        for name in fp8_layers(twin) if layers is None else layers:
            linear = twin.get_submodule(name)
            fp8 = Fp8Linear(linear.in_features, linear.out_features, weight_only=weight_only, dtype=dtype)
            twin.set_submodule(name, fp8)
    return twin.eval().requires_grad_(False)


def fp8_layers(transformer: nn.Module) -> list[str]:
    """The names of the linear layers that are fp8 in the twin."""
    modules = transformer.named_modules()
    return [name for name, module in modules if name.startswith(BLOCKS) and isinstance(module, nn.Linear | Fp8Linear)]
