"""Where the seconds go: of script/predict on the demo model; with --full, of a server's start on dev's real size.

--full writes 34 GB of random weights to BENCH_DIR and deletes them again. --tiny runs the same lines on a tiny model;
--folder takes a folder in diffusers layout that is there.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench._common import FOLDER, announce, benchmark_parser, seconds, spread, table
from settings import GB, read_settings
from tools import ROOT
from tools.random_flux import FLUX_1, FluxSize, write_repeating_flux

ROUNDS = 7
INPUTS = {"prompt": "a red circle", "megapixels": "0.25", "num_inference_steps": 4, "disable_safety_checker": True}
READ_BYTES = 16 * 2**20
CPU = torch.device("cpu")
# bytes a second, for what is computed: pinned copies over the bus, an NVMe disk of the PCIe 4 kind, a network volume,
# the memory of a slow GPU
PCIE_4, PCIE_5, NVME, VOLUME, GPU_MEMORY = 25 * GB, 50 * GB, 7 * GB, 0.5 * GB, 300 * GB


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--full", action="store_true", help="the start on a random dev of FLUX.1's real size")
    sizes.add_argument("--tiny", action="store_true", help="the same on a tiny one: the numbers mean nothing")
    sizes.add_argument("--folder", type=Path, help="the same on this folder, for example weights/FLUX.1-dev")
    sizes.add_argument("--part", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.part:
        what, folder = arguments.part.split(":", 1)
        print(json.dumps(MEASUREMENTS[what](Path(folder))))
    elif arguments.folder:
        start_on(arguments.folder)
    elif arguments.full or arguments.tiny:
        announce(600 if arguments.full else 60)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as name:
            write_repeating_flux(Path(name), FLUX_1 if arguments.full else FluxSize(), model="dev")
            start_on(Path(name))
    else:
        script_predict()


def script_predict() -> None:
    announce(13 * ROUNDS)
    stages: dict[str, list[float]] = {}
    for _ in tqdm(range(ROUNDS), unit="round"):
        for name, value in one_run().items():
            stages.setdefault(name, []).append(value)
    rest = statistics.median(stages["all"]) - sum(statistics.median(v) for k, v in stages.items() if k != "all")
    rows = [[name, spread(values)] for name, values in stages.items()]
    table(
        ["script/predict", "seconds"],
        [*rows[:-1], ["the rest: coglet, HTTP, saving, stopping", f"{rest:.2f}"], rows[-1]],
    )


def start_on(folder: Path) -> None:
    """Print where the time of a start on the dev of this folder goes, with what a GPU adds to it as computed."""
    parts = [name for name in ("vae", "text_encoder", "text_encoder_2", "transformer") if (folder / name).is_dir()]
    sizes = {part: sum(file.stat().st_size for file in weights(folder / part)) for part in parts}
    imports = timed(sys.executable, "-c", "import predict")[0]
    checker = measured("checker", folder)
    drop_from_page_cache(folder)
    mapped_cold, mapped = measured("map", folder), measured("map", folder)
    rows: list[list[object]] = [
        ["the worker's imports", "", f"{imports:.1f}", ""],
        ["safety checker open-nsfw loaded and tried", "", f"{checker:.1f}", ""],
        ["dev mapped", gigabytes(sum(sizes.values())), f"{mapped_cold['seconds']:.1f}", f"{mapped['seconds']:.1f}"],
        ["... memory that mapping takes, GB", "", f"{mapped['bytes'] / GB:.2f}", ""],
    ]
    for part in tqdm(parts, unit="part"):
        drop_from_page_cache(folder)
        plain = measured("read", folder / part)
        drop_from_page_cache(folder)
        cold, warm = measured("ring", folder / part)
        rows.append([f"{part}: through the ring, as to a GPU", gigabytes(sizes[part]), f"{cold:.1f}", f"{warm:.1f}"])
        rows.append([f"{part}: read() alone", gigabytes(sizes[part]), f"{plain:.1f}", ""])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"This machine has {gigabytes(memory)} GB of memory: of a part near that size little is left to read again.")
    table(["part", "GB", "seconds, page cache empty", "seconds, read just before"], rows)
    computed(sum(sizes.values()), sizes["transformer"])


def computed(dev: int, transformer: int) -> None:
    """What no machine here can show."""
    rows = [
        ["dev's parts read from an NVMe disk, 7 GB/s", f"{dev / NVME:.1f}"],
        ["dev's parts read from a network volume, 0.5 GB/s", f"{dev / VOLUME:.1f}"],
        ["dev's parts over PCIe 4, 25 GB/s, while they are read", f"{dev / PCIE_4:.1f}"],
        ["dev's parts over PCIe 5, 50 GB/s", f"{dev / PCIE_5:.1f}"],
        ["dev's fp8 twin, made from what is there, 300 GB/s", f"{1.5 * transformer / GPU_MEMORY:.1f}"],
        ["compiling the blocks", "only a GPU can show"],
        ["not waited for: schnell's transformer from the NVMe disk", f"{transformer / NVME:.1f}"],
        ["not waited for: schnell's transformer from the network volume", f"{transformer / VOLUME:.1f}"],
    ]
    table(["on a GPU, computed and not measured", "seconds"], rows)


def measure_mapping(folder: Path) -> dict[str, float]:
    from flux.models import load_flux  # noqa: PLC0415 - not counted

    before = own_bytes()
    took = seconds(lambda: load_flux({"dev": folder}, CPU, torch.bfloat16))
    return {"seconds": took, "bytes": own_bytes() - before}


def measure_ring(folder: Path) -> list[float]:
    """Seconds of bringing a part's weights through the ring, twice, to where nobody keeps them."""
    from flux.models import NETWORKS  # noqa: PLC0415 - not counted
    from flux.pristine import Pristine  # noqa: PLC0415
    from flux.transfer import Ring  # noqa: PLC0415

    module = NETWORKS[folder.name].from_pretrained(folder, device_map="cpu", use_safetensors=True, dtype=torch.bfloat16)
    pristine, ring = Pristine.of(folder, module), Ring(CPU)

    def bring() -> None:
        for _ in ring.stream((pristine(name), None) for name in pristine.shapes):
            pass

    return [seconds(bring), seconds(bring)]


def measure_reading(folder: Path) -> float:
    def read() -> None:
        buffer = bytearray(READ_BYTES)
        for path in weights(folder):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return seconds(read)


def measure_checker(_: Path) -> float:
    from safety import load_screener  # noqa: PLC0415 - not counted

    os.environ["SAFETY_MODEL"] = "open-nsfw"
    return seconds(partial(load_screener, read_settings(), CPU))


MEASUREMENTS: dict[str, Callable[[Path], Any]] = {
    "map": measure_mapping,
    "ring": measure_ring,
    "read": measure_reading,
    "checker": measure_checker,
}


def measured(what: str, folder: Path) -> Any:
    """One measurement in a process of its own, in which nothing is mapped."""
    return json.loads(
        timed(sys.executable, "-m", "bench.startup", "--part", f"{what}:{folder}")[1].stdout.splitlines()[-1]
    )


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def drop_from_page_cache(folder: Path) -> None:
    """Nothing may have the files mapped."""
    for path in weights(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_bytes() -> int:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def gigabytes(size: int) -> str:
    return f"{size / GB:.2f}"


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
