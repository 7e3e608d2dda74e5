"""The one reader of events: Wyoming's framing both ways, every bound, and nothing but BadEvent for what is wrong."""

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, get_args, get_type_hints

import pytest
import wyoming.event
from hypothesis import given, settings
from hypothesis import strategies as st
from wyoming.event import Event

from wyoming_qwen_asr import events
from wyoming_qwen_asr.errors import TimedOut
from wyoming_qwen_asr.events import (
    MAX_DATA,
    MAX_HEADER,
    MAX_PAYLOAD,
    READER_LIMIT,
    BadEvent,
    Final,
    Message,
    SessionStart,
    from_event,
    read_event,
    to_event,
    write_event,
)

property_test = settings(deadline=None, derandomize=True)

ReadEvent = Callable[[asyncio.StreamReader], Coroutine[Any, Any, Event | None]]


def written(event: Event) -> bytes:
    """An event as the wyoming package writes it."""
    stream = io.BytesIO()
    wyoming.event.write_event(event, stream)
    return stream.getvalue()


def read_all(stream: bytes, read: ReadEvent = read_event) -> list[Event]:
    """All events of a stream that ends. Raises what the reader raises."""

    async def reading() -> list[Event]:
        reader = asyncio.StreamReader(limit=READER_LIMIT)
        reader.feed_data(stream)
        reader.feed_eof()
        found = []
        while event := await read(reader):
            found.append(event)
        return found

    return asyncio.run(reading())


def refused(stream: bytes) -> str:
    with pytest.raises(BadEvent) as caught:
        read_all(stream)
    return str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.builds(
    Event, st.text(), st.dictionaries(st.text(), JSON, max_size=3), st.none() | st.binary(min_size=1, max_size=99)
)


@property_test
@given(st.lists(EVENTS, max_size=4))
def test_reads_what_wyoming_writes(sent: list[Event]) -> None:
    stream = b"".join(map(written, sent))
    assert read_all(stream) == sent == read_all(stream, wyoming.event.async_read_event)


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamWriter]]:
    """A socket pair: reader and writer of one end, and the writer of the other, which reads for nobody."""
    left, right = socket.socketpair()
    reader, other = await asyncio.open_connection(sock=left, limit=READER_LIMIT)
    _, writer = await asyncio.open_connection(sock=right)
    try:
        yield reader, writer, other
    finally:
        for each in (writer, other):
            each.transport.abort()


@pytest.mark.parametrize("read", [read_event, wyoming.event.async_read_event])
@pytest.mark.parametrize("write", [write_event, lambda w, e: wyoming.event.async_write_event(e, w)])
async def test_both_readers_and_writers_agree(read: ReadEvent, write: Callable[..., Any]) -> None:
    sent = [
        Event("describe"),
        Event(
            "transcribe", {"language": "de", "names": ["Küche", "客厅", "\u2028"], "none": None, "n": [1, {"x": 0.5}]}
        ),
        Event("audio-chunk", {"rate": 16000, "width": 2, "channels": 1}, bytes(range(256)) * 40),
    ]
    async with connection() as (reader, writer, _):
        for event in sent:
            await write(writer, event)
            assert await asyncio.wait_for(read(reader), 10) == event
        writer.close()
        assert await asyncio.wait_for(read(reader), 10) is None


def test_data_in_the_header() -> None:
    """As older clients send it; what follows the header wins."""
    assert read_all(b'{"type": "a", "data": {"x": 1, "y": 1}, "data_length": 8}\n{"x": 2}') == [
        Event("a", {"x": 2, "y": 1})
    ]
    assert read_all(b'{"type": "a", "data": {"x": 1}, "more": 1}\n') == [Event("a", {"x": 1})]
    assert read_all(b'{"type": "a", "data": null, "data_length": null, "payload_length": 0}\n') == [Event("a")]


def header(**fields: Any) -> bytes:
    return json.dumps({"type": "a", **fields}).encode() + b"\n"


