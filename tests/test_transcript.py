"""Text that streams: what clients of the Wyoming port see of it. `tests.fake_model` says a word for each tenth of a
second of audio, and a segment after eight of them."""

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info

from wyoming_qwen_asr.events import read_event
from wyoming_qwen_asr.wyoming.transcript import Answer

from .conftest import (
    SECONDS,
    Client,
    Recording,
    Server,
    StartServer,
    answer_of,
    metric,
    send_audio,
    serving,
    transcript_of,
)
from .fake_model import WORDS, streamed_text, words_of

ROOT = Path(__file__).parent.parent
FORM = (16000, 2, 1)
REQUEST = Transcribe(context={"text": "partials"}).event()


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("streaming")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_MODEL": str(folder)}
    async with serving(environ=environ, module="tests.fake_server") as running:
        yield running


@pytest.fixture
def pcm(clear: list[Recording]) -> bytes:
    """More than three segments, and a word that is not whole."""
    audio = b"".join(recording.pcm for recording in clear)[: 2 * 16000 * 3 + 500]
    assert len(words_of(audio)) > 3 * WORDS
    return audio


async def speak(client: Client, pcm: bytes, request: Event = REQUEST, until: int | None = None) -> None:
    """Say all but the end of an utterance, and wait until so many words of it have been heard: by default all but the
    last whole one, of which the server may keep a part until the end."""
    await client.write_event(request)
    await client.write_event(AudioStart(*FORM).event())
    for at in range(0, len(pcm), 1600):
        await client.write_event(AudioChunk(*FORM, pcm[at : at + 1600]).event())
        await asyncio.sleep(0)
    words = len(words_of(pcm, ended=False)) - 1 if until is None else until
    async with asyncio.timeout(SECONDS):
        while len("".join(client.chunks or []).split()) < words:
            await asyncio.sleep(0.01)


