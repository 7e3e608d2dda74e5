"""What the network works on next: one small unit at a time, live speech before files.

A unit is the features of a piece, one encoder window, up to 128 rows of a prompt, or one decode step for all pieces
that have come so far. After each it is decided anew, so speech that arrives waits for one unit at most, and a session
that is cancelled costs no more than one.

- Live sessions go first, always: a file is worked on when no live session has work to do. Each kind has a batch of its
  own, so that files neither slow a step of live speech down nor take its slots.
- Within a kind, a place in the batch goes to the session that has the fewest, then to the one that had its turn longest
  ago. Pieces under way take turns: one unit for the oldest that is still being read, one decode step for all others.
- The pieces of a long session are worked on together once it is known which language the later ones are to expect.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from ..audio import SAMPLE_RATE, AudioFormat
from ..errors import AsrError
from ..events import Final, Hint, Message, Segment, SessionError, SessionStart, Working
from ..text import join
from .network import Batch, Job, Network, Piece, Recognition, fit_together
from .resample import Resampler, Samples
from .vad import LATEST_CUT, cut_point

SLOTS = 8
"""Pieces of one kind under way: more gain little on a GPU and make each of them wait on a CPU."""

WORKING_SECONDS = 1.0
"""Between two signs of progress while the same sessions are computed."""

_LOGGER = logging.getLogger(__name__)

Emit = Callable[[Message, int], Awaitable[None]]
"""Has to return only when the message is out: what is computed next may be the end of the process."""


@dataclass(eq=False)
class _Part:
    """A piece of a session, under way."""

    number: int
    piece: Piece
    job: Job | None = None
    result: Recognition | None = None

    @property
    def decoding(self) -> bool:
        return self.job is not None and self.job.decoding


@dataclass
class _Stream:
    """One session, as far as it has come."""

    start: SessionStart
    resampler: Resampler
    chunks: list[Samples] = field(default_factory=list)
    """Heard, not yet cut."""
    waiting: int = 0
    """Samples in `chunks`."""
    cuts: deque[Samples] = field(default_factory=deque)
    """Pieces that are to be recognised."""
    parts: deque[_Part] = field(default_factory=deque)
    """Pieces under way, and those that are done but behind one that is not."""
    turn: int = 0
    """When the last of them got its place, among those of all sessions."""
    done: int = 0
    """Samples delivered."""
    ended: bool = False
    texts: list[str] = field(default_factory=list)
    language: str | None = None
    """Of the first delivered segment with speech; the later ones get it as a hint."""

    def hear(self, samples: Samples) -> None:
        self.chunks.append(samples)
        self.waiting += len(samples)
        while self.waiting >= LATEST_CUT:
            self._cut()

    def end(self, samples: Samples) -> None:
        self.hear(samples)
        self.ended = True
        if self.waiting:
            self._cut()

    def _cut(self) -> None:
        audio = np.concatenate(self.chunks)
        at = cut_point(audio) or len(audio)
        self.cuts.append(audio[:at])
        self.chunks = [audio[at:]]
        self.waiting = len(audio) - at

    @property
    def over(self) -> bool:
        return self.ended and not self.cuts and not self.parts

    @property
    def heard(self) -> str | None:
        """The language of the first piece with speech, as soon as its tag is read."""
        tags = (part.job.answer.language for part in self.parts if part.job)
        return self.language or next(filter(None, tags), None)

    @property
    def ready(self) -> bool:
        """Whether there is a piece, and it is known what it is to expect. That must not depend on how fast the one
        before is: a replay has to come to the same text."""
        if not self.cuts:
            return False
        settled = self.start.language or self.start.hint == "ignore" or self.heard
        return bool(settled) or all(part.job and part.job.answer.tagged for part in self.parts)


class _Lane:
    """Pieces under way, oldest first, of the sessions of one kind."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.batch = Batch(network)
        self.parts: list[_Part] = []
        self.suspects: list[_Part] = []
        """A unit of these failed: each is tried alone, to find out whose fault it was."""
        self._decoded = False  # in the last unit

    def next(self) -> list[_Part]:
        """Whose turn it is: one piece that is being read, or those that are decoded together."""
        self.suspects = [part for part in self.suspects if part in self.parts]
        if self.suspects:
            return [self.suspects.pop(0)]
        decoding = [part for part in self.parts if part.decoding]
        reading = next((part for part in self.parts if not part.decoding), None)
        if reading and reading.job and not reading.job.windows:
            jobs = [part.job for part in decoding if part.job]
            if not fit_together([reading.job, *jobs]):
                reading = None  # until others have left
        if reading and (self._decoded or not decoding):
            self._decoded = False
            return [reading]
        self._decoded = True
        return decoding

    def compute(self, parts: Sequence[_Part]) -> None:
        """One unit for what `next` gave."""
        part = parts[0]
        if part.job is None:
            part.job = self.network.hear(part.piece)
        elif part.job.windows:
            self.network.encode(part.job)
        elif not part.job.decoding:
            self.batch.prefill(part.job)
        else:
            self.batch.decode([part.job for part in parts if part.job])


