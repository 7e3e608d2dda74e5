"""Wyoming events through one bounded reader, and the messages of the pipe to our own children.

The framing is that of the wyoming package (https://github.com/OHF-Voice/wyoming): one JSON line
`{"type", "data", "data_length", "payload_length"}`, then `data_length` bytes of JSON, then the payload.
The reader there trusts every length and hides errors; this one bounds and checks them, for clients on the
network and for the pipes to the model process alike.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wyoming.event import Event, async_write_event

from .errors import BadRequest, TimedOut

MAX_HEADER = 8 * 1024
"""Bytes of the JSON line. Real headers have about 100; older clients put all data there."""

MAX_DATA = 64 * 1024
"""Bytes of JSON data. The largest real one is a list of bias names; 47 MB of JSON would stop the event loop
for more than a second."""

MAX_PAYLOAD = 1024 * 1024
"""Bytes of audio in one event: 32 s of 16 kHz mono, where clients send 10 to 64 ms."""

Hint = Literal["prefer", "force", "ignore"]
"""What a session's language means; see Settings.language_hint."""

READER_LIMIT = 64 * 1024
"""Buffer limit of an asyncio.StreamReader that `read_event` reads from (twice this is held at most)."""

WRITE_SECONDS = 10.0
"""A peer that takes longer to accept an event is gone or asleep: its connection is closed."""


class BadEvent(BadRequest):
    """What arrived is not a Wyoming event, or exceeds a bound. The stream cannot be read on."""

    code = "bad-event"


async def read_event(reader: asyncio.StreamReader) -> Event | None:
    """The next event; None when the stream ended between two events. Raises BadEvent."""
    try:
        line = await reader.readuntil(b"\n")
        if len(line) > MAX_HEADER:
            raise BadEvent("event header is too long")
        header = _parse_object(line)
        kind = header.get("type")
        if not isinstance(kind, str):
            raise BadEvent("event has no type")
        data = header.get("data")
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise BadEvent("event data is not an object")
        if length := _length(header, "data_length", MAX_DATA):
            data = data | _parse_object(await reader.readexactly(length))
        payload = None
        if length := _length(header, "payload_length", MAX_PAYLOAD):
            payload = await reader.readexactly(length)
        return Event(kind, data, payload)
    except asyncio.LimitOverrunError:
        raise BadEvent("event header is too long") from None
    except asyncio.IncompleteReadError as end:
        if end.partial or end.expected is not None:
            raise BadEvent("stream ended inside an event") from None
        return None


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
        if b"\\u" in text:  # half of a surrogate pair is a str that cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise BadEvent("event is not JSON") from None
    if not isinstance(value, dict):
        raise BadEvent("event is not a JSON object")
    return value


def _length(header: Mapping[str, Any], key: str, bound: int) -> int:
    value = header.get(key)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= bound:
        raise BadEvent(f"{key} is not a number from 0 to {bound}")
    return value


async def write_event(writer: asyncio.StreamWriter, event: Event, seconds: float = WRITE_SECONDS) -> None:
    """Write and drain. Raises TimedOut when the peer does not take it, ConnectionError when it is gone."""
    try:
        async with asyncio.timeout(seconds):
            await async_write_event(event, writer)
    except TimeoutError:
        writer.transport.abort()  # closing would wait for the peer to read the rest
        raise TimedOut("the peer does not read") from None


# --- messages: a dataclass's name, in kebab-case, is the type of its event ---------------------------------

# gateway → model process; each carries the session's number


@dataclass(frozen=True)
class SessionStart:
    """A stream of audio begins. Format as in AudioFormat; language is a Qwen name or None."""

    rate: int
    width: int
    channels: int
    language: str | None
    hint: Hint
    context: str
    heard: str | None = None
    """The language of the segments before, as a Qwen name, when this is a replay."""
    offset: float = 0.0
    """Seconds of the session that came before this audio (a replay starts late)."""
    live: bool = True
    """Somebody is speaking and waits: this goes before files."""


@dataclass(frozen=True)
class SessionAudio:
    """PCM bytes of the session, in the payload."""


