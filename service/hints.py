"""What a request most likely forgot, or cannot have meant: one line for the log each. Nothing is changed by them."""

import logging
import math
import re
import secrets
from collections.abc import Iterator

from service.errors import InputError

log = logging.getLogger("flux-lora")

SEED_BITS = 32  # of a seed, the lowest, are what torch's CPU generator (a Mersenne Twister) starts from
LEAST_SEED, MOST_SEED = -(2**63) + 1, 2**64 - 1
USUAL_SCHNELL_STEPS = 4
MANY_SCHNELL_STEPS = 8  # above it, more steps than anyone has use for
DEFAULT_GUIDANCE = 3


def usable_seed(seed: int | None, num_outputs: int) -> int:
    """The seed of the first picture; a random one where none is given. The log says which the generator makes of it.

    Raises `InputError` beyond 64 bits, signed or unsigned.
    """
    if seed is None:
        return secrets.randbits(SEED_BITS)
    most = MOST_SEED + 1 - num_outputs
    if not LEAST_SEED <= seed <= most:
        raise InputError(f"seed must be a whole number from {LEAST_SEED} to {most}.")
    used = seed % 2**SEED_BITS
    if used != seed:
        log.info("seed %d: only its lowest %d bits count, so the picture is that of seed %d", seed, SEED_BITS, used)
    return int(seed)


def reported_seed(seed: int) -> int:
    """For the metrics, where coglet keeps whole numbers of 64 bits with a sign: a larger seed's lowest 32 bits."""
    return seed if seed < 2**63 else seed % 2**SEED_BITS


def request_hints(
    model: str, mode: str, steps: int, steps_to_run: int, guidance_scale: float, strength: float
) -> Iterator[str]:
    """`steps_to_run` is how many of the `steps` image-to-image runs at this strength."""
    if model == "schnell" and steps > MANY_SCHNELL_STEPS:
        yield f"schnell: {steps} steps are asked for; {USUAL_SCHNELL_STEPS} are usual and take less time"
    if model == "schnell" and guidance_scale != DEFAULT_GUIDANCE:
        yield "schnell has no guidance: guidance_scale is ignored"
    if mode != "txt2img":
        yield f"prompt_strength {strength:g}: {steps_to_run} of the {steps} steps run" + _what_remains(
            mode, steps, steps_to_run
        )


def _what_remains(mode: str, steps: int, steps_to_run: int) -> str:
    """diffusers begins with as much noise as the first of the steps that run has: before all of them, with nothing
    else."""
    if steps_to_run == 0:
        return ", so the image comes back as it is"
    if steps_to_run < steps:
        return ""
    lost = "the image" if mode == "img2img" else "what is under the mask's white"
    most = math.floor(100 * (1 - 1 / steps)) / 100
    return f", so nothing of {lost} remains" + (f"; up to {most:g} something does" if most else "")


def trigger_hint(words: list[str], prompt: str) -> str | None:
    """Which trigger words of the LoRAs the prompt has. It is never changed."""
    if not words:
        return None
    found = [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    which = "none of them is in the prompt" if not found else f"in the prompt: {', '.join(found)}"
    return f"trigger words: {', '.join(words)}; {which}"


def log_hints(*hints: str | None) -> None:
    """A line for each that there is."""
    for hint in hints:
        if hint:
            log.info("%s", hint)
