"""The compiler's code for an fp8 layer on a GPU, made without one: how many kernels, and what they write.

Needs triton, which is in no requirements file: pip install --no-deps --target FOLDER triton, then PYTHONPATH=FOLDER.
"""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench._common import Goal, announce, benchmark_parser, judge, table
from flux.fp8 import Fp8Linear
from tools.fake_cuda import CUDA, fake_cuda

WIDTH, OUT = 3072, 12288  # the first layer of FLUX.1's feed-forward
CAPABILITY = (9, 0)  # Hopper
ITEM_BYTES = {"torch.bfloat16": 2, "torch.float32": 4, "torch.float8_e4m3fn": 1}
CASES = {"a modulation: one row, the weight alone in fp8": 1, "4,608 rows: picture and text at a megapixel": 4608}


@dataclass(frozen=True)
class Generated:
    """What the compiler made of a layer."""

    kernels: int
    calls: tuple[str, ...]  # of library functions
    written: int  # bytes of all buffers that are made
    largest_bf16: int  # numbers in the largest buffer of bfloat16


def main() -> None:
    arguments = benchmark_parser(__doc__, goals=True).parse_args()
    try:
        import triton  # noqa: F401, PLC0415 - it is no requirement
    except ImportError:
        sys.exit("triton is not installed: pip install --no-deps --target FOLDER triton, then PYTHONPATH=FOLDER.")
    announce(60)
    rows, goals = [], []
    for case, count in CASES.items():
        for tuned in (False, True):
            made = generate(count, coordinate_descent=tuned)
            cells = [made.kernels, ", ".join(made.calls) or "none", f"{made.written / 1e6:.1f}", made.largest_bf16]
            rows.append([case, "yes" if tuned else "no", *cells])
            if tuned:
                most = OUT * count  # the output
                goals.append(Goal(f"{case}: numbers in the largest bf16 buffer", made.largest_bf16, most))
    print(f"One layer of {WIDTH} x {OUT} for compute capability {'.'.join(map(str, CAPABILITY))}.")
    header = ["input", "coordinate descent", "kernels", "library calls", "MB written"]
    table([*header, "numbers in the largest bf16 buffer"], rows)
    judge(goals, check=arguments.check)


def generate(rows: int, *, coordinate_descent: bool) -> Generated:
    """Compile `Fp8Linear` for that many rows and read the code."""
    from torch._guards import detect_fake_mode  # noqa: PLC0415
    from torch._inductor.debug import DebugContext  # noqa: PLC0415
    from torch._inductor.decomposition import select_decomp_table  # noqa: PLC0415
    from torch._inductor.graph import GraphLowering  # noqa: PLC0415
    from torch._inductor.virtualized import V  # noqa: PLC0415
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415

    config = {"coordinate_descent_tuning": coordinate_descent, "compile_threads": 1}
    with a_gpu_that_is_not_there(), fake_cuda(), torch._inductor.config.patch(config):
        layer = Fp8Linear(WIDTH, OUT, weight_only=False, dtype=torch.bfloat16)
        state = {name: torch.empty(v.shape, dtype=v.dtype, device=CUDA) for name, v in layer.state_dict().items()}
        x = torch.empty(1, rows, WIDTH, dtype=torch.bfloat16, device=CUDA)
        for name, value in state.items():
            setattr(layer, name, value if name == "scale" else nn.Parameter(value, requires_grad=False))

        def forward(x: Tensor, *values: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(layer, dict(zip(state, values, strict=True)), (x,))
            return result

        inputs = (x, *state.values())
        module = make_fx(forward, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
        graph = GraphLowering(module, shape_env=ShapeEnv(), cpp_wrapper=False, aot_mode=False)
        handlers = (V.set_graph_handler(graph), V.set_debug_handler(DebugContext()))
        with handlers[0], handlers[1], V.set_fake_mode(detect_fake_mode(inputs)):
            graph.run(*inputs)
            code: Any = graph.codegen()[0]
    return read(getattr(code, "value", str(code)))


def read(code: str) -> Generated:
    """Count kernels, library calls and buffers in the compiler's code."""
    buffers = [
        (math.prod(int(side) for side in sides.split(",") if side.strip()), dtype)
        for sides, dtype in re.findall(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), (torch\.\w+)\)", code)
    ]
    calls = tuple(dict.fromkeys(re.findall(r"^\s+(?:extern_kernels|torch\.ops\.aten)\.(\w+)", code, re.MULTILINE)))
    return Generated(
        kernels=code.count("async_compile.triton("),
        calls=calls,
        written=sum(numbers * ITEM_BYTES[dtype] for numbers, dtype in buffers),
        largest_bf16=max((numbers for numbers, dtype in buffers if dtype == "torch.bfloat16"), default=0),
    )


@contextlib.contextmanager
def a_gpu_that_is_not_there() -> Iterator[None]:
    """What the compiler asks of a GPU, answered as an H100 would."""
    import torch._dynamo.device_interface as interface  # noqa: PLC0415
    import torch._inductor.codegen.triton as codegen  # noqa: PLC0415
    import torch.utils._triton as torch_triton  # noqa: PLC0415
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    number = CAPABILITY[0] * 10 + CAPABILITY[1]
    properties = SimpleNamespace(
        name="not there",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 * 2**30,
        gcnArchName="",
        L2_cache_size=50 * 2**20,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
    )
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
        get_current_stream=lambda _: 0,
    )
    cuda, worker = interface.CudaInterface, interface.CudaInterface.Worker
    answers = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: CAPABILITY),
        (torch.cuda, "get_arch_list", lambda: [f"sm_{number}"]),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.version, "cuda", "13.0"),
        (cuda, "is_available", staticmethod(lambda: True)),
        (cuda, "get_compute_capability", staticmethod(lambda *_, **__: number)),
        (cuda, "current_device", staticmethod(lambda: 0)),
        (cuda, "device_count", staticmethod(lambda: 1)),
        (cuda, "get_device_properties", staticmethod(lambda *_: properties)),
        (worker, "current_device", staticmethod(lambda: 0)),
        (worker, "get_device_properties", staticmethod(lambda *_, **__: properties)),
        (torch_triton, "triton_hash_with_backend", lambda *_, **__: "none"),
    ]
    if hasattr(codegen, "triton_hash_with_backend"):
        answers.append((codegen, "triton_hash_with_backend", lambda *_, **__: "none"))
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        triton.runtime.driver.set_active(driver)
        yield


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    main()
