"""FLUX.1 dev and schnell in memory: built from their files, shared where they are the same, each with its fp8 twin.

The files are read by diffusers and transformers. Which part is on the device at what time is for `residency.py` to say.
"""

import json
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from cachetools import LRUCache
from diffusers import (
    AutoencoderKL,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flux.device import Memory, attention_backend, has_fp8_units
from flux.fp8 import new_twin
from flux.plan import CLIP, FP8_SUFFIX, T5, VAE, Sizes, denoising_bytes, picture_bytes, plan_layout
from flux.pristine import Pristine
from flux.residency import Residency

log = logging.getLogger("flux-lora")

FP8 = "fp8"  # a precision, as the metrics and the log call it
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
EMBEDDING_CACHE_BYTES = 64 * 2**20  # a dev prompt takes 4 MiB at FLUX.1's width
WEIGHT_SAMPLES = 64  # places at which two copies of a part are compared
TYPICAL_SIZE = (1024, 1024)

TOKENIZERS: dict[str, Any] = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
}
NAMES = {"vae": VAE, "text_encoder": CLIP, "text_encoder_2": T5}  # in plans and in the log
T5_BLOCKS = "encoder.block"


@dataclass(frozen=True)
class PromptEmbeds:
    """What the transformer sees of a prompt."""

    t5: torch.Tensor  # [1, tokens, t5 width]
    clip: torch.Tensor  # [1, clip width], CLIP's pooled output

    @property
    def nbytes(self) -> int:
        return self.t5.nbytes + self.clip.nbytes


def _embedding_cache() -> LRUCache[tuple[str, Hashable], PromptEmbeds]:
    return LRUCache(EMBEDDING_CACHE_BYTES, getsizeof=lambda embeds: embeds.nbytes)


@dataclass(frozen=True, eq=False)
class Flux:
    """One of the two models in one precision. dev and schnell share all but the transformer and the schedule, a model's
    two precisions all but the transformer."""

    name: str
    precision: str  # one of PRECISIONS or FP8
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    scheduler: FlowMatchEulerDiscreteScheduler
    residency: Residency
    embeddings: LRUCache[tuple[str, Hashable], PromptEmbeds] = field(default_factory=_embedding_cache)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; for fp8, outside the layers that are in fp8."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    def pristine(self, component: str) -> Pristine:
        """The weights of one of `NETWORKS` as the checkpoint has them."""
        return self.residency.live(getattr(self, component)).pristine


class Precisions(NamedTuple):
    """One model in both of its precisions."""

    exact: Flux  # bf16, or float32 on a CPU without bfloat16 instructions
    fast: Flux  # fp8


Models = Mapping[str, Precisions]


