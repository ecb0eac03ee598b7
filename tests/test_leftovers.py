"""What Cog leaves on the disk does not pile up."""

import os
import time
from pathlib import Path

from service.leftovers import Leftovers


def age(path: Path) -> Path:
    os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)
    return path


def test_what_is_old_is_removed_and_nothing_else(tmp_path: Path) -> None:
    base = tmp_path
    for prediction in ("old", "used", "new"):
        for part in ("inputs", "outputs"):
            (base / "predictions" / prediction / part).mkdir(parents=True)
    (base / "predictions" / "used" / "outputs" / "x.webp").write_text("")
    for name in ("old", "used"):
        age(base / "predictions" / name)
    Leftovers(base / "predictions").sweep()
    assert sorted(path.name for path in (base / "predictions").iterdir()) == ["new", "used"]
    assert (base / "predictions" / "used" / "outputs" / "x.webp").exists()