async def test_words_come_while_they_are_spoken(server: Server, pcm: bytes) -> None:
    """All but the last ones before the audio ends, twice on a connection."""
    async with server.client() as client:
        for audio in (pcm, pcm[3200:]):
            hearing = asyncio.create_task(transcript_of(client))
            await speak(client, audio)
            assert " ".join(words_of(audio, ended=False)).startswith("".join(client.chunks or []))
            assert len(client.chunks or []) > 3
            await client.write_event(AudioStop().event())
            transcript = await hearing
            assert (transcript.text, transcript.language) == (streamed_text(audio), "en")
    line = (await server.logged(r"utterance id=\d+ .*", 2))[0]
    words, segments = len(words_of(pcm[3200:])), -(-len(words_of(pcm[3200:])) // WORDS)
    assert f" steps={words} acceptance=0.90 windows={segments} rows={2 * segments} replays=0 retracted=0 " in line


async def test_a_text_that_does_not_stream_is_one_chunk(server: Server, pcm: bytes) -> None:
    """And none when nobody has spoken."""
    async with server.client() as client:
        await send_audio(client, pcm)
        transcript = await transcript_of(client)
        assert client.heard == [transcript.text]
        await client.write_event(AudioStop().event())
        assert (await transcript_of(client)).text == ""
        assert client.heard == []


async def test_the_language_is_told_at_the_start_when_it_is_known(server: Server, pcm: bytes) -> None:
    for request, known in ((REQUEST, [None, "en"]), (Transcribe().event(), ["en"])):
        async with AsyncTcpClient("127.0.0.1", server.port) as client:
            await send_audio(client, pcm, request=request)
            events = await until_stop(client)
        assert events[0].type == "transcript-start"
        assert events[0].data.get("language") in known
        assert events[-2].data["language"] == "en"


async def until_stop(client: AsyncTcpClient) -> list[Event]:
    """Events up to the end of a transcript, or of the connection."""
    events = []
    async with asyncio.timeout(SECONDS):
        while event := await client.read_event():
            events.append(event)
            if event.type == "transcript-stop":
                break
    return events


@pytest.mark.parametrize("words", [1, WORDS - 1, WORDS + 1, 2 * WORDS + 3])
async def test_a_replay_in_mid_stream(server: Server, pcm: bytes, tmp_path: Path, words: int) -> None:
    """What was streamed is not said again, and nothing is left out; the client notices nothing."""
    replayed = server.log.count("replays=1")
    request = Transcribe(context={"text": f"kill {words} {tmp_path / uuid.uuid4().hex} partials"})
    async with server.client() as client:
        hearing = asyncio.create_task(transcript_of(client))
        await speak(client, pcm, request.event())
        await client.write_event(AudioStop().event())
        assert (await hearing).text == streamed_text(pcm)
    assert "retracted=0 " in (await server.logged(r"replays=1 .*", replayed + 1))[0]


async def test_an_error_after_chunks(server: Server, pcm: bytes) -> None:
    """It is told, and the connection closed."""
    async with server.client() as client:
        hearing = asyncio.create_task(answer_of(client))
        await speak(client, pcm, Transcribe(context={"text": "crash 5 partials"}).event(), until=5)
        answer = await hearing
        assert isinstance(answer, Error)
        assert answer.code == "model-failed"
        assert "".join(client.chunks or []) == " ".join(words_of(pcm)[:5])
        assert await client.read_event() is None
    async with server.client() as client:  # so that the faults are forgotten
        await send_audio(client, pcm)
        await transcript_of(client)


async def test_text_that_is_taken_back(server: Server, pcm: bytes) -> None:
    """Nothing more is streamed; the transcript is right, and what was wrong is counted."""
    counted = await metric(server, "qwen_asr_retracted_characters_total")
    async with AsyncTcpClient("127.0.0.1", server.port) as client:
        await send_audio(client, pcm, request=Transcribe(context={"text": "partials contradiction"}).event())
        events = await until_stop(client)
    streamed = "".join(event.data["text"] for event in events if event.type == "transcript-chunk")
    assert streamed == " ".join(words_of(pcm)[:WORDS])
    assert events[-2].data["text"] == " ".join(["taken back", *words_of(pcm)[WORDS:]])
    await server.logged(rf"retracted={len(streamed)} ")
    assert await metric(server, "qwen_asr_retracted_characters_total") == counted + len(streamed)


async def test_a_client_that_closes_after_its_transcript(server: Server, pcm: bytes) -> None:
    """As Home Assistant does, with `transcript-stop` on its way or unread: that is no error."""
    refusals, finals = await metric(server, "qwen_asr_refusals_total"), server.log.count("outcome=final")
    begun = len(server.log)
    for _ in range(20):
        async with AsyncTcpClient("127.0.0.1", server.port) as client:
            await send_audio(client, pcm, request=REQUEST)
            while event := await asyncio.wait_for(client.read_event(), SECONDS):
                if Transcript.is_type(event.type):
                    break
            assert event is not None
            assert client._writer is not None
            client._writer.transport.abort()
    await server.logged("outcome=final", finals + 20)
    assert await metric(server, "qwen_asr_refusals_total") == refusals
    assert "WARNING" not in server.log[begun:]
    assert "ERROR" not in server.log[begun:]


async def test_a_client_that_reads_only_after_its_audio(server: Server, pcm: bytes) -> None:
    """As Home Assistant before 2026.10; it gets the same."""
    async with server.client() as client:
        assert client._writer is not None
        client._writer.transport.pause_reading()
        await speak(client, pcm, until=0)
        await asyncio.sleep(0.5)
        await client.write_event(AudioStop().event())
        client._writer.transport.resume_reading()
        assert (await transcript_of(client)).text == streamed_text(pcm)
        assert len(client.heard) > 3


async def test_describe_among_chunks(server: Server, pcm: bytes) -> None:
    """Events of two kinds, each whole."""
    asked, infos = 300, 0
    async with AsyncTcpClient("127.0.0.1", server.port) as client:

        async def speak_and_ask() -> None:
            await client.write_event(REQUEST)
            await client.write_event(AudioStart(*FORM).event())
            for n in range(asked):
                await client.write_event(AudioChunk(*FORM, pcm[n * 320 : n * 320 + 320]).event())
                await client.write_event(Describe().event())
                await asyncio.sleep(0.002)
            await client.write_event(AudioStop().event())

        speaking = asyncio.create_task(speak_and_ask())
        text = ""
        async with asyncio.timeout(SECONDS):
            while infos < asked or not speaking.done() or not text:
                event = await client.read_event()
                assert event is not None
                if Info.is_type(event.type):
                    infos += 1
                    assert Info.from_event(event).asr[0].supports_transcript_streaming
                elif Transcript.is_type(event.type):
                    text = Transcript.from_event(event).text
        await speaking
    assert text == streamed_text(pcm[: asked * 320])


async def test_a_client_that_does_not_read_is_not_waited_for() -> None:
    """Chunks that it cannot take yet become one; once it reads, it gets all of the text."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    _, writer = await asyncio.open_connection(sock=ours)
    answer, words = Answer(writer), [f"word{n} " for n in range(5000)]
    async with asyncio.timeout(5):
        for word in words:
            await answer.more(word, None)
    assert writer.transport.get_write_buffer_size() < 300
    ending = asyncio.create_task(answer.end("".join(words), "English"))
    await asyncio.sleep(0.1)
    reader, their_writer = await asyncio.open_connection(sock=theirs)
    async with asyncio.timeout(SECONDS):
        events: list[Event] = []
        while not events or events[-1].type != "transcript-stop":
            event = await read_event(reader)
            assert event is not None
            events.append(event)
        await ending
    chunks = [event.data["text"] for event in events if event.type == "transcript-chunk"]
    assert "".join(chunks) == "".join(words) == events[-2].data["text"]
    assert 1 < len(chunks) < 200
    assert [event.type for event in events if event.type != "transcript-chunk"] == [
        "transcript-start",
        "transcript",
        "transcript-stop",
    ]
    writer.close()
    their_writer.close()


async def test_settings_of_streaming_reach_the_model_process(start_server: StartServer, clear: list[Recording]) -> None:
    """Spoken at its pace: by default there are steps on the way, and early chunks of a longer text."""
    server = await start_server("--chunk-size-sec=30", "--unfixed-chunk-num=100", "--window-seconds=1", "--preload")
    await server.logged("Model ready")
    pcm = clear[1].pcm
    async with server.client() as client:
        await client.write_event(AudioStart(16000, 2, 1).event())
        for at in range(0, len(pcm), 3200):
            await client.write_event(AudioChunk(16000, 2, 1, pcm[at : at + 3200]).event())
            await asyncio.sleep(0.1)
        await client.write_event(AudioStop().event())
        assert (await transcript_of(client)).text == clear[1].text
        assert client.heard == [clear[1].text], "nothing is shown before the end"
    assert int((await server.logged(r"utterance .* steps=(\d+)"))[1]) <= 1, "ahead of the end, at most"
