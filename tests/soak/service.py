"""A watched server, and honest clients of it."""

import asyncio
import contextlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from urllib.request import urlopen

import psutil
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.event import Event

from tests.conftest import Recording, Server, runs, serving, transcribe

from .tally import Tally

ANSWER_SECONDS = 150.0
"""An utterance may live through three loads and two kills on a busy machine; what takes longer hangs."""

SETTLE_SECONDS = 20.0
"""What may pass until the sessions of clients that are gone are closed."""

FORM = (16000, 2, 1)
CHUNK_BYTES = 2048

MARK, RUN = "SOAK", uuid.uuid4().hex
"""In the environment of every process that this run starts. Titles would overwrite that, but for SPT_NOENV."""

MAX_FILES = 40
"""Open in a gateway that serves nobody; it has about 15."""


@contextlib.asynccontextmanager
async def running(tally: Tally, *flags: str) -> AsyncIterator[Server]:
    """The tests' server. It is a failure of the scenario when it logs a fault, or keeps files open or lying about."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, MARK: RUN, "TMPDIR": folder, "SPT_NOENV": "1"}
        async with serving(*flags, environ=environ) as server:
            try:
                yield server
                if server.running:
                    gateway = psutil.Process(server.process.pid)
                    closed = await eventually(lambda: gateway.num_fds() < MAX_FILES, SETTLE_SECONDS)
                    tally.require(closed, f"the gateway keeps {gateway.num_fds()} files open")
            finally:
                tally.read_log(server)
        tally.require(not _names(folder), f"temporary files are left: {_names(folder)}")


def _names(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


def left_running() -> list[psutil.Process]:
    """Processes with our mark, besides this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == RUN:
                found.append(process)
    return found


def model_processes(server: Server) -> list[psutil.Process]:
    """None, while there is none; more than one should never be."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(server.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE and runs(child, "wyoming_qwen_asr.model"):
                    found.append(child)
    return found


def rss(process: psutil.Process | int) -> float:
    """In MB (10⁶ bytes)."""
    process = psutil.Process(process) if isinstance(process, int) else process
    return float(process.memory_info().rss) / 1e6


async def health(server: Server) -> dict[str, object]:
    def get() -> dict[str, object]:
        with urlopen(f"{server.http}/health", timeout=10) as answer:
            return dict(json.load(answer))

    return await asyncio.to_thread(get)


async def settled(server: Server, tally: Tally) -> None:
    """Fails unless every session is closed soon."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (state := await health(server))["sessions"]:
        if time.monotonic() > deadline:
            tally.fail(f"sessions stay open though their clients are gone: {state}")
            return
        await asyncio.sleep(0.1)


async def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    for _ in range(round(10 * seconds)):
        if condition():
            return True
        await asyncio.sleep(0.1)
    return condition()


async def heard_alone(server: Server, recordings: list[Recording], tally: Tally) -> list[str]:
    """What the server makes of each recording when nothing disturbs it: the texts to compare with. The demo model
    mistakes a few of them."""
    texts = [(await transcribe(server, recording.pcm)).text for recording in recordings]
    right = sum(text == recording.text for text, recording in zip(texts, recordings, strict=True))
    tally.require(right > 0.8 * len(recordings), f"only {right} of {len(recordings)} recordings are understood")
    return texts


async def say(client: AsyncClient, pcm: bytes, pace: Random | None = None) -> Transcript | Error | None:
    """The answer to one utterance; None when the connection was closed without one. With `pace`, the audio comes as
    from a network: now nothing, now a few chunks at once, several times faster than speech."""
    try:
        await client.write_event(Transcribe().event())
        await client.write_event(AudioStart(*FORM).event())
        for at in range(0, len(pcm), CHUNK_BYTES):
            await client.write_event(AudioChunk(*FORM, pcm[at : at + CHUNK_BYTES]).event())
            if pace and pace.random() < 0.25:
                await asyncio.sleep(pace.uniform(0, 0.12))
        await client.write_event(AudioStop().event())
    except ConnectionError:
        pass  # an error may be waiting for us
    while event := await next_event(client):
        if Transcript.is_type(event.type):
            return Transcript.from_event(event)
        if Error.is_type(event.type):
            return Error.from_event(event)
    return None


async def next_event(client: AsyncClient) -> Event | None:
    """None when the connection is closed. Raises TimeoutError."""
    try:
        return await asyncio.wait_for(client.read_event(), ANSWER_SECONDS)
    except (ConnectionError, asyncio.IncompleteReadError):
        return None


async def honest(server: Server, pcm: bytes, text: str, tally: Tally, when: str, pace: Random | None = None) -> None:
    """One utterance on a connection of its own must get exactly this text."""
    tally.sessions += 1
    tally.utterances += 1
    try:
        async with server.client() as client:
            answer = await say(client, pcm, pace)
    except (TimeoutError, OSError) as error:
        answer = None
        when += f" ({error!r})"
    if answer is None:
        tally.lost += 1
        tally.fail(f"no transcript {when}")
    elif isinstance(answer, Error):
        tally.fail(f"an honest client got an error {when}: {answer.text}")
    else:
        tally.require(answer.text == text, f"{answer.text!r} in place of {text!r} {when}")
