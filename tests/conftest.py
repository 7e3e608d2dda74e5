"""Shared by all tests: the recordings, the demo checkpoint, and real servers as real processes."""

import asyncio
import contextlib
import json
import re
import signal
import sys
import time
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient, AsyncTcpClient, AsyncUnixClient
from wyoming.error import Error
from wyoming.event import Event

RECORDINGS = Path(__file__).parent / "recordings"
DEMO = Path(__file__).parent.parent / "wyoming_qwen_asr/demo_model.zip"
SECONDS = 60.0
"""A deadline that only a hang reaches."""


@dataclass(frozen=True)
class Recording:
    """One of tests/recordings: what was said, and 16 kHz mono 16-bit PCM of it."""

    path: Path
    text: str
    language: str
    pcm: bytes


def load_recordings() -> list[Recording]:
    found = []
    for entry in json.loads((RECORDINGS / "texts.json").read_text()):
        path = RECORDINGS / entry["file"]
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (16000, 2, 1)
            found.append(Recording(path, entry["text"], entry["language"], file.readframes(file.getnframes())))
    return found


@pytest.fixture(scope="session")
def recordings() -> list[Recording]:
    """All 24, those that the demo model mistakes too."""
    return load_recordings()


@pytest.fixture(scope="session")
def clear(recordings: list[Recording]) -> list[Recording]:
    """Recordings that the demo model gets right, letter by letter, in float32 and bfloat16."""
    return [recordings[i] for i in (3, 5, 11, 13, 14, 17, 18, 19)]


class Server:
    """A running `wyoming-qwen-asr` with its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""
        self.port = 0
        self.http = ""
        self.expected_code = 0
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr
        while line := await self.process.stderr.readline():
            async with self._changed:
                self.log += line.decode()
                self._changed.notify_all()

    async def logged(self, pattern: str, count: int = 1, seconds: float = SECONDS) -> re.Match[str]:
        """The match of a pattern in the log, once there are so many."""
        async with asyncio.timeout(seconds), self._changed:
            while len(found := list(re.finditer(pattern, self.log))) < count:
                await self._changed.wait()
        return found[-1]

    def model_process(self) -> psutil.Process:
        """The model process there is now, or is about to be: what it runs shows a moment after it is started."""
        wait_until(lambda: bool(self.children("wyoming_qwen_asr.model")))
        (found,) = self.children("wyoming_qwen_asr.model")
        return found

    def children(self, module: str) -> list[psutil.Process]:
        """Those that run a module of ours; each has a title once it has begun."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if runs(child, module) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        return found

    async def kill(self) -> None:
        """SIGKILL, as the OOM killer or a user does it."""
        self.expected_code = -signal.SIGKILL
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """SIGTERM, and the exit code. Fails the test when something of it is left running."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.running else []
        if self.running:
            self.process.terminate()
        async with asyncio.timeout(SECONDS):
            code = await self.process.wait()
            await self._reading
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"left running: {alive}"
        return code

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def client(self) -> "Client":
        return Client("127.0.0.1", self.port)


def runs(process: psutil.Process, module: str) -> bool:
    """Whether it runs this module, by its command line or, once it has one, its title. Raises psutil.NoSuchProcess."""
    words = " ".join(process.cmdline()).split()
    return module in words or words[:2] == ["wyoming-qwen-asr:", module.rpartition(".")[2]]


@asynccontextmanager
async def serving(
    *flags: str, environ: dict[str, str] | None = None, module: str = "wyoming_qwen_asr"
) -> AsyncIterator[Server]:
    """A server on free ports with the demo model in float32, unless the flags say otherwise."""
    defaults = {"--uri": "tcp://127.0.0.1:0", "--http": "127.0.0.1:0", "--model": "demo", "--dtype": "float32"}
    if "--no-http" in flags:
        del defaults["--http"]
    given = [f"{flag}={value}" for flag, value in defaults.items() if not any(f.startswith(flag) for f in flags)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *given, *flags),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
        limit=1 << 20,  # of a line of the log
    )
    server = Server(process)
    try:
        if any(flag.startswith("--uri=tcp://") for flag in (*given, *flags)):
            server.port = int((await server.logged(r"Wyoming at tcp://\S+:(\d+)"))[1])
        if "--http=127.0.0.1:0" in given:
            server.http = (await server.logged(r"(http://127\.0\.0\.1:\d+)/v1"))[1]
        yield server
    finally:
        code = await server.stop()
        print(server.log)
    assert code == server.expected_code, server.log
    assert "Traceback" not in server.log, server.log


StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Start a server of the test's own, with flags; it is stopped at the end of the test."""
    async with AsyncExitStack() as stack:

        async def start(*flags: str, environ: dict[str, str] | None = None) -> Server:
            return await stack.enter_async_context(serving(*flags, environ=environ))

        yield start


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[Server]:
    """A server that the tests of a module share."""
    async with serving("--log-level=debug") as running:
        yield running