def load_flux(
    folders: Mapping[str, Path], device: torch.device, dtype: torch.dtype, memory: Memory | None = None
) -> dict[str, Precisions]:
    """Load every model of `folders` (name -> folder in diffusers layout) in `dtype` onto `device`, and prepare fp8.

    Weights go from the memory-mapped file to their device, tensor by tensor; on the CPU a file of that dtype is never
    copied at all. A part that a folder lacks, or that is the same as the first model's, is loaded once for both. With a
    `memory` to keep within, and for fp8 always, a part comes to the device when it is first used.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    residency = Residency(device, memory)
    models: dict[str, Precisions] = {}
    weight_only = not has_fp8_units(device)
    first_folder = next(iter(folders.values()))
    first: dict[str, Any] = {}
    for name, folder in folders.items():
        parts: dict[str, Any] = {}
        for part in (*TOKENIZERS, *NAMES):
            if first and _same_part(folder / part, first_folder / part):
                parts[part] = first[part]
            elif part in TOKENIZERS:
                parts[part] = TOKENIZERS[part].from_pretrained(folder, subfolder=part)
            else:
                called = f"{name} {NAMES[part]}" if first else NAMES[part]
                parts[part] = _load_part(residency, called, folder / part, dtype)
        first = first or parts
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        parts["transformer"] = _load_part(residency, name, folder / "transformer", dtype)
        models[name] = with_twin(residency, name, parts, weight_only=weight_only)
    return models


def with_twin(residency: Residency, name: str, parts: Mapping[str, Any], *, weight_only: bool) -> Precisions:
    """A model in both precisions, of its components, whose networks `residency` has; the fp8 twin is built when it is
    first used."""
    transformer = parts["transformer"]
    twin = new_twin(transformer, weight_only=weight_only)
    residency.add(name + FP8_SUFFIX, twin, residency.live(transformer).pristine, loaded=False)
    exact = Flux(name, PRECISIONS[transformer.dtype], residency=residency, **parts)
    return Precisions(exact, replace(exact, precision=FP8, transformer=twin))


def residency_of(models: Models) -> Residency:
    """The one that all of them share."""
    return next(iter(models.values())).exact.residency


def _load_part(residency: Residency, name: str, folder: Path, dtype: torch.dtype) -> Any:
    """Load a network; where device memory is limited it is only mapped, for its shapes."""
    limited = residency.memory is not None
    device = torch.device("cpu") if limited else residency.device
    part_class = NETWORKS[folder.name]
    module = part_class.from_pretrained(folder, device_map=str(device), use_safetensors=True, dtype=dtype).eval()
    pristine = Pristine.of(folder, module, residency.stream)
    residency.add(name, module, pristine, loaded=not limited, shared=folder.name in NAMES)
    return module


def fill_device(models: Models) -> None:
    """Bring to a device of limited memory what the first model needs, as far as it can hold that at once: VAE, text
    encoders, both precisions of the transformer.

    Raises `TooSmallError` when it cannot run even the smallest transformer.
    """
    residency = residency_of(models)
    if residency.memory is not None:
        transformers = [name + suffix for name in models for suffix in ("", FP8_SUFFIX)]
        t5, room = next(iter(models.values())).exact.text_encoder_2, picture_bytes(TYPICAL_SIZE)
        sizes = Sizes(residency.sizes, {T5: residency.streamed_size(t5, T5_BLOCKS)})
        layout = plan_layout(sizes, residency.memory, transformers, denoising_bytes(TYPICAL_SIZE), room)
        if layout.streamed:
            residency.stream_blocks(t5, T5_BLOCKS)
        residency.bring(layout, room)


def compile_blocks(models: Models, backend: str = "inductor") -> None:
    """Have the transformers' blocks compiled when they first run: one graph serves all blocks of a kind, both models
    and every picture size, and takes the weights as its inputs. `TORCHINDUCTOR_CACHE_DIR` keeps it between starts.

    Attention is by the kernels that the card is good at. On a GPU the compiler tries several tilings of each kernel,
    which makes one of casting an fp8 weight and multiplying a row by it: without, every modulation of the fp8 twin
    writes its weight out in bf16 first (`script/bench kernels`).
    """
    device = residency_of(models).device
    attention = attention_backend(device)
    log.info("attention: %s", attention or "torch's choice")
    options = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
    for flux in precisions(models):
        if attention:
            flux.transformer.set_attention_backend(attention)
        # the block cache decides by a value, which no graph can
        fullgraph = not flux.transformer.is_cache_enabled
        flux.transformer.compile_repeated_blocks(fullgraph=fullgraph, dynamic=True, backend=backend, options=options)


def cache_blocks(models: Models, threshold: float) -> None:
    """Have the fp8 twins skip a step's blocks but the first when that one's output changed by less than `threshold`,
    relative to the last step's (diffusers' first-block cache). It changes the picture."""
    for _, fast in models.values():
        fast.transformer.enable_cache(FirstBlockCacheConfig(threshold))


def precisions(models: Models) -> list[Flux]:
    """Every model in every precision."""
    return [flux for both in models.values() for flux in both]


def fits(flux: Flux, size: tuple[int, int]) -> bool:
    """Whether the device has the memory to denoise a picture of (width, height) pixels with this transformer."""
    return flux.residency.fits(flux.transformer, flux.vae, work=denoising_bytes(size))


def _same_part(a: Path, b: Path) -> bool:
    """Whether folder `a` is missing or holds the same thing as folder `b`.

    Small files are compared whole, weights by their length and at `WEIGHT_SAMPLES` places: reading 10 GB twice at every
    start would cost more than loading a copy, and weights trained apart differ everywhere.
    """
    if not a.is_dir():
        return True
    names = {file.name for file in a.iterdir()}
    return names == {file.name for file in b.iterdir()} and all(_same_file(a / name, b / name) for name in names)


def _same_file(a: Path, b: Path) -> bool:
    if a.name == "config.json":
        return _meaning(a) == _meaning(b)
    size = a.stat().st_size
    if size != b.stat().st_size:
        return False
    chunk = 2**16
    stride = max(chunk, size // WEIGHT_SAMPLES)
    with a.open("rb") as file_a, b.open("rb") as file_b:
        for offset in range(0, size, stride):
            file_a.seek(offset)
            file_b.seek(offset)
            if file_a.read(chunk) != file_b.read(chunk):
                return False
    return True


def _meaning(config: Path) -> dict[str, Any]:
    """A config without the notes on who wrote it, with which version, from where."""
    values = json.loads(config.read_text())
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}
