"""fp8: the layer against float64, merges that survive it, the twin against its base, pictures that repeat."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flux.device as device_module
from flux.device import compute_dtype
from flux.fp8 import E4M3, Fp8Linear, fp8_layers, new_twin, quantize_rows
from flux.live import LiveWeights
from flux.models import Flux, Precisions, cache_blocks, load_flux
from flux.pipelines import Job, denoise, encode_prompt
from flux.residency import Residency
from lora.merge import Merge
from lora.updates import LowRank

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)
E4M3_ERROR = 2**-4  # the most by which rounding to three bits of mantissa can be off, relative


def new_layer(weight: Tensor, bias: Tensor, *, weight_only: bool = False) -> Fp8Linear:
    layer = Fp8Linear(weight.shape[1], weight.shape[0], weight_only=weight_only, dtype=bias.dtype)
    layer.quantize_rows_(0, weight)
    layer.bias.data = bias
    return layer


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("leading", "width", "out"),
    [((2, 33), 64, 48), ((1, 7), 128, 16), ((40,), 32, 32), ((1, 1), 64, 32), ((1,), 64, 96), ((3, 2), 20, 10)],
)
def test_the_layer_is_a_linear_layer_within_its_rounding(
    leading: tuple[int, ...], width: int, out: int, dtype: torch.dtype, weight_only: bool
) -> None:
    generator = torch.Generator().manual_seed(width + out)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((out, width), (out,), (*leading, width)))
    x *= torch.logspace(-3, 3, x[..., 0].numel()).reshape(*leading, 1)  # tokens of all sizes have a scale of their own
    layer, x = new_layer(weight, bias.to(dtype), weight_only=weight_only), x.to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((*leading, out), dtype)
    truth = torch.nn.functional.linear(x.double(), weight.double(), layer.bias.double())
    for row, expected in zip(y.reshape(-1, out), truth.reshape(-1, out), strict=True):
        assert relative_error(row, expected) < 0.1
    assert torch.equal(y, layer(x))


def test_a_row_does_not_depend_on_the_others() -> None:
    """So that a picture's tokens are what they are whatever the prompt's length."""
    layer = new_layer(torch.randn(32, 64), torch.zeros(32))
    x = torch.randn(9, 64)
    assert torch.allclose(layer(x)[2:5], layer(x[2:5]), atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(-20, 20), st.integers(0, 2**31))
def test_quantized_rows_give_the_rows_back(rows: int, width: int, exponent: float, seed: int) -> None:
    original = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    original[0] = 0
    values, scale = quantize_rows(original)
    back = values.float() * scale
    assert (values.dtype, scale.shape) == (E4M3, (rows, 1))
    assert not back[0].any()
    assert bool(((back - original).abs() <= E4M3_ERROR * original.abs().amax(1, keepdim=True)).all())
    large = original.abs() > original.abs().amax(1, keepdim=True) / 2**8
    assert bool(((back - original).abs() <= E4M3_ERROR * original.abs())[large].all())
    assert torch.allclose(back.amax(1), original.amax(1), rtol=2**-4, atol=1e-9)
    values_again, scale_again = quantize_rows(back)
    assert torch.allclose(values_again.float() * scale_again, back, rtol=1e-6)


def test_rows_are_written_in_place_and_one_by_one_as_well_as_at_once() -> None:
    weight = torch.randn(48, 32)
    whole, parts = (new_layer(torch.zeros(48, 32), torch.zeros(48)) for _ in range(2))
    pointers = [tensor.data_ptr() for tensor in (parts.weight, parts.scale)]
    whole.quantize_rows_(0, weight)
    for start in range(0, 48, 20):
        parts.quantize_rows_(start, weight[start : start + 20].bfloat16().float())
    whole.quantize_rows_(0, weight.bfloat16())
    assert torch.equal(whole.weight.view(torch.uint8), parts.weight.view(torch.uint8))
    assert torch.equal(whole.scale, parts.scale)
    assert pointers == [tensor.data_ptr() for tensor in (parts.weight, parts.scale)]


def test_a_weak_lora_survives_where_quantizing_twice_loses_it() -> None:
    """(merge, quantize) beside (quantize, merge into that, quantize again): how much of the update is left."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator, dtype=torch.float64) * 0.02
    up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((256, 4), (4, 256)))
    update = up @ down
    update *= 0.01 * weight.norm() / update.norm()  # a hundredth of the weight, as trained ones are

    def quantized(value: Tensor) -> Tensor:
        values, scale = quantize_rows(value)
        return values.double() * scale

    truth = weight + update
    once, twice = quantized(truth), quantized(quantized(weight) + update)
    assert relative_error(once, truth) < relative_error(twice, truth)

    def kept(value: Tensor) -> float:
        """How much of the update is in what quantizing added to the quantized weight."""
        return float(((value - quantized(weight)) * update).sum() / (update * update).sum())

    assert kept(once) == pytest.approx(1, abs=0.1)
    assert abs(kept(twice) - 1) > 0.5


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Precisions]:
    return load_flux(checkpoints, CPU, DTYPE)