def padded(size: int) -> bytes:
    """A JSON object of so many bytes."""
    return b'{"type":"a"' + b" " * (size - 12) + b"}"


def test_bounds_are_inclusive() -> None:
    """What is exactly as large as allowed is read; one byte more is refused, before it arrives."""
    assert read_all(padded(MAX_HEADER - 1) + b"\n") == [Event("a")]
    assert refused(padded(MAX_HEADER) + b"\n") == "event header is too long"
    assert read_all(header(data_length=MAX_DATA) + padded(MAX_DATA)) == [Event("a", {"type": "a"})]
    assert refused(header(data_length=MAX_DATA + 1)) == f"data_length is not a number from 0 to {MAX_DATA}"
    assert read_all(header(payload_length=MAX_PAYLOAD) + bytes(MAX_PAYLOAD)) == [Event("a", {}, bytes(MAX_PAYLOAD))]
    assert refused(header(payload_length=MAX_PAYLOAD + 1)) == f"payload_length is not a number from 0 to {MAX_PAYLOAD}"


async def test_a_header_without_an_end_is_refused_before_its_end() -> None:
    reader = asyncio.StreamReader(limit=READER_LIMIT)
    reader.feed_data(b" " * (READER_LIMIT + 1))
    with pytest.raises(BadEvent, match="too long"):
        await asyncio.wait_for(read_event(reader), 10)


@pytest.mark.parametrize("key", ["data_length", "payload_length"])
@pytest.mark.parametrize("length", [-1, 10**30, True, False, 1.0, 0.5, float("nan"), "1", "", [], [1], {}])
def test_lengths_that_are_none(key: str, length: Any) -> None:
    assert refused(header(**{key: length}) + b"{}").startswith(key)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (b"\n", "event is not JSON"),
        (b"hello\n", "event is not JSON"),
        (b"GET / HTTP/1.1\r\n", "event is not JSON"),
        (b'{"type": "a"\n', "event is not JSON"),
        (b'{"type": "\xff"}\n', "event is not JSON"),
        (b'{"type": "\xed\xa0\x80"}\n', "event is not JSON"),
        ('{"type": "a"}'.encode("utf-16-le").replace(b"\n", b"") + b"\n", "event is not JSON"),
        (b'\xef\xbb\xbf{"type": "a"}\n', "event is not JSON"),
        (b'{"type": "\\ud800"}\n', "event is not JSON"),
        (b'{"type": "a", "data": {"x": ["\\udfff"]}}\n', "event is not JSON"),
        (b"9" * 5000 + b"\n", "event is not JSON"),
        (b"[" * 5000 + b"\n", "event is not JSON"),
        (header(data_length=60_000) + b"[" * 60_000, "event is not JSON"),
        (header(data_length=60_000) + b'{"a":' * 12_000, "event is not JSON"),
        (b"[]\n", "event is not a JSON object"),
        (b"null\n", "event is not a JSON object"),
        (header(data_length=2) + b"[]", "event is not a JSON object"),
        (header(data_length=4) + b"null", "event is not a JSON object"),
        (b"{}\n", "event has no type"),
        (b'{"type": null}\n', "event has no type"),
        (b'{"type": 1}\n', "event has no type"),
        (b'{"type": ["a"]}\n', "event has no type"),
        *((header(data=data), "event data is not an object") for data in ([], [1], "", "a", 0, 1, False)),
    ],
)
def test_what_is_no_event(stream: bytes, said: str) -> None:
    assert refused(stream) == said
    assert refused(written(Event("ok", {"x": 1}, b"12")) + stream) == said


def test_escaped_characters_are_read() -> None:
    """Half of a surrogate pair is refused, for it could not be written again; whole pairs are characters."""
    assert read_all(b'{"type": "\\ud83d\\ude00\\u00fc\\\\u"}\n') == [Event("😀ü\\u")]


