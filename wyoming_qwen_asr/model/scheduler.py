"""What the network works on next. Sessions that have a piece of audio ready are recognised together, oldest first."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..audio import SAMPLE_RATE, AudioFormat
from ..errors import AsrError
from ..events import Final, Hint, Message, Segment, SessionError, SessionStart
from ..text import join
from .network import Network, Piece, Recognition
from .resample import Resampler, Samples
from .vad import LATEST_CUT, cut_point

MAX_BATCH = 8
"""Pieces recognised together: more gains little on a GPU and makes the first of them wait on a CPU."""

_LOGGER = logging.getLogger(__name__)

Emit = Callable[[Message, int], Awaitable[None]]


@dataclass
class _Stream:
    """One session, as far as it has come."""

    start: SessionStart
    resampler: Resampler
    chunks: list[Samples] = field(default_factory=list)
    """Heard, not yet recognised."""
    waiting: int = 0
    """Samples in `chunks`."""
    done: int = 0
    """Samples recognised."""
    ended: bool = False
    texts: list[str] = field(default_factory=list)
    language: str | None = None
    """Of the first segment with speech; the later ones get it as a hint."""

    def hear(self, samples: Samples) -> None:
        self.chunks.append(samples)
        self.waiting += len(samples)

    def piece(self) -> Samples | None:
        """What to recognise next, if it is time for that. It stays until `finish`."""
        if self.waiting < LATEST_CUT and not self.ended:
            return None
        self.chunks = [np.concatenate(self.chunks)]  # never empty here: an end brings the resampler's rest
        return self.chunks[0][: cut_point(self.chunks[0])]

    def finish(self, samples: int) -> None:
        """So many samples are recognised."""
        self.chunks[0] = self.chunks[0][samples:]
        self.waiting -= samples
        self.done += samples


class Scheduler:
    """`start`, `audio`, `end`, `cancel` take what the gateway says; `run` answers through `emit`."""

    def __init__(self, network: Network, emit: Emit) -> None:
        self._network = network
        self._emit = emit
        self._streams: dict[int, _Stream] = {}
        self._news = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="network")

    def start(self, number: int, message: SessionStart) -> None:
        form = AudioFormat(message.rate, message.width, message.channels)
        self._streams[number] = _Stream(message, Resampler(form), language=message.heard)

    def audio(self, number: int, pcm: bytes) -> None:
        if stream := self._streams.get(number):
            stream.hear(stream.resampler.feed(pcm))
            self._news.set()

    def end(self, number: int) -> None:
        if stream := self._streams.get(number):
            stream.hear(stream.resampler.flush())
            stream.ended = True
            self._news.set()

    def cancel(self, number: int) -> None:
        self._streams.pop(number, None)

    async def run(self) -> None:
        """Recognise for ever."""
        while True:
            self._news.clear()
            if due := self._due():
                await self._recognise(due)
            else:
                await self._news.wait()

    def _due(self) -> dict[int, Samples]:
        """The next piece of each session that has one, at most MAX_BATCH of them."""
        due: dict[int, Samples] = {}
        for number, stream in self._streams.items():
            piece = stream.piece()
            if piece is not None:
                due[number] = piece
                if len(due) == MAX_BATCH:
                    break
        return due

    async def _recognise(self, due: dict[int, Samples]) -> None:
        numbers = list(due)
        pieces = [
            Piece(due[n], stream.start.context, stream.start.language or stream.language, _hint(stream))
            for n, stream in ((n, self._streams[n]) for n in numbers)
        ]
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._compute, self._network.recognise, pieces, lambda index: numbers[index] not in self._streams
            )
        except Exception as error:
            if len(due) > 1:  # find out whose piece it was
                for number, samples in due.items():
                    if number in self._streams:
                        await self._recognise({number: samples})
                return
            if not isinstance(error, AsrError):
                _LOGGER.exception("Recognising %.1f s of audio failed", len(due[numbers[0]]) / SAMPLE_RATE)
                error = AsrError("the model failed on this audio")
            self.cancel(numbers[0])
            await self._emit(SessionError(error.code, str(error)), numbers[0])
            return
        for number, result in zip(numbers, results, strict=True):
            if stream := self._streams.get(number):
                await self._deliver(number, stream, len(due[number]), result)

    async def _deliver(self, number: int, stream: _Stream, samples: int, result: Recognition) -> None:
        if result.looped or result.truncated:
            _LOGGER.warning("Session %d: the model %s", number, "repeated itself" if result.looped else "ran on")
        begin = stream.start.offset + stream.done / SAMPLE_RATE
        stream.finish(samples)
        stream.language = stream.language or result.language
        stream.texts.append(result.text)
        await self._emit(Segment(result.text, result.language, begin, begin + samples / SAMPLE_RATE), number)
        if stream.ended and not stream.waiting:
            self.cancel(number)
            await self._emit(Final(join(stream.texts), stream.language), number)


def _hint(stream: _Stream) -> Hint:
    """A language heard earlier in the session is a preference at most, whatever the client's would be."""
    start = stream.start
    return start.hint if start.language or start.hint == "ignore" else "prefer"
