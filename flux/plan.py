"""What a device of some size does with the models: pure functions of sizes in bytes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flux.device import Memory
from settings import GB

VAE, CLIP, T5 = "VAE", "CLIP", "T5"
ENCODERS = (CLIP, T5)
FP8_SUFFIX = " fp8"
# of activations at the peak of a transformer's forward and of the VAE (`script/bench memory`)
DENOISING_BYTES_PER_PIXEL = 800
DECODING_BYTES_PER_PIXEL = 2100


class TooSmallError(RuntimeError):
    """The device cannot hold what is needed at once; the message says what it needs."""


@dataclass(frozen=True)
class Moves:
    """What has to leave the device, in that order, and then come to it."""

    evict: list[str]
    load: list[str]


def plan_moves(
    sizes: Mapping[str, int], device: int, resident: Sequence[str], needed: Collection[str], work: int, room: int = 0
) -> Moves:
    """How to have all of `needed` on a device of so many bytes, with `work` bytes left for activations, or `room` bytes
    where that is more and possible.

    `resident` is what is there, in the order in which it may leave; it stays as far as it can. Raises `TooSmallError`.
    """
    left = device - sum(sizes[name] for name in needed)
    if left < work:
        raise TooSmallError(
            f"The device has {device / GB:.1f} GB for models, but {_listed(needed)} with {work / GB:.1f} GB to work in "
            f"need {(device - left + work) / GB:.1f} GB at once."
        )
    left -= room if room > work and room <= left else work
    others = [name for name in resident if name not in needed]
    evict = []
    while sum(sizes[name] for name in others) > left:
        evict.append(others.pop(0))
    return Moves(evict, [name for name in needed if name not in resident])


def plan_room(sizes: Mapping[str, int], free: int, idle: Iterable[str], wanted: int) -> list[str] | None:
    """Which of the idle parts, in their order, leave for `wanted` bytes where `free` are free; None where there is no
    room even without all of them."""
    evict = []
    for name in idle:
        if free >= wanted:
            break
        evict.append(name)
        free += sizes[name]
    return evict if free >= wanted else None


@dataclass(frozen=True)
class Layout:
    """Where the parts are at the start."""

    resident: list[str]  # brought to the device, in this order
    later: list[str]  # have room beside those, and come when they are first asked for
    streamed: list[str]  # encoders whose blocks come to the device one by one when a prompt is encoded
    waiting: list[str]  # the other parts, built when asked for from files that host memory can hold
    on_disk: list[str]  # the same from files that it cannot hold as well
    keeps_twins: bool  # whether fp8 weights stay in host memory once they are built


@dataclass(frozen=True)
class Sizes:
    """Bytes of FLUX.1's parts, and of the encoders where only one of their blocks is on the device at a time."""

    parts: Mapping[str, int]
    streamed: Mapping[str, int]


def plan_layout(sizes: Sizes, memory: Memory, transformers: Sequence[str], work: int, room: int) -> Layout:
    """Lay out `transformers`, the most wanted first, each followed by its fp8 twin. The VAE stays beside any of them,
    and so do `work` bytes for denoising, or `room` bytes for all that a picture takes where that is possible.

    - The two precisions of a model are on the device together where they can be, rather than whole encoders.
    - Room for the pristine weights of the first model comes before a second model.
    - A second model comes later, so that the first picture does not wait for it.

    Raises `TooSmallError` when not one transformer, or not even the encoders, can be on the device.
    """
    whole, small = sizes.parts, {**sizes.parts, **sizes.streamed}
    smallest = min(transformers, key=lambda name: whole[name])
    for needed in ([smallest, VAE], ENCODERS):
        plan_moves(small, memory.device, [], needed, work)
    usable = [name for name in transformers if whole[name] + whole[VAE] + work <= memory.device]
    if whole[smallest] + whole[VAE] + room <= memory.device:
        work = room

    def fit(names: Collection[str], of: Mapping[str, int]) -> bool:
        return sum(of[name] for name in (VAE, *ENCODERS, *names)) + work <= memory.device

    first = [name for name in usable if _file(name) == _file(usable[0])]
    together = first if fit(first, small) else first[:1]
    streamed = [] if fit(together, whole) else [name for name in ENCODERS if name in sizes.streamed]
    of = small if streamed else whole
    fit_first = _that_fit((VAE, *first, *ENCODERS), of, memory.device - work)
    left = memory.device - work - sum(of[name] for name in fit_first)
    if usable[0] in fit_first:
        left -= whole[_file(usable[0])]  # for its pristine weights
    later = _that_fit((name for name in usable if name not in first), of, left)
    resident = [name for name in (VAE, *ENCODERS, *usable) if name in fit_first]
    others = [name for name in (*ENCODERS, *usable) if name not in (*resident, *later)]
    host, files, waiting, on_disk = memory.host, set[str](), list[str](), list[str]()
    for name in others:
        file = _file(name)
        if file not in files and whole[file] > host:
            on_disk.append(name)
        else:
            waiting.append(name)
            host -= 0 if file in files else whole[file]
            files.add(file)
    twins = sum(whole[name] for name in usable if name.endswith(FP8_SUFFIX))
    return Layout(
        resident, later, streamed, waiting, on_disk, keeps_twins=bool(others) and not on_disk and twins <= host
    )


def _that_fit(names: Iterable[str], sizes: Mapping[str, int], left: int) -> list[str]:
    """Those that fit beside the ones before them."""
    fit = []
    for name in names:
        if sizes[name] <= left:
            fit.append(name)
            left -= sizes[name]
    return fit


def _file(name: str) -> str:
    """The part whose file a transformer is built from."""
    return name.removesuffix(FP8_SUFFIX)


def denoising_bytes(size: tuple[int, int]) -> int:
    """What a transformer's forward needs beside the weights, for a picture of (width, height) pixels."""
    return DENOISING_BYTES_PER_PIXEL * size[0] * size[1]


def decoding_bytes(size: tuple[int, int]) -> int:
    """What the VAE needs beside its weights, encoding or decoding."""
    return DECODING_BYTES_PER_PIXEL * size[0] * size[1]


def picture_bytes(size: tuple[int, int]) -> int:
    """What denoising and decoding a picture need beside the weights, whichever is more."""
    return max(denoising_bytes(size), decoding_bytes(size))


def _listed(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
