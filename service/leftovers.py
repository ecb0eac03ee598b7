"""What Cog leaves on the disk, bounded: the folders of old predictions."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

COGS_FOLDERS = Path("/tmp/coglet/predictions")  # noqa: S108 - where Cog makes an inputs and an outputs folder for each
KEPT_SECONDS = 600.0  # longer than Cog makes use of one
PAUSE_SECONDS = 60.0  # between two sweeps


class Leftovers:
    """Removes what is old."""

    def __init__(self, cogs_folders: Path = COGS_FOLDERS) -> None:
        self._cogs_folders, self._swept = cogs_folders, 0.0

    def sweep(self) -> None:
        """Remove what is old and empty, at most once a minute. It may be interrupted anywhere."""
        now = time.time()
        if now - self._swept < PAUSE_SECONDS:
            return
        self._swept = now
        for entry in _old(self._cogs_folders, now):
            with suppress(OSError):  # a folder that is in use is not empty, and stays
                for name in ("inputs", "outputs", ""):
                    Path(entry, name).rmdir()


def _old(folder: Path, now: float) -> Iterator["os.DirEntry[str]"]:
    """What nobody has changed for a while; nothing for a folder that is not there."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if now - entry.stat(follow_symlinks=False).st_mtime > KEPT_SECONDS:
                    yield entry
