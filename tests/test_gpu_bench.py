"""`script/bench gpu --tiny`: the measurements for a GPU run here, with the lines and goals of the full run."""

import json
import sys
from pathlib import Path

import pytest

from bench import gpu
from bench._gpu import MEASUREMENTS


def test_every_measurement_runs_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--json", str(file)])
    gpu.main()
    document = json.loads(file.read_text())
    assert document["tiny"]
    assert list(document["lines"]) == list(MEASUREMENTS)
    lines = {line["what"]: line for some in document["lines"].values() for line in some}
    assert all(line["value"] >= 0 for line in lines.values())
    for precision in ("bf16", "fp8"):
        assert f"swap, {precision}, pristine weights on the device" in lines
        assert lines[f"bytes that differ after 20 swaps from a fresh merge, {precision}"]["value"] == 0
    assert lines["numbers that differ after 40 cancels"]["value"] == 0
    assert all(
        line["value"] < line["most"] for what, line in lines.items() if what.startswith("error of an fp8 product")
    )
    printed = capsys.readouterr().out
    assert all(f"| {what} |" in printed for what in lines)
