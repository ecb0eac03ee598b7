"""The OpenAPI document that `cog build` makes of predict.py, made without Cog's command line.

coglet checks requests only against `.cog/openapi_schema.json`, which `cog build` writes into the container. This reads
the same source text in the same way (statically: literals in the signature of `Predictor.run`) and writes the same
document, so that the server checks requests here as well. It knows the kinds of input that predict.py uses and fails
on any other. The form is that of `pkg/schema/openapi_spec.go` in Cog's repository.
"""

import ast
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools import ROOT

PREDICTOR = ROOT / "predict.py"
TYPES: dict[str, dict[str, str]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
BOUNDS = {"ge": "minimum", "le": "maximum"}

Json = dict[str, Any]


def write_schema(folder: Path = ROOT) -> Path:
    """Write the document of the folder's predict.py where coglet looks for it, unless that is what the file holds
    already. Returns its path."""
    document = to_cog_json(openapi_document((folder / PREDICTOR.name).read_text()))
    file = folder / ".cog" / "openapi_schema.json"
    if not file.exists() or file.read_text() != document:
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")  # several servers may start at once
        unfinished.write_text(document)
        unfinished.replace(file)
    return file


def to_cog_json(document: Json) -> str:
    """Compact JSON as Go's encoder writes it, which escapes these three."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def openapi_document(source: str) -> Json:
    """The OpenAPI 3.0.2 document of the class `Predictor` in the source text, all of it.

    Raises `ValueError` for a signature that Cog, or this, cannot read.
    """
    run = _run_method(source)
    inputs, enums = _inputs(run, source)
    components = {"Input": inputs, "Output": _output(run), **enums, **_fixed_components()}
    info = {"title": "Cog", "version": version("cog")}
    return {"components": {"schemas": components}, "info": info, "openapi": "3.0.2", "paths": _paths()}


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


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _text(title: str, **more: str) -> Json:
    return _sorted({"title": title, "type": "string", **more})


def _object(title: str, properties: Json, required: list[str] | None = None) -> Json:
    needed = {"required": required} if required else {}
    return {"properties": _sorted(properties), **needed, "title": title, "type": "object"}


def _fixed_components() -> Json:
    """The components that are the same for every predictor."""
    response = {
        "input": _ref("Input"),
        "output": _ref("Output"),
        "metrics": {"title": "Metrics", "type": "object"},
        **{name: _text(_title(name)) for name in ("id", "version", "status", "error", "logs")},
        **{name: _text(_title(name), format="date-time") for name in ("created_at", "started_at", "completed_at")},
    }
    place = {"items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "title": "Location", "type": "array"}
    problems = {"detail": {"items": _ref("ValidationError"), "title": "Detail", "type": "array"}}
    states = ["starting", "processing", "succeeded", "canceled", "failed"]
    return {
        "PredictionRequest": _object("PredictionRequest", {"id": _text("Id"), "input": _ref("Input")}),
        "PredictionResponse": _object("PredictionResponse", response),
        "Status": {"description": "An enumeration.", "enum": states, "title": "Status", "type": "string"},
        "HTTPValidationError": _object("HTTPValidationError", problems),
        "ValidationError": _object(
            "ValidationError",
            {"loc": place, "msg": _text("Message"), "type": _text("Error Type")},
            ["loc", "msg", "type"],
        ),
    }


def _answers(schema: Json, *, checked: bool) -> Json:
    def answer(description: str, content: Json) -> Json:
        return {"content": {"application/json": {"schema": content}}, "description": description}

    answers = {"200": answer("Successful Response", schema)}
    if checked:
        answers["422"] = answer("Validation Error", _ref("HTTPValidationError"))
    return answers


def _paths() -> Json:
    body = {"content": {"application/json": {"schema": _ref("PredictionRequest")}}}
    identifier = {"in": "path", "name": "prediction_id", "required": True, "schema": _text("Prediction Id")}
    return {
        "/": {"get": {"operationId": "root__get", "responses": _answers({}, checked=False), "summary": "Root"}},
        "/health-check": {
            "get": {
                "operationId": "healthcheck_health_check_get",
                "responses": _answers({}, checked=False),
                "summary": "Healthcheck",
            }
        },
        "/predictions": {
            "post": {
                "description": "Run a single prediction on the model",
                "operationId": "predict_predictions_post",
                "requestBody": body,
                "responses": _answers(_ref("PredictionResponse"), checked=True),
                "summary": "Predict",
            }
        },
        "/predictions/{prediction_id}/cancel": {
            "post": {
                "operationId": "cancel_predictions__prediction_id__cancel_post",
                "parameters": [identifier],
                "responses": _answers({}, checked=True),
                "summary": "Cancel",
            }
        },
    }


if __name__ == "__main__":
    print(write_schema().relative_to(ROOT))
