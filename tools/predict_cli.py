"""Make one prediction from the command line, as `cog predict` does, but with Cog's server on this machine."""

import argparse
import base64
import json
import mimetypes
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.cog_schema import PREDICTOR, openapi_document
from tools.server import ServerError, cog_server, end_on_sigterm

PROGRESS_BAR = re.compile(r"\d+%\|")
MIB = 1 << 20
MOST_BODY = 100 * MIB  # bytes of a request that coglet takes
LARGEST_SENT = 32 * MIB  # bytes of a LoRA that is sent with the request, so that two and two pictures fit into it
LONGEST_NAME = 1000  # characters of what may be a file's name
FOLDER_VARIABLE = "LORA_FOLDER"
LORA_INPUTS = ("replicate_weights", "extra_lora")
FILE_INPUTS = ("image", "mask", *LORA_INPUTS)
Json = dict[str, Any]


class UsageError(ValueError):
    """The command line cannot be used; the message says why."""


def main() -> int:
    """Returns the exit code: 0 when the prediction succeeded."""
    arguments = _parse_arguments()
    end_on_sigterm(128 + signal.SIGTERM)
    schema = openapi_document(PREDICTOR.read_text())["components"]["schemas"]
    try:
        texts = _json_inputs(arguments.json) if arguments.json else _flag_inputs(arguments.input)
        _check_names(texts, schema)
        environment = dict(_name_and_value(pair) for pair in arguments.env)
        console = Console()
        with TemporaryDirectory(prefix="flux-lora-") as folder:
            inputs = _with_files(texts, Path(folder), environment)
            if not arguments.json:
                inputs = {name: _typed(name, value, schema) for name, value in inputs.items()}
            _check_size(inputs)
            with cog_server(environment, on_log=console.show) as server:
                prediction = server.predict(inputs)
        console.end_bar()
        return _finish(prediction, arguments)
    except (UsageError, ServerError) as error:
        print(f"{type(error).__name__.removesuffix('Error').lower()} error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/predict",
        description="Run one prediction through Cog's server on this machine and save the pictures.",
        epilog='Example: script/predict -i prompt="a red circle on a white background" -i seed=1',
    )
    parser.add_argument(
        "-i", "--input", action="append", default=[], metavar="NAME=VALUE", help="an input; @FILE sends a file"
    )
    parser.add_argument(
        "--json",
        metavar="JSON",
        help="all inputs as one JSON object, or @FILE, or - for standard input; prints the response as JSON",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="output",
        metavar="PATH",
        help="where to save: PATH.0.webp and so on (default: output)",
    )
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable for the predictor",
    )
    arguments = parser.parse_args()
    if arguments.json and arguments.input:
        parser.error("use --json or -i, not both")
    return arguments


