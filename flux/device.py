"""The device that the model runs on: all that differs between a CPU and a CUDA GPU."""

import logging
import os
from dataclasses import dataclass

import torch

from settings import SettingsError

log = logging.getLogger("flux-lora")

RESERVED_BYTES = 600 * 10**6  # of a GPU's memory, for kernels, their workspaces and what torch's allocator cannot use


@dataclass(frozen=True)
class Memory:
    """Bytes for weights and activations on the device, and for mapped files on the host."""

    device: int
    host: int


def choose_device(name: str | None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1"); None: the first GPU, or the CPU where there is none.

    Raises `SettingsError` for a GPU that is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"The environment variable FLUX_DEVICE asks for {name}, but torch sees {torch.cuda.device_count()} GPUs."
        )
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU without bfloat16 instructions, where its products are hundreds of times slower."""
    if multiplies_bf16(device):
        return torch.bfloat16
    log.warning("this CPU has no bfloat16 instructions: the models run in float32")
    return torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrices in bfloat16 are multiplied by instructions made for it: on GPUs, and on CPUs that have some."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def memory_of(device: torch.device) -> Memory | None:
    """What a GPU and its host have for the models; None for a CPU, whose operating system moves mapped files itself."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return Memory(device=free - RESERVED_BYTES, host=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def compiles(setting: bool | None, device: torch.device) -> bool:
    """Whether the transformers are compiled: as `FLUX_COMPILE` says, or else on a GPU."""
    return device.type == "cuda" if setting is None else setting


def has_fp8_units(device: torch.device) -> bool:
    """Whether scaled_mm multiplies fp8 matrices there: on GPUs since Ada (compute capability 8.9), and on CPUs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return True
    log.warning("this GPU has no fp8 matrix units: go_fast keeps the weights in fp8 and computes in bf16")
    return False


def check_device(device: torch.device) -> None:
    """Compute something small on the device. Raises `RuntimeError` if it has stopped working."""
    try:
        answer = torch.ones(2, device=device).sum().item()
    except RuntimeError as error:  # what CUDA says goes on for many lines
        raise RuntimeError(f"The device {device} has stopped working: {str(error).splitlines()[0]}.") from None
    if answer != 2:
        raise RuntimeError(f"The device {device} has stopped working: it adds 1 and 1 to {answer}.")


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on a GPU, so that a clock read next is right; a CPU has nothing queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
