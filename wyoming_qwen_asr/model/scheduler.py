"""What the network works on next: one small unit at a time, live speech before files.

A unit is a second of audio listened to, the features of a step, one encoder window, up to 160 rows of a prompt, or one
decode step for all segments that have come so far. After each it is decided anew, so speech that arrives waits for one
unit at most, and a session that is cancelled costs no more than one.

- While somebody speaks there are steps (see session.Part.due): each recognises the segment as far as it has come.
  When the voice stops, the segment is recognised ahead of the end of the audio; that stands if no more speech comes.
- What is asked for goes before what may yet change: a segment that is complete before the steps of those who speak. A
  step that is not worth its end any more is left, in the middle of a unit if it is the session's alone.
- Live sessions go first, always: a file is worked on when no live session has work to do. Each kind has a batch of its
  own, so that files neither slow a step of live speech down nor take its slots.
- Within a kind, a place in the batch goes to the session that has the fewest, then to the one that had its turn longest
  ago. Segments under way take turns: one unit for the oldest that is still being read, one decode step for all others.
- The segments of a long session are worked on together once it is known which language the later ones are to expect.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from itertools import count
from typing import Any, TypeVar

from ..audio import SAMPLE_RATE
from ..errors import AsrError
from ..events import Final, Hint, Message, Partial, Segment, SessionError, SessionStart, Working
from ..text import join
from .batch import Batch, fit_together
from .job import Job
from .network import Abandoned, Network
from .session import Pace, Part, Stream
from .vad import Detector, new_detector

SLOTS = 8
"""Steps of one kind under way: more gain little on a GPU and make each of them wait on a CPU."""

LISTEN_FRAMES = 32
"""Looked at by the voice activity detector at once: a second of audio."""

WORKING_SECONDS = 1.0
"""Between two signs of progress while the same sessions are computed."""

_T = TypeVar("_T")

_LOGGER = logging.getLogger(__name__)

Emit = Callable[[Message, int], Awaitable[None]]
"""Has to return only when the message is out: what is computed next may be the end of the process."""


class _Lane:
    """The steps under way, oldest first, of the sessions of one kind."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.batch = Batch(network, SLOTS)
        self.parts: list[Part] = []
        self.suspects: list[Part] = []
        """A unit of these failed: each is tried alone, to find out whose fault it was."""
        self._decoded = False  # in the last unit

    def leave(self, part: Part) -> None:
        """Its step is of no use any more."""
        part.abandon()
        self.parts.remove(part)

    def next(self) -> list[Part]:
        """Whose turn it is: one part that is being read, or those that are decoded together."""
        self.suspects = [part for part in self.suspects if part in self.parts]
        if self.suspects:
            return [self.suspects.pop(0)]
        wanted = [part for part in self.parts if part.step and part.step.exact] or self.parts
        decoding = [part for part in wanted if part.stage == "decode"]
        reading = next((part for part in wanted if part.stage != "decode"), None)
        if reading and reading.stage == "prefill" and not self._fits(reading):
            reading = None  # until others have left
        if reading and (self._decoded or not decoding):
            self._decoded = False
            return [reading]
        self._decoded = True
        return decoding

    def _fits(self, reading: Part) -> bool:
        """Whether there is room for its step beside the others. One that stands takes that of those that do not."""
        using = [job for job in self.batch.jobs if not job.resting]
        others = [part for part in self.parts if part is not reading and part.job in using]
        passing = [part for part in others if part.step and not part.step.exact]
        while not fit_together([part.job for part in (reading, *others) if part.job]):
            if not (reading.step and reading.step.exact and passing):
                return False
            others.remove(passing[-1])
            self.leave(passing.pop())
        return True

    def compute(self, parts: Sequence[Part], start: SessionStart, hint: Hint) -> None:
        """One unit for what `next` gave; start and hint are those of its first. Raises Abandoned."""
        part = parts[0]
        job = part.job = part.job or self.network.open(start.context)
        match part.stage:
            case "hear":
                assert part.step
                end, exact = part.step.end, part.step.exact
                self.network.hear(job, part.audio[part.fed : end], end, part.step.language, hint, exact)
                part.fed, part.begun = max(part.fed, end), True
            case "encode":
                self.network.encode(job)
            case "prefill":
                self.batch.prefill(job)
            case "decode":
                self.batch.decode([part.job for part in parts if part.job])


