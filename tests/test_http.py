"""The file endpoint, by the official client and by hand."""

import asyncio
import io
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import openai
import pytest
import soundfile
from aiohttp import FormData

from wyoming_qwen_asr.limits import MAX_UPLOAD_BYTES

from .conftest import Recording, Server, StartServer, open_sessions


@pytest.fixture(scope="module")
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="any", max_retries=0) as connected:
        yield connected


def encoded(recording: Recording, form: str, rate: int = 16000, channels: int = 1) -> bytes:
    """The recording as a file."""
    import soxr

    samples = soxr.resample(np.frombuffer(recording.pcm, "<i2") / 32768, 16000, rate)
    file = io.BytesIO()
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(form, "PCM_16")
    soundfile.write(file, np.repeat(samples[:, None], channels, 1), rate, format=form, subtype=subtype)
    return file.getvalue()


def wav_header(rate: int) -> bytes:
    """Of 42,000 16-bit samples."""
    return b"RIFF" + struct.pack(
        "<I4s4sIHHIIHH4sI", 84_036, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", 84_000
    )


@pytest.mark.parametrize(
    ("form", "rate", "channels"),
    [("WAV", 16000, 1), ("WAV", 96000, 2), ("FLAC", 44100, 2), ("OGG", 48000, 1), ("MP3", 44100, 1)],
)
async def test_formats(client: openai.AsyncOpenAI, clear: list[Recording], form: str, rate: int, channels: int) -> None:
    """What libsndfile reads, at any rate, whatever its name says."""
    for recording in clear[:2]:
        file = ("speech.bin", encoded(recording, form, rate, channels))
        assert (await client.audio.transcriptions.create(file=file, model="whisper-1")).text == recording.text


async def test_text(client: openai.AsyncOpenAI, clear: list[Recording]) -> None:
    text = await client.audio.transcriptions.create(
        file=clear[0].path, model="any", response_format="text", language="en", temperature=0
    )
    assert text == clear[0].text + "\n"
    assert (
        await client.audio.transcriptions.create(
            file=clear[0].path, model="any", response_format="text", language="auto"
        )
        == text
    )


async def test_language_and_prompt(client: openai.AsyncOpenAI, clear: list[Recording]) -> None:
    """A language is a hint like Wyoming's; a prompt is context, which the demo model has learnt to ignore."""
    german = await client.audio.transcriptions.create(file=clear[4].path, model="any", language="de")
    assert german.text != clear[4].text
    biased = await client.audio.transcriptions.create(file=clear[4].path, model="any", prompt="kitchen, attic")
    assert biased.text == clear[4].text


async def test_silence(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "quiet.wav", np.zeros(32000), 16000)
    assert (
        await client.audio.transcriptions.create(file=tmp_path / "quiet.wav", model="any", language="en")
    ).text == ""


async def test_longer_than_a_piece(client: openai.AsyncOpenAI, clear: list[Recording]) -> None:
    """Cut in the pauses and joined: every sentence is there as often as it was said."""
    pcm = b"".join(recording.pcm + bytes(16000) for recording in [clear[i] for i in (0, 2)] * 6)
    long = Recording(Path(), "", "en", pcm)
    text = (await client.audio.transcriptions.create(file=("l.flac", encoded(long, "FLAC")), model="any")).text
    assert text.count("intercom") >= 5


async def test_many_at_once(client: openai.AsyncOpenAI, clear: list[Recording]) -> None:
    answers = await asyncio.gather(
        *(client.audio.transcriptions.create(file=recording.path, model="any") for recording in clear)
    )
    assert [answer.text for answer in answers] == [recording.text for recording in clear]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "bad-audio"),
        (b"not audio at all", "bad-audio"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt ", "bad-audio"),
        (b"fLaC" + bytes(100), "bad-audio"),
        (b"ID3" + bytes(2000), "bad-audio"),
        (wav_header(rate=1) + bytes(84_000), "bad-audio"),
    ],
)
async def test_what_is_no_audio(client: openai.AsyncOpenAI, content: bytes, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.audio.transcriptions.create(file=("x.wav", content), model="any")
    assert raised.value.code == code
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "srt"}, "response_format"),
        ({"language": "klingon"}, "language"),
        ({"stream": "true"}, "stream"),
    ],
)
async def test_what_is_not_offered(server: Server, clear: list[Recording], fields: dict[str, str], param: str) -> None:
    """Refused with the name of the field, before anything is computed."""
    form = FormData(fields)
    form.add_field("file", clear[0].path.read_bytes(), filename="a.wav")
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.http}/v1/audio/transcriptions", data=form) as response,
    ):
        error = (await response.json())["error"]
        assert (response.status, error["param"], error["type"]) == (400, param, "invalid_request_error")


