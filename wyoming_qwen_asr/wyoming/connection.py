"""One Wyoming client: `transcribe`, audio in, text out.

Protocol: https://github.com/OHF-Voice/wyoming. A connection may carry one utterance after another. What goes wrong is
told with an `error` event, and the connection is closed then, because older Home Assistants wait for that.
"""

import asyncio
import contextlib
import logging
import time
from typing import Any

from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe
from wyoming.ping import Ping, Pong

from ..audio import AudioFormat
from ..engine.engine import Engine
from ..engine.session import Session, SessionOptions
from ..errors import AsrError, BadRequest, TimedOut
from ..events import READER_LIMIT, read_event, write_event
from ..limits import CONNECTION_IDLE_SECONDS, MAX_CONTEXT_CHARACTERS, UTTERANCE_IDLE_SECONDS
from ..metrics import Metrics
from ..text import language_name
from .info import info
from .transcript import Answer

LINGER_SECONDS = 5.0
"""After an error, what the client still sends is read and dropped for so long: closing at once would reset the
connection, and the client might never see the error. So long it may take for the rest of what we wrote, too."""

_LOGGER = logging.getLogger(__name__)


class Connection:
    """One client. Events are read while an utterance is being recognised, so that `describe` is answered meanwhile.

    One task reads, and tells errors; whoever else has a reason to end the connection interrupts it. Another one answers
    an utterance; an event is written in one go, so theirs do not mix.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        address: str,
        idle_seconds: float | None = CONNECTION_IDLE_SECONDS,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self._engine = engine
        self._metrics = metrics
        self._reader = reader
        self._writer = writer
        self._address = address
        self._idle_seconds = idle_seconds
        self._leaving = self._ending = False
        self._error: AsrError | None = None  # why it was interrupted
        self.heard = time.monotonic()
        """When the last whole event was dealt with; who sends half a one is silent."""
        # The utterance that is arriving:
        self._request = Transcribe()
        self._format: AudioFormat | None = None
        self._session: Session | None = None
        self._last_audio = 0.0  # when some of it was taken
        # What sends its transcript, or that of the one before it:
        self._answer: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve the client until it, or we, had enough."""
        _LOGGER.debug("%s: connected", self._address)
        try:
            while event := await self._next():
                await self._handle(event)
                self.heard = time.monotonic()
            if not self._session:
                await self._answered()  # a client may close its sending half and still listen
        except asyncio.CancelledError:  # see `interrupt`
            if self._error:
                await self.tell(self._error)
        except AsrError as error:
            await self.tell(error)
        except OSError:
            pass  # the client is gone
        except Exception:
            _LOGGER.exception("%s: a fault of ours", self._address)
            await self.tell(AsrError("internal error"))
        finally:
            self._ending = True
            self._give_up()
            await self._close()
            _LOGGER.debug("%s: closed", self._address)

    async def refuse(self, error: AsrError) -> None:
        """Tell the client why it is not served."""
        try:
            await self.tell(error)
        finally:
            await self._close()

    @property
    def has_session(self) -> bool:
        """Whether an utterance is arriving, or being recognised."""
        return not self._ending and (self._session is not None or self._answer is not None)

    def abort(self) -> None:
        """Close it without a word."""
        _LOGGER.debug("%s: gives way to another connection", self._address)
        self._writer.transport.abort()

    def interrupt(self, error: AsrError | None = None) -> None:
        """End the connection now, with an error or without, unless it is ending already."""
        if not self._ending:
            self._ending = True
            self._error = error
            self.task.cancel()

    def leave(self) -> None:
        """End the connection after the utterance that is under way, if any."""
        self._leaving = True
        if not self._answer:
            self.interrupt()

    async def tell(self, error: AsrError) -> None:
        """Send an error, and no more; read on until the client has seen it."""
        self._ending = True
        self._give_up()  # nothing may come after the error
        self._metrics.refusals.labels(error.code).inc()
        _LOGGER.warning("%s: %s", self._address, error)
        with contextlib.suppress(AsrError, OSError):
            await self._send(Error(text=str(error), code=error.code).event())
            if self._writer.can_write_eof():
                self._writer.write_eof()
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(READER_LIMIT):
                    pass

    async def _close(self) -> None:
        """Let the client have what is written, if it takes that. How the connection came to its end is asked for, or
        asyncio's log calls a reset that was never looked at an error."""
        self._writer.close()
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except (OSError, NotImplementedError):  # reset by the client; a pipe's end cannot be waited for
            pass

    async def _next(self) -> Event | None:
        """The next event; None when the client is gone, or silent for too long between utterances."""
        while True:
            seconds = self._idle_seconds
            if self._session:
                seconds = max(0.0, self._last_audio + UTTERANCE_IDLE_SECONDS - time.monotonic())
            try:
                async with asyncio.timeout(seconds) as limit:
                    return await read_event(self._reader)
            except TimeoutError:
                if not limit.expired():
                    raise  # the network's: the client cannot be reached
                if self._session:
                    raise TimedOut("no audio for too long") from None
                if not self._answer:
                    return None

    async def _handle(self, event: Event) -> None:
        if Describe.is_type(event.type):
            await self._send(info(self._engine.name, self._engine.model).event())
        elif Ping.is_type(event.type):
            await self._send(Pong(text=_text(event.data, "text")).event())
        elif Transcribe.is_type(event.type):
            self._request = _request(event.data)
        elif AudioStart.is_type(event.type):
            self._begin(_format(event.data))
        elif AudioChunk.is_type(event.type):
            await self._audio(event)
        elif AudioStop.is_type(event.type):
            await self._stop()
        else:
            _LOGGER.debug("%s: ignored %r", self._address, event.type)

    def _begin(self, form: AudioFormat) -> None:
        """An utterance begins. One that never came to its end is given up, as the client has done."""
        if self._session:
            self._give_up()
        self._format = form

    def _give_up(self) -> None:
        """Nobody waits for the transcript any more."""
        self._session = None
        if self._answer:
            self._answer.cancel()

    async def _audio(self, event: Event) -> None:
        form = _format(event.data) if "rate" in event.data else self._format
        if not event.payload:
            return
        if form is None:
            raise BadRequest("audio without a format")
        if self._session is None:
            await self._answered()
            self._open(form)
        assert self._session is not None
        if form != self._format:
            raise BadRequest("the audio format changed in mid-utterance")
        await self._session.feed(event.payload)
        self._last_audio = time.monotonic()  # after the wait for room, which is not the client's fault

    def _open(self, form: AudioFormat) -> None:
        """The first audio of an utterance: from here on its answer, or what prevents it, is waited for."""
        self._format = form
        session = self._session = self._engine.session(self._options(form))
        self._answer = asyncio.create_task(Answer(self._writer).run(session))
        self._answer.add_done_callback(lambda answer: self._transcribed(session, answer))

    def _options(self, form: AudioFormat) -> SessionOptions:
        language = language_name(self._request.language)
        if self._request.language and not language:
            _LOGGER.debug("%s: language %r is not known", self._address, self._request.language)
        return SessionOptions(form, language, _context(self._request), "wyoming", self._address)

    async def _stop(self) -> None:
        """The audio is complete."""
        session, self._session = self._session, None
        self._request, self._format = Transcribe(), None
        if session:
            await session.end()
        else:
            await self._answered()
            await Answer(self._writer).end("", None)

    def _transcribed(self, session: Session, answer: asyncio.Task[None]) -> None:
        """The transcript is sent, or cannot be."""
        session.close()
        if self._answer is answer:
            self._answer = None
        if answer.cancelled():
            return
        error = answer.exception()
        if error:
            self.interrupt(error if isinstance(error, AsrError) else None)
        elif self._leaving:
            self.interrupt()

    async def _answered(self) -> None:
        """Wait until the last utterance's transcript is sent."""
        if self._answer:
            await asyncio.wait([self._answer])

    async def _send(self, event: Event) -> None:
        await write_event(self._writer, event)


def _request(data: dict[str, Any]) -> Transcribe:
    """A `transcribe` event whose fields have the types they should. Raises BadRequest."""
    _text(data, "name")
    _text(data, "language")
    for key in ("transcript_names", "transcript_terms"):
        words = data.get(key) or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadRequest(f"{key} is not a list of texts")
    if not isinstance(data.get("context") or {}, dict):
        raise BadRequest("context is not an object")
    return Transcribe.from_event(Event("transcribe", data))


def _text(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{key} is not text")
    return value


def _format(data: dict[str, Any]) -> AudioFormat:
    return AudioFormat(data.get("rate", 0), data.get("width", 0), data.get("channels", 0))


def _context(request: Transcribe) -> str:
    """What the model reads before it listens: names first, as many as fit. The protocol's own `context` is for
    dialogues; only a text in it is used."""
    said = (request.context or {}).get("text")
    words = [*(request.transcript_names or []), *(request.transcript_terms or [])]
    context = said if isinstance(said, str) else ""
    for word in words:
        longer = f"{context}, {word}" if context else word
        if len(longer) > MAX_CONTEXT_CHARACTERS:
            break
        context = longer
    return context[:MAX_CONTEXT_CHARACTERS]
