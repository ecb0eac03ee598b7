"""The arrows between the modules of the product: who may import whom, and what must stay cheap to import."""

import ast
import subprocess
import sys

import pytest

from tools import ROOT

PACKAGES = ("fetch", "lora", "flux")
ABOVE = ("predict", "lora_loader", "safety")
LEAVES = ("service", *(file.stem for file in ROOT.glob("*.py") if file.stem not in ABOVE))
MAY_IMPORT = {  # besides LEAVES; a package's name stands for all of its modules
    "fetch": ("fetch", "lora.errors", "lora.header", "lora.families", "lora.names"),
    "lora": ("lora",),
    "flux": ("flux",),
    "lora_loader": PACKAGES,
    "predict": (*PACKAGES, "safety", "lora_loader"),
    "fleet": ("fleet", "tools.ROOT", "tools.cog_schema", "tools.server"),
}
FOLDERS = (*PACKAGES, "service", "fleet")
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text()
    for file in [*ROOT.glob("*.py"), *(file for one in FOLDERS for file in (ROOT / one).glob("*.py"))]
}
OURS = {file.stem for file in ROOT.glob("*.py")} | {file.parent.name for file in ROOT.glob("*/__init__.py")}
MOST_LINES = 300


def forbidden_imports(module: str, source: str) -> list[str]:
    """What of this project `source` imports, at any depth, that `module` may not."""
    imported: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            imported += [f"{start}.{alias.name}" for alias in node.names]
    allowed = (*LEAVES, *MAY_IMPORT.get(module.partition(".")[0], ()))
    return [
        name
        for name in imported
        if (name.startswith(".") or name.partition(".")[0] in OURS)
        and not any(f"{name}.".startswith(f"{each}.") for each in allowed)
    ]


def test_modules_import_only_what_is_below_them() -> None:
    found = {module: forbidden_imports(module, source) for module, source in MODULES.items()}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lora.names", "from fetch.files import CONFIG_FILE"),
        ("lora.names", "import flux.models"),
        ("flux.fp8", "from lora import updates"),
        ("fetch.files", "from lora.formats import read_lora"),
        ("fetch.files", "from lora import read_lora"),
        ("safety", "from flux.models import load_flux"),
        ("phases", "from flux import models"),
        ("settings", "from flux.device import Memory"),
        ("images", "def late():\n    import lora_loader"),
        ("lora_loader", "from predict import Predictor"),
        ("predict", "from tools.server import cog_server"),
        ("predict", "from fleet.app import build"),
        ("fleet.front", "from flux.models import load_flux"),
        ("fleet.worker", "from tools.random_flux import FluxSize"),
        ("lora.names", "from .header import Shape"),
    ],
)
def test_an_import_from_above_is_found(module: str, line: str) -> None:
    assert len(forbidden_imports(module, line)) == 1


def test_modules_are_short() -> None:
    lines = {module: len(source.splitlines()) for module, source in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > MOST_LINES} == {}


def test_the_clock_and_the_device_load_no_model_library() -> None:
    """They serve what has to start quickly: a command line, a small process."""
    code = "import sys, phases, flux.device; print(sorted({'diffusers', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
