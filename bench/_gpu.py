"""The eight measurements of `script/bench gpu`, each a function from the models at hand to lines of its table."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench._loras import new_lora, parsed
from flux.device import is_out_of_memory, synchronize
from flux.fp8 import quantize_rows
from flux.live import Changes
from flux.models import Flux, Precisions
from flux.pipelines import Job, decode, denoise, encode_prompt
from flux.transfer import Ring
from settings import GB

SIZES = {"1 MP": (1024, 1024), "0.25 MP": (512, 512)}
STEPS, SWAPS, CANCELS, ROUNDS, ROWS = 4, 20, 20, 3, (2, 17, 4481, 4608)  # rows of the fp8 products


@dataclass(frozen=True)
class Line:
    """One line of the table. `most` or `least` is the goal, where there is one."""

    what: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None


class CancelledError(BaseException):
    """As Cog's cancelling is."""


@dataclass(frozen=True)
class Bench:
    """What is measured on."""

    models: dict[str, Precisions]
    sizes: dict[str, tuple[int, int]]

    @property
    def both(self) -> Precisions:
        return self.models["dev"]

    @property
    def device(self) -> torch.device:
        return self.both.exact.residency.device

    def seconds(self, do: Callable[[], object]) -> float:
        """Of one call and what it queues on the device."""
        synchronize(self.device)
        started = time.perf_counter()
        do()
        synchronize(self.device)
        return time.perf_counter() - started

    def job(self, size: tuple[int, int], steps: int = STEPS) -> Job:
        return Job(size, steps, 3.0, encode_prompt(self.both.exact, "a lighthouse at dawn"))

    def loras(self, count: int) -> list[Changes]:
        """Of rank 16, on every linear layer of the blocks."""
        pristine = self.both.exact.pristine("transformer")
        return [parsed(new_lora(pristine, 16, seed), pristine, f"lora {seed}") for seed in range(count)]


def copies(bench: Bench) -> Iterable[Line]:
    """Copy rates of the transformer's file: as it is mapped, first and second touch, and through rings."""
    pristine = bench.both.exact.pristine("transformer")
    total = sum(pristine(name).nbytes for name in pristine.shapes)
    target = torch.empty(max(pristine(name).nbytes for name in pristine.shapes), dtype=torch.uint8, device=bench.device)

    def mapped() -> None:
        for name in pristine.shapes:
            source = pristine(name).reshape(-1).view(torch.uint8)
            target[: source.numel()].copy_(source)

    for touch in ("first", "second"):
        yield Line(f"mapped file, {touch} touch", total / bench.seconds(mapped) / GB, "GB/s")
    for threads in (1, 4, 8):
        ring = Ring(bench.device, threads=threads)

        def through_ring(ring: Ring = ring) -> None:
            for _ in ring.stream((pristine(name), None) for name in pristine.shapes):
                pass

        through_ring()
        goal = 20.0 if threads > 1 else None
        yield Line(f"ring, {threads} threads", total / bench.seconds(through_ring) / GB, "GB/s", least=goal)


