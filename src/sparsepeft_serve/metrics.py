"""What the service has done, for Prometheus: by the names of text-embeddings-inference where they mean the same."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sparsepeft.inference import Prediction

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

        self._requests = counter("te_request_count", "Requests.", ["method"])
        self._success = counter("te_request_success", "Requests that were answered.", ["method"])
        self._failure = counter("te_request_failure", "Requests that were not.", ["err"])
        self._duration = histogram("te_request_duration", "Seconds from a request to its answer.", _SECONDS)
        self._queue_duration = histogram("te_request_queue_duration", "Seconds until a batch took it.", _SECONDS)
        self._inference_duration = histogram("te_request_inference_duration", "Seconds of a batch.", _SECONDS)
        self._input_length = histogram("te_request_input_length", "Tokens of an input.", _TOKENS)
        self._batch_size = histogram("te_batch_next_size", "Inputs of a batch.", _ROWS)
        self._queue_size = Gauge("te_queue_size", "Inputs that no batch has yet.", registry=self._registry)
        self._texts = counter("sparsepeft_task_inputs", "Inputs that a task answered.", ["task"])
        self._errors = counter("sparsepeft_task_errors", "Inputs that a task could not answer.", ["task"])

    def asked(self, method: str) -> None:
        """A request came: ``single``, ``batch`` or ``all``."""
        self._requests.labels(method).inc()

    def answered(self, method: str, seconds: float) -> None:
        """It was answered."""
        self._success.labels(method).inc()
        self._duration.observe(seconds)

    def failed(self, kind: str) -> None:
        """It was not, for a reason of this kind."""
        self._failure.labels(kind.lower()).inc()

    def queued(self, seconds: float) -> None:
        """A request's first input got into a batch after so long."""
        self._queue_duration.observe(seconds)

    def computed(self, num_inputs: int, seconds: float) -> None:
        """A batch was computed."""
        self._batch_size.observe(num_inputs)
        self._inference_duration.observe(seconds)

    def predicted(self, task: str, prediction: Prediction) -> None:
        """A task answered an input, or could not."""
        if prediction.error is None:
            self._texts.labels(task).inc()
            self._input_length.observe(prediction.num_tokens)
        else:
            self._errors.labels(task).inc()

    def text(self, num_waiting: int) -> bytes:
        """As Prometheus reads it."""
        self._queue_size.set(num_waiting)
        return generate_latest(self._registry)
