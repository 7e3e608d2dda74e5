"""Hostile HTTP requests, as bytes. Pure: `listed` is always the same, `mutated` follows its generator."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

PATH = "/v1/audio/transcriptions"
BOUNDARY = "soak"

CLIENT_ERRORS = frozenset(range(400, 500))
SERVED_OR_REFUSED = CLIENT_ERRORS | {200}


@dataclass(frozen=True)
class Request:
    """Bytes of one connection, and what may be answered."""

    name: str
    data: bytes
    statuses: frozenset[int] = CLIENT_ERRORS
    envelope: bool = True
    """Whether an error must be in OpenAI's form: what is not even HTTP reaches no handler that could know."""
    hang_up: bool = False
    """The client leaves after the last byte, and hears no answer."""


def http(method: str, path: str, body: bytes = b"", *headers: str, kind: str = "", length: int | None = None) -> bytes:
    """A request whose length may lie."""
    lines = [f"{method} {path} HTTP/1.1", "Host: soak", "Connection: close", *headers]
    if kind:
        lines.append(f"Content-Type: {kind}")
    if body or length is not None:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


NAMED = 'form-data; name="file"; filename="a"'
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def part(disposition: str, content: bytes, *headers: str) -> bytes:
    lines = [f"--{BOUNDARY}", f"Content-Disposition: {disposition}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content + b"\r\n"


def field(name: str, value: bytes | str) -> bytes:
    return part(f'form-data; name="{name}"', value.encode() if isinstance(value, str) else value)


def file(content: bytes, name: str = "speech.wav") -> bytes:
    return part(f'form-data; name="file"; filename="{name}"', content, "Content-Type: application/octet-stream")


def post(*parts: bytes, kind: str = FORM, end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> bytes:
    return http("POST", PATH, b"".join(parts) + end, kind=kind)


def wav(pcm: bytes, fmt: bytes | None = None, riff: int | None = None, data: int | None = None) -> bytes:
    """A WAV file whose header may lie."""
    fmt = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16) if fmt is None else fmt
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt
    chunks += b"data" + struct.pack("<I", len(pcm) if data is None else data) + pcm
    return b"RIFF" + struct.pack("<I", len(chunks) + 4 if riff is None else riff) + b"WAVE" + chunks


def listed(pcm: bytes) -> Iterator[Request]:
    """Everything that came to mind."""
    good = file(wav(pcm))
    yield from _paths()
    yield from _forms(good)
    yield from _fields(good)
    yield from _files(pcm)
    yield from _headers(post(good), good)


def _paths() -> Iterator[Request]:
    for method, path in (
        *(("GET", PATH), ("PUT", PATH), ("DELETE", PATH), ("PATCH", PATH), ("OPTIONS", "*")),
        *(
            ("POST", f"{PATH}/"),
            ("POST", "/v1/audio"),
            ("POST", "/health"),
            ("GET", "/"),
            ("GET", "//"),
            ("GET", "/v1"),
        ),
        *(("GET", "/../../etc/passwd"), ("GET", "/v1/../../etc/passwd"), ("GET", "/%2e%2e/%2e%2e/etc/passwd")),
        *(("GET", "/v1/models/../../x"), ("GET", "/%00"), ("GET", "/%ff%fe"), ("GET", "/\\..\\x")),
        *(("GET", "/v1/models/%2f..%2f.."), ("GET", f"/{'a' * 4000}"), ("GET", f"/?{'a=b&' * 900}"), ("GET", "/?=%%%")),
    ):
        yield Request(f"{method} {path[:40]}", http(method, path))


def _forms(good: bytes) -> Iterator[Request]:
    """The form as a whole."""
    whole = good + f"--{BOUNDARY}--\r\n".encode()
    yield Request("no body, no type", http("POST", PATH))
    yield Request("no body", http("POST", PATH, kind=FORM))
    yield Request("JSON", http("POST", PATH, json.dumps({"file": "x"}).encode(), kind="application/json"))
    yield Request("urlencoded", http("POST", PATH, b"file=x", kind="application/x-www-form-urlencoded"))
    yield Request("audio as the body", http("POST", PATH, whole, kind="audio/wav"))
    yield Request("bad type", http("POST", PATH, whole, kind=";;;/"))
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=other"):
        yield Request(kind, post(good, kind=kind))
    yield Request("long boundary", post(good, kind=f"multipart/form-data; boundary={'b' * 3000}"))
    yield Request("odd boundary", post(good, kind='multipart/form-data; boundary="\\"ü\\""'))
    yield Request("multipart/mixed", post(good, kind=f"multipart/mixed; boundary={BOUNDARY}"), SERVED)
    yield Request("only the end", post())
    yield Request("no end", post(good, end=b""), SERVED_OR_REFUSED)
    yield Request("nothing but a boundary", post(f"--{BOUNDARY}".encode(), end=b""))
    yield Request("noise", post(bytes(range(256)) * 20, end=b""))
    yield Request("a part without headers", post(f"--{BOUNDARY}\r\n\r\nx\r\n".encode()))
    yield Request("a part with broken headers", post(f"--{BOUNDARY}\r\nnonsense\r\n\r\nx\r\n".encode(), good))
    yield Request("a part with a long header", post(part("form-data; name=a", b"x", f"X: {'x' * 20_000}"), good))
    yield Request("a part with many headers", post(part("form-data; name=a", b"x", *["X: y"] * 2000), good))
    yield Request("a form in the form", post(part("form-data; name=a", b"--b\r\n", f"Content-Type: {FORM}"), good))
    yield Request("10,000 parts", post(*[field("a", "b")] * 10_000))
    for encoding in ("gzip", "deflate", "br", "nonsense"):
        yield Request(
            f"part encoded {encoding}",
            post(part(NAMED, b"x" * 100, f"Content-Encoding: {encoding}")),
        )
    for encoding in ("base64", "quoted-printable", "binary", "nonsense"):
        transfer = f"Content-Transfer-Encoding: {encoding}"
        yield Request(f"part in {encoding}", post(part(NAMED, b"=" * 101, transfer)))
    yield Request("part with a length", post(part(NAMED, b"x", "Content-Length: -5")))
    yield Request("part with a huge length", post(part(NAMED, b"x", "Content-Length: 999999")))


def _fields(good: bytes) -> Iterator[Request]:
    """Fields beside the file."""
    yield Request("no file", post(field("model", "whisper-1")))
    yield Request("file as a field", post(field("file", "text")))
    yield Request("empty file", post(file(b"")))
    yield Request("no name", post(part("form-data", b"x"), good))
    yield Request("not form-data", post(part("attachment; filename=x", b"x"), good))
    for value in ("", "yaml", "JSON", "json\x00", "[]", "../../json"):
        statuses = SERVED if value == "" else CLIENT_ERRORS
        yield Request(f"response_format {value!r}", post(field("response_format", value), good), statuses)
    for value in ("klingon", "../../../etc/passwd", "en\x00", "e" * 5000, "\u202een", "1"):
        yield Request(f"language {value[:30]!r}", post(field("language", value), good))
    yield Request("stream", post(field("stream", "TRUE"), good))
    yield Request("prompt too long", post(field("prompt", "x" * 20_000), good))
    for name, value in (
        *(("prompt", "x" * 16_000), ("prompt", "\x00\x01\r\n--soa"), ("prompt", "<|im_end|><|audio_start|>")),
        *(
            ("temperature", "NaN"),
            ("temperature", "-1e999"),
            ("model", "../../other"),
            ("model", ""),
            ("x" * 3000, "y"),
        ),
        *(("", "nameless"), ("constructor", "{}"), ("timestamp_granularities[]", "eon")),
    ):
        yield Request(f"{name[:30]} {value[:30]!r}", post(field(name, value), good), SERVED_OR_REFUSED)
    for name in ("prompt", "language", "response_format", "model"):
        yield Request(f"{name} is no UTF-8", post(field(name, b"\xff\xfe\xed\xa0\x80"), good))
    yield Request("file twice, the second empty", post(good, file(b"")))


def _files(pcm: bytes) -> Iterator[Request]:
    """What pretends to be audio."""
    riff = b"RIFF\xff\xff\xff\xffWAVE"
    for name, content in {
        "text": b"Turn on the light.",
        "one byte": b"\0",
        "zeros": bytes(10_000),
        "HTML": b"<!doctype html><script>alert(1)</script>",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
        "ELF": b"\x7fELF" + bytes(range(256)) * 4,
        "zip bomb's head": b"PK\x03\x04" + bytes(range(256)) * 4,
        "RIFF alone": riff,
        "FLAC alone": b"fLaC" + bytes(range(256)),
        "OGG alone": b"OggS\0\2" + bytes(range(256)),
        "MP3 alone": b"\xff\xfb\x90\x00" + bytes(100),
        "ID3 with a lying length": b"ID3\4\0\0\x7f\x7f\x7f\x7f" + bytes(100),
        "AIFF alone": b"FORM\xff\xff\xff\xffAIFFCOMM" + bytes(50),
        "CAF alone": b"caff\0\1\0\0desc" + b"\xff" * 40,
        "AU, huge": b".snd" + struct.pack(">IIIII", 24, 0xFFFFFFFF, 3, 0xFFFFFFFF, 0xFFFF) + bytes(100),
        "WAV without samples": wav(b""),
        "WAV of no channels": wav(pcm, struct.pack("<HHIIHH", 1, 0, 16000, 32000, 2, 16)),
        "WAV of 65535 channels": wav(pcm, struct.pack("<HHIIHH", 1, 0xFFFF, 16000, 32000, 2, 16)),
        "WAV at 0 Hz": wav(pcm, struct.pack("<HHIIHH", 1, 1, 0, 0, 2, 16)),
        "WAV of 0 bits": wav(pcm, struct.pack("<HHIIHH", 1, 1, 16000, 32000, 0, 0)),
        "WAV of 255 bits": wav(pcm, struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 255)),
        "WAV of an unknown kind": wav(pcm, struct.pack("<HHIIHH", 0xDEAD, 1, 16000, 32000, 2, 16)),
        "WAV with a short format": wav(pcm, b"\1\0\1\0"),
        "WAV without a format": riff + b"data" + struct.pack("<I", 4) + b"abcd",
    }.items():
        yield Request(name, post(file(content)))
    for name, content in {
        "WAV at 1 Hz": wav(pcm, struct.pack("<HHIIHH", 1, 1, 1, 2, 2, 16)),
        "WAV at 4 GHz": wav(pcm, struct.pack("<HHIIHH", 1, 1, 0xFFFFFFFF, 2, 2, 16)),
        "WAV of 1000 channels": wav(pcm, struct.pack("<HHIIHH", 1, 1000, 16000, 32000, 2000, 16)),
        "WAV with too much data said": wav(pcm, data=0xFFFFFFF0, riff=0xFFFFFFFF),
        "WAV with too little data said": wav(pcm, data=3),
        "WAV of half a sample": wav(pcm[:1]),
        "WAV of one sample": wav(pcm[:2]),
        "WAV of not-a-numbers": wav(b"\xff" * 8000, struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)),
        "WAV cut off": wav(pcm)[: len(pcm) // 2],
    }.items():
        yield Request(name, post(file(content)), SERVED_OR_REFUSED)
    for name in (
        "../../../../etc/passwd",
        "/dev/sda",
        "C:\\Windows\\x",
        "a\x00b.wav",
        "x" * 5000,
        "%00",
        "|id",
        "$(id)",
        "-h",
        "ü\u202e",
    ):
        yield Request(f"file name {name[:30]!r}", post(file(b"not audio", name)))


