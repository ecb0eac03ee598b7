"""LoRA files for the tests, in every dialect and of every kind, and what they do to a model in float64."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.names import Shapes

Base = Callable[[str, str], Tensor]  # component, parameter's name -> its pristine value
Difference = Callable[[Base], Tensor]  # float64

DIALECTS = ("diffusers", "PEFT", "ComfyUI", "kohya", "OneTrainer", "XLabs", "LyCORIS", "bare")
KINDS = ("lora", "lokr", "lokr_full", "lokr_both", "loha", "diff", "dora_out", "dora_in", "dora_peft")


@dataclass
class LoraFile:
    """What is in the file, and what it makes of each parameter."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    makes: dict[tuple[str, str], Difference] = field(default_factory=dict)  # (component, parameter's name)

    def __or__(self, other: "LoraFile") -> "LoraFile":
        return LoraFile(self.tensors | other.tensors, self.metadata | other.metadata, self.makes | other.makes)

    def save(self, path: Path) -> Path:
        save_file({key: tensor.clone() for key, tensor in self.tensors.items()}, path, self.metadata)
        return path


@dataclass(frozen=True)
class FileModule:
    """A module as a dialect names it, and the modules of the model whose rows are its rows."""

    component: str
    stem: str
    names: tuple[str, ...]
    swapped: bool = False


def shapes_of(**models: torch.nn.Module) -> Shapes:
    """transformer=..., text_encoder=..., text_encoder_2=..."""
    return {
        component: {name: parameter.shape for name, parameter in model.named_parameters()}
        for component, model in models.items()
    }


def base_of(**models: torch.nn.Module) -> Base:
    parameters = {component: dict(model.named_parameters()) for component, model in models.items()}
    return lambda component, name: parameters[component][name].detach()


def make_lora(
    shapes: Shapes,
    dialect: str = "diffusers",
    kind: str = "lora",
    *,
    rank: int = 4,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    only: str = "",
    seed: int = 0,
) -> LoraFile:
    """A LoRA on every linear layer whose name in the file matches the regular expression `only`.

    An alpha that is left out is left out of the file as well, except in the dialects that always have it.
    """
    file, random = LoraFile(), torch.Generator().manual_seed(seed)
    if alpha is None and dialect in ("kohya", "OneTrainer", "LyCORIS"):
        alpha = rank / 2

    def draw(*shape: int, size: float = 0.3) -> Tensor:
        return (torch.randn(*shape, generator=random) * size).to(dtype)

    how = _Writing(shapes, dialect, kind, rank, alpha, draw)
    for module in file_modules(shapes, dialect):
        if re.search(only, module.stem):
            _add(file, module, how)
    return file


def file_modules(shapes: Shapes, dialect: str) -> Iterator[FileModule]:
    """Every linear layer of the model, as the dialect names it."""
    linear = {
        component: [name.removesuffix(".weight") for name, shape in named.items() if _linear(name, shape)]
        for component, named in shapes.items()
    }
    if dialect in ("diffusers", "PEFT", "OneTrainer", "LyCORIS"):
        prefix = {"diffusers": "transformer.", "PEFT": "base_model.model.", "OneTrainer": "lora_transformer_"}
        for name in linear.get("transformer", []):
            text = name if dialect in ("diffusers", "PEFT") else name.replace(".", "_")
            yield FileModule("transformer", prefix.get(dialect, "lycoris_") + text, (name,))
    else:
        for name, ours in original_modules(shapes, dialect == "XLabs"):
            text = name.replace(".", "_") if dialect == "kohya" else name
            prefix = {"kohya": "lora_unet_", "ComfyUI": "diffusion_model."}.get(dialect, "")
            yield FileModule("transformer", prefix + text, ours, name == "final_layer.adaLN_modulation.1")
    encoders = {
        "diffusers": ("text_encoder.text_model.", "text_encoder_2."),
        "ComfyUI": ("text_encoders.clip_l.transformer.text_model.", "text_encoders.t5xxl.transformer."),
        "kohya": ("lora_te1_text_model_", "lora_te3_"),
        "OneTrainer": ("lora_te1_text_model_", "lora_te2_"),
    }.get(dialect, ())
    for component, prefix in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
        for name in linear.get(component, []):
            yield FileModule(component, prefix + (name.replace(".", "_") if prefix.endswith("_") else name), (name,))


def _linear(name: str, shape: torch.Size) -> bool:
    return (
        name.endswith(".weight")
        and len(shape) == 2
        and "embedding" not in name
        and "shared" not in name
        and "bias" not in name
    )


