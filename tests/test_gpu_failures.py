"""What goes wrong on a GPU, or for want of one, as far as it can be shown without: one sentence, or one log line."""

import logging
from pathlib import Path

import pytest
import torch

from flux import device, live
from flux.device import choose_device, free_host_memory, is_out_of_memory
from flux.live import NoMemoryError
from flux.models import load_flux
from lora.merge import Merge
from lora.updates import Full
from safety import SafetyError
from settings import SettingsError

CPU = torch.device("cpu")


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A wheel for CUDA 13 on an older driver sees no GPU at all."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SettingsError) as caught:
        choose_device("cuda")
    assert str(caught.value) == (
        "The environment variable FLUX_DEVICE asks for cuda, but torch sees 0 GPUs: CUDA 13.0 needs an NVIDIA driver of"
        " version 580 or newer, and a container --gpus all."
    )
    with caplog.at_level(logging.WARNING):
        assert choose_device(None) == CPU
    assert caplog.messages == ["this torch is built for CUDA 13.0 and finds no GPU: the CPU is used"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        SafetyError("Screening failed, ...: the safety checker raised OutOfMemoryError."),
    ],
)
def test_running_out_of_memory_is_known_whoever_says_so(checkpoints: dict[str, Path], error: Exception) -> None:
    residency = load_flux({"dev": checkpoints["dev"]}, CPU, torch.bfloat16)["dev"].exact.residency

    def work() -> None:
        raise error

    with pytest.raises(
        RuntimeError, match=r"^The device ran out of memory on this request and has been cleared: .*[.]$"
    ):
        residency.or_clear(work)
    assert residency.resident == []


def test_other_errors_stay_what_they_are(checkpoints: dict[str, Path]) -> None:
    residency = load_flux({"dev": checkpoints["dev"]}, CPU, torch.bfloat16)["dev"].exact.residency

    def work() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        residency.or_clear(work)
    assert residency.resident
    assert not is_out_of_memory(ValueError("memory of an elephant"))


def test_a_cpu_without_memory_for_what_a_lora_changes_says_so_before_it_writes(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed weights are private copies of what was mapped from the file; what is a copy already takes no more."""
    flux = load_flux({"dev": checkpoints["dev"]}, CPU, torch.bfloat16)["dev"].exact
    pristine = flux.pristine("transformer")
    name = "transformer_blocks.0.attn.to_q.weight"
    changes = {name: Merge([("sha", 1.0, Full(torch.ones(pristine.shapes[name])))])}
    with monkeypatch.context() as full:
        full.setattr(live, "free_host_memory", lambda: 1000)
        with pytest.raises(NoMemoryError, match=r"^The LoRAs change weights of 0.0 GB, .* 0.0 GB are free: .*[.]$"):
            flux.residency.change(flux.transformer, changes)
    assert torch.equal(flux.transformer.get_parameter(name), pristine(name))
    flux.residency.change(flux.transformer, changes)
    monkeypatch.setattr(live, "free_host_memory", lambda: 0)
    flux.residency.change(flux.transformer, {})
    flux.residency.change(flux.transformer, changes)
    assert torch.equal(flux.transformer.get_parameter(name), (pristine(name).float() + 1).bfloat16())


def test_a_container_has_what_its_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CONTROL_GROUP", tmp_path)
    machine = free_host_memory()
    for name, text in (
        ("memory.max", "5000\n"),
        ("memory.current", "4000\n"),
        ("memory.stat", "anon 1000\nfile 2500\n"),
    ):
        (tmp_path / name).write_text(text)
    assert free_host_memory() == 3500  # mapped files give their pages back
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(free_host_memory() - machine) < machine
