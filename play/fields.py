"""The inputs of a Cog server as its OpenAPI document has them, and what the page needs to know to show each."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

PROMPT, SEED, OUTPUTS = "prompt", "seed", "num_outputs"
LORAS, PICTURE, MORE = "LoRAs", "Picture and mask", "More inputs"
GROUPS = {  # MORE has all others
    LORAS: ("replicate_weights", "lora_scale", "extra_lora", "extra_lora_scale"),
    PICTURE: ("image", "mask", "prompt_strength"),
}


@dataclass(frozen=True)
class Field:
    """One input of the server. `kind` is string, integer, number, boolean or uri (a file)."""

    name: str
    kind: str
    description: str
    default: Any
    minimum: float | None
    maximum: float | None
    choices: tuple[Any, ...]

    @property
    def label(self) -> str:
        return self.name.replace("_", " ").capitalize().replace("Lora", "LoRA").replace("lora", "LoRA")

    @property
    def bounded(self) -> bool:
        """Whether a slider can show it: a number that always has a value, between two bounds."""
        return None not in (self.minimum, self.maximum, self.default)

    @property
    def step(self) -> float:
        """Of its slider: 1 for integers, else a power of ten or half of one, for about a hundred positions."""
        if self.kind == "integer":
            return 1
        span = (self.maximum or 0) - (self.minimum or 0)
        power: float = 10 ** math.floor(math.log10(span / 50)) if span > 0 else 1
        return power * 5 if span / (power * 5) >= 50 else power

    @property
    def info(self) -> str:
        """The description, and the bounds where no slider shows them."""
        if self.bounded or self.minimum is None or self.maximum is None:
            return self.description
        return f"{self.description} {self.minimum:g} to {self.maximum:g}."


def read_fields(document: Json) -> dict[str, Field]:
    """The inputs by their names, in the order of the server's signature.

    `document` is what /openapi.json answers; raises `KeyError` or `TypeError` when it is none of Cog's.
    """
    schemas = document["components"]["schemas"]
    properties: Json = schemas["Input"]["properties"]
    order = sorted(properties, key=lambda name: properties[name].get("x-order", len(properties)))
    return {name: _field(name, properties[name], schemas) for name in order}


def _field(name: str, schema: Json, schemas: Json) -> Field:
    """Choices stand in a schema of their own, which `allOf` names."""
    for reference in schema.get("allOf", ()):
        schema = schemas[reference["$ref"].rsplit("/", 1)[-1]] | schema
    kind = "uri" if schema.get("format") == "uri" else schema.get("type", "string")
    return Field(
        name=name,
        kind=kind,
        description=schema.get("description", ""),
        default=schema.get("default"),
        minimum=schema.get("minimum"),
        maximum=schema.get("maximum"),
        choices=tuple(schema.get("enum", ())),
    )


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """The inputs in the groups of the page, the prompt apart; a group that has none is left out."""
    left = [name for name in names if name != PROMPT]
    groups = {title: [name for name in members if name in left] for title, members in GROUPS.items()}
    taken = {name for members in groups.values() for name in members}
    groups[MORE] = [name for name in left if name not in taken]
    return {title: members for title, members in groups.items() if members}


def typed(field: Field, text: str) -> Any:
    """Text as the type that the server asks for; what does not fit stays text, for the server to judge."""
    text = text.strip()
    if field.kind == "boolean" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if field.kind in ("integer", "number"):
        try:
            return int(text)
        except ValueError:
            number = _finite(text)
            return text if number is None else number
    return text


def _finite(text: str) -> float | None:
    """JSON has no infinity."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
