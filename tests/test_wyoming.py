"""The Wyoming server as its clients see it: a real server process, a real model process, the stock client."""

import asyncio
import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import soxr
from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import AsrModel, Describe, Info
from wyoming.ping import Ping, Pong

from wyoming_qwen_asr import __version__
from wyoming_qwen_asr.engine.engine import Engine
from wyoming_qwen_asr.events import read_event, write_event
from wyoming_qwen_asr.limits import MAX_CONTEXT_CHARACTERS
from wyoming_qwen_asr.metrics import Metrics
from wyoming_qwen_asr.settings import load
from wyoming_qwen_asr.wyoming.connection import Connection, _context

from .conftest import (
    SECONDS,
    Client,
    Recording,
    Server,
    StartServer,
    UnixClient,
    metric,
    open_sessions,
    send_audio,
    transcribe,
    transcript_of,
)


async def next_event(client: AsyncClient) -> Event | None:
    return await asyncio.wait_for(client.read_event(), SECONDS)


async def refused(client: AsyncClient) -> str:
    """The code of the error that comes next; after it the connection must end."""
    event = await next_event(client)
    assert event is not None, "closed without an error"
    assert Error.is_type(event.type), event
    error = Error.from_event(event)
    assert error.text
    assert await next_event(client) is None, "still open after an error"
    return error.code or ""


async def described(client: AsyncClient) -> AsrModel:
    await client.write_event(Describe().event())
    event = await next_event(client)
    assert event is not None
    (program,) = Info.from_event(event).asr
    assert program.installed
    assert program.version == __version__
    (model,) = program.models
    assert model.installed
    return model


async def test_describe_before_any_model(start_server: StartServer) -> None:
    """Home Assistant learns all it needs while nothing is loaded, and asking loads nothing."""
    server = await start_server()
    async with server.client() as client:
        async with asyncio.timeout(SECONDS):  # the checkpoint is looked at by another process
            while (model := await described(client)).languages != ["en", "de"]:
                await asyncio.sleep(0.1)
        assert model.name == "demo"
        await client.write_event(Ping(text="x").event())
        assert await next_event(client) == Pong(text="x").event()
    assert not server.children("wyoming_qwen_asr.model")


async def test_two_utterances_on_one_connection(server: Server, clear: list[Recording]) -> None:
    async with server.client() as client:
        for recording in (clear[0], clear[7], clear[1]):
            await send_audio(client, recording.pcm, request=Transcribe(language=recording.language).event())
            transcript = await transcript_of(client)
            assert (transcript.text, transcript.language) == (recording.text, recording.language)


async def test_eight_at_once_get_their_own_texts(server: Server, clear: list[Recording]) -> None:
    texts = await asyncio.gather(*(transcribe(server, recording.pcm) for recording in clear))
    assert [t.text for t in texts] == [recording.text for recording in clear]


@pytest.mark.parametrize("chunk_bytes", [7, 320, 333, 65536])
async def test_chunks_may_be_cut_anywhere(server: Server, clear: list[Recording], chunk_bytes: int) -> None:
    async with server.client() as client:
        await send_audio(client, clear[2].pcm, chunk_bytes=chunk_bytes)
        assert (await transcript_of(client)).text == clear[2].text


def _as_format(pcm: bytes, rate: int, width: int, channels: int) -> bytes:
    samples = soxr.resample(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768, 16000, rate)
    samples = np.repeat(samples, channels)
    scale, zero, dtype = (127, 128, "u1") if width == 1 else (2 ** (8 * width - 1) - 256, 0, f"<i{width}")
    return bytes(np.round(samples * scale + zero).astype(dtype))


@pytest.mark.parametrize(
    "form", [(22050, 4, 1), (24000, 2, 2), (32000, 2, 1), (44100, 2, 2), (48000, 4, 2), (16000, 4, 1)]
)
async def test_any_format(server: Server, clear: list[Recording], form: tuple[int, int, int]) -> None:
    async with server.client() as client:
        for recording in clear[:3]:
            await send_audio(client, _as_format(recording.pcm, *form), form)
            assert (await transcript_of(client)).text == recording.text


@pytest.mark.parametrize("form", [(8000, 2, 1), (16000, 1, 1)])
async def test_narrow_formats(server: Server, clear: list[Recording], form: tuple[int, int, int]) -> None:
    """The demo model has never heard a telephone, nor 8-bit noise: something is heard, nothing fails."""
    async with server.client() as client:
        await send_audio(client, _as_format(clear[0].pcm, *form), form)
        assert (await transcript_of(client)).text


