"""The error of everything that can be wrong with a LoRA: its reference, its file, what it would change."""


class LoraError(ValueError):
    """A LoRA cannot be used; the message is one sentence for the person who named it, without a secret."""
