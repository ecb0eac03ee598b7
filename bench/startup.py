"""Where the seconds of script/predict go when the environment exists, on the demo checkpoint."""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from bench._common import announce, benchmark_parser, spread, table
from tools import ROOT

ROUNDS = 7
INPUTS = {"prompt": "a red circle", "megapixels": "0.25", "num_inference_steps": 4, "disable_safety_checker": True}


def main() -> None:
    benchmark_parser(__doc__).parse_args()
    announce(13 * ROUNDS)
    stages: dict[str, list[float]] = {}
    for _ in tqdm(range(ROUNDS), unit="round"):
        for name, seconds in one_run().items():
            stages.setdefault(name, []).append(seconds)
    rest = statistics.median(stages["all"]) - sum(statistics.median(v) for k, v in stages.items() if k != "all")
    rows = [[name, spread(values)] for name, values in stages.items()]
    table(
        ["script/predict", "seconds"],
        [*rows[:-1], ["the rest: coglet, HTTP, saving, stopping", f"{rest:.2f}"], rows[-1]],
    )


def one_run() -> dict[str, float]:
    help_seconds = timed(ROOT / "script" / "predict", "--help")[0]
    import_seconds = timed(sys.executable, "-c", "import predict")[0]
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture"
        seconds, done = timed(ROOT / "script" / "predict", "--json", json.dumps(INPUTS), "-o", picture)
    setup = re.findall(r"^(?:load safety checker|find weights|load models): (\d+\.\d+) s$", done.stderr, re.MULTILINE)
    return {
        "bash, Python, the client's imports (as --help)": help_seconds,
        "the worker's imports: torch, diffusers, transformers": import_seconds,
        "setup(): the safety checker loaded and tried, both models loaded": sum(map(float, setup)),
        "the prediction: 512 x 512, 4 steps": json.loads(done.stdout)["metrics"]["predict_time"],
        "all": seconds,
    }


def timed(*command: str | Path) -> "tuple[float, subprocess.CompletedProcess[str]]":
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done


if __name__ == "__main__":
    main()
