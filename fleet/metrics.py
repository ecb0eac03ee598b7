"""What the fleet counts, for Prometheus at the port of each Ray node that exports metrics."""

from ray.util.metrics import Counter, Gauge, Histogram

WORKER = ("worker",)  # the tag
WAIT_BOUNDARIES = [0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]  # seconds


class QueueMetrics:
    """Counted where predictions get their workers."""

    def __init__(self) -> None:
        self._queue = Gauge("fleet_queue_length", "Predictions that wait for a worker.")
        self._swaps = Counter("fleet_swaps", "Predictions for which a worker had to merge other LoRAs.", WORKER)
        self._model_changes = Counter("fleet_model_changes", "Those on another model or precision.", WORKER)

    def queue(self, length: int) -> None:
        """So many wait now."""
        self._queue.set(length)

    def begun(self, worker: str, moves: int) -> None:
        """`moves` as `dispatch.Worker.moves` says."""
        if moves >= 2:
            self._swaps.inc(1.0, {"worker": worker})
        if moves % 2:
            self._model_changes.inc(1.0, {"worker": worker})


class FrontMetrics:
    """Counted where predictions come and go."""

    def __init__(self) -> None:
        self._wait = Histogram("fleet_wait_seconds", "From a prediction's arrival to its worker.", WAIT_BOUNDARIES)
        self._predictions = Counter("fleet_predictions", "Predictions that a worker has answered.", WORKER)
        self._busy = Counter("fleet_busy_seconds", "Time at predictions: its rate is a worker's busy share.", WORKER)
        self._retries = Counter("fleet_retries", "Predictions whose worker was lost.")
        self._refused = Counter("fleet_refused", "Predictions refused because of the queue's length or the wait.")

    def ended(self, worker: str, waited: float, seconds: float) -> None:
        """A prediction waited so long for the worker, which took so long for it."""
        self._wait.observe(waited)
        self._predictions.inc(1.0, {"worker": worker})
        self._busy.inc(max(seconds, 1e-6), {"worker": worker})  # Ray takes no 0

    def retried(self) -> None:
        """A prediction's worker was lost."""
        self._retries.inc()

    def refused(self) -> None:
        """A prediction was answered with 503."""
        self._refused.inc()


class WorkerMetrics:
    """Counted where the answers are."""

    def __init__(self, worker: str) -> None:
        self._lora_cache = Counter(
            "fleet_lora_cache", "Predictions by where their LoRAs came from.", ("worker", "source")
        ).set_default_tags({"worker": worker})

    def lora_cache(self, source: str) -> None:
        """`source`: memory, disk, download or none, as the metric `lora_cache` of a prediction says."""
        self._lora_cache.inc(1.0, {"source": source})
