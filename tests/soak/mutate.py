"""Hostile Wyoming streams, made from honest ones. Pure: the same generator in the same state makes the same bytes."""

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.event import Event, write_event
from wyoming.info import Describe
from wyoming.ping import Ping

from wyoming_qwen_asr.events import MAX_DATA, MAX_HEADER, MAX_PAYLOAD

FORM = (16000, 2, 1)

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 15999, 2**31, 2**63, -(2**63), 10**400),
    *(0.5, 1e308, float("nan"), float("inf")),
    *("", "en", "xx-YY", "\ud800", "\x00", "\n", "../../etc/passwd", "%s%n{}", "ü" * 300, "a" * 5000, "16000"),
    *([], {}, [[]], [None], [1, 2], ["a", "\udfff"], {"text": "\ud800"}, {"text": 1}, {"": {}}, [{"a": [{}]}] * 50),
)
"""Values for any field: of the wrong type, out of range, or right for another field. The lone surrogates are valid
JSON, and no text."""

FIELDS = ("text", "name", "language", "context", "transcript_names", "transcript_terms", "rate", "width", "channels")
"""That the server looks at."""

_ONE = (
    b'{"type":"audio-chunk","data":{"rate":16000,"width":2,"channels":1},"payload_length":4}\nabcd'
    b'{"type":"audio-stop"}\n'
)

KNOWN = (
    b'{"type":"ping","data":{"text":"\\ud800"}}\n',
    b'{"type":"transcribe","data":{"context":{"text":"\\ud800"}}}\n' + _ONE,
    *[_ONE + _ONE + b"!\n"] * 20,
)
"""Streams that broke the server once: text that cannot be written on, and an end that came before its answer began."""

LENGTHS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 100, MAX_DATA, MAX_DATA + 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2**31, 2**32 + 1, 2**63, 10**30),
    *(1.0, 1e999, True, "12", [], {}, None),
)


def wire(*events: Event) -> bytes:
    """Events as bytes, as an honest client writes them."""
    file = io.BytesIO()
    for event in events:
        write_event(event, file)
    return file.getvalue()


def utterance(pcm: bytes, chunk_bytes: int = 2048) -> list[Event]:
    """Every event of one."""
    chunks = [AudioChunk(*FORM, pcm[at : at + chunk_bytes]).event() for at in range(0, len(pcm), chunk_bytes)]
    return [Transcribe().event(), AudioStart(*FORM).event(), *chunks, AudioStop().event()]


@dataclass
class _Draft:
    """An event whose parts may contradict each other. `header` wins over the lengths that are true."""

    kind: Any
    data: Any
    payload: bytes = b""
    header: dict[str, Any] = field(default_factory=dict)
    inline: bool = False
    """Data in the header, as older clients write it."""

    def encode(self) -> bytes:
        header: dict[str, Any] = {"type": self.kind}
        data = b""
        if self.inline:
            header["data"] = self.data
        elif self.data:
            data = json.dumps(self.data).encode()
            header["data_length"] = len(data)
        if self.payload:
            header["payload_length"] = len(self.payload)
        return json.dumps(header | self.header).encode() + b"\n" + data + self.payload


def hostile(rng: Random, pcm: bytes) -> bytes:
    """One stream of a hostile client. Little audio: it is not recognition that is tried here."""
    begin = 2 * rng.randrange(max(1, len(pcm) // 2 - 4000))
    drafts = [
        _Draft(event.type, dict(event.data), event.payload or b"", inline=rng.random() < 0.2)
        for event in _events(rng, pcm[begin : begin + 2 * rng.randint(1, 2000)])
    ]
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 3)):
            rng.choice(_EVENT_MUTATIONS)(rng, drafts)
    stream = b"".join(draft.encode() for draft in drafts)
    if rng.random() < 0.4:
        stream = rng.choice(_BYTE_MUTATIONS)(rng, stream)
    return stream


def _events(rng: Random, pcm: bytes) -> list[Event]:
    """An honest utterance, or honest events in no order."""
    events = utterance(pcm, rng.choice((1, 3, 320, 640, 2048)) if len(pcm) < 100 else 1024)
    others = [Describe().event(), Ping("?").event(), Event("run-pipeline", {"start_stage": "asr"}), Event("")]
    context = Transcribe(language="de", transcript_names=["Küche", "Bad"], context={"text": "Haus"}).event()
    if rng.random() < 0.5:
        events = rng.choices([*events, *others, context], k=rng.randint(1, 12))
    else:
        events[0] = rng.choice([events[0], context])
        events.insert(rng.randrange(len(events) + 1), rng.choice(others))
    return events