def swaps(bench: Bench) -> Iterable[Line]:
    """Swaps of a LoRA of rank 16, with the pristine weights on the device and from the host; and the bits after 20."""
    first, second = bench.loras(2)
    for flux in bench.both:
        residency, pristine = flux.residency, flux.pristine("transformer")
        swap = partial(residency.change, flux.transformer)
        residency.use(flux.transformer, flux.vae)
        swap(first)
        times = [bench.seconds(partial(swap, (second, first)[i % 2])) for i in range(6)]
        near = all(pristine.is_near(name) for name in first)
        where = "pristine weights on the device" if near else "no room for pristine weights"
        yield Line(f"swap, {flux.precision}, {where}", statistics.median(times), "s", most=0.15)
        for i in range(SWAPS):
            swap((first, second)[i % 2])
        swapped = [value.clone() for value in flux.transformer.parameters()]
        residency.evict_all()
        residency.use(flux.transformer, flux.vae)
        pairs = zip(swapped, flux.transformer.parameters(), strict=True)
        wrong = sum(int((bits(a) != bits(b)).sum()) for a, b in pairs)
        yield Line(f"bytes that differ after {SWAPS} swaps from a fresh merge, {flux.precision}", wrong, "", most=0)
        untouched, pristine.untouched = pristine.untouched, lambda _: None
        live = residency.live(flux.transformer)
        times = [bench.seconds(partial(live.apply, (first, second)[i % 2])) for i in range(4)]
        pristine.untouched = untouched
        yield Line(f"swap, {flux.precision}, through the ring", statistics.median(times), "s", most=1.0)
        swap({})


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def steps(bench: Bench) -> Iterable[Line]:
    """The first call of each size and the seconds of a step after it."""
    for flux in bench.both:
        for name, size in bench.sizes.items():
            draw = partial(denoise, flux, bench.job(size), 1, lambda: None)
            first = bench.seconds(draw)
            times = [bench.seconds(draw) / STEPS for _ in range(ROUNDS)]
            step = statistics.median(times)
            yield Line(f"a step, {flux.precision}, {name}", 1000 * step, "ms", most=110 if name == "1 MP" else None)
            yield Line(f"first call beside a later one, {flux.precision}, {name}", first / (STEPS * step), "", most=1.5)


def products(bench: Bench) -> Iterable[Line]:
    """scaled_mm beside float64, and its rate."""
    inner = (
        bench.both.exact.transformer.config.num_attention_heads * bench.both.exact.transformer.config.attention_head_dim
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4 * inner, inner, generator=generator)
    quantized, scale = quantize_rows(weight.to(bench.device, torch.bfloat16))
    for count in ROWS:
        x = torch.randn(count, inner, generator=generator)
        rows, row_scale = quantize_rows(x.to(bench.device, torch.bfloat16))

        def product(rows: Tensor = rows, row_scale: Tensor = row_scale) -> Tensor:
            return torch._scaled_mm(rows, quantized.t(), row_scale, scale.t(), out_dtype=torch.bfloat16)

        truth = x.double() @ weight.double().t()
        error = float((product().double().cpu() - truth).norm() / truth.norm())
        yield Line(f"error of an fp8 product of {count} rows", error, "", most=0.05)
        times = [bench.seconds(product) for _ in range(10)]
        yield Line(f"fp8 product of {count} rows", 2 * count * weight.numel() / min(times) / 1e12, "TFLOP/s")