async def test_requests_that_are_none(server: Server) -> None:
    """Each gets OpenAI's envelope and a request id."""
    url = f"{server.http}/v1/audio/transcriptions"
    multipart = {"Content-Type": "multipart/form-data; boundary=b"}
    broken = b"--b\r\nnonsense\r\n\r\nx\r\n--b--\r\n"
    nameless = b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"
    async with aiohttp.ClientSession() as http:
        for request, status in (
            (http.get(f"{server.http}/v1/nothing"), 404),
            (http.get(url), 405),
            (http.post(url, json={}), 400),
            (http.post(url, data=b"x"), 400),
            (http.post(url, data=b"junk", headers=multipart), 400),
            (http.post(url, data=nameless, headers=multipart), 400),
            (http.post(url, data=broken, headers=multipart), 400),
            (http.post(url, data=b"x", headers={"Content-Type": "multipart/form-data"}), 400),
            (http.post(url, data=FormData({"model": "x"}, default_to_multipart=True)), 400),
            (http.post(url, data=FormData({"model": "x" * 20_000}, default_to_multipart=True)), 413),
        ):
            async with request as response:
                assert response.status == status, await response.text()
                assert (await response.json())["error"]["message"]
                assert response.headers["x-request-id"]


async def test_a_small_file_of_long_audio(server: Server) -> None:
    """Eleven minutes of silence in a few kilobytes: refused by its length, not by its size."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(11 * 60 * 8000), 8000, format="FLAC", subtype="PCM_16")
    form = FormData()
    form.add_field("file", file.getvalue(), filename="a.flac")
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.http}/v1/audio/transcriptions", data=form) as response,
    ):
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "too-large"


async def test_forms_are_bounded(server: Server) -> None:
    """Many small fields, or many files, are a large form."""
    url = f"{server.http}/v1/audio/transcriptions"
    many = FormData(default_to_multipart=True)
    for number in range(100):
        many.add_field(f"field{number}", "x")
    two = FormData(default_to_multipart=True)
    for _ in range(2):
        two.add_field("file", b"x", filename="a.wav")
    async with aiohttp.ClientSession() as http:
        for form, status in ((many, 413), (two, 400)):
            async with http.post(url, data=form) as response:
                assert response.status == status


async def test_a_client_that_leaves(server: Server, clear: list[Recording]) -> None:
    """In mid-upload and while it waits: its session is closed."""
    pcm = b"".join(recording.pcm for recording in clear) * 30
    long = encoded(Recording(Path(), "", "en", pcm), "WAV")
    form = FormData()
    form.add_field("file", io.BytesIO(long), filename="a.wav")
    with pytest.raises(TimeoutError):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(0.5)) as http:
            await http.post(f"{server.http}/v1/audio/transcriptions", data=form)
    _, writer = await asyncio.open_connection(*server.http.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n")
    writer.write(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
    await writer.drain()
    writer.transport.abort()
    async with asyncio.timeout(10):
        while await open_sessions(server):
            await asyncio.sleep(0.1)


async def test_too_large(server: Server, clear: list[Recording]) -> None:
    async def endless() -> object:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(MAX_UPLOAD_BYTES // (1 << 20) + 8):
            yield bytes(1 << 20)

    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{server.http}/v1/audio/transcriptions",
            data=endless(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        ) as response,
    ):
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "too-large"


async def test_models_and_health(client: openai.AsyncOpenAI, server: Server) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]
    async with aiohttp.ClientSession() as http, http.get(f"{server.http}/health") as response:
        health = await response.json()
    assert health["status"] == "ok"
    assert health["model"] == "demo"
    assert health["state"] in ("idle", "loading", "ready")
    assert health["sessions"] == 0


async def test_no_http(start_server: StartServer) -> None:
    server = await start_server("--no-http")
    assert "API" not in server.log
