"""script/fleet over HTTP: two workers of a predictor that only sleeps, through every fault, and two of the demo model.

It runs in the fleet's own environment, without what the other tests share: script/test-fleet.
"""

import json
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

pytest.importorskip("ray", reason="the fleet's tests run in its own environment: script/test-fleet")

import yaml
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema

from fleet.__main__ import _parser
from fleet.app import Options
from fleet.state import APP, WORKER
from tools.fleet import Fleet, started_fleet, wait_until_ready
from tools.receiver import Received, receiver
from tools.server import Project, cog_server, free_port

ROOT = Path(__file__).parent.parent
SLEEPER = ROOT / "bench" / "sleeper"
PYTHON = ROOT / ".venv" / "bin" / "python"
LORAS = ROOT / "weights" / "demo-loras"
PATIENCE = 60  # seconds, on a busy machine
SHORT = ("--swap-seconds", "0.2")
JSON = {"Content-Type": "application/json"}
SLEEPY = ("--project", str(SLEEPER))


@contextmanager
def started(*options: str, ready: bool = True, **environment: str) -> Iterator[Fleet]:
    with started_fleet(*options, environment=environment) as fleet:
        if ready:
            wait_until_ready(fleet)
        yield fleet


def eventually(condition: Callable[[], Any]) -> Any:
    """What it returns, once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.05)
    return result


@pytest.fixture(scope="module")
def sleepers() -> Iterator[Fleet]:
    with started(
        *SLEEPY, "--workers", "2", "--longest-queue", "6", "--longest-wait", "6", "--longest-prediction", "9", *SHORT
    ) as fleet:
        yield fleet


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture
def webhooks() -> Iterator[tuple[str, list[Received]]]:
    with receiver() as running:
        yield running


def busy(fleet: Fleet, pool: ThreadPoolExecutor, seconds: float = 3.0) -> list[Future[dict[str, Any]]]:
    """Both workers are at a prediction of this length."""
    eventually(lambda: fleet.health()["queue"]["running"] == 0)  # what was canceled a moment ago has ended
    running = [pool.submit(partial(fleet, prompt=f"busy {turn}", seconds=seconds)) for turn in range(2)]
    eventually(lambda: fleet.health()["queue"]["running"] == 2)
    return running


def test_its_answers_are_those_of_a_single_server(sleepers: Fleet) -> None:
    with cog_server(project=Project(SLEEPER, PYTHON, checked=False)) as single:
        for path in ("/", "/openapi.json", "/predictions", "/nothing"):
            one, many = (requests.get(url + path, timeout=PATIENCE) for url in (single.url, sleepers.url))
            assert (one.status_code, one.text) == (many.status_code, many.text), path
        for body, headers in (
            ('{"input":{"prompt":"é","seed":1},"id":"same"}', JSON),
            ('{"input":{"prompt":"no type","seed":0},"id":"same"}', {}),
            ('{"input":{"prompt":"\\ud800","seed":1}}', JSON),
            ('{"input":[1],"id":"same"}', JSON),
            ('{"input":{},"webhook_events_filter":["x"]}', JSON),
            ("junk", JSON),
            ('{"id":7}', JSON),
        ):
            one, many = (
                requests.post(f"{url}/predictions", body.encode(), headers=headers, timeout=PATIENCE)
                for url in (single.url, sleepers.url)
            )
            assert one.status_code == many.status_code
            assert without_time(one) == without_time(many)
            assert one.headers["Content-Type"] == many.headers["Content-Type"]
            time.sleep(0.1)  # the single server is busy until a moment after its answer
    assert set(sleepers.health()) >= {"status", "setup", "version"}


def without_time(response: requests.Response) -> str:
    """Without the id either, and the column of a mistake in the JSON, into which the front has put more."""
    text = re.sub(r"pred_\w+|column \d+", "", response.text)
    return re.sub(r'"predict_time":[\d.e-]+|"server":\d+|"swapped":\d', "", text)


def test_no_request_meets_a_409_and_all_are_answered_once(sleepers: Fleet, pool: ThreadPoolExecutor) -> None:
    prompts = [str(turn) for turn in range(40)]
    answers = []
    for batch in range(0, 40, 8):  # two at workers, six in the queue
        jobs = [pool.submit(partial(sleepers, prompt=prompt, seconds=0.1)) for prompt in prompts[batch : batch + 8]]
        answers += [job.result() for job in jobs]
    assert [answer["output"].split()[0] for answer in answers] == prompts
    shares = Counter(answer["metrics"]["server"] for answer in answers)
    assert len(shares) == 2
    assert min(shares.values()) >= 12


def test_beyond_the_longest_queue_the_answer_is_503(sleepers: Fleet, pool: ThreadPoolExecutor) -> None:
    running = busy(sleepers, pool)
    waiting = [pool.submit(partial(sleepers, prompt="waits")) for _ in range(6)]
    eventually(lambda: sleepers.health()["queue"]["waiting"] == 6)
    assert sleepers.health()["status"] == "BUSY"
    for prefer in (None, "respond-async"):
        refused = sleepers.post({"input": {"prompt": "one too many"}}, prefer)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "queue is full" in refused.json()["error"]
    assert all(job.result()["status"] == "succeeded" for job in running + waiting)
    assert sleepers.health()["status"] == "READY"


def test_beyond_the_longest_wait_the_answer_is_503(
    sleepers: Fleet, pool: ThreadPoolExecutor, webhooks: tuple[str, list[Received]]
) -> None:
    url, received = webhooks
    running = busy(sleepers, pool, seconds=7.5)
    late = sleepers.post({"id": "late", "input": {}, "webhook": url})
    assert (late.status_code, "Retry-After" in late.headers) == (503, True)
    assert "in time" in late.json()["error"]
    assert [message.json()["status"] for message in eventually(lambda: received)] == ["failed"]
    assert [job.result()["status"] for job in running] == ["succeeded"] * 2


def test_a_client_that_hangs_up_frees_its_place(sleepers: Fleet, pool: ThreadPoolExecutor) -> None:
    running = busy(sleepers, pool)
    waiting = [hang_up_later(sleepers, prompt="waits") for _ in range(3)]
    eventually(lambda: sleepers.health()["queue"]["waiting"] == 3)
    for connection in waiting:
        connection.close()
    eventually(lambda: sleepers.health()["queue"]["waiting"] == 0)
    assert all(job.result()["status"] == "succeeded" for job in running)
    long = [hang_up_later(sleepers, prompt="runs", seconds=100) for _ in range(2)]
    eventually(lambda: sleepers.health()["queue"]["running"] == 2)
    for connection in long:
        connection.close()
    assert sleepers(prompt="next")["status"] == "succeeded"


def hang_up_later(fleet: Fleet, **inputs: Any) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(fleet.url.rsplit(":", 1)[1])))
    body = json.dumps({"input": inputs})
    head = "POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
    connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_the_same_id_is_one_prediction(sleepers: Fleet, pool: ThreadPoolExecutor) -> None:
    first = pool.submit(sleepers.put, "once", prompt="first", seconds=2)
    eventually(lambda: sum(sleepers.health()["queue"].values()))
    again = eventually(lambda: (state := sleepers.put("once", prompt="first", seconds=2)).status_code == 202 and state)
    assert again.json()["input"] == {"prompt": "first", "seconds": 2}
    eventually(lambda: sleepers.put("once", prompt="first", seconds=2).json()["status"] == "processing")
    assert first.result().json()["status"] == "succeeded"
    running = busy(sleepers, pool, 1)
    queued = pool.submit(sleepers.put, "queued", prompt="later")
    eventually(lambda: sleepers.health()["queue"]["waiting"] == 1)
    assert sleepers.put("queued", prompt="later").json()["status"] == "starting"
    assert queued.result().json()["output"].startswith("later")
    assert [job.result()["status"] for job in running] == ["succeeded"] * 2


def test_canceling_reaches_the_queue_and_the_worker(
    sleepers: Fleet, pool: ThreadPoolExecutor, webhooks: tuple[str, list[Received]]
) -> None:
    url, received = webhooks
    jobs = [pool.submit(sleepers.put, f"run{turn}", seconds=100) for turn in range(2)]
    eventually(lambda: sleepers.health()["queue"]["running"] == 2)
    body = {"id": "queued", "input": {}, "webhook": url, "webhook_events_filter": ["completed"]}
    queued = pool.submit(sleepers.post, body)
    eventually(lambda: sleepers.health()["queue"]["waiting"] == 1)
    assert [sleepers.cancel(id_) for id_ in ("queued", "run0", "run1", "nothing")] == [200, 200, 200, 404]
    assert [job.result().json()["status"] for job in [queued, *jobs]] == ["canceled"] * 3
    assert [message.json() for message in eventually(lambda: received)] == [queued.result().json()]
    assert sleepers(prompt="next")["status"] == "succeeded"


def test_a_prediction_is_canceled_in_its_first_moment(sleepers: Fleet, pool: ThreadPoolExecutor) -> None:
    for turn in range(8):
        job = pool.submit(sleepers.put, f"moment{turn}", seconds=100)
        eventually(lambda turn=turn: sleepers.cancel(f"moment{turn}") == 200)
        assert job.result().json()["status"] == "canceled"


def test_an_asynchronous_prediction_tells_its_webhook(sleepers: Fleet, webhooks: tuple[str, list[Received]]) -> None:
    url, received = webhooks
    answer = sleepers.post(
        {"id": "a", "input": {"prompt": "x", "seed": 1, "seconds": 0.2}, "webhook": url}, prefer="respond-async"
    )
    assert (answer.status_code, answer.json()) == (202, {"id": "a", "status": "starting"})
    done = eventually(lambda: [event.json() for event in received if event.json()["status"] == "succeeded"])
    assert [event["output"] for event in done] == ["x 1"]
    assert "processing" in [event.json()["status"] for event in received]


@pytest.mark.parametrize("id_", ["a" * 65, "..", "%2ftmp%2fx", "..%2fx", "a b"])
def test_an_id_that_could_be_a_path_is_refused(sleepers: Fleet, id_: str) -> None:
    request = requests.Request("PUT", "http://x").prepare()
    request.url = f"{sleepers.url}/predictions/{id_}"
    request.body, request.headers["Content-Length"] = b'{"input":{}}', "12"
    assert requests.Session().send(request, timeout=PATIENCE).status_code in (404, 405, 422)
    assert sleepers.post({"id": id_, "input": {}}).status_code == 422


def test_a_body_of_75_mb_passes(sleepers: Fleet) -> None:
    answer = sleepers(prompt="x" * 75_000_000, seed=1)
    assert answer["output"] == "x" * 75_000_000 + " 1"


@pytest.mark.parametrize("process", ["predictor", "server", "worker", "nobody"])
def test_a_process_that_dies_or_stands_still_costs_nothing(
    sleepers: Fleet, pool: ThreadPoolExecutor, tmp_path: Path, process: str
) -> None:
    """The prediction that it was at is made by another, with the same seed; Ray starts a new worker."""
    others = [pool.submit(partial(sleepers, prompt=str(turn), seconds=0.2)) for turn in range(4)]
    answer = sleepers(prompt="tried twice", kill=process, once=str(tmp_path / "killed"))
    assert answer["output"].startswith("tried twice"), answer
    assert [job.result()["output"].split()[0] for job in others] == ["0", "1", "2", "3"]
    eventually(lambda: len(servers(sleepers, pool)) == 2)


def servers(fleet: Fleet, pool: ThreadPoolExecutor) -> set[int]:
    """Those that two predictions at once run on; fewer while workers start."""
    jobs = [pool.submit(fleet.post, {"input": {"seconds": 0.5}}) for _ in range(2)]
    return {job.result().json()["metrics"]["server"] for job in jobs if job.result().status_code == 200}


def test_a_prediction_that_kills_every_worker_fails_with_one_sentence(
    sleepers: Fleet, pool: ThreadPoolExecutor
) -> None:
    answer = sleepers(kill="server")
    assert answer["status"] == "failed"
    assert "lost" in answer["error"]
    eventually(lambda: len(servers(sleepers, pool)) == 2)


def test_metrics_tell_of_queue_swaps_and_workers(sleepers: Fleet) -> None:
    for lora in "aabb":
        sleepers(replicate_weights=lora)
    eventually(lambda: sleepers.metrics()["fleet_swaps_total"] >= 2)
    names = {"fleet_queue_length", "fleet_wait_seconds_count", "fleet_busy_seconds_total", "fleet_predictions_total"}
    assert names <= set(sleepers.metrics())


def test_a_restart_loses_no_request(sleepers: Fleet, pool: ThreadPoolExecutor) -> None:
    before = servers(sleepers, pool)
    sleepers.process.send_signal(signal.SIGHUP)
    answers = []
    while not any("All workers are new" in line for line in sleepers.log):
        answers.append(sleepers(prompt="during", seconds=0.1))
    assert all(answer["status"] == "succeeded" for answer in answers)
    assert not before & eventually(lambda: len(found := servers(sleepers, pool)) == 2 and found)


def test_it_grows_and_shrinks_with_the_queue(pool: ThreadPoolExecutor) -> None:
    options = ("--workers", "1", "--min", "1", "--max", "2", "--scale-up-after", "1", "--scale-down-after", "1")
    with started(*SLEEPY, *options, *SHORT) as fleet:
        jobs = [pool.submit(partial(fleet, seconds=5)) for _ in range(6)]
        eventually(lambda: fleet.health()["workers"]["running"] == 2)
        assert [job.result()["status"] for job in jobs] == ["succeeded"] * 6
        eventually(lambda: fleet.health()["workers"]["running"] == 1)
        assert fleet(prompt="still there")["status"] == "succeeded"


def test_a_setup_that_fails_is_said_once() -> None:
    with started(*SLEEPY, ready=False, SLEEPER_SETUP_ERROR="The weights are bad.") as fleet:
        assert fleet.process.wait(PATIENCE) == 1
        eventually(lambda: any("fleet error" in line for line in fleet.log))
        assert [line for line in fleet.log if line.startswith("fleet error")] == [
            "fleet error: RuntimeError: The weights are bad.\n"
        ]


@dataclass
class Shelf:
    """A server of LoRAs on this machine."""

    url: str
    sent: list[str] = field(default_factory=list)  # the paths whose files it has sent, to whoever had none


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    class Files(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.5)  # so that both workers want it before one has it
            super().do_GET()

        def log_request(self, code: int | str = "", size: int | str = "") -> None:
            if code == 200:
                found.sent.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=LORAS)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = Shelf(f"http://127.0.0.1:{server.server_port}")
        yield found
        server.shutdown()


@pytest.fixture(scope="module")
def painters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers of the demo model, which do not wait for a better one."""
    cache = str(tmp_path_factory.mktemp("loras"))
    variables = {"OMP_NUM_THREADS": "1", "LORA_ALLOW_PRIVATE_HOSTS": "1", "LORA_CACHE_DIR": cache}
    with started("--workers", "2", "--swap-seconds", "0", **variables) as fleet:
        yield fleet


