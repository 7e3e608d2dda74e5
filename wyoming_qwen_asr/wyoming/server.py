"""The Wyoming server: `transcribe`, audio in, `transcript` out, over TCP, Unix sockets or stdin and stdout.

Protocol: https://github.com/OHF-Voice/wyoming. A connection may carry one utterance after another. What goes wrong is
told with an `error` event, and the connection is closed then, because older Home Assistants wait for that.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong

from ..audio import AudioFormat
from ..engine.engine import Engine
from ..engine.session import Session, SessionOptions
from ..errors import AsrError, BadRequest, Busy, TimedOut
from ..events import READER_LIMIT, read_event, write_event
from ..process import streams
from ..settings import (
    CONNECTION_IDLE_SECONDS,
    MAX_CONNECTIONS,
    MAX_CONTEXT_CHARACTERS,
    UTTERANCE_IDLE_SECONDS,
    HostPort,
)
from ..text import language_code, language_name
from .info import info

LINGER_SECONDS = 5.0
"""After an error, what the client still sends is read and dropped for so long: closing at once would reset the
connection, and the client might never see the error."""

_LOGGER = logging.getLogger(__name__)


class WyomingServer:
    """All addresses Wyoming is served at."""

    def __init__(self, engine: Engine, model: str, language: str | None) -> None:
        self._engine = engine
        self._model = model
        self.language = language
        """Qwen's name, for requests that name none; None to detect."""
        self._listeners: list[asyncio.Server] = []
        self._sockets: list[Path] = []
        self._connections: set[_Connection] = set()

    def info(self) -> Info:
        return info(self._model, self._engine.model)

    def session(self, options: SessionOptions) -> Session:
        return self._engine.session(options)

    async def listen(self, uri: str) -> HostPort | None:
        """Serve at a URI from now on; for tcp, where that came to be. Raises OSError."""
        parts = urlsplit(uri)
        if parts.scheme == "unix":
            path = Path(parts.netloc + parts.path)
            _remove_dead_socket(path)
            self._listeners.append(await asyncio.start_unix_server(self._accept, str(path), limit=READER_LIMIT))
            self._sockets.append(path)
            return None
        assert parts.hostname is not None
        listener = await asyncio.start_server(self._accept, parts.hostname, parts.port, limit=READER_LIMIT)
        self._listeners.append(listener)
        return HostPort(parts.hostname, listener.sockets[0].getsockname()[1])

    async def serve_stdio(self) -> None:
        """One connection on stdin and stdout, until stdin ends."""
        reader, writer = await streams(sys.stdin.buffer, sys.stdout.buffer)
        await self._serve(_Connection(self, reader, writer, "stdio"))

    async def close(self, seconds: float) -> None:
        """Take no new connections and wait so long for the utterances that are under way."""
        for listener in self._listeners:
            listener.close()
        for connection in self._connections:
            connection.leave()
        tasks = {connection.task for connection in self._connections}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for path in self._sockets:
            path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("peername") or "unix socket"
        connection = _Connection(self, reader, writer, str(address))
        if len(self._connections) >= MAX_CONNECTIONS:
            await connection.fail(Busy(f"{MAX_CONNECTIONS} connections are open already"))
            return
        await self._serve(connection)

    async def _serve(self, connection: "_Connection") -> None:
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


class _Connection:
    """One client. Events are read while an utterance is being recognised, so that `describe` never waits."""

    def __init__(
        self, server: WyomingServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self._server = server
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
            await self._send(self._server.info().event())
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
            self._session = self._server.session(self._options(form))
        if form != self._format:
            raise BadRequest("the audio format changed in mid-utterance")
        await self._session.feed(event.payload)

    def _options(self, form: AudioFormat) -> SessionOptions:
        request = self._request
        language = language_name(request.language)
        if request.language and not language:
            _LOGGER.debug("%s: language %r is not known, so it is detected", self._address, request.language)
        return SessionOptions(form, language or self._server.language, _context(request))

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


def _remove_dead_socket(path: Path) -> None:
    """A Unix socket that a killed server left behind would make binding fail; one that is served must."""
    if path.is_socket():
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