@dataclass(frozen=True)
class SessionEnd:
    """No more audio comes: finish."""


@dataclass(frozen=True)
class SessionCancel:
    """Nobody waits any more: forget the session."""


# model process → gateway: results of a session


@dataclass(frozen=True)
class SpeechStarted:
    at: float
    """Seconds from the start of the session."""


@dataclass(frozen=True)
class Partial:
    stable_delta: str
    """Text that will not be taken back, to be appended to what came before."""
    tail: str
    """Unfixed text after it; each Partial replaces the last one's."""


@dataclass(frozen=True)
class Segment:
    text: str
    language: str | None
    start: float
    """Seconds from the start of the session; the audio before `end` is finished with."""
    end: float
    steps: int = 0
    """Decodes of it before its end was known."""
    drafted: int = 0
    """Tokens of hypotheses that the decoder read again in one forward each,"""
    accepted: int = 0
    """and those of them that it would have written again."""
    windows: int = 0
    """Finished windows that were encoded anew, because the loudest moment came after them,"""
    rows: int = 0
    """and rows that the decoder read anew for that or for want of a place in its cache."""


@dataclass(frozen=True)
class SpeechStopped:
    at: float


@dataclass(frozen=True)
class Final:
    text: str
    """All text of the utterance; empty when nobody spoke."""
    language: str | None
    """Qwen's name of it; None when nobody spoke."""


Result = SpeechStarted | Partial | Segment | SpeechStopped | Final


@dataclass(frozen=True)
class SessionError:
    """This session failed; code and message of an AsrError."""

    code: str
    message: str


# any child → gateway: about itself


@dataclass(frozen=True)
class Ready:
    """The model is loaded. `choices` says what was picked for `auto`, and why."""

    seconds: float
    choices: list[str]


@dataclass(frozen=True)
class Working:
    """A sign of progress: a unit of work is done. Said when the sessions change, and at most once a second besides."""

    sessions: list[int]
    """Those that are being computed together from now on; empty when there is nothing to do."""


@dataclass(frozen=True)
class Downloading:
    done: int
    """Bytes."""
    total: int


@dataclass(frozen=True)
class Located:
    """The checkpoint is complete on disk."""

    name: str
    path: str
    languages: list[str]
    """Qwen names."""


@dataclass(frozen=True)
class Failed:
    """The child cannot do its work and exits; code and message of an AsrError."""

    code: str
    message: str


Message = (
    SessionStart
    | SessionAudio
    | SessionEnd
    | SessionCancel
    | Result
    | SessionError
    | Ready
    | Working
    | Downloading
    | Located
    | Failed
)


def _event_type(message: type[Any]) -> str:
    """SessionStart → "session-start"."""
    return "".join("-" + c.lower() if c.isupper() else c for c in message.__name__)[1:]


_MESSAGES = {_event_type(message): message for message in get_args(Message)}

_FIELDS = {kind: get_type_hints(message) for kind, message in _MESSAGES.items()}


def to_event(message: Message, session: int | None = None, payload: bytes | None = None) -> Event:
    """The event that carries a message through a pipe, for one session or for the process."""
    data = asdict(message)
    if session is not None:
        data["session"] = session
    return Event(_event_type(type(message)), data, payload)


def from_event(event: Event) -> tuple[Message, int]:
    """The message of an event and its session's number, 0 for the process. Raises BadEvent."""
    data = dict(event.data)
    session = data.pop("session", 0)
    try:
        message: Message = _MESSAGES[event.type](**data)
    except (KeyError, TypeError):
        raise BadEvent(f"not a message of ours: {event.type!r}") from None
    types = {**_FIELDS[event.type], "session": int}
    if not all(_is_of(value, types[name]) for name, value in (*vars(message).items(), ("session", session))):
        raise BadEvent(f"a message of ours with a wrong value: {event.type!r}")
    return message, session


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the type that a message's field has."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(each, *get_args(hint)) for each in value)
    if get_origin(hint) is UnionType:
        return any(_is_of(value, each) for each in get_args(hint))
    right = isinstance(value, (int, float) if hint is float else hint)
    return right and isinstance(value, bool) == (hint is bool)  # bool is an int to Python