SMALL = {"prompt": "a red circle", "aspect_ratio": "custom", "width": 256, "height": 256, "output_format": "png"}
QUICK = {**SMALL, "model": "schnell", "num_inference_steps": 2, "seed": 5}


def test_pictures_and_refusals_are_those_of_a_single_server(painters: Fleet, pool: ThreadPoolExecutor) -> None:
    with cog_server({"OMP_NUM_THREADS": "1"}, project=Project(ROOT, PYTHON)) as single:
        for options in ({}, {"go_fast": True, "aspect_ratio": "1:1", "megapixels": "0.25"}):
            alone = single.predict(QUICK | options)
            assert alone["status"] == "succeeded", alone
            both = [pool.submit(partial(painters, **QUICK | options)) for _ in range(2)]
            assert [job.result()["output"] for job in both] == [alone["output"]] * 2
        for inputs in ({}, {"prompt": 1}, QUICK | {"width": 9}, QUICK | {"model": "pro"}, QUICK | {"seed": "x"}):
            one = requests.post(f"{single.url}/predictions", json={"input": inputs}, timeout=PATIENCE)
            many = painters.post({"input": inputs})
            assert (many.status_code, many.text) == (one.status_code, one.text) == (422, one.text)
        wrong = QUICK | {"extra_lora": "no such thing"}
        assert painters(**wrong)["error"] == single.predict(wrong)["error"]
    eventually(lambda: any("schnell, txt2img" in line for line in painters.log))


