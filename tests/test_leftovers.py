"""What Cog leaves on the disk does not pile up."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.leftovers import PREFIX, Leftovers


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    before = tempfile.gettempdir()
    tempfile.tempdir = str(tmp_path)
    yield tmp_path
    tempfile.tempdir = before


def age(path: Path) -> Path:
    os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)
    return path


def test_what_is_old_is_removed_and_nothing_else(base: Path) -> None:
    leftovers = Leftovers(base / "predictions")
    with tempfile.NamedTemporaryFile(delete=False) as refused, tempfile.NamedTemporaryFile(delete=False) as fresh:
        pass
    assert Path(refused.name).parent == leftovers.folder
    others = base / "others"
    others.write_text("")
    for prediction in ("old", "used", "new"):
        for part in ("inputs", "outputs"):
            (base / "predictions" / prediction / part).mkdir(parents=True)
    (base / "predictions" / "used" / "outputs" / "x.webp").write_text("")
    for path in (Path(refused.name), others, base / "predictions" / "old", base / "predictions" / "used"):
        age(path)
    leftovers.sweep()
    assert not Path(refused.name).exists()
    assert Path(fresh.name).exists()
    assert others.exists()
    assert sorted(path.name for path in (base / "predictions").iterdir()) == ["new", "used"]
    assert (base / "predictions" / "used" / "outputs" / "x.webp").exists()


def test_the_folder_of_a_process_that_was_killed_goes_with_the_next_start(base: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    killed, alive = base / f"{PREFIX}{ended.pid}-x", base / f"{PREFIX}{os.getpid()}-x"
    for folder in (killed, alive):
        folder.mkdir()
        (folder / "input.png").write_text("")
    Leftovers(base / "none").sweep()
    assert not killed.exists()
    assert alive.exists()
