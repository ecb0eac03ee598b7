"""A 1 megapixel request through the real server: every part outside encoding, denoising, decoding and screening."""

import base64
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, judge, table
from tools.random_flux import FluxSize, write_random_flux
from tools.server import CogServer, cog_server, wait_until_idle

ROUNDS = 15
GOAL = 1.5
MODEL_PHASES = ("encode_time", "denoise_time", "decode_time", "safety_time")
REQUESTS = ("text-to-image", "image-to-image, WebP", "image-to-image, PNG")


def main() -> None:
    options = benchmark_parser(__doc__, goals=True).parse_args()
    announce(60)
    with tempfile.TemporaryDirectory() as folder:
        environment = {}
        for model in ("dev", "schnell"):
            write_random_flux(Path(folder) / model, FluxSize(), model=model)
            environment[f"FLUX_{model.upper()}"] = str(Path(folder) / model)
        with cog_server(environment) as server:
            columns = measure(server)
    rows = [[name, *(f"{column[name]:.1f}" for column in columns)] for name in columns[0] if name != "ratio"]
    rows.append([f"ratio (goal: at most {GOAL})", *(f"{column['ratio']:.2f}" for column in columns)])
    table(["part (ms, median)", *REQUESTS], rows)
    ratios = zip(REQUESTS, columns, strict=True)
    judge([Goal(f"ratio, {name}", column["ratio"], GOAL) for name, column in ratios], check=options.check)


def measure(server: CogServer) -> list[dict[str, float]]:
    """Milliseconds of every part of each of `REQUESTS`, and their ratio to the bare encode."""
    request = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 1, "disable_safety_checker": True}
    png, webp = (server.predict({**request, "output_format": kind})["output"][0] for kind in ("png", "webp"))
    picture = Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2])))
    print(f"The picture is noise, the worst case of every codec: PNG {len(png) >> 10} KB, WebP {len(webp) >> 10} KB.")
    image_to_image = [{**request, "image": data_url, "prompt_strength": 1.0} for data_url in (webp, png)]
    columns = []
    for what, inputs in zip(REQUESTS, [request, *image_to_image], strict=True):
        parts: dict[str, list[float]] = {}
        for _ in tqdm(range(ROUNDS), desc=what, unit="request"):
            for name, value in {**one_request(server, inputs), "bare webp encode": webp_encode(picture)}.items():
                parts.setdefault(name, []).append(1000 * value)
        columns.append({name: statistics.median(values) for name, values in parts.items()})
        columns[-1]["ratio"] = columns[-1]["all outside the model"] / columns[-1]["bare webp encode"]
    return columns


def one_request(server: CogServer, inputs: dict[str, Any]) -> dict[str, float]:
    """Seconds by part, from the client's clock, the metrics and the log."""
    wait_until_idle(server.url)
    started = time.perf_counter()
    answer = requests.post(f"{server.url}/predictions", json={"input": inputs}, timeout=120).json()
    wall = time.perf_counter() - started
    metrics = answer["metrics"]
    model = sum(metrics[phase] for phase in MODEL_PHASES)
    read = next(float(line.split()[1]) for line in answer["logs"].splitlines() if line.startswith("read: "))
    in_run = metrics["predict_time"] - model - read - metrics["save_time"]
    return {
        "reading inputs": read,
        "saving (webp)": metrics["save_time"],
        "rest of run()": in_run,
        "HTTP, JSON, base64, coglet, client": wall - metrics["predict_time"],
        "all outside the model": wall - model,
    }


def webp_encode(picture: Image.Image) -> float:
    started = time.perf_counter()
    picture.save(io.BytesIO(), "WEBP", quality=80)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