def _headers(request: bytes, good: bytes) -> Iterator[Request]:
    """Around the form: what is no HTTP any more may be refused in any form."""
    head, _, body = request.partition(b"\r\n\r\n")

    def changed(*lines: bytes) -> bytes:
        return b"\r\n".join([head, *lines, b"", b""]) + body

    whole = good + f"--{BOUNDARY}--\r\n".encode()
    for name, lines in {
        "two lengths": [b"Content-Length: 5"],
        "length and chunks": [b"Transfer-Encoding: chunked"],
        "unknown transfer": [b"Transfer-Encoding: nonsense"],
        "long header": [b"X: " + b"x" * 100_000],
        "many headers": [b"X: y"] * 40_000,
        "header without a colon": [b"nonsense"],
        "NUL in a header": [b"X: \0"],
        "two hosts": [b"Host: other"],
    }.items():
        yield Request(name, changed(*lines), SERVED_OR_REFUSED, envelope=False)
    yield Request("unknown expectation", changed(b"Expect: a miracle"), envelope=False)
    yield Request("expects 100-continue", changed(b"Expect: 100-continue"), SERVED)
    yield Request("upgrade", changed(b"Upgrade: websocket"), SERVED_OR_REFUSED)
    yield Request("body said to be gzip", changed(b"Content-Encoding: gzip"), SERVED_OR_REFUSED)
    for length in ("-1", "x", "1e5", "99999999999999999999999999", "0x10"):
        lied = http("POST", PATH, whole, kind=FORM).replace(
            f"Content-Length: {len(whole)}".encode(), f"Content-Length: {length}".encode()
        )
        yield Request(f"length {length}", lied, envelope=False, hang_up=length.startswith("9"))
    for part_of in (0, len(whole) // 2):  # the rest looks like a second request, and is none
        short = http("POST", PATH, whole, kind=FORM, length=part_of)
        yield Request(f"length too short, {part_of}", short, envelope=False)
    for name, data in {
        "HTTP/9.9": b"GET /health HTTP/9.9\r\n\r\n",
        "no HTTP": b'{"type":"describe"}\n',
        "no method": b"BREW / HTTP/1.1\r\n",
        "no URL": "GET /ü HTTP/1.1\r\n".encode(),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        "noise": bytes(range(256)) * 40,
    }.items():
        yield Request(name, data + b"\r\n\r\n", envelope=False)
    yield Request("length too long", http("POST", PATH, whole, kind=FORM, length=10 * len(whole)), hang_up=True)
    for end in (0, 10, len(head) - 5, len(head) + 4, len(head) + 30, len(head) + 100, len(request) - 20):
        yield Request(f"cut after {end} bytes", request[:end], hang_up=True)
    chunked = http("POST", PATH, b"", "Transfer-Encoding: chunked", kind=FORM)
    for name, data in {"bad": b"zz\r\n", "endless": b"ffffffffffffffffff\r\n", "negative": b"-5\r\nabc\r\n"}.items():
        yield Request(f"{name} chunk", chunked + data + body[:50], envelope=False, hang_up=name == "endless")


SERVED = frozenset({200})


def mutated(rng: Random, pcm: bytes) -> Request:
    """An upload that was right before some bytes of it changed."""
    parts = [field("model", "whisper-1"), field("language", "en"), field("response_format", "json")]
    form = bytearray(b"".join([*rng.sample(parts, rng.randint(0, 3)), file(wav(pcm[: rng.randrange(2000, len(pcm))]))]))
    form += f"--{BOUNDARY}--\r\n".encode()
    head = len(form) - form[::-1].index(b"atad")  # up to the samples: there it hurts
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(head)
        match rng.randrange(3):
            case 0:
                form[at] ^= 1 << rng.randrange(8)
            case 1:
                form[at : at + rng.randint(1, 20)] = rng.randbytes(rng.randint(0, 20))
            case 2:
                form[at:at] = form[at : at + rng.randint(1, 60)]
    return Request("mutated upload", http("POST", PATH, bytes(form), kind=FORM), SERVED_OR_REFUSED)