class Scheduler:
    """`start`, `audio`, `end`, `cancel` take what the gateway says; `run` answers through `emit`."""

    def __init__(self, network: Network, emit: Emit) -> None:
        self._emit = emit
        self._streams: dict[int, _Stream] = {}
        self._lanes = {True: _Lane(network), False: _Lane(network)}  # live first
        self._turns = count()
        self._news = asyncio.Event()
        self._working: list[int] = []  # sessions, as last said
        self._said_at = 0.0
        self._compute: Executor = ThreadPoolExecutor(1, thread_name_prefix="network")

    def start(self, number: int, message: SessionStart) -> None:
        form = AudioFormat(message.rate, message.width, message.channels)
        self._streams[number] = _Stream(message, Resampler(form), language=message.heard, turn=next(self._turns))

    def audio(self, number: int, pcm: bytes) -> None:
        if stream := self._streams.get(number):
            stream.hear(stream.resampler.feed(pcm))
            self._news.set()

    def end(self, number: int) -> None:
        if stream := self._streams.get(number):
            stream.end(stream.resampler.flush())
            self._news.set()

    def cancel(self, number: int) -> None:
        if self._streams.pop(number, None):
            for lane in self._lanes.values():
                lane.parts = [part for part in lane.parts if part.number != number]
            self._news.set()

    async def run(self) -> None:
        """Recognise for ever."""
        while True:
            self._news.clear()
            await self._finish()
            for live, lane in self._lanes.items():
                self._admit(lane, live=live)
                if parts := lane.next():
                    await self._work(lane, parts)
                    break
            else:
                if any(lane.batch.jobs for lane in self._lanes.values()):
                    await self._in_thread(_leave, self._jobs())
                await self._say_working([])
                await self._news.wait()

    def _admit(self, lane: _Lane, *, live: bool) -> None:
        """Fill the free places of a kind."""
        while len(lane.parts) < SLOTS:
            ready = [entry for entry in self._streams.items() if entry[1].start.live == live and entry[1].ready]
            if not ready:
                return
            number, stream = min(ready, key=lambda entry: (len(entry[1].parts), entry[1].turn))
            start = stream.start
            piece = Piece(stream.cuts.popleft(), start.context, start.language or stream.heard, _hint(stream))
            part = _Part(number, piece)
            stream.turn = next(self._turns)
            stream.parts.append(part)
            lane.parts.append(part)

    async def _work(self, lane: _Lane, parts: list[_Part]) -> None:
        await self._say_working(sorted({part.number for part in parts}))
        try:
            await self._in_thread(_unit, self._jobs(), lane, parts)
        except Exception as error:
            # A GPU that is broken for good fails here, too: that ends the process, and the next one gets the sessions.
            await self._in_thread(lane.network.wait)
            if len(parts) > 1:
                lane.suspects = list(parts)
            else:
                await self._fail(parts[0], error)
            return
        for part in parts:
            if part in lane.parts and part.job and part.job.answer.done:  # its session may have been cancelled
                lane.parts.remove(part)
                part.result = part.job.result
                await self._deliver(part.number)

    def _jobs(self) -> "_Jobs":
        return [(lane, [part.job for part in lane.parts if part.job]) for lane in self._lanes.values()]

    async def _in_thread(self, call: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._compute, call, *args)

    async def _say_working(self, sessions: list[int]) -> None:
        """Before the unit: should it be the death of the process, it is known whose it was."""
        now = asyncio.get_running_loop().time()
        if sessions != self._working or (sessions and now - self._said_at >= WORKING_SECONDS):
            self._working, self._said_at = sessions, now
            await self._emit(Working(sessions), 0)

    async def _fail(self, part: _Part, error: Exception) -> None:
        if part.number not in self._streams:
            return
        if not isinstance(error, AsrError):
            seconds = len(part.piece.samples) / SAMPLE_RATE
            _LOGGER.error("Session %d: recognising %.1f s of audio failed", part.number, seconds, exc_info=error)
            error = AsrError("the model failed on this audio")
        self.cancel(part.number)
        await self._emit(SessionError(error.code, str(error)), part.number)

    async def _deliver(self, number: int) -> None:
        """The segments of a session that are done, in their order."""
        stream = self._streams[number]
        while number in self._streams and stream.parts and (result := stream.parts[0].result):
            if result.looped or result.truncated:
                _LOGGER.warning("Session %d: the model %s", number, "repeated itself" if result.looped else "ran on")
            begin = stream.start.offset + stream.done / SAMPLE_RATE
            stream.done += len(stream.parts.popleft().piece.samples)
            end = stream.start.offset + stream.done / SAMPLE_RATE
            stream.language = stream.language or result.language
            stream.texts.append(result.text)
            await self._emit(Segment(result.text, result.language, begin, end), number)

    async def _finish(self) -> None:
        """The finals of the sessions that are over."""
        for number, stream in list(self._streams.items()):
            if stream.over:
                self.cancel(number)
                await self._emit(Final(join(stream.texts), stream.language), number)


_Jobs = list[tuple[_Lane, list[Job]]]
"""What is under way, as it was when the other thread was given work."""


def _leave(jobs: _Jobs) -> None:
    """The others are done or cancelled: their slots are free."""
    for lane, wanted in jobs:
        lane.batch.retain(wanted)


def _unit(jobs: _Jobs, lane: _Lane, parts: list[_Part]) -> None:
    _leave(jobs)
    lane.compute(parts)


def _hint(stream: _Stream) -> Hint:
    """A language heard earlier in the session is a preference at most, whatever the client's would be."""
    start = stream.start
    return start.hint if start.language or start.hint == "ignore" else "prefer"
