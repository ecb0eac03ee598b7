"""What a device of some size does with the models: a pure function of sizes in bytes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flux.device import Memory
from settings import GB

VAE = "VAE"
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
    sizes: Mapping[str, int], device: int, resident: Sequence[str], needed: Collection[str], work: int
) -> Moves:
    """How to have all of `needed` on a device of so many bytes, with `work` bytes left for activations.

    `resident` is what is there, least recently used first; it stays as far as there is room. Raises `TooSmallError`.
    """
    room = device - work - sum(sizes[name] for name in needed)
    if room < 0:
        raise TooSmallError(
            f"The device has {device / GB:.1f} GB for models, but {_listed(needed)} with {work / GB:.1f} GB to work in "
            f"need {(device - room) / GB:.1f} GB at once."
        )
    others = [name for name in resident if name not in needed]
    evict = []
    while sum(sizes[name] for name in others) > room:
        evict.append(others.pop(0))
    return Moves(evict, [name for name in needed if name not in resident])


@dataclass(frozen=True)
class Layout:
    """Where the parts are at the start."""

    resident: list[str]  # brought to the device: what it holds at once when nothing is asked for twice
    waiting: list[str]  # the other parts, built when asked for from files that host memory can hold
    on_disk: list[str]  # the same from files that it cannot hold as well


def plan_layout(
    sizes: Mapping[str, int], memory: Memory, transformers: Sequence[str], encoders: Sequence[str], work: int
) -> Layout:
    """Lay out `transformers`, the most wanted first, and the text encoders; the VAE stays beside any transformer.

    `sizes` has all of them; "dev fp8" is built from the file of "dev". Raises `TooSmallError` when not one transformer,
    or not even the encoders, can be on the device.
    """
    usable = [name for name in transformers if sizes[name] + sizes[VAE] + work <= memory.device]
    smallest = min(transformers, key=lambda name: sizes[name])
    for needed in ([smallest, VAE], encoders):
        plan_moves(sizes, memory.device, [], needed, work)
    room = memory.device - work - sizes[VAE]
    encoders_stay = sizes[usable[0]] + sum(sizes[name] for name in encoders) <= room
    resident, others = [VAE], []
    for name in (*encoders, *usable):
        if sizes[name] <= room and (encoders_stay or name not in encoders):
            resident.append(name)
            room -= sizes[name]
        else:
            others.append(name)
    host, files, waiting, on_disk = memory.host, set[str](), [], []
    for name in others:
        file = name.removesuffix(FP8_SUFFIX)
        if file not in files and sizes[file] > host:
            on_disk.append(name)
        else:
            waiting.append(name)
            host -= 0 if file in files else sizes[file]
            files.add(file)
    return Layout(resident, waiting, on_disk)


def denoising_bytes(size: tuple[int, int]) -> int:
    """What a transformer's forward needs beside the weights, for a picture of (width, height) pixels."""
    return DENOISING_BYTES_PER_PIXEL * size[0] * size[1]


def decoding_bytes(size: tuple[int, int]) -> int:
    """What the VAE needs beside its weights, encoding or decoding."""
    return DECODING_BYTES_PER_PIXEL * size[0] * size[1]


def _listed(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