def nothing() -> None:
    pass


def interrupt() -> None:
    raise InterruptedError


def latents(
    flux: Flux, size: tuple[int, int] = (256, 256), steps: int = 4, on_step: Callable[[], None] = nothing
) -> Tensor:
    job = Job(size=size, steps=steps, guidance=3.0, embeds=encode_prompt(flux, "a red circle"))
    return denoise(flux, job, 3, on_step)


def test_the_twin_is_its_base_in_fp8(models: dict[str, Precisions]) -> None:
    exact, fast = models["dev"]
    exact.residency.use(fast.transformer)
    twin, base, pristine = fast.transformer, exact.transformer, exact.pristine("transformer")
    layers = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "blocks." in name}
    assert set(fp8_layers(twin)) == layers
    for name, parameter in twin.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in layers and kind == "weight":
            values, scale = quantize_rows(pristine(name))
            assert torch.equal(parameter.view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(twin.get_submodule(owner).scale, scale)
        else:
            assert torch.equal(parameter, pristine(name).to(DTYPE))


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_go_fast_draws_the_same_picture_again_and_nearly_that_of_the_base(
    models: dict[str, Precisions], model: str
) -> None:
    exact, quick = latents(models[model].exact), latents(models[model].fast)
    assert torch.equal(latents(models[model].fast), quick)
    assert torch.equal(latents(models[model].exact), exact)
    assert 0 < relative_error(quick, exact.double()) < 0.1


def test_a_gpu_without_fp8_units_keeps_the_weights_in_fp8(
    checkpoints: dict[str, Path], models: dict[str, Precisions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closer to the base, since activations stay as they are."""
    monkeypatch.setattr("flux.models.has_fp8_units", lambda _: False)
    flux = load_flux({"dev": checkpoints["dev"]}, CPU, DTYPE)["dev"]
    exact = latents(flux.exact).double()
    weight_only = latents(flux.fast)
    assert flux.fast.transformer.get_submodule(fp8_layers(flux.exact.transformer)[0]).weight.dtype == E4M3
    assert 0 < relative_error(weight_only, exact) < relative_error(latents(models["dev"].fast), exact)


def test_whether_a_device_multiplies_in_fp8_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert device_module.has_fp8_units(CPU)
    assert not caplog.messages

    def no_kernel(*_: object, **__: object) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", no_kernel)
    assert not device_module.has_fp8_units(CPU)
    assert "this device cannot multiply in fp8" in caplog.text


def test_loras_in_the_twin_are_merged_first_and_quantized_once(models: dict[str, Precisions]) -> None:
    flux = models["schnell"].exact
    pristine = flux.pristine("transformer")
    layers = fp8_layers(flux.transformer)
    twin = new_twin(flux.transformer, weight_only=False)
    residency = Residency(CPU)
    residency.add("twin", twin, pristine, loaded=False)
    residency.use(twin)
    generator = torch.Generator().manual_seed(0)
    live = LiveWeights(twin, pristine)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    wanted = {}
    for name in layers[::2]:
        out, width = pristine.shapes[f"{name}.weight"]
        update = LowRank(
            0.01 * torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator), 0.5
        )
        wanted[f"{name}.weight"] = update
    strength = 0.8
    live.apply({name: Merge([("sha", strength, update)]) for name, update in wanted.items()})
    for name, update in wanted.items():
        truth = pristine(name).double() + strength * update.scale * (update.up.double() @ update.down.double())
        values, scale = quantize_rows(truth.float())
        owner = twin.get_submodule(name.removesuffix(".weight"))
        same = owner.weight.view(torch.uint8) == values.view(torch.uint8)
        assert same.float().mean() > 0.999  # sums in float32 and in float64 differ in last bits
        assert torch.allclose(owner.scale, scale, rtol=1e-5)
    live.apply({})
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


def test_first_block_caching_skips_steps_and_forgets_the_last_picture(checkpoints: dict[str, Path]) -> None:
    flux = load_flux({"dev": checkpoints["dev"]}, CPU, DTYPE)["dev"]
    plain, exact = latents(flux.fast, steps=8), latents(flux.exact, steps=8)
    cache_blocks({"dev": flux}, 10.0)  # so high that every step but the first is skipped
    calls: list[int] = []
    last = flux.fast.transformer.single_transformer_blocks[-1].attn
    last.register_forward_hook(lambda *_: calls.append(1))
    cached = latents(flux.fast, steps=8)
    assert len(calls) == 1
    assert not torch.equal(cached, plain)
    assert torch.equal(latents(flux.fast, steps=8), cached)
    with pytest.raises(InterruptedError):
        latents(flux.fast, size=(256, 320), on_step=interrupt)
    assert torch.equal(latents(flux.fast, steps=8), cached)
    assert torch.equal(latents(flux.exact, steps=8), exact)  # only go_fast
