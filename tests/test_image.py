"""The image as `cog build` would make it: cog.yaml, .dockerignore and requirements.txt against each other and Cog."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from settings import MB, Settings, read_settings
from tools import ROOT
from tools.image_files import image_files, read_rules

COG: dict[str, Any] = yaml.safe_load((ROOT / "cog.yaml").read_text())
ENVIRONMENT = dict(entry.split("=", 1) for entry in COG["environment"])
IN_THE_IMAGE = {"LICENSE", "cog.yaml", "fetch", "flux", "lora", "service", "weights"}  # and the modules at the root
MOST_MB = 20.0  # without the real weights
SMOKE_TEST = {
    "FLUX_DEV": "weights/demo-dev",
    "FLUX_SCHNELL": "weights/demo-schnell",
    "FLUX_DEVICE": "cpu",
    "SAFETY_MODEL": "open-nsfw",
}
# `environmentVariableDenyList` in pkg/config/env.go of Cog's repository
REFUSED_BY_COG = re.compile(
    r"(LD_)?LIBRARY_PATH|(PYTHON)?PATH|VIRTUAL_ENV|PYTHONUNBUFFERED|HF_ENDPOINT|HF_HUB_ENABLE_HF_TRANSFER|"
    r"(R8|REPLICATE|CUDA|NVIDIA|NV|PGET|KUBERNETES)_.*"
)
REAL = ["weights/FLUX.1-dev/transformer/a.safetensors", "weights/nsfw_image_detection/config.json", "weights/own.tar"]
LEFT_OVER = [
    ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so",
    ".venv-play/bin/python",
    ".git/config",
    ".env",
    ".cog/build/a.whl",
    "flux/__pycache__/models.pyc",
    "fetch/deep/__pycache__/x.pyc",
    "output.0.webp",
    "output-gallery/index.html",
    "trained.tar",
    "another_package/module.py",
    "data/predict.py",
    "weights/FLUX.1-schnell.incomplete/transformer/a.safetensors",
    "weights/FLUX.1-dev/.cache/huggingface/download/a.incomplete",
]
START = """
from flux.checkpoints import find_checkpoints
from settings import read_settings
print(*find_checkpoints(read_settings()).values())
"""


def tracked() -> list[Path]:
    """The files that are in git, or would be after the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in listed.stdout.splitlines() if os.path.lexists(ROOT / line)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, and empty files for what lies in people's folders besides."""
    root = tmp_path_factory.mktemp("clone")
    for file in tracked():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, root / file, follow_symlinks=False)
    for name in LEFT_OVER + REAL:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_the_image_has_the_predictor_and_the_weights_and_nothing_else(clone: Path) -> None:
    modules = {file.name for file in tracked() if file.suffix == ".py" and file.parent == Path()}
    files = image_files(clone)
    assert {file.parts[0] for file in files} == IN_THE_IMAGE | modules
    expected = {file for file in tracked() if file.parts[0] in IN_THE_IMAGE | modules} | set(map(Path, REAL))
    assert set(files) == expected
    assert sum((clone / file).stat().st_size for file in files) < MOST_MB * MB


def test_the_image_has_all_that_the_predictor_imports(clone: Path) -> None:
    files = set(image_files(clone))
    assert Path(COG["run"].partition(":")[0]) in files
    for file in [file for file in files if file.suffix == ".py"]:
        for name in imported(file):
            module = Path(*name.split("."))
            homes = {module.with_suffix(".py"), module / "__init__.py"}
            assert homes & files or not any((ROOT / home).exists() for home in homes), f"{file} imports {name}"


def imported(file: Path) -> Iterator[str]:
    """The modules that it imports, and of `from x import y` both x and x.y."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_the_smoke_test_finds_the_demo_model_in_the_image(clone: Path, tmp_path: Path) -> None:
    """With the image's files alone, its environment, and what docs/shipping.md adds."""
    for file in image_files(clone):
        if file not in map(Path, REAL):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clone / file, tmp_path / file, follow_symlinks=False)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **ENVIRONMENT, **SMOKE_TEST}
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "weights/demo-dev weights/demo-schnell\n", done.stderr
    shipping = (ROOT / "docs" / "shipping.md").read_text()
    assert all(f"-e {name}={value}" in shipping for name, value in SMOKE_TEST.items())


@pytest.mark.parametrize(
    ("rules", "inside", "outside"),
    [
        ("docs", ["play/docs/a", "docs2"], ["docs/a/b"]),
        ("/docs/", ["play/docs/a"], ["docs/a"]),
        ("*.md", ["docs/a.md"], ["a.md"]),
        ("**/*.md\n!README.md", ["README.md"], ["a.md", "docs/README.md"]),
        ("*\n!flux\n**/__pycache__", ["flux/a/b.py"], ["a", "flux/__pycache__/x", "__pycache__/x"]),
        ("# docs\n\nweights/*/.cache", ["docs/a", "weights/.cache", "weights/a/b/.cache"], ["weights/a/.cache/b"]),
        ("!docs\ndocs", [], ["docs/a"]),
        ("a?c", ["ac", "a/c"], ["abc"]),
    ],
)
def test_dockerignore_is_read_as_docker_reads_it(
    tmp_path: Path, rules: str, inside: list[str], outside: list[str]
) -> None:
    for name in (*inside, *outside):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            path.touch()
    (tmp_path / ".dockerignore").write_text(rules)
    found = {str(file) for file in image_files(tmp_path)} - {".dockerignore"}
    assert found == {name for name in inside if (tmp_path / name).is_file()}


def test_what_is_not_read_of_a_dockerignore_is_refused() -> None:
    with pytest.raises(ValueError, match=r"brackets, backslashes and \.\. are not known here"):
        read_rules("*.py[co]")


def test_the_environment_is_known_to_the_predictor_and_allowed_by_cog() -> None:
    ours = {entry.metadata["variable"][0] for entry in fields(Settings)}
    table = (ROOT / "docs" / "configuration.md").read_text().partition("## Variables of the libraries")[2]
    for name in ENVIRONMENT:
        assert name in ours or f"| `{name}` |" in table, f"nothing reads {name}"
        assert not REFUSED_BY_COG.fullmatch(name), f"Cog refuses {name}"
    assert len(ENVIRONMENT) == len(COG["environment"])
    settings = read_settings(ENVIRONMENT)
    assert (settings.flux_dev, settings.flux_schnell, settings.flux_demo) == (None, None, False)
    assert (settings.hf_token, settings.safety_model) == (None, "two-stage")


def test_versions_are_pinned_and_the_same_everywhere() -> None:
    build = COG["build"]
    pinned = {
        name: dict(re.findall(r"^([\w.-]+)==([^\s#]+)", (ROOT / name).read_text(), re.MULTILINE))
        for name in (build["python_requirements"], "requirements-dev.txt")
    }
    for name, versions in pinned.items():
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(versions), f"{name}: a line without =="
    tools = pinned["requirements-dev.txt"]
    assert build["sdk_version"] == tools["cog"] == tools["coglet"]
    assert f"COGLET_WHEEL=pypi:{tools['coglet']}" in (ROOT / "docs" / "shipping.md").read_text()
    assert not {"cog", "coglet"} & pinned[build["python_requirements"]].keys()
    assert f'requires-python = ">={build["python_version"]},' in (ROOT / "pyproject.toml").read_text()
    file, _, name = COG["run"].partition(":")
    classes = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef)]
    assert name in classes
