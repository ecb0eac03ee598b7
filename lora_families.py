"""What a file is when it is not a LoRA for this model: told from its keys and shapes."""

from collections.abc import Mapping

from lora_names import Shapes
from lora_references import LoraError


def other_family(header: Mapping[str, tuple[str, tuple[int, ...]]], shapes: Shapes, name: str) -> LoraError | None:
    return None
