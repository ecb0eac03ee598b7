"""The GPU path by CUDA's own rules for shapes, strides, dtypes and devices, on tensors without numbers; and the bytes
that cross to the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.transfers import MOST_BYTES, crossings
from flux import fp8
from flux.device import Memory
from flux.models import NAMES, TOKENIZERS, Flux, PromptEmbeds
from flux.pipelines import Job, denoise
from flux.plan import FP8_SUFFIX
from flux.pristine import Pristine
from flux.residency import Residency
from settings import GB
from tools.fake_cuda import CUDA, fake_cuda
from tools.random_flux import FULL_WIDTH, new_networks, new_scheduler

FACTORS = 0.03  # bytes of a LoRA of rank 16, per parameter that it changes
SIZE = (1024, 768)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_each_parameter_crosses_once_in_the_files_dtype(precision: str) -> None:
    found = {one.operation: one for one in crossings(precision, base_on_device=False)}
    assert found.keys() == {"load", "merge", "another merge", "restore", "load with a LoRA"}
    assert {name: one.casts for name, one in found.items()} == dict.fromkeys(found, 0)
    assert all(one.bytes_per_parameter <= MOST_BYTES for one in found.values())
    assert found["load"].bytes_per_parameter == 2


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_nothing_but_a_loras_factors_crosses_where_the_pristine_weights_are_on_the_device(precision: str) -> None:
    found = crossings(precision, base_on_device=True)
    assert [one.casts for one in found] == [0] * 4
    assert [one.bytes_per_parameter for one in found if one.operation in ("load", "restore")] == [0, 0]
    assert all(one.bytes_per_parameter <= FACTORS for one in found)


@contextmanager
def flux_on_a_gpu(model: str) -> Iterator[tuple[Flux, Flux]]:
    """Both precisions, of FLUX.1's width."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            parts: dict[str, Any] = new_networks(FULL_WIDTH, model=model)
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler, twin = new_scheduler(model), fp8.new_twin(parts["transformer"], weight_only=False)
    with fake_cuda() as ledger:
        residency = Residency(CUDA, Memory(1000 * GB, 1000 * GB), ledger.stream)
        for part, name in ({**NAMES, "transformer": model}).items():
            shapes = {key: value.shape for key, value in parts[part].named_parameters()}
            read = lambda key, shapes=shapes: torch.empty(shapes[key], dtype=torch.bfloat16)  # noqa: E731
            residency.add(name, parts[part], Pristine(shapes, read, ledger.stream), loaded=False, shared=part in NAMES)
        residency.add(model + FP8_SUFFIX, twin, residency.live(parts["transformer"]).pristine, loaded=False)
        exact = Flux(model, "bf16", residency=residency, scheduler=scheduler, **dict.fromkeys(TOKENIZERS), **parts)
        yield exact, replace(exact, precision="fp8", transformer=twin)


def step(flux: Flux) -> Tensor:
    config = flux.transformer.config
    t5 = torch.empty(1, 512, config.joint_attention_dim, dtype=torch.bfloat16, device=CUDA)
    clip = torch.empty(1, config.pooled_projection_dim, dtype=torch.bfloat16, device=CUDA)
    return denoise(flux, Job(SIZE, 1, 3.0, PromptEmbeds(t5, clip)), 1, lambda: None)


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_a_step_of_the_whole_transformer_runs_on_the_device_alone(model: str) -> None:
    with flux_on_a_gpu(model) as both:
        for flux in both:
            latents = step(flux)
            assert (latents.device, latents.dtype) == (CUDA, torch.bfloat16)
            assert latents.shape == (1, SIZE[0] // 16 * SIZE[1] // 16, 64)


def test_a_weight_in_the_wrong_layout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """scaled_mm takes the second matrix by columns, and scales of a row and of a column."""
    layer = fp8.Fp8Linear.forward

    def by_rows(self: fp8.Fp8Linear, x: Tensor) -> Tensor:
        rows, scale = fp8.quantize_rows(x.reshape(-1, self.in_features))
        weight = self.weight.t().contiguous()
        return torch._scaled_mm(rows, weight, scale, self.scale.t(), self.bias, out_dtype=x.dtype)

    def with_a_scale_by_rows(self: fp8.Fp8Linear, x: Tensor) -> Tensor:
        rows, scale = fp8.quantize_rows(x.reshape(-1, self.in_features))
        return torch._scaled_mm(rows, self.weight.t(), scale, self.scale, self.bias, out_dtype=x.dtype)

    with fake_cuda():
        linear = fp8.Fp8Linear(3072, 6144, weight_only=False, dtype=torch.bfloat16)
        for name, value in (*linear.named_parameters(), *linear.named_buffers()):
            new = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
            setattr(linear, name, nn.Parameter(new, requires_grad=False) if name != "scale" else new)
        x = torch.empty(1, 17, 3072, dtype=torch.bfloat16, device=CUDA)
        assert layer(linear, x).shape == (1, 17, 6144)
        for wrong in (by_rows, with_a_scale_by_rows):
            with pytest.raises(RuntimeError):
                wrong(linear, x)
