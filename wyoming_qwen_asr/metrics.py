"""What the gateway counts, for `GET /metrics` (Prometheus text format, by prometheus-client).

One object of a gateway, made in gateway.py and handed to whoever counts: no globals.
"""

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 120)


class Metrics:
    """Names as Prometheus asks for them: base units, `_total` for what only grows. Memory, files and CPU time of the
    gateway are `process_*`, as every program's are; those of the model process are `qwen_asr_model_process_*`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"qwen_asr_{name}", text, labels, registry=self._registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"qwen_asr_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)

        self.utterances = counter("utterances", "Sessions that ended, by how: final, error, cancelled", "outcome")
        self.audio_seconds = counter("audio_seconds", "Audio of the sessions that got their final")
        self.steps = counter("steps", "Decodes of speech that was still going on")
        self.drafted_tokens = counter("drafted_tokens", "Tokens of earlier decodes that were read again at once")
        self.accepted_tokens = counter("accepted_tokens", "Those of them that would have been written again")
        self.retractions = counter("retractions", "Sessions whose final does not begin with what was streamed of it")
        self.retracted_characters = counter("retracted_characters", "What was streamed and is not in the final")
        self.refusals = counter("refusals", "Errors told to clients, by code", "code")
        self.gave_way = counter("connections_gave_way", "Silent connections closed in favour of a new one")
        self.faults = counter("faults", "Ends of the model process that nobody asked for, by cause", "cause")
        self.replays = counter("replays", "Sessions given to another model process")
        self.strikes = counter("strikes", "Sessions that were being computed when the model process failed")
        self.loads = counter("loads", "Model processes started")
        self.evictions = counter("evictions", "Model processes ended because nobody spoke")
        self.load_seconds = seconds("load", "From the start of a model process to its readiness")
        self.queue_seconds = seconds("queue", "Until the model process works on a session that could be worked on")
        self.first_partial_seconds = seconds("first_partial", "From the first audio to the first partial")
        self.final_seconds = seconds("final", "From the end of the audio to its final")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when somebody looks."""
        Gauge(f"qwen_asr_{name}", text, registry=self._registry).set_function(value)

    def state(self, states: Iterable[str], value: Callable[[], str]) -> None:
        """1 for the state there is, 0 for the others."""
        gauge = Gauge(
            "qwen_asr_state", "What the model process, or its checkpoint, is doing", ["state"], registry=self._registry
        )
        for each in states:
            gauge.labels(each).set_function(partial(_is, value, each))

    def model_process(self, pid: Callable[[], int | None]) -> None:
        """Measure the process of this number, whenever there is one."""
        ProcessCollector("qwen_asr_model", pid=lambda: pid() or "none", registry=self._registry)

    def text(self) -> bytes:
        """What `GET /metrics` answers."""
        return generate_latest(self._registry)


def _is(value: Callable[[], str], state: str) -> float:
    return float(value() == state)