def original_modules(shapes: Shapes, xlabs: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Black Forest Labs' name of each linear layer, and diffusers' names of the layers that it holds."""
    names = list(shapes["transformer"])
    doubles = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("transformer_blocks."))
    singles = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("single_transformer_blocks."))
    for i in range(doubles):
        there, here, attn = f"double_blocks.{i}.", f"transformer_blocks.{i}.", f"transformer_blocks.{i}.attn."
        image_qkv = (attn + "to_q", attn + "to_k", attn + "to_v")
        text_qkv = (attn + "add_q_proj", attn + "add_k_proj", attn + "add_v_proj")
        if xlabs:
            yield there + "processor.qkv_lora1", image_qkv
            yield there + "processor.qkv_lora2", text_qkv
            yield there + "processor.proj_lora1", (attn + "to_out.0",)
            yield there + "processor.proj_lora2", (attn + "to_add_out",)
            continue
        yield there + "img_attn.qkv", image_qkv
        yield there + "txt_attn.qkv", text_qkv
        yield there + "img_attn.proj", (attn + "to_out.0",)
        yield there + "txt_attn.proj", (attn + "to_add_out",)
        yield there + "img_mlp.0", (here + "ff.net.0.proj",)
        yield there + "img_mlp.2", (here + "ff.net.2",)
        yield there + "txt_mlp.0", (here + "ff_context.net.0.proj",)
        yield there + "txt_mlp.2", (here + "ff_context.net.2",)
        yield there + "img_mod.lin", (here + "norm1.linear",)
        yield there + "txt_mod.lin", (here + "norm1_context.linear",)
    for i in range(singles):
        there, here = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        qkv = (here + "attn.to_q", here + "attn.to_k", here + "attn.to_v")
        if xlabs:
            yield there + "processor.qkv_lora", qkv
            yield there + "processor.proj_lora", (here + "proj_out",)
            continue
        yield there + "linear1", (*qkv, here + "proj_mlp")
        yield there + "linear2", (here + "proj_out",)
        yield there + "modulation.lin", (here + "norm.linear",)
    if xlabs:
        return
    yield "img_in", ("x_embedder",)
    yield "txt_in", ("context_embedder",)
    yield "final_layer.linear", ("proj_out",)
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",)
    for there, here in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        if f"time_text_embed.{here}_embedder.linear_1.weight" in names:
            yield there + ".in_layer", (f"time_text_embed.{here}_embedder.linear_1",)
            yield there + ".out_layer", (f"time_text_embed.{here}_embedder.linear_2",)


@dataclass(frozen=True)
class _Writing:
    """How the modules of a file are written."""

    shapes: Shapes
    dialect: str
    kind: str
    rank: int
    alpha: float | None
    draw: Callable[..., Tensor]


def _add(file: LoraFile, module: FileModule, how: _Writing) -> None:
    weights = [f"{name}.weight" for name in module.names]
    counts = [how.shapes[module.component][weight][0] for weight in weights]
    out, width = sum(counts), how.shapes[module.component][weights[0]][1]
    parts = _parts(how, out, width)
    if how.alpha is not None and how.kind != "diff":
        parts["alpha"] = torch.full_like(next(iter(parts.values()))[0, 0], how.alpha)
    magnitude = None
    if how.kind.startswith("dora"):
        shape = {"dora_out": (out, 1), "dora_in": (1, width), "dora_peft": (out,)}[how.kind]
        magnitude = how.draw(*shape).float().abs() + 0.5
        parts["lora_magnitude_vector" if how.kind == "dora_peft" else "dora_scale"] = magnitude
        magnitude = magnitude.double().reshape(-1, 1) if how.kind == "dora_peft" else magnitude.double()
    file.tensors |= {f"{module.stem}.{part}": tensor for part, tensor in parts.items()}

    def all_rows(base: Base) -> Tensor:
        """The difference of all rows, in the order of the model."""
        swap = _swap if module.swapped else torch.clone
        delta = _unscaled(how, parts)
        if "alpha" in parts and how.kind != "lokr_full":
            delta = delta * parts["alpha"].double() / how.rank
        if magnitude is None:
            return swap(delta)
        weight = swap(torch.cat([base(module.component, weight).double() for weight in weights]))
        new = weight + delta
        norm = torch.linalg.vector_norm(new, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
        return swap(magnitude * new / norm - weight)

    for i, weight in enumerate(weights):
        rows = slice(sum(counts[:i]), sum(counts[: i + 1]))
        file.makes[module.component, weight] = lambda base, rows=rows: all_rows(base)[rows]


def _parts(how: _Writing, out: int, width: int) -> dict[str, Tensor]:
    """The tensors of one module, without alpha and magnitude."""
    draw, rank = how.draw, how.rank
    if how.kind == "diff":
        return {"diff": draw(out, width)}
    if how.kind == "loha":
        return {f"hada_w{i}_a": draw(out, rank) for i in "12"} | {f"hada_w{i}_b": draw(rank, width) for i in "12"}
    if not how.kind.startswith("lokr"):
        down, up = SUFFIXES.get(how.dialect, ("lora_A.weight", "lora_B.weight"))
        return {down: draw(rank, width), up: draw(out, rank)}
    a, b = (next(divisor for divisor in (4, 2, 1) if size % divisor == 0) for size in (out, width))
    parts = {"lokr_w1": draw(a, b), "lokr_w2": draw(out // a, width // b)}
    for side in {"lokr": ["lokr_w2"], "lokr_both": ["lokr_w1", "lokr_w2"]}.get(how.kind, []):
        rows, columns = parts.pop(side).shape
        parts |= {f"{side}_a": draw(rows, rank), f"{side}_b": draw(rank, columns)}
    return parts


def _unscaled(how: _Writing, parts: dict[str, Tensor]) -> Tensor:
    if how.kind == "diff":
        return parts["diff"].double()
    if how.kind == "loha":
        return _multiplied(parts, "hada_w1") * _multiplied(parts, "hada_w2")
    if how.kind.startswith("lokr"):
        return torch.kron(_multiplied(parts, "lokr_w1"), _multiplied(parts, "lokr_w2"))
    down, up = SUFFIXES.get(how.dialect, ("lora_A.weight", "lora_B.weight"))
    return parts[up].double() @ parts[down].double()


def _multiplied(parts: dict[str, Tensor], side: str) -> Tensor:
    if side in parts:
        return parts[side].double()
    return parts[f"{side}_a"].double() @ parts[f"{side}_b"].double()


SUFFIXES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "OneTrainer": ("lora_down.weight", "lora_up.weight"),
    "LyCORIS": ("lora_down.weight", "lora_up.weight"),
    "XLabs": ("down.weight", "up.weight"),
}


def _swap(tensor: Tensor) -> Tensor:
    """The two halves of the rows change places."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
