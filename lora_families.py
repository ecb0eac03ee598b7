"""What a file is when it is not a LoRA for this model: told from its keys and shapes."""

from lora_names import Shapes
from lora_references import LoraError
from lora_tensors import Header


def other_family(header: Header, shapes: Shapes, name: str) -> LoraError | None:
    return None