class Console:
    """The predictor's log on standard error, with its progress bar kept on one line."""

    def __init__(self) -> None:
        self._in_bar = False

    def show(self, line: str) -> None:
        """Print one line. On a terminal a bar overwrites the one before; elsewhere only a finished bar is printed."""
        if not PROGRESS_BAR.search(line):
            self.end_bar()
            print(line, file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
            self._in_bar = True
        elif "100%|" in line:
            print(line, file=sys.stderr, flush=True)

    def end_bar(self) -> None:
        if self._in_bar:
            print(file=sys.stderr)
            self._in_bar = False


def _name_and_value(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not (name and equals):
        raise UsageError(f"{pair!r} is not of the form name=value.")
    return name, value


def _flag_inputs(pairs: list[str]) -> Json:
    return dict(map(_name_and_value, pairs))


def _with_files(inputs: Json, folder: Path, environment: dict[str, str]) -> Json:
    """The inputs with the files that "@" names: as data: URIs, or a LoRA by its name where it is in a folder from which
    the server may read it. For a LoRA that may be too large to be sent `folder` becomes that one, in `environment`.

    Raises `UsageError`.
    """
    found: Json = {}
    allowed = environment.get(FOLDER_VARIABLE) or os.environ.get(FOLDER_VARIABLE)
    for name, value in inputs.items():
        found[name] = value
        if name in FILE_INPUTS and isinstance(value, str):
            _check_at(name, value, allowed)
        if isinstance(value, str) and value.startswith("@"):
            file = Path(value[1:]).expanduser()
            if name in LORA_INPUTS and file.suffix == ".safetensors" and _size(file) > LARGEST_SENT and not allowed:
                found[name] = _offer(file, folder / f"{name}-{file.name}")
                environment[FOLDER_VARIABLE] = str(folder)
            else:
                found[name] = data_url(file)
    return found


def _check_at(name: str, value: str, allowed: str | None) -> None:
    """Refuse a file's name that was meant to be sent, but for one that the server has in its folder."""
    if value.startswith("@") or not value or (allowed and (Path(allowed) / value).is_file()):
        return
    try:
        is_file = len(value) < LONGEST_NAME and Path(value).expanduser().is_file()
    except OSError:
        return
    if is_file:
        raise UsageError(f"{value} is a file on this machine: put @ before its name to send it, -i {name}=@{value}.")


def _offer(file: Path, link: Path) -> str:
    """The file under another name, without a copy where the disk can do that."""
    try:
        link.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, link)
    return link.name


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from None


def _check_size(inputs: Json) -> None:
    """What coglet refuses is not sent. Raises `UsageError`."""
    size = len(json.dumps({"input": inputs}))
    if size > MOST_BODY:
        raise UsageError(
            f"the request has {size / MIB:.0f} MiB and the server takes {MOST_BODY // MIB}: send smaller files, or "
            f"their addresses; a LoRA may also be in a folder that {FOLDER_VARIABLE} names."
        )


def _typed(name: str, value: str, schema: Json) -> Any:
    """The text as the type that the schema asks for, or as it is where it does not fit: the server refuses it then."""
    kind = schema["Input"]["properties"].get(name, {}).get("type")
    if kind not in ("integer", "number", "boolean"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def data_url(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _json_inputs(text: str) -> Json:
    if text in ("-", "@-"):
        text = sys.stdin.read()
    elif text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text()
        except OSError as error:
            raise UsageError(f"{text[1:]} cannot be read: {error.strerror}.") from None
    try:
        inputs = json.loads(text)
    except ValueError:
        inputs = None
    if not isinstance(inputs, dict):
        raise UsageError("--json needs one JSON object with the inputs.")
    return inputs


def _check_names(inputs: Json, schema: Json) -> None:
    """Refuse inputs that do not exist. The server would ignore them, and a typing error would go unnoticed."""
    known = schema["Input"]["properties"]
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise UsageError(f"there is no input {', '.join(unknown)}; there are {', '.join(known)}.")


def _finish(prediction: Json, arguments: argparse.Namespace) -> int:
    succeeded = prediction.get("status") == "succeeded"
    if succeeded:
        destination = Path(arguments.output).expanduser()
        prediction["output"] = [str(path) for path in _save(prediction["output"], destination)]
    if arguments.json:
        print(json.dumps(prediction, indent=2))
    elif not succeeded:
        print(_reason(prediction), file=sys.stderr)
    else:
        for path in prediction["output"]:
            print(path)
    return 0 if succeeded else 1


def _save(data_urls: list[str], destination: Path) -> list[Path]:
    """Write output i to PATH.i.EXTENSION, whatever extension PATH has."""
    stem = destination / "output" if destination.is_dir() else destination.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, url in enumerate(data_urls):
        header, _, content = url.partition(",")
        kind = header.removeprefix("data:").removesuffix(";base64")
        extension = {"image/jpeg": ".jpg"}.get(kind) or mimetypes.guess_extension(kind) or ""
        path = stem.with_name(f"{stem.name}.{i}{extension}")
        path.write_bytes(base64.b64decode(content))
        paths.append(path)
    return paths


def _reason(prediction: Json) -> str:
    """The error of a prediction, or of inputs that the schema refused."""
    if "detail" in prediction:
        return "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in prediction["detail"])
    error = str(prediction.get("error", prediction))
    # Cog says "Prediction failed: " twice and names the exception's class before the sentence itself
    return re.sub(r"^(Prediction failed: )*(\w+(Error|Exception): )?", "", error)


if __name__ == "__main__":
    sys.exit(main())