class Watching(AsyncClient):
    """A stock client that keeps the chunks of a transcript and gives back all other events. Fails when what is around a
    transcript is not in its order, or the chunks are not its text."""

    chunks: list[str] | None = None
    """Of the transcript that has started and is not complete yet."""
    heard: list[str]
    """Of the last one that is."""
    _stop_due = False

    async def read_event(self) -> Event | None:
        while (event := await super().read_event()) and self._passes(event):
            pass
        return event

    def _passes(self, event: Event) -> bool:
        match event.type:
            case "transcript-start":
                assert self.chunks is None, "a transcript starts within another one"
                assert not self._stop_due, "a transcript starts, and the last one has not stopped"
                self.chunks = []
            case "transcript-chunk":
                assert self.chunks is not None, "a chunk before its transcript-start"
                assert event.data["text"], "an empty chunk"
                self.chunks.append(event.data["text"])
            case "transcript":
                assert self.chunks is not None, "a transcript without a start"
                assert "".join(self.chunks) == event.data["text"], self.chunks
                self.heard, self.chunks, self._stop_due = self.chunks, None, True
                return False
            case "transcript-stop":
                assert self._stop_due, "a transcript-stop without a transcript"
                self._stop_due = False
            case _:
                return False
        return True

    async def read_stop(self) -> None:
        """What comes behind a transcript."""
        event = await super().read_event()
        assert event is not None, "closed before the transcript-stop"
        assert self._passes(event), event
        assert not self._stop_due


class Client(Watching, AsyncTcpClient):
    """Over TCP."""


class UnixClient(Watching, AsyncUnixClient):
    """Over a Unix socket."""


async def answer_of(client: Watching) -> Transcript | Error:
    """The next transcript, with all that belongs to it, or what is said in place of it."""
    event = await asyncio.wait_for(client.read_event(), SECONDS)
    assert event is not None, "the server closed the connection"
    if Error.is_type(event.type):
        return Error.from_event(event)
    assert Transcript.is_type(event.type), event
    await asyncio.wait_for(client.read_stop(), SECONDS)
    return Transcript.from_event(event)


async def transcript_of(client: Watching) -> Transcript:
    """The next transcript. Fails on anything else."""
    answer = await answer_of(client)
    assert isinstance(answer, Transcript), answer
    return answer


async def send_audio(
    client: AsyncClient,
    pcm: bytes,
    form: tuple[int, int, int] = (16000, 2, 1),
    chunk_bytes: int = 2048,
    request: Event | None = None,
) -> None:
    """`transcribe`, the audio as fast as it goes, `audio-stop`. `form` is rate, width, channels."""
    await client.write_event(request or Transcribe().event())
    await client.write_event(AudioStart(*form).event())
    for at in range(0, len(pcm), chunk_bytes):
        await client.write_event(AudioChunk(*form, pcm[at : at + chunk_bytes]).event())
    await client.write_event(AudioStop().event())


async def transcribe(server: Server, pcm: bytes, language: str | None = None) -> Transcript:
    """One utterance on a connection of its own."""
    async with server.client() as client:
        await send_audio(client, pcm, request=Transcribe(language=language).event())
        return await transcript_of(client)


async def open_sessions(server: Server) -> int:
    """As /health tells it."""
    async with aiohttp.ClientSession() as http, http.get(f"{server.http}/health") as response:
        return int((await response.json())["sessions"])


async def metric(server: Server, name: str, **labels: str) -> float:
    """A sample of /metrics; 0 when there is none."""
    async with aiohttp.ClientSession() as http, http.get(f"{server.http}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    samples = [sample for family in families for sample in family.samples]
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll what cannot be awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
