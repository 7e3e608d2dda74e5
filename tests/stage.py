"""The scheduler on a stage. Units run in the test's own thread, on its clock, so what happens between two is
settled."""

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.events import Final, Hint, Message, Partial, Segment, SessionError, SessionStart, Working
from wyoming_qwen_asr.model import scheduler as scheduler_module
from wyoming_qwen_asr.model import session as session_module
from wyoming_qwen_asr.model import vad
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.network import Network
from wyoming_qwen_asr.model.scheduler import Scheduler
from wyoming_qwen_asr.model.session import Pace, Part, Stream

from .conftest import DEMO, load_recordings
from .reference import Offline, floats, offline

SAID = [recording.pcm for recording in load_recordings()]
"""Each begins with 0.3 s of silence and ends with 0.5 s of it."""
LONG = b"".join(SAID)
"""50 s."""
SECOND = 2 * SAMPLE_RATE
"""In bytes."""


@contextmanager
def one_thread() -> Iterator[None]:
    """The demo model is too small for two threads to be worth waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def network() -> Network:
    return Network.load(open_checkpoint(DEMO), torch.device("cpu"), torch.float32)


def detector() -> vad.Detector:
    """Somebody speaks where it is loud: costs nothing, and remembers nothing."""
    return lambda frame: float(np.abs(frame).max() > 0.01)


@contextmanager
def cut_short() -> Iterator[None]:
    """Segments of 3 to 6 s, so that little audio has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vad, "EARLIEST_CUT", 3 * SAMPLE_RATE)
        patch.setattr(vad, "LATEST_CUT", 6 * SAMPLE_RATE)
        for module in (vad, session_module):
            patch.setattr(module, "QUIET_FROM", 4 * SAMPLE_RATE)
        yield


@dataclass(frozen=True)
class Talk:
    """A session's audio and what is known about it."""

    pcm: bytes
    live: bool = True
    language: str | None = None
    hint: Hint = "prefer"
    context: str = ""

    @property
    def start(self) -> SessionStart:
        return SessionStart(SAMPLE_RATE, 2, 1, self.language, self.hint, self.context, live=self.live)


def reference(talk: Talk) -> Offline:
    """What a session has to come to, however it arrives and is scheduled."""
    return _reference(replace(talk, live=True), (vad.EARLIEST_CUT, vad.QUIET_FROM, vad.LATEST_CUT))


