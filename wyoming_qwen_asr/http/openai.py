"""OpenAI's transcription API: https://platform.openai.com/docs/api-reference/audio."""

import asyncio
import logging
import tempfile
import time
import uuid
from typing import IO

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from .. import __version__
from ..audio import AudioFormat
from ..engine.engine import Engine
from ..engine.session import Session, SessionOptions
from ..errors import AsrError, BadAudio, BadRequest, TimedOut, TooLarge, by_code
from ..events import BadEvent, Failed, Final, SessionAudio, SessionEnd, from_event
from ..limits import MAX_CONTEXT_CHARACTERS, MAX_UPLOAD_BYTES
from ..metrics import Metrics
from ..process import Child
from ..settings import Settings
from ..text import language_name
from .connections import Connections
from .places import Places

MAX_FIELD_BYTES = 16 * 1024
"""Of a form field that is not the file; the longest real one is a prompt."""

MAX_FIELDS = 64
"""Of a form. OpenAI's has some fifteen, lists repeat theirs."""

UPLOAD_CHUNK_BYTES = 256 * 1024
"""Written at a time, in a thread: a disk may be slow."""

UPLOAD_SECONDS = 600.0
"""For a form to arrive: the largest file over a poor wireless network."""

DECODE_SECONDS = 120.0
"""For some more of a file; its process may compute for half of that in all. What waits for the model does not count."""

FORMATS = ("json", "text")

_LOGGER = logging.getLogger(__name__)


class OpenAI:
    """The handlers of /v1."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self.places = Places(max(1, settings.max_sessions // 2))
        """The other half of the sessions is for those who are speaking."""
        self._created = int(time.time())

    async def models(self, request: web.Request) -> web.Response:
        """The one model there is."""
        entry = {"id": self._engine.name, "object": "model", "created": self._created, "owned_by": "wyoming-qwen-asr"}
        return web.json_response({"object": "list", "data": [entry]})

    async def transcriptions(self, request: web.Request) -> web.Response:
        """A file in, its text out. `model` may be any name: there is one model."""
        async with self.places.one():
            return await self._transcription(request)

    async def _transcription(self, request: web.Request) -> web.Response:
        with tempfile.NamedTemporaryFile(prefix="wyoming-qwen-asr-") as file:
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    fields = await _read_form(request, file)
            except TimeoutError:
                raise TimedOut("the form did not arrive in time") from None
            shape = fields.get("response_format") or "json"
            if shape not in FORMATS:
                raise BadRequest(f"response_format must be one of {', '.join(FORMATS)}", "response_format")
            if fields.get("stream", "false").lower() == "true":
                raise BadRequest("stream is not supported", "stream")
            final = await self._transcribe(file.name, _options(fields, request.remote))
        if shape == "text":
            return web.Response(text=final.text + "\n")
        return web.json_response({"text": final.text})

    async def _transcribe(self, path: str, options: SessionOptions) -> Final:
        async with self._engine.session(options) as session:
            await _feed(session, path)
            await session.end()
            return await session.final()


def _options(fields: dict[str, str], address: str | None) -> SessionOptions:
    hint = fields.get("language", "").strip()
    language = language_name(hint)
    if hint not in ("", "auto") and not language:
        raise BadRequest("language is none that Qwen3-ASR knows", "language")
    context = fields.get("prompt", "")[:MAX_CONTEXT_CHARACTERS]
    return SessionOptions(AudioFormat(), language, context, "http", address or "", live=False)


async def _feed(session: Session, path: str) -> None:
    """Decode a file, in a process of its own, into the session. Raises BadAudio."""
    child = await Child.spawn("wyoming_qwen_asr.decode", path)
    heard = False
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(DECODE_SECONDS) as limit:
            async for event in child.events():
                match from_event(event)[0]:
                    case SessionAudio():
                        heard = True
                        limit.reschedule(None)  # the session has a deadline of its own
                        await session.feed(event.payload or b"")
                        limit.reschedule(clock() + DECODE_SECONDS)
                    case SessionEnd():
                        if not heard:
                            raise BadAudio("the file holds no audio", "file")
                        return
                    case Failed() as failed:
                        raise by_code(failed.code)(failed.message, "file")
    except (BadEvent, TimeoutError):
        pass  # it was stopped in the middle of something
    finally:
        await child.stop()
    raise BadAudio("the file could not be decoded within the limits of time and memory", "file")


async def _read_form(request: web.Request, file: IO[bytes]) -> dict[str, str]:
    """The fields of a multipart form; the one named `file` goes into `file`, as it arrives.
    Raises BadRequest, TooLarge."""
    if not request.content_type.startswith("multipart/"):
        raise BadRequest("the body must be multipart/form-data")
    fields: dict[str, str] = {}
    size: int | None = None
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader) or part.name is None:
                raise BadRequest("a part of the form has no name")
            if len(fields) == MAX_FIELDS:
                raise TooLarge("the form has too many fields")
            if part.name != "file":
                fields[part.name] = await _field(part)
            elif size is None:
                size = await _save(part, file)
            else:
                raise BadRequest("the form has more than one file", "file")
    except (ValueError, AssertionError, HttpProcessingError):
        raise BadRequest("the form is broken") from None
    if size is None:
        raise BadRequest("there is no file in the form", "file")
    if size == 0:
        raise BadAudio("the file is empty", "file")
    file.flush()
    return fields


async def _save(part: BodyPartReader, file: IO[bytes]) -> int:
    size = 0
    while chunk := await part.read_chunk(UPLOAD_CHUNK_BYTES):
        size += len(chunk)
        if size > MAX_UPLOAD_BYTES:
            raise TooLarge(f"the file is larger than {MAX_UPLOAD_BYTES >> 20} MB", "file")
        await asyncio.to_thread(file.write, chunk)
    return size


async def _field(part: BodyPartReader) -> str:
    value = b""
    while chunk := await part.read_chunk(MAX_FIELD_BYTES):
        value += chunk
        if len(value) > MAX_FIELD_BYTES:
            raise TooLarge(f"{part.name!r} is too long")
    return value.decode("utf-8")


def errors_in_envelopes(metrics: Metrics, connections: Connections) -> Middleware:
    """Middleware: every failure in OpenAI's envelope, every answer with a request id."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        async with connections.request(request):
            response = await _answered(request, handler, metrics)
        response.headers["x-request-id"] = f"req_{uuid.uuid4().hex}"
        response.headers["Server"] = f"wyoming-qwen-asr/{__version__}"
        return response

    return middleware


async def _answered(request: web.Request, handler: Handler, metrics: Metrics) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _envelope(error.status, error.reason.lower(), None, None)
    except AsrError as error:
        _LOGGER.warning("%s %s: %s", request.method, request.path, error)
        metrics.refusals.labels(error.code).inc()
        response = _envelope(error.status, str(error), error.param, error.code)
        if error.retryable and error.status in (429, 503):
            response.headers["Retry-After"] = str(error.retry_after)
        return response
    except ConnectionError:
        return web.Response(status=400)  # the client is gone
    except Exception:
        _LOGGER.exception("%s %s failed", request.method, request.path)
        return _envelope(500, "internal error", None, AsrError.code)


def _envelope(status: int, message: str, param: str | None, code: str | None) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": code}}, status=status)
