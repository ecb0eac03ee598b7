"""Which prediction goes to which worker, and what the fleet's front reads of a request: no process is started."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.bodies import read_body
from fleet.dispatch import MOST_OVERTAKEN, Dispatcher, Weights

SWAP = 0.5
A, B, C = (Weights("dev", False, ((name, 1.0),)) for name in "abc")


def dispatcher(*workers: str) -> Dispatcher:
    made = Dispatcher(SWAP)
    made.set_workers(workers, now=0)
    return made


def give(to: Dispatcher, now: float, **predictions: Weights) -> dict[str, str]:
    for id_, weights in predictions.items():
        to.add(id_, weights)
    return {prediction: worker for prediction, worker, _ in to.assign(now)}


def test_a_lora_goes_where_it_is() -> None:
    fleet = dispatcher("1", "2")
    first = give(fleet, 0, a=A, b=B)
    for prediction, worker in first.items():
        fleet.finished(worker, prediction, 3)
    assert give(fleet, 4, b2=B) == {"b2": first["b"]}
    assert give(fleet, 4, a2=A) == {"a2": first["a"]}


def test_another_lora_takes_the_worker_whose_weights_are_unused_for_longest() -> None:
    fleet = dispatcher("1", "2")
    first = give(fleet, 0, a=A, b=B)
    fleet.finished(first["b"], "b", 1)
    fleet.finished(first["a"], "a", 2)
    assert give(fleet, 3, c=C) == {"c": first["b"]}


def test_a_worker_takes_the_oldest_that_needs_no_swap() -> None:
    fleet = dispatcher("1")
    give(fleet, 0, a=A, b=B, a2=A)
    fleet.finished("1", "a", 3)
    assert give(fleet, 3) == {"a2": "1"}


def test_nobody_is_overtaken_for_ever() -> None:
    fleet = dispatcher("1")
    give(fleet, 0, first=A, b=B)
    running, served = "first", []
    for turn in range(MOST_OVERTAKEN + 1):
        fleet.add(f"a{turn}", A)
        fleet.finished("1", running, turn)
        ((running, _, _),) = fleet.assign(turn)
        served.append(running)
    assert served == [*(f"a{turn}" for turn in range(MOST_OVERTAKEN)), "b"]


def test_a_prediction_waits_for_its_lora_as_long_as_a_swap_takes_and_no_longer() -> None:
    fleet = dispatcher("1", "2")
    give(fleet, 0, a=A, b=B)
    fleet.finished("1", "a", 1)  # so a prediction takes a second
    assert give(fleet, 1.1, b2=B) == {}, "its worker is about to be idle"
    assert fleet.next_look(1.1) == pytest.approx(SWAP)
    fleet.finished("2", "b", 1.2)
    assert give(fleet, 1.2) == {"b2": "2"}
    assert give(fleet, 1.3, b3=B) == {"b3": "1"}, "its worker has just begun: that would be the longer wait"


def test_a_worker_that_overruns_is_not_waited_for() -> None:
    fleet = dispatcher("1", "2")
    give(fleet, 0, a=A, b=B)
    fleet.finished("1", "a", 1)
    assert give(fleet, 1, b2=B) == {}
    assert give(fleet, 1 + SWAP) == {"b2": "1"}


def test_models_and_precisions_count() -> None:
    fleet = dispatcher("1", "2")
    first = give(fleet, 0, dev=A, schnell=A._replace(model="schnell"))
    for prediction, worker in first.items():
        fleet.finished(worker, prediction, 3)
    assert give(fleet, 4, next=A._replace(model="schnell")) == {"next": first["schnell"]}
    assert give(fleet, 4, more=A) == {"more": first["dev"]}


@given(
    st.lists(st.one_of(st.sampled_from("abcdef"), st.integers(0, 3)), max_size=60),  # a new prediction, a worker ends
    st.floats(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_everything_is_given_once_to_an_idle_worker(events: list[str | int], step: float) -> None:
    """Whatever comes, no worker has two predictions, none is lost or given twice, and none waits beside an idle worker
    for longer than a swap."""
    fleet = dispatcher("0", "1", "2", "3")
    running: dict[str, str] = {}
    added, given, now = 0, set(), 0.0
    for event in [*events, *(worker for _ in range(70) for worker in range(4))]:
        now += step
        if isinstance(event, str):
            fleet.add(str(added := added + 1), Weights("dev", False, ((event, 1.0),)))
        elif prediction := running.pop(str(event), None):
            fleet.finished(str(event), prediction, now)
        for prediction, worker, _ in fleet.assign(now):
            assert worker not in running
            assert prediction not in given
            running[worker] = prediction
            given.add(prediction)
        if len(running) < 4 and fleet.waiting:
            assert fleet.next_look(now) is not None
            assert fleet.next_look(now) <= SWAP + 1e-9  # rounding
    assert len(given) == added


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"prompt": "x"}, Weights("dev", False, ())),
        ({"model": "schnell", "go_fast": True}, Weights("schnell", True, ())),
        ({"go_fast": True, "aspect_ratio": "custom"}, Weights("dev", False, ())),
        (
            {"replicate_weights": " a/b ", "extra_lora": "c/d", "extra_lora_scale": 0.5},
            Weights("dev", False, (("a/b", 1.0), ("c/d", 0.5))),
        ),
        ({"replicate_weights": "", "extra_lora": None, "lora_scale": "junk"}, Weights("dev", False, ())),
        ({"replicate_weights": "a/b", "lora_scale": 10**400}, Weights("dev", False, (("a/b", 1.0),))),
    ],
)
def test_the_weights_of_a_request_are_those_of_the_contract(inputs: dict[str, object], expected: Weights) -> None:
    assert read_body(json.dumps({"input": inputs}).encode()).weights == expected


DEEP = b"[" * 100_000
EVENTS = b'{"input":{},"webhook_events_filter":["x"]}'


@pytest.mark.parametrize(
    "raw", [b"", b"nonsense", b"[1]", b'{"input":[1]}', b'{"id":7}', b"\xff", b'{"webhook":{}}', DEEP, EVENTS]
)
def test_a_body_that_is_not_cogs_is_left_to_a_server(raw: bytes) -> None:
    body = read_body(raw)
    assert body.input is None
    assert body.weights is None
    assert body.additions("id", "POST") == {}


def test_a_missing_seed_is_chosen_and_a_given_one_kept() -> None:
    assert 0 <= read_body(b'{"input":{"seed":null}}').additions("i", "PUT")["seed"] < 2**32
    assert read_body(b'{"input":{"seed":3}}').additions("i", "POST") == {"id": "i"}
