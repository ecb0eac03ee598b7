"""Bytes per parameter that cross from host memory to a GPU in a load, a merge and a restore, and casts on the way."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench._common import Goal, benchmark_parser, judge, table
from flux.device import Memory
from flux.fp8 import fp8_layers, new_twin
from flux.pristine import Pristine
from flux.residency import Residency
from lora.merge import Merge
from lora.updates import LowRank
from settings import GB
from tools.fake_cuda import CUDA, Ledger, fake_cuda
from tools.random_flux import FULL_WIDTH, new_networks

RANK = 16
BASE = {False: "in host memory", True: "on the device"}
MOST_BYTES = 2.05  # a parameter in bf16, and the LoRA's factors


@dataclass(frozen=True)
class Crossing:
    """What one operation on all linear layers of the blocks moved."""

    operation: str
    precision: str
    base_on_device: bool
    bytes_per_parameter: float
    casts: int


@contextmanager
def fake_transformers(*, base_on_device: bool) -> Iterator[tuple[Residency, Ledger, dict[str, torch.nn.Module]]]:
    """A transformer of FLUX.1's width in both precisions on a fake GPU, with or without room for pristine copies."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            exact = new_networks(FULL_WIDTH, model="dev")["transformer"]
    finally:
        torch.set_default_dtype(torch.float32)
    twin = new_twin(exact, weight_only=False)
    shapes = {name: value.shape for name, value in exact.named_parameters()}
    size = sum(shape.numel() * 2 for shape in shapes.values())

    def read(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16)

    with fake_cuda() as ledger:
        pristine = Pristine(shapes, read, ledger.stream)
        memory = Memory(4 * size if base_on_device else int(1.01 * size), 100 * GB)
        residency = Residency(CUDA, memory, ledger.stream)
        residency.add("dev", exact, pristine, loaded=False)
        residency.add("dev fp8", twin, pristine, loaded=False)
        yield residency, ledger, {"bf16": exact, "fp8": twin}


def crossings(precision: str, *, base_on_device: bool) -> list[Crossing]:
    """Of a load, two merges, a restore and a load with a LoRA."""
    found = []
    with fake_transformers(base_on_device=base_on_device) as (residency, ledger, transformers):
        transformer = transformers[precision]
        shapes = residency.live(transformer).pristine.shapes
        names = [f"{name}.weight" for name in fp8_layers(transformer)]
        in_blocks, everywhere = (sum(shapes[name].numel() for name in some) for some in (names, shapes))

        def count(operation: str, parameters: int, do: Callable[[], object]) -> None:
            sent, casts = ledger.bytes, ledger.casts
            do()
            each = (ledger.bytes - sent) / parameters
            found.append(Crossing(operation, precision, base_on_device, each, ledger.casts - casts))

        def change(number: int | None) -> None:
            residency.change(transformer, {} if number is None else lora(shapes, names, number))

        if base_on_device:
            residency.use(transformers["bf16"])
        count("load", everywhere, lambda: residency.use(transformer))
        count("merge", in_blocks, lambda: change(1))
        count("another merge", in_blocks, lambda: change(2))
        count("restore", in_blocks, lambda: change(None))
        if not base_on_device:
            residency.evict_all()
            change(3)
            count("load with a LoRA", everywhere, lambda: residency.use(transformer))
    return found


def lora(shapes: Mapping[str, torch.Size], names: list[str], number: int) -> dict[str, Merge]:
    def update(out: int, width: int) -> LowRank:
        factors = torch.empty(out, RANK, dtype=torch.bfloat16), torch.empty(RANK, width, dtype=torch.bfloat16)
        return LowRank(*factors, 1.0)

    return {name: Merge([(str(number), 1.0, update(*shapes[name]))]) for name in names}


def main() -> None:
    arguments = benchmark_parser(__doc__, goals=True).parse_args()
    cases = [(precision, base) for base in (False, True) for precision in ("bf16", "fp8")]
    found = [one for precision, base in cases for one in crossings(precision, base_on_device=base)]
    print(f"On fake CUDA tensors of FLUX.1's width, a LoRA of rank {RANK} on every linear layer of the blocks.")
    rows = [
        [
            one.operation,
            one.precision,
            "yes" if one.base_on_device else "no",
            f"{one.bytes_per_parameter:.3f}",
            one.casts,
        ]
        for one in found
    ]
    table(["operation", "precision", "pristine weights", "bytes per parameter", "copies that change the dtype"], rows)
    judge([goal for one in found for goal in goals(one)], check=arguments.check)


def goals(one: Crossing) -> list[Goal]:
    """The LoRA's own factors cross in every merge."""
    factors = 0.03
    most = factors if one.base_on_device else MOST_BYTES
    name = f"{one.operation}, {one.precision}, pristine weights {BASE[one.base_on_device]}"
    return [
        Goal(f"{name}: bytes per parameter", one.bytes_per_parameter, most),
        Goal(f"{name}: copies that change the dtype", one.casts, 0),
    ]


if __name__ == "__main__":
    main()
