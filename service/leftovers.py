"""What Cog leaves on the disk, bounded: inputs that never reached a prediction, and folders of old ones."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

COGS_FOLDERS = Path("/tmp/coglet/predictions")  # noqa: S108 - where Cog makes an inputs and an outputs folder for each
PREFIX = "cog-inputs-"
KEPT_SECONDS = 600.0  # longer than from the arrival of an input to its use
PAUSE_SECONDS = 60.0  # between two sweeps


class Leftovers:
    """A temporary folder of this process's own. Cog asks `tempfile` where to put inputs, so they go there, and all that
    is old there may be removed."""

    def __init__(self, cogs_folders: Path = COGS_FOLDERS) -> None:
        self._cogs_folders, self._swept = cogs_folders, 0.0
        base = Path(tempfile.gettempdir())
        for folder in base.glob(f"{PREFIX}*"):
            if _is_of_dead_process(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
        tempfile.tempdir = str(self.folder)

    def sweep(self) -> None:
        """Remove what is old, at most once a minute. It may be interrupted anywhere."""
        now = time.time()
        if now - self._swept < PAUSE_SECONDS:
            return
        self._swept = now
        for entry in _old(self.folder, now):
            if entry.is_file(follow_symlinks=False):
                Path(entry).unlink(missing_ok=True)
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


def _is_of_dead_process(folder: Path) -> bool:
    match = re.match(rf"{PREFIX}(\d+)-", folder.name)
    try:
        os.kill(int(match[1]) if match else 0, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    return False
