"""Compiled blocks: as many graphs after a tour of sizes, modes, LoRAs and precisions as before it; and a loop over the
steps that gives a GPU nothing to wait for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from flux.device import compute_dtype
from flux.fp8 import Fp8Linear
from flux.models import Flux, Precisions, compile_blocks, load_flux, precisions
from flux.pipelines import Job, denoise, encode_picture, encode_prompt, warm_up
from lora.merge import Merge
from lora.updates import LowRank
from tools.random_flux import FluxSize, write_random_flux

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)


def nothing() -> None:
    pass


def job_of(flux: Flux, mode: str, size: tuple[int, int], photo: Image.Image) -> Job:
    picture = photo.resize(size)
    return Job(
        size=size,
        steps=2,
        guidance=3.0,
        embeds=encode_prompt(flux, "a cat"),
        posterior=None if mode == "txt2img" else encode_picture(flux, picture),
        mask=picture.convert("L") if mode == "inpaint" else None,
    )


TOUR = [("txt2img", (256, 256)), ("txt2img", (512, 256)), ("img2img", (320, 448)), ("inpaint", (256, 304))]


def tour(models: dict[str, Precisions], photo: Image.Image) -> list[torch.Tensor]:
    """Every stop with dev in both precisions, the first with schnell."""
    stops = {"dev": TOUR, "schnell": TOUR[:1]}
    return [
        denoise(flux, replace(job_of(flux, *stop, photo), steps=1), 1, nothing)
        for flux in precisions(models)
        for stop in stops[flux.name]
    ]


def change_weights(flux: Flux, strength: float) -> None:
    pristine = flux.pristine("transformer")
    flux.residency.use(flux.transformer)
    updates = {
        name: Merge([("sha", strength, LowRank(torch.ones(out, 1), torch.ones(1, *width), 0.01))])
        for name, (out, *width) in pristine.shapes.items()
        if "attn.to_q.weight" in name
    }
    flux.residency.change(flux.transformer, updates if strength else {})


def test_nothing_compiles_after_the_warm_up(tmp_path: Path, photo: Image.Image) -> None:
    """Sizes, modes, a model that comes later, both precisions, LoRAs written in place, parts that leave and come back.
    The graphs run as they were traced, so that the latents are bit for bit those of the uncompiled blocks."""
    folders = {model: tmp_path / model for model in ("dev", "schnell")}
    for model, folder in folders.items():
        write_random_flux(folder, FluxSize(single_blocks=2), model=model)
    models = load_flux(folders, CPU, DTYPE)
    for flux in precisions(models):
        change_weights(flux, 0.5)
    changed = tour(models, photo)
    for flux in precisions(models):
        change_weights(flux, 0)
    plain = tour(models, photo)
    assert not any(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    compile_blocks(models, backend="eager")
    warm_up({"dev": models["dev"]})
    after_warm_up = graphs["unique_graphs"]
    assert after_warm_up <= 8  # two kinds of block in two precisions, each as the first of its kind and as a later one
    for latents, expected in zip(tour(models, photo), plain, strict=True):
        assert torch.equal(latents, expected)
    for flux in precisions(models):
        change_weights(flux, 0.5)
    for latents, expected in zip(tour(models, photo), changed, strict=True):
        assert torch.equal(latents, expected)
    models["dev"].exact.residency.evict_all()  # what comes back has its LoRAs
    for latents, expected in zip(tour(models, photo), changed, strict=True):
        assert torch.equal(latents, expected)
    assert graphs["unique_graphs"] == after_warm_up
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_layer_agrees() -> None:
    """By the compiler that the predictor uses, any count of rows with one graph."""
    layer = Fp8Linear(64, 32, weight_only=False, dtype=DTYPE)
    layer.quantize_rows_(0, torch.randn(32, 64))
    layer.bias.data.zero_()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for rows in (5, 40, 7):
            x = torch.randn(2, rows, 64, dtype=DTYPE)
            assert torch.allclose(compiled(x), layer(x), rtol=0.05, atol=0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_pinned", "equal")  # the device's answer, or data for it


class Operations(TorchDispatchMode):
    """Notes every operation that runs, by the step that it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = [[]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = func._opname == "_to_copy" and kwargs.get("device") is not None
        self.steps[-1].append("move" if moves else func._opname)
        return func(*args, **kwargs)


@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
def test_a_step_neither_waits_for_the_device_nor_sends_it_anything(
    checkpoints: dict[str, Path], photo: Image.Image, mode: str
) -> None:
    # in float32, since a cast that names the device it is on looks like a move
    models = load_flux({"dev": checkpoints["dev"]}, CPU, torch.float32)
    for one in precisions(models):
        job = job_of(one, mode, (256, 256), photo)
        denoise(one, job, 1, nothing)  # brings the transformer and makes the schedule
        with Operations() as operations:
            denoise(one, job, 1, lambda: operations.steps.append([]))
        before, *steps, _ = operations.steps
        assert len(steps) == 1  # the first is counted with what comes before it
        assert "addmm" in steps[0] or "_scaled_mm" in steps[0]
        assert not {"move", *WAITS} & set(steps[0])
        assert before.count("sin") > steps[0].count("sin")  # the positions' are made with the first step, and no more