def test_truncated_at_every_byte() -> None:
    stream = written(Event("audio-chunk", {"rate": 16000}, b"12345678"))
    assert read_all(b"") == []
    for end in range(1, len(stream)):
        assert refused(stream[:end]) == "stream ended inside an event"


@property_test
@given(
    st.lists(EVENTS, min_size=1, max_size=3).map(lambda sent: b"".join(map(written, sent))) | st.binary(),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.binary(max_size=3)), max_size=4),
)
def test_damaged_streams(stream: bytes, damages: list[tuple[int, int, bytes]]) -> None:
    """Any bytes are events, which can be written again, or a BadEvent."""
    for at, deleted, inserted in damages:
        stream = stream[:at] + inserted + stream[at + deleted :]
    try:
        found = read_all(stream)
    except BadEvent:
        return
    for event in found:
        written(event)


async def flood(writer: asyncio.StreamWriter, seconds: float) -> None:
    """More than any buffer holds."""
    for _ in range(100):
        await write_event(writer, Event("audio-chunk", {}, bytes(MAX_PAYLOAD)), seconds)


async def test_a_peer_that_does_not_read() -> None:
    """TimedOut, and the connection is given up: nothing waits for the peer to read the rest one day."""
    async with connection() as (_, writer, _other):
        with pytest.raises(TimedOut):
            await flood(writer, 0.2)
        await asyncio.wait_for(writer.wait_closed(), 10)
        assert writer.transport.get_write_buffer_size() == 0


async def test_a_peer_that_is_gone() -> None:
    async with connection() as (_, writer, other):
        other.transport.abort()
        with pytest.raises(ConnectionError):
            await flood(writer, 10)


# --- messages ------------------------------------------------------------------------------------------------

MESSAGES: tuple[type[Any], ...] = get_args(Message)


def any_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any message of a kind; not-a-number would not equal itself."""
    hints = get_type_hints(kind)
    return st.builds(
        kind, **{n: st.floats(allow_nan=False) if h is float else st.from_type(h) for n, h in hints.items()}
    )


@property_test
@given(st.one_of([any_of(kind) for kind in MESSAGES]), st.none() | st.integers(0), st.none() | st.binary(min_size=1))
def test_messages_pass_the_pipe(message: Message, session: int | None, payload: bytes | None) -> None:
    (event,) = read_all(written(to_event(message, session, payload)))
    assert from_event(event) == (message, session or 0)
    assert event.payload == payload


def test_every_message_has_a_type_of_its_own() -> None:
    assert len(MESSAGES) == len(events._MESSAGES) == 15
    assert to_event(Final("", None)).type == "final"
    assert to_event(SessionStart(16000, 2, 1, None, "prefer", "")).type == "session-start"


START = {"rate": 16000, "width": 2, "channels": 1, "language": None, "hint": "prefer", "context": "", "offset": 0}


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("", {}),
        ("Final", {"text": "", "language": None}),
        ("describe", {}),
        ("final", {}),
        ("final", {"text": ""}),
        ("final", {"text": "", "language": None, "more": 1}),
        ("final", {"text": None, "language": None}),
        ("final", {"text": "", "language": 1}),
        ("final", {"text": "", "language": None, "session": None}),
        ("final", {"text": "", "language": None, "session": "1"}),
        ("final", {"text": "", "language": None, "session": True}),
        ("final", {"text": "", "language": None, "session": []}),
        ("speech-started", {"at": "0"}),
        ("speech-started", {"at": True}),
        ("located", {"name": "", "path": "", "languages": "English"}),
        ("located", {"name": "", "path": "", "languages": ["English", 1]}),
        ("session-start", {**START, "rate": 16000.0}),
        ("session-start", {**START, "hint": "maybe"}),
        ("session-start", {**START, "hint": []}),
    ],
)
def test_what_is_no_message(kind: str, data: dict[str, Any]) -> None:
    assert from_event(Event("session-start", dict(START)))[1] == 0
    with pytest.raises(BadEvent):
        from_event(Event(kind, data))
