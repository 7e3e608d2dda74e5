"""What one session was like: a line of the log at its end, and figures for `GET /metrics`.

A stopwatch that the session tells what happens; times are seconds of a clock that only goes forward.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..events import Partial, Result, Segment
from ..metrics import Metrics


@dataclass
class Record:
    """`str` of it is the line: key=value, seconds with milliseconds, `-` for what did not happen."""

    number: int
    client: str
    """Where the audio came from: "wyoming" or "http"."""
    clock: Callable[[], float] = time.monotonic
    audio: float = 0.0
    """Seconds of it."""
    steps: int = 0
    """Decodes of segments while they were spoken; with the four below as the segments say."""
    drafted: int = 0
    accepted: int = 0
    windows: int = 0
    rows: int = 0
    replays: int = 0
    retracted: int = 0
    """Characters of stable text that the final does not begin with. It must be 0."""
    outcome: str = "cancelled"
    """Until it ends: "final", or the code of an error."""

    _first_audio: float | None = None
    _ended: float | None = None
    _first_work: float | None = None
    _first_partial: float | None = None
    _final: float | None = None
    _load: float = 0.0
    _loads_since: float | None = None
    _compute: float = 0.0
    _works_since: float | None = None

    def heard(self, seconds: float) -> None:
        """More audio has come."""
        if self._first_audio is None:
            self._first_audio = self.clock()
        self.audio += seconds

    def ended(self) -> None:
        """No more audio comes."""
        self._ended = self.clock()

    def loading(self, so: bool) -> None:
        """Whether there is no model that could work on this session."""
        now = self.clock()
        if self._loads_since is not None:
            self._load += now - self._loads_since
        self._loads_since = now if so else None

    def working(self, here: bool) -> None:
        """The model process works on something: this session, or others."""
        now = self.clock()
        if self._works_since is not None:
            self._compute += now - self._works_since
        self._works_since = now if here else None
        if here and self._first_work is None:
            self._first_work = now

    def replayed(self) -> None:
        """The model process is gone; the next one has to load first."""
        self.working(False)
        self.loading(True)
        self.replays += 1

    def segment(self, segment: Segment) -> None:
        """The text of some audio is there."""
        self.steps += segment.steps
        self.drafted += segment.drafted
        self.accepted += segment.accepted
        self.windows += segment.windows
        self.rows += segment.rows

    def emitted(self, result: Result) -> None:
        """The client may see this."""
        words = isinstance(result, Partial) and (result.stable_delta or result.tail)
        if words and self._first_partial is None:
            self._first_partial = self.clock()

    def finished(self, retracted: int) -> None:
        """The final is there."""
        self.working(False)
        self.loading(False)
        self._final = self.clock()
        self.retracted = retracted
        self.outcome = "final"

    def failed(self, code: str) -> None:
        self.working(False)
        self.loading(False)
        self.outcome = code

    @property
    def first_partial_latency(self) -> float | None:
        """From the first audio."""
        return _between(self._first_audio, self._first_partial)

    @property
    def final_latency(self) -> float | None:
        """From the end of the audio."""
        return _between(self._ended, self._final)

    @property
    def queue(self) -> float | None:
        """What the model process let it wait: until it first worked on it, from the end of the audio, or from the
        first audio when it began before that end."""
        if self._first_work is not None and self._ended is not None and self._ended <= self._first_work:
            return _between(self._ended, self._first_work)
        return _between(self._first_audio, self._first_work)

    @property
    def rtf(self) -> float | None:
        """Compute ÷ audio. Sessions computed together each count the whole time."""
        return self._compute / self.audio if self.audio and self._first_work is not None else None

    @property
    def acceptance(self) -> float | None:
        """Of the tokens that were drafted."""
        return self.accepted / self.drafted if self.drafted else None

    def count(self, metrics: Metrics) -> None:
        """Into the figures, once, at the end."""
        metrics.utterances.labels(self.outcome).inc()
        if self.outcome == "final":
            metrics.audio_seconds.inc(self.audio)
        metrics.steps.inc(self.steps)
        metrics.drafted_tokens.inc(self.drafted)
        metrics.accepted_tokens.inc(self.accepted)
        metrics.retracted_characters.inc(self.retracted)
        metrics.retractions.inc(self.retracted > 0)
        for histogram, value in (
            (metrics.first_partial_seconds, self.first_partial_latency),
            (metrics.final_seconds, self.final_latency),
            (metrics.queue_seconds, self.queue),
        ):
            if value is not None:
                histogram.observe(value)

    def __str__(self) -> str:
        return (
            f"utterance id={self.number} client={self.client or '-'} audio={self.audio:.3f} "
            f"queue={_shown(self.queue)} load={self._load:.3f} first_partial={_shown(self.first_partial_latency)} "
            f"final={_shown(self.final_latency)} rtf={_shown(self.rtf)} steps={self.steps} "
            f"acceptance={_shown(self.acceptance, 2)} windows={self.windows} rows={self.rows} "
            f"replays={self.replays} retracted={self.retracted} outcome={self.outcome}"
        )


def _between(begin: float | None, end: float | None) -> float | None:
    return end - begin if begin is not None and end is not None else None


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