class Scheduler:
    """`start`, `audio`, `end`, `cancel` take what the gateway says; `run` answers through `emit`. `compute` has one
    thread, for the network alone."""

    def __init__(
        self,
        network: Network,
        compute: Executor,
        emit: Emit,
        pace: Pace | None = None,
        detector: Callable[[], Detector] = new_detector,
    ) -> None:
        self._network, self._compute, self._emit, self._detector = network, compute, emit, detector
        self._pace = pace or Pace()
        self._streams: dict[int, Stream] = {}
        self._lanes = {True: _Lane(network), False: _Lane(network)}  # live first
        self._turns = count()
        self._news = asyncio.Event()
        self._working: list[int] = []  # sessions, as last said
        self._said_at = 0.0
        self._unit: list[Part] = []  # what the other thread computes
        self._halt = threading.Event()  # it is not worth its end
        network.check = self._check

    def start(self, number: int, message: SessionStart) -> None:
        stream = Stream(number, message, self._network.tokenizer.decode, self._pace, self._detector)
        stream.turn = next(self._turns)
        self._streams[number] = stream

    def audio(self, number: int, pcm: bytes) -> None:
        if stream := self._streams.get(number):
            stream.arrive(pcm)
            self._news.set()

    def end(self, number: int) -> None:
        if stream := self._streams.get(number):
            stream.end()
            self._news.set()
            self._leave_unit(number, exact=False)

    def cancel(self, number: int) -> None:
        if self._streams.pop(number, None):
            for lane in self._lanes.values():
                lane.parts = [part for part in lane.parts if part.number != number]
            self._news.set()
            self._leave_unit(number, exact=True)

    def _leave_unit(self, number: int, *, exact: bool) -> None:
        """Stop the unit that is computed for this session alone, between two layers. An exact step may be what the
        session needs at its end."""
        if len(self._unit) == 1 and self._unit[0].number == number:
            step = self._unit[0].step
            if exact or (step and not step.exact):
                self._halt.set()

    def _check(self) -> None:
        if self._halt.is_set():
            raise Abandoned

    async def run(self) -> None:
        """Recognise for ever."""
        while True:
            self._news.clear()
            await self._finish()
            for live, lane in self._lanes.items():
                listened = await self._listen(live)
                if listened and not live and self._news.is_set():
                    break  # somebody may have begun to speak
                self._admit(lane, live)
                if parts := lane.next():
                    await self._work(lane, parts)
                if parts or listened:
                    break
            else:
                if any(lane.batch.jobs for lane in self._lanes.values()):
                    await self._in_thread(_leave, self._jobs())
                await self._say_working([])
                await self._news.wait()

    async def _listen(self, live: bool) -> bool:
        """One unit of listening, for the session of a kind that has waited longest for it; whether there was one."""
        waiting = [stream for stream in self._streams.values() if stream.start.live == live and stream.unheard]
        if not waiting:
            return False
        stream = min(waiting, key=lambda each: each.listened)
        stream.listened = next(self._turns)
        found = await self._in_thread(stream.listen, *stream.take(), LISTEN_FRAMES)
        if stream.number in self._streams:
            stream.sort(found)
            for part in stream.parts:
                if part.outdated:
                    self._lanes[live].leave(part)
            await self._deliver(stream)
        return True

    def _admit(self, lane: _Lane, live: bool) -> None:
        """Fill the free places of a kind. A step that stands takes the place of one that does not, if need be."""
        now = asyncio.get_running_loop().time()
        while True:
            streams = [stream for stream in self._streams.values() if stream.start.live == live]
            others = len(streams) < len(self._streams)
            due = [(stream, *found) for stream in streams if (found := stream.next(now, rest=others))]
            if not due:
                return
            under_way = Counter(part.number for part in lane.parts)
            stream, part, step = min(due, key=lambda each: (not each[2].exact, under_way[each[0].number], each[0].turn))
            if len(lane.parts) >= SLOTS:
                passing = [each for each in lane.parts if each.step and not each.step.exact]
                if not (step.exact and passing):
                    return
                lane.leave(passing[-1])
            stream.turn = next(self._turns)
            part.begin(step)
            lane.parts.append(part)

    async def _work(self, lane: _Lane, parts: list[Part]) -> None:
        await self._say_working(sorted({part.number for part in parts}))
        parts = [part for part in parts if part in lane.parts]  # meanwhile, sessions may have been cancelled
        if not parts:
            return
        stream = self._streams[parts[0].number]
        self._unit = parts
        try:
            await self._in_thread(_unit, self._jobs(), lane, parts, stream.start, stream.hint)
        except Abandoned:
            if parts[0] in lane.parts:  # or its session was cancelled
                lane.leave(parts[0])
            return
        except Exception as error:
            # A GPU that is broken for good fails here, too: that ends the process, and the next one gets the sessions.
            await self._in_thread(lane.network.wait)
            if len(parts) > 1:
                lane.suspects = list(parts)
            else:
                await self._fail(parts[0], error)
            return
        finally:
            self._unit = []
            self._halt.clear()
        for part in parts:
            if part in lane.parts and part.job and part.job.resting:  # its session may have been cancelled
                lane.parts.remove(part)
                await self._answered(part, part.job)

    async def _answered(self, part: Part, job: Job) -> None:
        """A step has come to its answer."""
        part.finish(job.result, asyncio.get_running_loop().time(), self._pace)
        stream = self._streams[part.number]
        if not part.closed and (shown := part.show(self._pace)):
            await self._emit(Partial(*shown), part.number)
        await self._deliver(stream)

    def _jobs(self) -> "_Jobs":
        """Of each kind, those that have a step under way or may have another."""
        streams = self._streams.values()
        return [
            (
                lane,
                [part.job for s in streams if s.start.live == live for part in s.parts if part.job and not part.done],
            )
            for live, lane in self._lanes.items()
        ]

    async def _in_thread(self, call: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, call, *args)

    async def _say_working(self, sessions: list[int]) -> None:
        """Before the unit: should it be the death of the process, it is known whose it was."""
        now = asyncio.get_running_loop().time()
        if sessions != self._working or (sessions and now - self._said_at >= WORKING_SECONDS):
            self._working, self._said_at = sessions, now
            await self._emit(Working(sessions), 0)

    async def _fail(self, part: Part, error: Exception) -> None:
        if part.number not in self._streams:
            return
        if not isinstance(error, AsrError):
            seconds = len(part.audio) / SAMPLE_RATE
            _LOGGER.error("Session %d: recognising %.1f s of audio failed", part.number, seconds, exc_info=error)
            error = AsrError("the model failed on this audio")
        self.cancel(part.number)
        await self._emit(SessionError(error.code, str(error)), part.number)

    async def _deliver(self, stream: Stream) -> None:
        """The segments of a session that are done, in their order."""
        while stream.number in self._streams and stream.parts and stream.parts[0].done:
            part, number = stream.parts.popleft(), stream.number
            result = part.result
            if result.looped or result.truncated:
                _LOGGER.warning("Session %d: the model %s", number, "repeated itself" if result.looped else "ran on")
            begin = stream.start.offset + stream.done / SAMPLE_RATE
            stream.done += part.length or 0
            end = stream.start.offset + stream.done / SAMPLE_RATE
            stream.language = stream.language or result.language
            if result.text:
                stream.texts.append(result.text)
            await self._emit(Segment(result.text, result.language, begin, end, part.steps, *part.counts), number)

    async def _finish(self) -> None:
        """The finals of the sessions that are over."""
        for number, stream in list(self._streams.items()):
            if stream.over and number in self._streams:  # it may be cancelled while another one's is said
                self.cancel(number)
                await self._emit(Final(join(stream.texts), stream.language), number)


_Jobs = list[tuple[_Lane, list[Job]]]
"""What is under way, as it was when the other thread was given work."""


def _leave(jobs: _Jobs) -> None:
    """The others are done or cancelled: their slots are free."""
    for lane, wanted in jobs:
        lane.batch.retain(wanted)


def _unit(jobs: _Jobs, lane: _Lane, parts: list[Part], start: SessionStart, hint: Hint) -> None:
    _leave(jobs)
    lane.compute(parts, start, hint)