def _quiet() -> Iterable[tuple[str, bytes]]:
    noise = np.random.default_rng(0).normal(size=48000)
    yield "nothing", b""
    yield "one sample", b"\0\0"
    yield "digital silence", bytes(64000)
    for level in (0.001, 0.01, 0.03):
        yield f"noise at {20 * np.log10(level):.0f} dBFS", (noise * level * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("language", [None, "en", "de"])
@pytest.mark.parametrize(("what", "pcm"), list(_quiet()))
async def test_no_speech_is_no_text(server: Server, what: str, pcm: bytes, language: str | None) -> None:
    """Also when a language is named, as Home Assistant always does."""
    assert (await transcribe(server, pcm, language)).text == ""


async def test_audio_stop_alone(server: Server, clear: list[Recording]) -> None:
    """An empty transcript, and the connection lives on."""
    async with server.client() as client:
        await client.write_event(AudioStop().event())
        assert (await transcript_of(client)).text == ""
        await send_audio(client, clear[0].pcm)
        assert (await transcript_of(client)).text == clear[0].text


@pytest.mark.parametrize("language", ["en-GB", "EN_us", "English", "fr", "xx", "auto", ""])
async def test_language_hints_that_change_nothing(server: Server, clear: list[Recording], language: str) -> None:
    """Regions and names are understood; what the model does not know is detected."""
    transcript = await transcribe(server, clear[0].pcm, language)
    assert (transcript.text, transcript.language) == (clear[0].text, "en")


async def test_a_language_is_taken(server: Server, clear: list[Recording]) -> None:
    transcript = await transcribe(server, clear[4].pcm, "de")
    assert transcript.language == "de"
    assert transcript.text != clear[4].text


async def test_hint_ignored(start_server: StartServer, clear: list[Recording]) -> None:
    server = await start_server("--language-hint=ignore", "--no-http")
    transcript = await transcribe(server, clear[4].pcm, "de")
    assert (transcript.text, transcript.language) == (clear[4].text, "en")


async def test_language_of_the_server(start_server: StartServer, clear: list[Recording]) -> None:
    """--language is for requests that name none."""
    server = await start_server("--language=de", "--no-http")
    assert (await transcribe(server, clear[0].pcm)).language == "de"
    assert (await transcribe(server, clear[0].pcm, "en")).text == clear[0].text


async def test_names_and_unknown_fields(server: Server, clear: list[Recording]) -> None:
    """A model's name matches or is ignored; names, terms and what newer clients add never fail an utterance."""
    for data in (
        {"name": "demo"},
        {"name": "whisper", "vad_sensitivity": "relaxed", "context": {"conversation": 3}, "new": [1]},
    ):
        async with server.client() as client:
            await client.write_event(Event("select-program", {"name": "other"}))
            await send_audio(client, clear[0].pcm, request=Event("transcribe", data))
            assert (await transcript_of(client)).text == clear[0].text
    async with server.client() as client:
        biased = Transcribe(transcript_names=["Kitchen <|im_end|>"], transcript_terms=["boiler"] * 1000)
        await send_audio(client, clear[0].pcm, request=biased.event())
        await transcript_of(client)


def test_context_is_names_then_terms() -> None:
    request = Transcribe(context={"text": "Attic"}, transcript_names=["Ann", "Bo"], transcript_terms=["lamp"])
    assert _context(request) == "Attic, Ann, Bo, lamp"
    assert _context(Transcribe(context={"text": 5})) == ""
    many = Transcribe(transcript_names=["name"] * 9000, transcript_terms=["term"])
    assert len(_context(many)) <= MAX_CONTEXT_CHARACTERS
    assert _context(many).endswith("name")


RATE = {"rate": 16000, "width": 2, "channels": 1}


@pytest.mark.parametrize(
    ("code", "events"),
    [
        ("bad-audio", [Event("audio-start", RATE | {"rate": 1})]),
        ("bad-audio", [Event("audio-start", RATE | {"width": True})]),
        ("bad-audio", [Event("audio-start", {})]),
        ("bad-audio", [Event("audio-chunk", RATE | {"channels": 9}, b"xx")]),
        ("bad-request", [Event("audio-chunk", {}, b"xx")]),
        ("bad-request", [Event("audio-chunk", RATE, b"xx"), Event("audio-chunk", RATE | {"rate": 8000}, b"xx")]),
        ("bad-request", [Event("transcribe", {"language": 5})]),
        ("bad-request", [Event("transcribe", {"transcript_names": "Ann"})]),
        ("bad-request", [Event("transcribe", {"context": "Ann"})]),
        ("bad-request", [Event("ping", {"text": {}})]),
    ],
)
async def test_bad_events_are_told(server: Server, code: str, events: list[Event]) -> None:
    async with server.client() as client:
        for event in events:
            await client.write_event(event)
        assert await refused(client) == code


@pytest.mark.parametrize("line", [b"hello\n", b'{"type":"audio-chunk","payload_length":8000000000}\n', b"{" * 100_000])
async def test_what_is_not_wyoming_is_told(server: Server, line: bytes) -> None:
    async with server.client() as client:
        assert client._writer is not None
        client._writer.write(line)
        assert await refused(client) == "bad-event"


async def test_an_error_is_seen_by_a_client_that_keeps_sending(server: Server) -> None:
    """Closing at once would reset the connection, and the error would be lost."""
    async with server.client() as client:
        await client.write_event(AudioStart(1, 2, 1).event())
        for _ in range(200):
            await client.write_event(AudioChunk(16000, 2, 1, bytes(20_000)).event())
        assert await refused(client) == "bad-audio"


async def test_too_long(server: Server) -> None:
    async with server.client() as client:
        await client.write_event(AudioStart(16000, 2, 1).event())
        for _ in range(601):
            await client.write_event(AudioChunk(16000, 2, 1, bytes(32_000)).event())
        assert await refused(client) == "too-large"


async def test_describe_while_an_utterance_is_recognised(server: Server, clear: list[Recording]) -> None:
    """On the same connection: the answer to `describe` comes first."""
    async with server.client() as client:
        await send_audio(client, b"".join(r.pcm for r in clear))
        await described(client)
        assert (await transcript_of(client)).text


async def test_a_client_may_close_its_half(server: Server, clear: list[Recording]) -> None:
    """Like `nc -N`: all audio is sent, the connection half closed, the transcript still comes."""
    async with server.client() as client:
        await send_audio(client, clear[0].pcm)
        assert client._writer is not None
        client._writer.write_eof()
        assert (await transcript_of(client)).text == clear[0].text
        assert await next_event(client) is None


async def test_an_utterance_that_begins_anew(server: Server, clear: list[Recording]) -> None:
    """A second `audio-start` gives up what came after the first."""
    async with server.client() as client:
        await client.write_event(AudioStart(48000, 2, 2).event())
        await client.write_event(AudioChunk(48000, 2, 2, clear[1].pcm[:40000]).event())
        await send_audio(client, clear[0].pcm)
        assert (await transcript_of(client)).text == clear[0].text


async def test_a_session_is_closed_whatever_ends_the_connection(server: Server, clear: list[Recording]) -> None:
    """An utterance behind another one, then garbage and the end of the stream, all at once."""
    for _ in range(3):
        async with server.client() as client:
            await send_audio(client, clear[0].pcm)
            await send_audio(client, clear[1].pcm)
            assert client._writer is not None
            client._writer.write(b"junk\n")
            client._writer.write_eof()
            while await next_event(client):
                pass
    async with asyncio.timeout(SECONDS):
        while await open_sessions(server):
            await asyncio.sleep(0.1)


async def test_a_client_that_cannot_be_reached() -> None:
    """The kernel's ETIMEDOUT is Python's TimeoutError too; it ends the connection, also in mid-utterance."""
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        metrics = Metrics()
        connection = Connection(Engine(load([], {}), metrics), metrics, reader, writer, "gone")
        connection._answer = asyncio.create_task(asyncio.sleep(SECONDS))
        reader.set_exception(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
        async with asyncio.timeout(5):
            await connection.run()


async def test_a_client_that_is_gone_when_its_error_comes() -> None:
    """That the connection was reset is looked at, or asyncio's log would call it an error, sooner or later."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    metrics = Metrics()
    theirs.sendall(b'{"type":')
    theirs.close()
    async with asyncio.timeout(5):
        await Connection(Engine(load([], {}), metrics), metrics, reader, writer, "gone").run()
    closed = writer._protocol._closed  # type: ignore[attr-defined]
    assert isinstance(closed.exception() if not closed._log_traceback else None, BrokenPipeError)


async def test_sessions_are_bounded(start_server: StartServer, clear: list[Recording]) -> None:
    """The one too many is told so, in its own dialect; the others are served; a place that becomes free is given."""
    server = await start_server("--max-sessions=3")
    clients: list[Client] = []
    try:
        for _ in range(4):
            client = server.client()
            await client.connect()
            clients.append(client)
            await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
            await described(client) if len(clients) <= 3 else None
        assert await refused(clients[-1]) == "busy"
        url = f"{server.http}/v1/audio/transcriptions"
        async with aiohttp.ClientSession() as http, http.post(url, data={"file": clear[0].path.open("rb")}) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "5")
            assert (await answer.json())["error"]["type"] == "rate_limit_error"
        await clients[0].disconnect()
        for client in clients[1:-1]:
            await client.write_event(AudioStop().event())
        for client in clients[1:-1]:
            assert (await transcript_of(client)).text == clear[0].text
        assert (await transcribe(server, clear[1].pcm)).text == clear[1].text
    finally:
        for client in clients:
            await client.disconnect()
    assert await metric(server, "qwen_asr_refusals_total", code="busy") == 2


async def test_sessions_of_an_address_are_bounded(start_server: StartServer, clear: list[Recording]) -> None:
    """Over both protocols together; another address still gets its own."""
    server = await start_server("--max-sessions-per-address=1", "--uri=tcp://0.0.0.0:0")
    async with server.client() as first, server.client() as second:
        await first.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
        await described(first)
        await second.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
        assert await refused(second) == "busy"
        url = f"{server.http}/v1/audio/transcriptions"
        async with aiohttp.ClientSession() as http, http.post(url, data={"file": clear[0].path.open("rb")}) as answer:
            assert answer.status == 429
            assert "address" in (await answer.json())["error"]["message"]
        other = Client("127.0.0.1", server.port)
        streams = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
        other._reader, other._writer = streams
        await send_audio(other, clear[1].pcm)
        assert (await transcript_of(other)).text == clear[1].text
        await other.disconnect()
        await first.write_event(AudioStop().event())
        assert (await transcript_of(first)).text == clear[0].text


async def silent_connections(port: int, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]


async def test_the_longest_silent_connection_gives_way(start_server: StartServer, clear: list[Recording]) -> None:
    """At the limit a new connection is served; who has a session keeps it, and who spoke last leaves last."""
    server = await start_server("--max-connections=4")
    async with server.client() as speaking, server.client() as quiet, server.client() as quieter:
        await quiet.write_event(Ping().event())
        await next_event(quiet)
        await speaking.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
        await described(speaking)
        await described(quieter)
        await described(quiet)
        async with server.client() as fourth, server.client() as fifth:
            await described(fourth)
            await described(fifth)
            assert await next_event(quieter) is None
            await described(quiet)
            await speaking.write_event(AudioStop().event())
            assert (await transcript_of(speaking)).text == clear[0].text
    assert await metric(server, "qwen_asr_connections_gave_way_total") == 1


async def test_connections_that_all_have_a_session(start_server: StartServer, clear: list[Recording]) -> None:
    """None of them gives way: the new one is told."""
    server = await start_server("--max-connections=2", "--no-http")
    async with server.client() as first, server.client() as second:
        for client in (first, second):
            await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
            await described(client)
        async with server.client() as third:
            assert await refused(third) == "busy"
        for client in (first, second):
            await client.write_event(AudioStop().event())
            assert (await transcript_of(client)).text == clear[0].text


async def test_400_silent_connections_and_8_gigabytes(server: Server, clear: list[Recording]) -> None:
    """Announced, that is: each is a few bytes of ours. An honest client is served all the while."""
    process = psutil.Process(server.process.pid)
    assert (await transcribe(server, clear[0].pcm)).text == clear[0].text
    before = process.memory_info().rss
    silent = await silent_connections(server.port, 200)
    for _, writer in silent[-50:]:
        writer.write(b'{"type":"audio-chunk","payload_length":8000000000}\n')
    silent += await silent_connections(server.port, 150)
    for _, writer in silent[-50:]:
        writer.write(b'{"type":"audio-chunk","data":{"rate":16000,"width":2,"channels":1},"payload_length":1048576}\n')
    silent += await silent_connections(server.port, 50)
    try:
        for recording in clear[:3]:
            assert (await transcribe(server, recording.pcm)).text == recording.text
        assert process.num_fds() < 150, "connections are not bounded"
        assert process.memory_info().rss - before < 20e6
    finally:
        for _, writer in silent:
            writer.close()


async def test_a_client_that_does_not_read(server: Server) -> None:
    """It asks and asks; once our answers fill the network's buffers, it is closed."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(SECONDS):
            while True:
                writer.write(b'{"type":"describe"}\n' * 1000)
                await writer.drain()
    writer.close()
    await server.logged(r"the peer does not read")


async def test_clients_that_vanish(server: Server, clear: list[Recording]) -> None:
    """In mid-utterance, with or without a reset; and after it, with one: the session is closed, long before its end."""
    pcm = b"".join(recording.pcm for recording in clear) * 2
    for whole, reset in ((False, False), (False, True), (True, True)):
        client = server.client()
        await client.connect()
        assert client._writer is not None
        await send_audio(client, pcm) if whole else await client.write_event(
            AudioChunk(16000, 2, 1, pcm[:900_000]).event()
        )
        await described(client)
        assert await open_sessions(server) == 1
        if reset:
            linger = struct.pack("ii", 1, 0)
            client._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client._writer.close()
        async with asyncio.timeout(10):
            while await open_sessions(server):
                await asyncio.sleep(0.05)
    await server.logged("outcome=cancelled", count=3)


async def test_audio_that_comes_faster_than_it_is_recognised(start_server: StartServer, clear: list[Recording]) -> None:
    """The reading stops, and goes on: nothing is lost, and no more than a minute is kept."""
    server = await start_server()
    pcm = b"".join(recording.pcm + bytes(16000) for recording in [clear[0], clear[2]] * 24)
    assert len(pcm) > 80 * 32000
    async with server.client() as client:
        sending = asyncio.create_task(send_audio(client, pcm))
        most = 0.0
        while not sending.done():
            most = max(most, await metric(server, "qwen_asr_retained_bytes"))
            await asyncio.sleep(0.05)
        transcript = await transcript_of(client)
    assert transcript.text.count("intercom") >= 20
    assert 0 < most < 61 * 32000
    assert await metric(server, "qwen_asr_retained_bytes") == 0


async def test_unix_socket(start_server: StartServer, clear: list[Recording], tmp_path: Path) -> None:
    """Beside a TCP port; a socket that a killed server left behind is replaced, and ours is removed."""
    path = tmp_path / "asr.sock"
    killed = await start_server(f"--uri=unix://{path}", "--no-http")
    await killed.logged("Wyoming at unix")
    await killed.kill()
    assert path.is_socket()
    both = await start_server(f"--uri=unix://{path}", "--uri=tcp://127.0.0.1:0", "--no-http")
    await both.logged("Wyoming at tcp")
    for _ in range(2):
        async with UnixClient(str(path)) as client:
            await send_audio(client, clear[0].pcm)
            assert (await transcript_of(client)).text == clear[0].text
    await both.stop()
    assert not path.exists()


async def stdio(stdin: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    """A server whose client is its parent."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wyoming_qwen_asr", "--uri=stdio://", "--no-http", "--model=demo", "--dtype=float32"),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_stdio(clear: list[Recording]) -> None:
    """Any program can start the server as its child; it leaves, its work done, when its stdin ends."""
    process = await stdio()
    assert process.stdin is not None
    assert process.stdout is not None
    client = Client("", 0)
    client._reader, client._writer = process.stdout, process.stdin
    await send_audio(client, clear[0].pcm)
    process.stdin.close()
    async with asyncio.timeout(SECONDS):
        assert (await transcript_of(client)).text == clear[0].text
        assert await process.stdout.read() == b""
        assert await process.wait() == 0


async def test_stdio_is_left_on_sigterm() -> None:
    """At once, although stdin is open."""
    process = await stdio()
    assert process.stdin is not None
    assert process.stdout is not None
    await write_event(process.stdin, Describe().event())
    assert await read_event(process.stdout) is not None
    process.terminate()
    async with asyncio.timeout(10):
        _, log = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in log


async def test_stdio_that_is_no_pipe() -> None:
    process = await stdio(asyncio.subprocess.DEVNULL)
    _, log = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == 1
    assert log.splitlines()[-1] == (b"wyoming-qwen-asr: cannot serve at stdio://: it is neither a pipe nor a terminal")