def memory(bench: Bench) -> Iterable[Line]:
    """The plan beside what the allocator and the driver report; what moves in three pictures."""
    residency = bench.both.exact.residency
    for number in range(3):
        before = set(residency.resident)
        for flux in bench.both:
            job = bench.job(bench.sizes["1 MP"], 1)
            decode(flux, denoise(flux, job, number, lambda: None), job.size)
        moved = len(before ^ set(residency.resident))
        what = f"parts that came or left in pictures {2 * number + 1} and {2 * number + 2}"
        yield Line(what, moved, "", most=0 if number else None)
    planned = sum(residency.sizes[name] for name in residency.resident)
    yield Line("planned for the parts that are there", planned / GB, "GB")
    if bench.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(bench.device)
        yield Line("reserved by the allocator / planned", reserved / planned, "", most=1.1)
        if command := shutil.which("nvidia-smi"):
            query = [command, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
            yield Line("used, as nvidia-smi says", float(used) * 2**20 / GB, "GB")


def vae(bench: Bench) -> Iterable[Line]:
    """Decoding a megapixel: as it is, channels last, compiled."""
    flux, size = bench.both.exact, bench.sizes["1 MP"]
    flux.residency.use(flux.vae, work=0)
    network: AutoencoderKL = flux.vae
    latents = torch.zeros(1, 16, size[1] // 8, size[0] // 8, dtype=flux.dtype, device=bench.device)

    @torch.no_grad()
    def run(decoder: Callable[..., object]) -> None:
        decoder(latents, return_dict=False)

    backend = "inductor" if bench.device.type == "cuda" else "eager"
    ways: list[tuple[str, Callable[[], Callable[..., object]]]] = [
        ("as it is", lambda: network.decode),
        ("channels last", lambda: network.to(memory_format=torch.channels_last).decode),
        ("channels last, compiled", lambda: torch.compile(network.decode, backend=backend)),
    ]
    for name, prepare in ways:
        decoder = prepare()
        run(decoder)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
            before = torch.cuda.memory_allocated(bench.device)
        times = [bench.seconds(partial(run, decoder)) for _ in range(ROUNDS)]
        yield Line(f"VAE, {name}", 1000 * statistics.median(times), "ms")
        if bench.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(bench.device) - before
            yield Line(f"VAE, {name}, peak beside its weights", peak / GB, "GB", most=2.3)
    network.to(memory_format=torch.contiguous_format)


def failures(bench: Bench) -> Iterable[Line]:
    """Out of memory with a ballast; cancels in merges and steps; the bits afterwards."""
    flux = bench.both.exact
    job = bench.job(bench.sizes["0.25 MP"], 2)
    expected = denoise(flux, job, 7, lambda: None).clone()
    if bench.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(bench.device)
        ballast = [torch.empty(max(0, free - 300 * 2**20), dtype=torch.uint8, device=bench.device)]
        try:
            flux.residency.or_clear(partial(denoise, flux, bench.job((1440, 1440), 1), 7, lambda: None))
            outcome = 0.0
        except RuntimeError as error:
            outcome = float(str(error).startswith("The device ran out of memory"))
        ballast.clear()
        yield Line("running out of memory is one sentence", outcome, "", least=1)
    lora = bench.loras(1)[0]

    def cancel() -> None:
        raise CancelledError

    for _ in range(CANCELS):
        for broken in (lambda: denoise(flux, job, 7, cancel), lambda: cancelled_merge(flux, lora)):
            with suppress(CancelledError):
                broken()
    flux.residency.change(flux.transformer, {})
    again = denoise(flux, job, 7, lambda: None)
    yield Line(f"numbers that differ after {2 * CANCELS} cancels", int((again != expected).sum()), "", most=0)


def cancelled_merge(flux: Flux, lora: Changes) -> None:
    """A merge that ends in the middle of its weights."""
    names = list(lora)
    live = flux.residency.live(flux.transformer)
    half = {name: lora[name] for name in names[: len(names) // 2]}
    live.apply({**half, names[-1]: _Broken()})


class _Broken:
    """A change that is cancelled as it is written."""

    content, reads = ("broken",), ()

    def write(self, *_: object, **__: object) -> None:
        raise CancelledError


def attention(bench: Bench) -> Iterable[Line]:
    """scaled_dot_product_attention by each back end, at the tokens of a megapixel."""
    config, (width, height) = bench.both.exact.transformer.config, bench.sizes["1 MP"]
    tokens = width * height // 256 + 512
    shape = (1, config.num_attention_heads, tokens, config.attention_head_dim)
    query, key, value = (torch.randn(shape, device=bench.device, dtype=bench.both.exact.dtype) for _ in range(3))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def attend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        try:
            first = bench.seconds(attend)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            continue  # the device has no such kernel
        times = [bench.seconds(attend) for _ in range(ROUNDS)]
        yield Line(f"attention, {backend.name.lower()}", 1000 * statistics.median(times), "ms")
        yield Line(f"attention, {backend.name.lower()}, first call", 1000 * first, "ms")


MEASUREMENTS: dict[str, Callable[[Bench], Iterable[Line]]] = {
    "copies": copies,
    "swaps": swaps,
    "steps": steps,
    "fp8 products": products,
    "memory": memory,
    "VAE": vae,
    "failures": failures,
    "attention": attention,
}
