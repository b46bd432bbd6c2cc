"""What the service has done, for Prometheus: by the names of text-embeddings-inference where they mean the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from sparsepeft.inference import Prediction

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _BareCounter:
    """A counter by its bare name, as text-embeddings-inference has it: prometheus_client's own end in ``_total``."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        self._name, self._text, self._label = name, text, label
        self._counts: dict[str, int] = {}
        registry.register(self)

    def inc(self, value: str) -> None:
        """Count one more with this value of the label."""
        self._counts[value] = self._counts.get(value, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        metric = Metric(self._name, self._text, "unknown")  # of a "counter" the type would be told by the other name
        for value, count in [*self._counts.items()]:
            metric.add_sample(self._name, {self._label: value}, count)
        yield metric


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

        self._requests = _BareCounter("te_request_count", "Requests.", "method", self._registry)
        self._success = _BareCounter("te_request_success", "Requests that were answered.", "method", self._registry)
        self._failure = _BareCounter("te_request_failure", "Requests that were not.", "err", self._registry)
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
        self._requests.inc(method)

    def answered(self, method: str, seconds: float) -> None:
        """It was answered."""
        self._success.inc(method)
        self._duration.observe(seconds)

    def failed(self, kind: str) -> None:
        """It was not, for a reason of this kind."""
        self._failure.inc(kind.lower())

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