def _nasty(rng: Random) -> Any:
    """Of its own: a later mutation may change it."""
    return copy.deepcopy(rng.choice(NASTY))


# --- mutations of events, in place ---------------------------------------------------------------------------


def _replace_field(rng: Random, drafts: list[_Draft]) -> None:
    draft = rng.choice(drafts)
    if isinstance(draft.data, dict) and draft.data:
        draft.data[rng.choice(list(draft.data))] = _nasty(rng)


def _add_field(rng: Random, drafts: list[_Draft]) -> None:
    draft = rng.choice(drafts)
    if isinstance(draft.data, dict):
        draft.data[rng.choice(FIELDS)] = _nasty(rng)


def _replace_data(rng: Random, drafts: list[_Draft]) -> None:
    draft = rng.choice(drafts)
    draft.data = _nasty(rng)
    draft.inline = rng.random() < 0.5


def _replace_type(rng: Random, drafts: list[_Draft]) -> None:
    rng.choice(drafts).kind = _nasty(rng)


def _lie(rng: Random, drafts: list[_Draft]) -> None:
    rng.choice(drafts).header[rng.choice(("data_length", "payload_length"))] = rng.choice(LENGTHS)


def _nest(rng: Random, drafts: list[_Draft]) -> None:
    """JSON in JSON in JSON, in the data: below and above what the parser can take."""
    draft = rng.choice(drafts)
    depth = rng.choice((5, 500, 3000, 30_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nested = b'{"context":' + opening * depth + (b"1" + closing * depth if rng.random() < 0.8 else b"") + b"}"
    draft.data, draft.inline = {}, False
    draft.header["data_length"] = len(nested)
    draft.payload = nested + draft.payload


def _swell(rng: Random, drafts: list[_Draft]) -> None:
    """A header, data or payload at the bound, or just over it."""
    draft = rng.choice(drafts)
    over = rng.choice((-200, 0, 1, 1000))
    match rng.randrange(3):
        case 0:
            draft.header["padding"] = "x" * (MAX_HEADER + over)
        case 1 if rng.random() < 0.2:
            draft.data, draft.inline = {"padding": "x" * (MAX_DATA + over)}, False
        case 2 if rng.random() < 0.05:
            draft.payload = bytes(MAX_PAYLOAD + over)


def _reorder(rng: Random, drafts: list[_Draft]) -> None:
    rng.shuffle(drafts)


def _repeat(rng: Random, drafts: list[_Draft]) -> None:
    at = rng.randrange(len(drafts))
    drafts[at:at] = [drafts[at]] * rng.randint(1, 20)


_EVENT_MUTATIONS: tuple[Callable[[Random, list[_Draft]], None], ...] = (
    *(_replace_field, _replace_field, _add_field, _add_field, _replace_data, _replace_type),
    *(_lie, _lie, _nest, _swell, _reorder, _repeat),
)


# --- mutations of bytes --------------------------------------------------------------------------------------


def _flip_bits(rng: Random, stream: bytes) -> bytes:
    flipped = bytearray(stream)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _truncate(rng: Random, stream: bytes) -> bytes:
    return stream[: rng.randrange(len(stream))]


def _insert(rng: Random, stream: bytes) -> bytes:
    at = rng.randrange(len(stream))
    return stream[:at] + rng.randbytes(rng.randint(1, 50)) + stream[at:]


def _remove(rng: Random, stream: bytes) -> bytes:
    at = rng.randrange(len(stream))
    return stream[:at] + stream[at + rng.randint(1, 50) :]


def _noise(rng: Random, stream: bytes) -> bytes:
    return rng.randbytes(rng.randint(1, 3000))


def _no_lines(rng: Random, stream: bytes) -> bytes:
    return stream.replace(b"\n", b" ") * rng.choice((1, 50))


_BYTE_MUTATIONS: tuple[Callable[[Random, bytes], bytes], ...] = (
    *(_flip_bits, _flip_bits, _truncate, _truncate, _insert, _remove, _noise, _no_lines),
)
