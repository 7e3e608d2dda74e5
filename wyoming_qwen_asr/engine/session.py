"""The one door to the model: a session is one stream of audio in, results out.

    async with engine.session(options) as session:
        await session.feed(pcm)
        await session.end()
        async for result in session.results():
            ...

The session retains its audio until the text of it is delivered, so that the engine can give it to another model
process when one dies: nothing the client sees tells that it happened.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ..audio import AudioFormat
from ..errors import AsrError, TimedOut, TooLarge, by_code
from ..events import (
    Final,
    Hint,
    Message,
    Partial,
    Result,
    Segment,
    SessionAudio,
    SessionEnd,
    SessionError,
    SessionStart,
    SpeechStarted,
    SpeechStopped,
)
from ..limits import (
    FINAL_SECONDS,
    MAX_PIECE_SECONDS,
    MAX_RETAINED_BYTES,
    MAX_UNCONFIRMED_FILE_SECONDS,
    MAX_UNCONFIRMED_SECONDS,
    MAX_UTTERANCE_SECONDS,
    OPEN_SECONDS,
)
from .record import Record
from .replay import Cursor, Tries

MAX_RESULTS = 1024
"""Results that a front end has not yet taken; partials come a few times a second, so it has slept for minutes."""

SEND_SECONDS = 0.1
"""Audio goes to the model process in pieces of this length: Home Assistant's 10 ms would cost 100 events a second."""

ROOM_SECONDS = 0.05
"""Between two looks whether there is room for more audio."""

SEND_BYTES = 64 * 1024
"""And at most so many bytes at once, so that sessions catching up take turns."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionOptions:
    """What a front end says about a stream of audio before it begins."""

    format: AudioFormat
    language: str | None = None
    """Qwen's name; None to detect."""
    context: str = ""
    """Names and terms the speaker is likely to use."""
    client: str = ""
    """The front end: "wyoming" or "http"."""
    address: str = ""
    """Where the client is, for the bound of sessions per address."""
    live: bool = True
    """Somebody is speaking and waits; a file is computed when no such session has work to do."""


