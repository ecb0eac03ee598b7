"""What only a GPU can show: copies, swaps, steps, products, memory, the VAE, failures, attention.

One command on a bare machine with any CUDA GPU, without a network: it writes random weights of FLUX.1-dev's real size
(34 GB; BENCH_DIR says where), prints a table and writes gpu.json. --tiny runs the same lines on a CPU.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench._common import FOLDER, Goal, announce, benchmark_parser, judge, table
from bench._gpu import MEASUREMENTS, SIZES, Bench, Line
from flux.device import Memory, choose_device, compute_dtype, memory_of
from flux.models import Precisions, compile_blocks, fill_device, load_flux
from flux.pipelines import warm_up
from settings import GB
from tools.random_flux import FLUX_1, FluxSize, write_random_flux

TINY = FluxSize(double_blocks=2, single_blocks=2, t5_layers=2)
TINY_SIZES = {"1 MP": (128, 128), "0.25 MP": (64, 64)}


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU, to try the measurements themselves"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the lines go (default: %(default)s)")
    arguments = parser.parse_args()
    announce(30 if arguments.tiny else 600)
    lines = tiny() if arguments.tiny else full()
    report(lines, arguments)


def tiny() -> dict[str, list[Line]]:
    """Every measurement, on a simulated device of the CPU's."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_flux(Path(folder), TINY, model="dev")
        device = torch.device("cpu")
        models = load_flux({"dev": Path(folder)}, device, compute_dtype(device), Memory(10 * GB, 10 * GB))
        fill_device(models)
        return measure(Bench(models, TINY_SIZES))


def full() -> dict[str, list[Line]]:
    """Every measurement on the first GPU, at FLUX.1-dev's real size."""
    device = choose_device("cuda")
    folder = FOLDER / "dev-full"
    if not folder.exists():
        print(f"writing random weights of 34 GB into {folder}", flush=True)
        unfinished = folder.with_suffix(".unfinished")
        write_random_flux(unfinished, FLUX_1, model="dev")
        unfinished.rename(folder)
    models = load_flux({"dev": folder}, device, torch.bfloat16, memory_of(device))
    fill_device(models)
    compiling = compile_lines(models)
    return {"compiling": compiling, **measure(Bench(models, SIZES))}


def compile_lines(models: dict[str, Precisions]) -> list[Line]:
    compile_blocks(models)
    started = time.perf_counter()
    warm_up(models)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [Line("warm-up", time.perf_counter() - started, "s"), Line("graphs after it", graphs, "", most=8)]


def measure(bench: Bench) -> dict[str, list[Line]]:
    found = {}
    for name, measurement in (bar := tqdm(MEASUREMENTS.items())):
        bar.set_description(name)
        found[name] = list(measurement(bench))
    return found


def report(found: dict[str, list[Line]], arguments: argparse.Namespace) -> None:
    """The table, the file and the goals that were missed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    every = [(group, line) for group, lines in found.items() for line in lines]
    rows = [[group, line.what, f"{line.value:.4g}", line.unit, goal_of(line)] for group, line in every]
    print(f"\n{name}, torch {torch.__version__}" + (", tiny: the numbers mean nothing" if arguments.tiny else ""))
    table(["measurement", "line", "value", "unit", "goal"], rows)
    document = {"device": name, "torch": torch.__version__, "tiny": arguments.tiny}
    lines = {group: [asdict(line) for line in some] for group, some in found.items()}
    arguments.json.write_text(json.dumps({**document, "lines": lines}, indent=1))
    goals = [Goal(line.what, line.value, line.most) for _, line in every if line.most is not None]
    goals += [Goal(line.what, line.value, line.least, at_least=True) for _, line in every if line.least is not None]
    judge(goals, check=arguments.check)


def goal_of(line: Line) -> str:
    if line.most is not None:
        return f"at most {line.most:g}"
    return "" if line.least is None else f"at least {line.least:g}"


if __name__ == "__main__":
    main()