def test_a_lora_is_downloaded_once_and_its_requests_go_where_it_is(
    painters: Fleet, shelf: Shelf, pool: ThreadPoolExecutor
) -> None:
    def draw(lora: str) -> str:
        answer = painters(**QUICK, replicate_weights=f"{shelf.url}/{lora}.safetensors")
        assert answer["status"] == "succeeded", answer
        return str(answer["metrics"]["lora_cache"])

    together = [pool.submit(draw, "sunset") for _ in range(2)]
    assert {job.result() for job in together} <= {"download", "disk"}
    assert shelf.sent == ["/sunset.safetensors"]
    assert draw("pastel") == "download"
    assert [draw(lora) for lora in ("sunset", "pastel", "sunset", "pastel")] == ["memory"] * 4
    eventually(lambda: painters.metrics()["fleet_lora_cache_total"] >= 7)


def test_a_machine_that_dies_costs_nothing(pool: ThreadPoolExecutor) -> None:
    """Two nodes of Ray on this machine, with a worker each; the front is on the one that stays."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    cluster = Cluster(initialize_head=True, head_node_args={"temp_dir": folder, "include_dashboard": False})
    try:
        other = cluster.add_node(env_vars={"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port())})
        with started(*SLEEPY, *SHORT, "--workers", "2", "--address", cluster.address) as fleet:
            assert len(servers(fleet, pool)) == 2
            jobs = [pool.submit(partial(fleet, prompt=str(turn), seconds=1)) for turn in range(6)]
            eventually(lambda: fleet.health()["queue"]["running"] == 2)
            cluster.remove_node(other, allow_graceful=False)
            assert [job.result()["output"].split()[0] for job in jobs] == ["0", "1", "2", "3", "4", "5"]
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_docs_name_every_option_and_its_default() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (.+?) \|", (ROOT / "docs" / "fleet.md").read_text(), re.MULTILINE)
    parser = _parser()
    assert [name for name, _ in rows] == re.findall(r"^  (--[a-z-]+)", parser.format_help(), re.MULTILINE)
    numbers = {name: float(cell) for name, cell in rows if cell.isdigit()}
    assert len(numbers) == 7
    assert numbers == {name: parser.get_default(name[2:].replace("-", "_")) for name in numbers}


def test_the_file_for_kubernetes_is_an_application_of_this_fleet() -> None:
    spec = yaml.safe_load((ROOT / "fleet" / "rayservice.yaml").read_text())["spec"]
    (application,) = ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"])).applications
    assert (application.name, application.import_path, application.route_prefix) == (APP, "fleet.app:build", "/")
    assert set(application.args) <= set(Options.model_fields)
    assert [deployment.name for deployment in application.deployments] == [WORKER]
    assert f"ray[serve]=={spec['rayClusterConfig']['rayVersion']}" in (ROOT / "requirements-fleet.txt").read_text()
