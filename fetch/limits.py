"""How long a fetch may take, how often it tries again, and how large a LoRA may be."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fetch.errors import CacheError
from lora.errors import LoraError
from settings import GB, MB


@dataclass(frozen=True)
class FetchLimits:
    """Seconds and bytes. A download fails after 20 s without data or 30 minutes in total."""

    connect_timeout: float = 10.0
    read_timeout: float = 20.0  # without a single byte
    total_timeout: float = 1800.0
    retry_pauses: tuple[float, ...] = (0.5, 2.0, 8.0)  # one before each further try
    longest_retry_pause: float = 30.0  # a server that asks for a longer one has failed
    segment_bytes: int = 16 * MB  # of one request; a file that is larger is fetched in parallel
    connections: int = 8
    progress_interval: float = 2.0  # between two lines of progress in the log


def too_large(label: str, size: int | None, most_bytes: int) -> LoraError:
    """The error for a file of `size` bytes; None: it did not end where `most_bytes` were read."""
    most = f"{most_bytes / GB:.3g} GB"
    has = f"{size / GB:.3g} GB" if size else f"more than {most}"
    return LoraError(f"{label} has {has}; LORA_MAX_GB allows {most}, and LoRAs are smaller than models.")


def check_space(path: Path, size: int) -> None:
    """Raises `CacheError` when the disk of `path` has no room for `size` more bytes."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise CacheError(f"The disk of LORA_CACHE_DIR has {free / GB:.3g} GB free and {size / GB:.3g} GB are needed.")
