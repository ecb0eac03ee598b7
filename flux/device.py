"""The device that the model runs on: all that differs between a CPU and a CUDA GPU."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from settings import SettingsError

log = logging.getLogger("flux-lora")

LEAST_DRIVER = 580  # for CUDA 13
HOPPER = 9  # the first number of CUDA's compute capability
CONTROL_GROUP = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = (  # in the words of a checker's failure, cuBLAS, cuDNN, the driver, oneDNN and torch on a CPU
    "OutOfMemoryError",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "could not create a primitive",
    "DefaultCPUAllocator",
)
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
        if name == "cpu" and torch.version.cuda:
            log.warning("this torch is built for CUDA %s and finds no GPU: the CPU is used", torch.version.cuda)
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        why = f"torch sees {count} GPUs"
        if torch.version.cuda and not count:
            why += f": CUDA {torch.version.cuda} needs an NVIDIA driver of version {LEAST_DRIVER} or newer"
            why += ", and a container --gpus all"
        raise SettingsError(f"The environment variable FLUX_DEVICE asks for {name}, but {why}.")
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
    """Whether scaled_mm multiplies fp8 matrices with a scale per row there, tried with one small product: GPUs before
    Ada have no units for it, and some kernels are missing for some newer ones."""
    rows = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(32, 1, device=device)
    try:
        product = torch._scaled_mm(rows, rows.t(), scale, scale.t(), out_dtype=torch.bfloat16)
        works = bool((product == 32).all())
    except (RuntimeError, NotImplementedError) as error:
        log.info("fp8 product: %s", str(error).partition("\n")[0])
        works = False
    if not works:
        log.warning("this device cannot multiply in fp8: go_fast keeps the weights in fp8 and computes in bf16")
    return works


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it means that the device, or a CPU, has no memory left, whichever library says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def attention_backend(device: torch.device) -> str | None:
    """diffusers' name of the attention kernels that the card is known to be good at; None: whichever torch takes.

    cuDNN's on Hopper. On Blackwell reports disagree, and before Hopper torch's own flash attention is as fast.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return None
    return "_native_cudnn"


def free_host_memory() -> int:
    """Bytes that processes here can still take: of the machine, or of the container (control groups, version 2)."""
    free: int = psutil.virtual_memory().available
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used + int(statistics.get("file", 0)))


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


def pinned_bytes(size: int, device: torch.device) -> torch.Tensor:
    """A buffer of `size` bytes in host memory, uint8; pinned where the device is a GPU, which copies from it at the
    bus's speed."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return tensor.to("cpu", copy=True)


class CopyStream:
    """A stream of a GPU's for copies from host memory, beside the one that computes. The copies of one buffer are known
    by their `slot`. On a CPU a copy has happened when it is asked for, and there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._device = device
        self._events: dict[int, Any] = {}  # by slot: after its last copy

    @contextmanager
    def queue(self, slot: int) -> Iterator[None]:
        """Copies that are asked for within are queued here."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._events[slot] = self._stream.record_event()

    def wait_for_copies(self, slot: int) -> None:
        """Block until the copies of the slot are done."""
        if event := self._events.get(slot):
            event.synchronize()

    def wait_for_current_work(self) -> None:
        """What is queued here from now on begins after what the current stream has been asked for so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def let_current_work_wait(self, slot: int) -> None:
        """What the current stream is asked for from now on begins after the copies of the slot."""
        if event := self._events.get(slot):
            torch.cuda.current_stream(self._device).wait_event(event)

    def used_by_current_work(self, tensor: torch.Tensor) -> None:
        """A tensor that was made here is used there: its memory is free only after both."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))


class Stopwatch:
    """Adds up how long what is asked for while it runs takes on the device, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        started = self._now()
        yield
        if self._on_gpu:
            self._events.append((started, self._now()))
        else:
            self._seconds += self._now() - started

    def seconds(self) -> float:
        """Waits for the device, once."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events = []
        return self._seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
