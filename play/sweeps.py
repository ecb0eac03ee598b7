"""Many requests that differ in one input or two: a strip, or a grid."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from play.fields import OUTPUTS, Field, typed
from play.predictions import Request

STRENGTHS = "-1, -0.5, 0, 0.5, 1, 1.5"
GRID_STRENGTHS = "0, 0.5, 1"
LORA_SCALE, EXTRA_LORA_SCALE = "lora_scale", "extra_lora_scale"
SUGGESTED = {  # where neither choices nor bounds say what is worth a look
    LORA_SCALE: STRENGTHS,
    EXTRA_LORA_SCALE: STRENGTHS,
    "seed": "1, 2, 3, 4",
    "num_inference_steps": "4, 8, 16, 28",
    "guidance_scale": "1, 2, 3, 4, 6",
}


@dataclass(frozen=True)
class Axis:
    """An input and the values that it takes, in turn."""

    name: str
    values: tuple[Any, ...]

    def title(self, value: Any) -> str:
        return f"{self.name} {_shown(value)}"


@dataclass(frozen=True)
class Sweep:
    """The requests of a sheet, row by row, each under what is special about it."""

    columns: list[str]  # titles
    rows: list[str]  # labels; a strip has one, which is empty
    requests: dict[str, Request]


def sweepable(fields: Mapping[str, Field]) -> list[str]:
    """The inputs that a sheet may compare: numbers, choices and switches, but for how many pictures there are."""
    kinds = ("integer", "number", "boolean")
    return [name for name, field in fields.items() if name != OUTPUTS and (field.choices or field.kind in kinds)]


def suggested_values(field: Field) -> str:
    """What stands in the text field of an axis when its input is chosen."""
    if field.choices:
        return ", ".join(map(str, field.choices))
    if field.kind == "boolean":
        return "false, true"
    if field.name in SUGGESTED or field.minimum is None or field.maximum is None:
        return SUGGESTED.get(field.name, "")
    low, high = field.minimum, field.maximum
    middle = (low + high) / 2
    return ", ".join(_shown(typed(field, f"{value:g}")) for value in (low, round(middle, 2), high))


def read_axis(field: Field, text: str) -> Axis:
    """The values between commas, each once."""
    values = (typed(field, part) for part in re.split(r"[,;\n]", text) if part.strip())
    return Axis(field.name, tuple(dict.fromkeys(values)))


def wrong_with(axes: Sequence[Axis]) -> str:
    """One sentence when no sheet can be drawn with these axes, else nothing."""
    if empty := [axis.name for axis in axes if not axis.values]:
        return f"Name the values of {empty[0]}, between commas."
    if len({axis.name for axis in axes}) < len(axes):
        return f"{axes[0].name} cannot go across and down: choose two inputs."
    return ""


def sweep(base: Request, across: Axis, down: Axis | None = None) -> Sweep:
    """`base` with each value of `across`, and if `down` is given with each of its values in a row of its own."""
    rows = [({down.name: value}, down.title(value)) for value in down.values] if down else [({}, "")]
    requests = {
        ", ".join(filter(None, (label, across.title(value)))): base | row | {across.name: value}
        for row, label in rows
        for value in across.values
    }
    return Sweep([across.title(value) for value in across.values], [label for _, label in rows], requests)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
