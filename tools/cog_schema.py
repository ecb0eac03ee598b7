"""The part of `cog build`'s OpenAPI document that depends on predict.py, made without Cog's command line.

coglet checks a request against the inputs in `.cog/openapi_schema.json`, which `cog build` writes into the container;
without that file it takes anything. The generator is part of Cog's command line, which is written in Go: neither the
`cog` package nor coglet has it. This reads the same source text in the same way (statically: literals in the signature
of `Predictor.run`) and writes the same inputs, choices and output. What Cog's document says beside them, the addresses
and the form of an answer, is the same for every predictor and nothing here reads it, so it is left out.

It knows the kinds of input that predict.py uses and fails on any other. The form is that of
`pkg/schema/openapi_spec.go` in Cog's repository.
"""

import ast
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools import ROOT

PREDICTOR = ROOT / "predict.py"
SCHEMA_FILE = ROOT / ".cog" / "openapi_schema.json"
TYPES: dict[str, dict[str, str]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
BOUNDS = {"ge": "minimum", "le": "maximum"}

Json = dict[str, Any]


def write_schema() -> Path:
    """Write predict.py's document to `SCHEMA_FILE` unless that is what it holds. Returns its path."""
    document = json.dumps(openapi_document(PREDICTOR.read_text()))
    if not SCHEMA_FILE.exists() or SCHEMA_FILE.read_text() != document:
        SCHEMA_FILE.parent.mkdir(exist_ok=True)
        SCHEMA_FILE.write_text(document)
    return SCHEMA_FILE


def openapi_document(source: str) -> Json:
    """The OpenAPI 3.0.2 document of the class `Predictor` in the source text.

    Raises `ValueError` for a signature that Cog, or this, cannot read.
    """
    run = _run_method(source)
    inputs, enums = _inputs(run, source)
    components = {"Input": inputs, "Output": _output(run), **enums}
    info = {"title": "Cog", "version": version("cog")}
    return {"components": {"schemas": components}, "info": info, "openapi": "3.0.2", "paths": {}}


def _run_method(source: str) -> ast.FunctionDef:
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Predictor":
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name == "run":
                    return member
    raise ValueError("there is no method Predictor.run")


def _inputs(run: ast.FunctionDef, source: str) -> tuple[Json, Json]:
    """The schema of the input object, and one enumeration for each input that has choices."""
    properties, enums, required = {}, {}, []
    arguments = run.args.args[1:]
    for order, (argument, value) in enumerate(zip(arguments, run.args.defaults, strict=True)):
        name, options = argument.arg, _options(value, source)
        kind, nullable = _type(argument.annotation)
        field: Json = {"x-order": order}
        if "choices" in options:
            field["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
            enums[name] = _sorted(
                {"title": name, "description": "An enumeration.", "enum": options["choices"], "type": kind["type"]}
            )
        else:
            field |= {"title": _title(name), **kind}
        if "default" in options:
            field["default"] = options["default"]
        else:
            required.append(name)
        if nullable:
            field["nullable"] = True
        field |= {BOUNDS[bound]: options[bound] for bound in BOUNDS if bound in options}
        field["description"] = options["description"]
        properties[name] = _sorted(field)
    return {"properties": properties, "required": required, "title": "Input", "type": "object"}, enums


def _options(node: ast.expr, source: str) -> Json:
    """The keywords of one `Input(...)`, all of them literals."""
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Input" and not node.args
    ):
        raise ValueError(f"line {node.lineno}: every input needs Input(...) with keywords")
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    unknown = options.keys() - {"description", "default", "choices", *BOUNDS}
    if unknown:
        raise ValueError(f"line {node.lineno}: {', '.join(sorted(unknown))} is not known here")
    for keyword in node.keywords:
        if keyword.arg == "description":
            text = ast.get_source_segment(source, keyword.value)
            if text is None or text[1:-1] != options["description"]:  # Cog takes what stands between the quotes
                raise ValueError(f"line {node.lineno}: a description is one plain string without escapes")
    return options


def _type(annotation: ast.expr | None) -> tuple[dict[str, str], bool]:
    """`T` or `T | None`: the schema of T, and whether None is allowed."""
    match annotation:
        case ast.Name(id=name) if name in TYPES:
            return TYPES[name], False
        case ast.BinOp(left=ast.Name(id=name), op=ast.BitOr(), right=ast.Constant(value=None)) if name in TYPES:
            return TYPES[name], True
    raise ValueError(f"the annotation {ast.unparse(annotation) if annotation else None} is not known here")


def _output(run: ast.FunctionDef) -> Json:
    if run.returns is None or ast.unparse(run.returns) != "list[Path]":
        raise ValueError("run must return list[Path]")
    return {"items": _sorted(TYPES["Path"]), "title": "Output", "type": "array"}


def _title(name: str) -> str:
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _sorted(mapping: Json | dict[str, str]) -> Json:
    return dict(sorted(mapping.items()))


if __name__ == "__main__":
    print(write_schema().relative_to(ROOT))
