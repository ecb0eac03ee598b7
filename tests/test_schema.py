"""The inputs and the output are a contract, which contract.json holds as Cog's own generator writes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import Server
from tools.cog_schema import PREDICTOR, openapi_document, to_cog_json

CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text())
DOCUMENT = openapi_document(PREDICTOR.read_text())


def without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_descriptions(v) for k, v in value.items() if not (k == "description" and isinstance(v, str))}
    return [without_descriptions(item) for item in value] if isinstance(value, list) else value


def test_inputs_and_output_are_the_contract_byte_for_byte() -> None:
    components = without_descriptions(DOCUMENT["components"]["schemas"])
    ours = {name: components[name] for name in CONTRACT}
    assert json.dumps(ours, indent=1) == json.dumps(CONTRACT, indent=1)


def test_every_input_is_described() -> None:
    properties = DOCUMENT["components"]["schemas"]["Input"]["properties"]
    assert all(len(field["description"]) > 20 for field in properties.values())


def test_the_server_serves_the_document(server: Server) -> None:
    served = requests.get(f"{server.url}/openapi.json", timeout=None).json()
    assert served == json.loads(to_cog_json(DOCUMENT))


@pytest.mark.parametrize(
    ("signature", "complaint"),
    [
        ('prompt: str = Input(description="a" "b")', "one plain string"),
        ('prompt: bytes = Input(description="a")', "annotation bytes"),
        ('prompt: str = Input(description="a", regex="b")', "regex"),
        ('prompt: str = "a"', "Input"),
    ],
)
def test_a_signature_that_cog_would_read_otherwise_is_refused(signature: str, complaint: str) -> None:
    source = f"class Predictor:\n    def run(self, {signature}) -> list[Path]: ..."
    with pytest.raises(ValueError, match=complaint):
        openapi_document(source)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x", "aspect_ratio": "7:5"}, "aspect_ratio"),
        ({"prompt": "x", "num_outputs": 5}, "num_outputs"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "x", "guidance_scale": -0.1}, "guidance_scale"),
        ({"prompt": "x", "lora_scale": 3.1}, "lora_scale"),
        ({"prompt": "x", "seed": "five"}, "seed"),
        ({"prompt": "x", "seed": 1.5}, "seed"),
        ({"prompt": "x", "width": 255}, "width"),
        ({"prompt": "x", "go_fast": "yes"}, "go_fast"),
    ],
)
def test_inputs_outside_the_contract_are_refused_by_name(server: Server, inputs: dict[str, Any], field: str) -> None:
    answer = server.post({"input": inputs})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "input", field]
