"""One Wyoming client: `transcribe`, audio in, `transcript` out.

Protocol: https://github.com/OHF-Voice/wyoming. A connection may carry one utterance after another. What goes wrong is
told with an `error` event, and the connection is closed then, because older Home Assistants wait for that.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong

from ..audio import AudioFormat
from ..engine.engine import Engine
from ..engine.session import Session, SessionOptions
from ..errors import AsrError, BadRequest, TimedOut
from ..events import READER_LIMIT, read_event, write_event
from ..limits import CONNECTION_IDLE_SECONDS, MAX_CONTEXT_CHARACTERS, UTTERANCE_IDLE_SECONDS
from ..text import language_code, language_name
from .info import info

LINGER_SECONDS = 5.0
"""After an error, what the client still sends is read and dropped for so long: closing at once would reset the
connection, and the client might never see the error."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What every connection offers."""

    engine: Engine
    model: str
    """The setting, for the time before the checkpoint is found."""
    language: str | None
    """Qwen's name, for requests that name none; None to detect."""

    def info(self) -> Info:
        return info(self.model, self.engine.model)


class Connection:
    """One client. Events are read while an utterance is being recognised, so that `describe` never waits."""

    def __init__(
        self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self._service = service
        self._reader = reader
        self._writer = writer
        self._address = address
        self._leaving = False
        # The utterance that is arriving:
        self._request = Transcribe()
        self._format: AudioFormat | None = None
        self._session: Session | None = None
        # The one before it, being recognised:
        self._answer: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve the client until it, or we, had enough."""
        _LOGGER.debug("%s: connected", self._address)
        try:
            while event := await self._next():
                await self._handle(event)
            await self._answered()  # a client may close its sending half and still listen
        except AsrError as error:
            await self.fail(error)
        except ConnectionError:
            pass
        finally:
            if self._session:
                self._session.close()
            if self._answer:
                self._answer.cancel()
            self._writer.close()
            _LOGGER.debug("%s: closed", self._address)

    def leave(self) -> None:
        """Close after the utterance that is under way, if any."""
        self._leaving = True
        if not self._session and not self._answer:
            self._writer.close()

    async def fail(self, error: AsrError) -> None:
        """Tell the client, and close."""
        _LOGGER.warning("%s: %s", self._address, error)
        with contextlib.suppress(AsrError, OSError, TimeoutError):
            await self._send(Error(text=str(error), code=error.code).event())
            if self._writer.can_write_eof():
                self._writer.write_eof()
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(READER_LIMIT):
                    pass
        self._writer.close()

    async def _next(self) -> Event | None:
        """The next event; None when the client is gone, or silent for too long between utterances."""
        seconds = UTTERANCE_IDLE_SECONDS if self._session else CONNECTION_IDLE_SECONDS
        while True:
            try:
                async with asyncio.timeout(seconds):
                    return await read_event(self._reader)
            except TimeoutError:
                if self._session:
                    raise TimedOut("no audio for too long") from None
                if not self._answer:
                    return None

    async def _handle(self, event: Event) -> None:
        if Describe.is_type(event.type):
            await self._send(self._service.info().event())
        elif Ping.is_type(event.type):
            await self._send(Pong(text=_text(event.data, "text")).event())
        elif Transcribe.is_type(event.type):
            self._request = _request(event.data)
        elif AudioStart.is_type(event.type):
            self._format = _format(event.data)
        elif AudioChunk.is_type(event.type):
            await self._audio(event)
        elif AudioStop.is_type(event.type):
            await self._stop()
        else:
            _LOGGER.debug("%s: ignored %r", self._address, event.type)

    async def _audio(self, event: Event) -> None:
        form = _format(event.data) if "rate" in event.data else self._format
        if not event.payload:
            return
        if form is None:
            raise BadRequest("audio without a format")
        if self._session is None:
            await self._answered()
            self._format = form
            self._session = self._service.engine.session(self._options(form))
        if form != self._format:
            raise BadRequest("the audio format changed in mid-utterance")
        await self._session.feed(event.payload)

    def _options(self, form: AudioFormat) -> SessionOptions:
        request = self._request
        language = language_name(request.language)
        if request.language and not language:
            _LOGGER.debug("%s: language %r is not known, so it is detected", self._address, request.language)
        return SessionOptions(form, language or self._service.language, _context(request))

    async def _stop(self) -> None:
        """The audio is complete: answer, while the next event is read."""
        await self._answered()
        session, self._session = self._session, None
        self._request, self._format = Transcribe(), None
        if session is None:
            await self._send(Transcript(text="").event())
            return
        await session.end()
        self._answer = asyncio.create_task(self._transcript(session))

    async def _transcript(self, session: Session) -> None:
        try:
            final = await session.final()
            await self._send(Transcript(text=final.text, language=language_code(final.language)).event())
        except AsrError as error:
            self._leaving = True
            _LOGGER.warning("%s: %s", self._address, error)
            await self._send(Error(text=str(error), code=error.code).event())
        finally:
            session.close()
            if self._leaving:
                self._writer.close()

    async def _answered(self) -> None:
        """Wait until the last utterance's transcript is sent."""
        if self._answer:
            await self._answer
            self._answer = None

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