@cache
def _reference(talk: Talk, cuts: tuple[int, ...]) -> Offline:
    assert cuts == (vad.EARLIEST_CUT, vad.QUIET_FROM, vad.LATEST_CUT)
    samples = floats(talk.pcm[: len(talk.pcm) // 2 * 2])
    return offline(network(), samples, talk.language, talk.hint, talk.context, detector)


def plain(talk: Talk) -> Final:
    whole = reference(talk)
    return Final(whole.text, whole.language)


@dataclass(frozen=True)
class Unit:
    """Of the network's work. `end`: samples that the step recognises."""

    kind: str
    sessions: list[int]
    exact: bool = field(default=True, compare=False)
    end: int = field(default=0, compare=False)
    began: float = field(default=0.0, compare=False)


class Stage(Executor):
    """A scheduler, and the executor of its units. `cues`: what happens once unit n (from 1) has been decided on."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.scheduler = Scheduler(network(), self, self._emit, pace or Pace(chunk_size_sec=0.5), detector)
        self.log: list[Unit | tuple[int, Message]] = []
        self.cues: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self.units = 0
        self.now = 0.0
        self.cost: Callable[[Unit], float] = lambda _: 0.0
        """Seconds that a unit takes."""
        self.watch: Callable[[], None] = lambda: None
        """After each unit."""
        self.listening: Callable[[int], None] = lambda _: None
        """While a session is listened to."""
        self.saying: Callable[[int, Message], None] = lambda *_: None
        """While something is said."""
        self.fed: dict[int, int] = defaultdict(int)
        """Bytes of each session so far."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    async def _emit(self, message: Message, session: int) -> None:
        self.saying(session, message)
        await asyncio.sleep(0)  # a pipe may be full
        self.log.append((session, message))

    def submit(self, call: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        if call is scheduler_module._unit:
            self.units += 1
            self.log.append(unit := self._describe(args[2]))
            self._cue(self.units)
            self._pass(self.now + self.cost(unit))
        elif isinstance(stream := getattr(call, "__self__", None), Stream):
            self.listening(stream.number)
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        self.watch()
        return future

    def _describe(self, parts: Sequence[Part]) -> Unit:
        step = parts[0].step
        assert step
        return Unit(parts[0].stage, [part.number for part in parts], step.exact, step.end, self.now)

    def _cue(self, unit: int) -> None:
        while (first := min(self.cues, default=unit + 1)) <= unit:
            for action in self.cues.pop(first):
                action()

    def _pass(self, until: float) -> None:
        """Time goes by."""
        while self._events and self._events[0][0] <= until + 1e-9:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    def talk(self, number: int, talk: Talk, at: int = 0) -> None:
        """At unit `at`."""
        self.cues[at].append(lambda: self.say(number, talk))

    def feed(self, number: int, talk: Talk, sizes: Sequence[int], every: int, at: int = 0) -> None:
        """At unit `at` a session begins. Chunks of these sizes [bytes], in turns, come `every` so many units, and when
        there is nothing else to do; so does the end, behind the last of them."""

        def begin() -> None:
            self.scheduler.start(number, talk.start)
            chunk(0, 0)

        def chunk(done: int, index: int) -> None:
            if done >= len(talk.pcm):
                self.scheduler.end(number)
                return
            size = sizes[index % len(sizes)]
            self.hear(number, talk.pcm[done : done + size])
            self.cues[self.units + every].append(lambda: chunk(done + size, index + 1))

        self.cues[at].append(begin)

    def speak(self, number: int, talk: Talk, at: float = 0.0, chunk: int = SECOND // 10) -> None:
        """Somebody speaks from that time on, a second of audio in a second."""
        self.at(at, lambda: self.scheduler.start(number, talk.start))
        for done in range(0, len(talk.pcm), chunk):
            piece = talk.pcm[done : done + chunk]
            come = at + (done + len(piece)) / SECOND
            self.at(come, partial(self.hear, number, piece))
        self.at(at + len(talk.pcm) / SECOND, lambda: self.scheduler.end(number))

    def hear(self, number: int, pcm: bytes) -> None:
        self.fed[number] += len(pcm)
        self.scheduler.audio(number, pcm)

    def say(self, number: int, talk: Talk, *, end: bool = True) -> None:
        """A session begins, and all of it is there, but for its end perhaps."""
        self.scheduler.start(number, talk.start)
        self.hear(number, talk.pcm)
        if end:
            self.scheduler.end(number)

    def cancel(self, number: int, at: int) -> None:
        self.cues[at].append(lambda: self.scheduler.cancel(number))

    def play(self) -> "Stage":
        """Until nothing is left to do. Cues for later units than there are come when the others are done, times come
        sooner then."""
        asyncio.run(self._play())
        return self

    async def _play(self) -> None:
        asyncio.get_running_loop().time = lambda: self.now  # type: ignore[method-assign]
        self._cue(0)
        running = asyncio.create_task(self.scheduler.run())
        news = self.scheduler._news
        while True:
            while news.is_set() or not news._waiters:
                await asyncio.sleep(0)
                if running.done():
                    running.result()
            if self.cues:
                for action in self.cues.pop(min(self.cues)):
                    action()
            elif self._events:
                self._pass(self._events[0][0])
            else:
                break
        running.cancel()
        assert not self.scheduler._streams
        assert not self.scheduler._halt.is_set()
        assert all(not lane.parts and not lane.batch.cache.lengths for lane in self.scheduler._lanes.values())

    def said(self) -> list[tuple[int, Message]]:
        return [entry for entry in self.log if not isinstance(entry, Unit)]

    def ends(self) -> dict[int, list[Message]]:
        """How each session ended."""
        found: dict[int, list[Message]] = defaultdict(list)
        for session, message in self.said():
            if isinstance(message, Final | SessionError):
                found[session].append(message)
        return found

    def computed(self) -> list[Unit]:
        return [entry for entry in self.log if isinstance(entry, Unit)]

    def of(self, number: int) -> list[int]:
        """Which units, counted from 1, were this session's."""
        return [i for i, unit in enumerate(self.computed(), 1) if number in unit.sessions]

    def segments(self, number: int) -> list[Segment]:
        return [message for session, message in self.said() if session == number and isinstance(message, Segment)]

    def partials(self, number: int) -> list[list[Partial]]:
        """Of one segment after another; those of a segment that never ended last."""
        found: list[list[Partial]] = [[]]
        for session, message in self.said():
            if session == number and isinstance(message, Segment):
                found.append([])
            elif session == number and isinstance(message, Partial):
                found[-1].append(message)
        return found


def retractions(stage: Stage, number: int) -> int:
    """Segments whose text does not begin with what was said to be stable."""
    stable = ["".join(shown.stable_delta for shown in each) for each in stage.partials(number)]
    texts = [segment.text for segment in stage.segments(number)]
    return sum(not text.startswith(shown) for text, shown in zip(texts, stable, strict=False))


def check(stage: Stage, talks: dict[int, Talk]) -> None:
    """Each has its text, and nobody else."""
    assert sorted(stage.ends()) == sorted(talks), stage.ends()
    for number, talk in talks.items():
        check_session(stage, number, talk)


def check_session(stage: Stage, number: int, talk: Talk) -> None:
    """It has its text, segment by segment, and only that; its segments are all of its audio."""
    assert stage.ends()[number] == [plain(talk)], (stage.ends()[number], plain(talk))
    said = [message for session, message in stage.said() if session == number and not isinstance(message, Working)]
    assert isinstance(said[-1], Final)
    segments = stage.segments(number)
    expected = [(each.text, each.language) for each in reference(talk).segments]
    assert [(segment.text, segment.language) for segment in segments] == expected, (segments, expected)
    if segments:
        assert segments[0].start == 0
        assert all(a.end == b.start for a, b in pairwise(segments))
    assert sum(segment.end - segment.start for segment in segments) == pytest.approx(len(talk.pcm) // 2 / SAMPLE_RATE)
    assert not stage.partials(number)[-1], "partials of a segment that never ended"