class Session:
    """Made by Engine.session; see the module's docstring. Front ends use `feed`, `end`, `results` and `final`;
    the rest is for the engine."""

    def __init__(
        self,
        number: int,
        options: SessionOptions,
        hint: Hint,
        wake: Callable[[], None],
        close: Callable[["Session"], None],
        retained: Callable[[], int] = lambda: 0,
    ) -> None:
        self.number = number
        self.record = Record(number, options.client)
        self._retained_in_all = retained
        self._options = options
        self._hint = hint
        self._wake = wake
        self._close = close

        self._audio = bytearray()  # retained: from byte _base of the stream on
        self._base = 0
        self._fed = 0
        self._ended_at: float | None = None

        self._sent: int | None = None  # bytes the present model process has; None before its SessionStart
        self.end_sent: float | None = None
        """When the present model process was told that no more audio comes, by the loop's clock."""
        self.tries = Tries()
        self._cursor = Cursor()

        self._results: deque[Result] = deque()
        self._error: AsrError | None = None
        self._news = asyncio.Event()
        self.language: str | None = None
        """Qwen's name of what is spoken, once a segment with speech, or the final, has told."""
        self._set_deadline(OPEN_SECONDS)
        self.finished = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- for front ends ------------------------------------------------------------------------------------------

    async def feed(self, pcm: bytes) -> None:
        """More audio, cut anywhere; waits while the model is far behind. Raises TooLarge past ten minutes, and whatever
        the session has failed with."""
        if self._error:
            raise self._error
        if self._fed + len(pcm) > MAX_UTTERANCE_SECONDS * self._options.format.bytes_per_second:
            raise TooLarge(f"more than {MAX_UTTERANCE_SECONDS / 60:.0f} minutes of audio")
        while self._far_ahead():
            await asyncio.sleep(ROOM_SECONDS)  # room comes from here or from any other session
            if self._error:
                raise self._error
        self._audio += pcm
        self._fed += len(pcm)
        self.record.heard(len(pcm) / self._options.format.bytes_per_second)
        self._wake()

    async def end(self) -> None:
        """No more audio comes. From here on the clock runs: TimedOut if the final does not come in time."""
        self._ended_at = time.monotonic()
        self.record.ended()
        self._deadline.cancel()
        self._set_deadline(FINAL_SECONDS + 2 * self._seconds)
        self._wake()

    async def results(self) -> AsyncIterator[Result]:
        """Results as they come; the last one is a Final, whose text is that of the Partials' deltas one after another
        (but for what `Record.retracted` counts). Raises AsrError when the session has failed."""
        while True:
            while self._results:
                result = self._results.popleft()
                yield result
                if isinstance(result, Final):
                    return
            if self._error:
                raise self._error
            self._news.clear()
            await self._news.wait()

    async def final(self) -> Final:
        """The Final alone."""
        async for result in self.results():
            if isinstance(result, Final):
                return result
        raise AssertionError("results end with a Final")

    def close(self) -> None:
        """Nobody waits any more, with or without a result: work still to do is cancelled. Safe to call again."""
        self._deadline.cancel()
        self._close(self)

    # --- for the engine ------------------------------------------------------------------------------------------

    def deliver(self, message: Message) -> None:
        """What the model process says about this session, while anybody waits for it."""
        if self.finished:
            return None
        match message:
            case SessionError():
                return self.fail(by_code(message.code)(message.message))
            case Segment():
                _LOGGER.debug("Utterance %d: segment %.1f to %.1f s", self.number, message.start, message.end)
                self.language = self.language or message.language
                self.record.segment(message)
                self.tries.acquit(proven=True)
                self._forget(message.end)
            case Final():
                self.language = self.language or message.language
            case Partial() | SpeechStarted() | SpeechStopped():
                pass
            case _:
                return self.fail(AsrError("the model process sent a wrong message"))
        if len(self._results) >= MAX_RESULTS:
            return self.fail(TimedOut("the client does not take its results"))
        for result in self._cursor.take(message):
            self._results.append(result)
            self.record.emitted(result)
            self._news.set()
        if isinstance(message, Final):
            self.finished = True
            self.record.finished(self._cursor.retracted)
        return None

    def fail(self, error: AsrError) -> None:
        """End the session with an error, unless it has ended already."""
        if not self.finished:
            self.finished = True
            self.record.failed(error.code)
            self._error = error
            self._news.set()

    def restart(self, *, struck: bool, killed: bool = False) -> None:
        """The model process is gone: begin again with the retained audio, in the next one. `struck` and `killed` are
        those of `Tries.died`. Strikes, or a replay too many, fail the session in the end."""
        if self._sent is None or self.finished:
            return  # that process never had it
        self._sent = self.end_sent = None
        self._cursor.restart()
        if error := self.tries.died(asyncio.get_running_loop().time(), struck=struck, killed=killed):
            self.fail(error)
        else:
            self.record.replayed()

    @property
    def given(self) -> bool:
        """Whether the present model process knows of it."""
        return self._sent is not None

    @property
    def all_sent(self) -> bool:
        """Whether the present model process has everything that came so far, but for less than a piece."""
        unsent = self._fed - (self._sent or 0)
        done = self._ended_at is None or self.end_sent is not None
        return self.given and done and unsent < SEND_SECONDS * self._options.format.bytes_per_second

    @property
    def pending(self) -> float:
        """Seconds of audio whose text is not delivered."""
        return self.retained / self._options.format.bytes_per_second

    def outgoing(self, languages: Sequence[str]) -> tuple[Message, bytes | None] | None:
        """The next message for the model process, and its payload; None when there is nothing to say yet.
        A language that is not among the model's `languages` is left for it to detect."""
        options = self._options
        form = options.format
        if self.finished:
            return None
        if self._sent is None:
            self._sent = self._base
            self.tries.begin(asyncio.get_running_loop().time())
            language = options.language if options.language in languages else None
            offset = self._base / form.bytes_per_second
            return SessionStart(
                *(form.rate, form.width, form.channels, language, self._hint, options.context),
                *(self.language, offset, options.live),
            ), None
        unsent = self._fed - self._sent
        ended = self._ended_at is not None
        if unsent >= SEND_SECONDS * form.bytes_per_second or (ended and unsent):
            begin = self._sent - self._base
            payload = bytes(self._audio[begin : begin + SEND_BYTES])
            self._sent += len(payload)
            return SessionAudio(), payload
        if ended and self.end_sent is None:
            self.end_sent = asyncio.get_running_loop().time()
            return SessionEnd(), None
        return None

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.fail, TimedOut("no transcript in time"))

    @property
    def _seconds(self) -> float:
        return self._fed / self._options.format.bytes_per_second

    @property
    def address(self) -> str:
        return self._options.address

    @property
    def retained(self) -> int:
        """Bytes of audio whose text is not delivered."""
        return len(self._audio)

    def _far_ahead(self) -> bool:
        """Whether the model should catch up before more audio is taken."""
        live = self._options.live
        if self._retained_in_all() > (MAX_RETAINED_BYTES if live else MAX_RETAINED_BYTES // 2):
            return self.pending > MAX_PIECE_SECONDS
        return self.pending > (MAX_UNCONFIRMED_SECONDS if live else MAX_UNCONFIRMED_FILE_SECONDS)

    def _forget(self, seconds: float) -> None:
        """Drop the audio before this time of the session, in whole frames."""
        form = self._options.format
        done = min(round(seconds * form.rate) * form.frame_bytes, self._sent or self._base)
        if done > self._base:
            del self._audio[: done - self._base]
            self._base = done
