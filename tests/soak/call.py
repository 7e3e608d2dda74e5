"""A long call, faster than it was spoken: the model process by itself, over its pipe. Its memory stays where it is,
and its text is that of `offline()`."""

import asyncio
import tempfile
from pathlib import Path
from random import Random

import psutil
import torch

from tests.conftest import DEMO, load_recordings
from tests.network_fixtures import unpack_demo
from tests.reference import floats, offline
from wyoming_qwen_asr.events import Final, Partial, Ready, Segment, SessionAudio, SessionEnd, SessionStart, from_event
from wyoming_qwen_asr.limits import MAX_UNCONFIRMED_SECONDS
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.network import Network
from wyoming_qwen_asr.process import Child
from wyoming_qwen_asr.text import agreement

from .service import rss
from .tally import Size, Tally

BYTES_PER_SECOND = 32_000
CHUNK_SECONDS = 0.1
SPEED = 8.0
"""Times as fast as it was spoken, or as fast as it is recognised."""

SETTLING_SECONDS = 180.0
"""Of the call, until memory has found its level."""

GROWTH = 20.0
"""MB of the model process after that."""


async def call(size: Size, rng: Random, tally: Tally) -> str:
    """Two people talk, in turns and with pauses, now and then a long one."""
    said = [recording.pcm for recording in load_recordings() if recording.language == "en"]
    pcm = _talk(rng, said, size.call_seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = unpack_demo(Path(name))
        flags = ("--device=cpu", "--dtype=float32", "--threads=1", "--log-level=warning", "--chunk-size-sec=1")
        child = await Child.spawn("wyoming_qwen_asr.model", f"--model={folder}", "--name=demo", *flags)
        try:
            heard = await _hear(child, pcm)
        finally:
            await child.stop()
    network = Network.load(open_checkpoint(DEMO), torch.device("cpu"), torch.float32)
    expected = await asyncio.to_thread(offline, network, floats(pcm))
    tally.sessions += 1
    tally.utterances += len(expected.segments)
    texts = [segment.text for segment in heard.segments]
    tally.require(heard.text == expected.text, "the text of the call is not that of its audio at once")
    same = texts == [each.text for each in expected.segments]
    tally.require(same, "the segments of the call are not those of its audio")
    settled = [memory for at, memory in heard.memory if at >= SETTLING_SECONDS]
    growth = max(settled, default=0.0) - settled[0] if settled else 0.0
    tally.require(bool(settled) and growth < GROWTH, f"the model process grew by {growth:.0f} MB in the call")
    minutes, shown = len(pcm) / BYTES_PER_SECOND / 60, heard.stable / max(1, len(expected.text))
    return (
        f"{minutes:.0f} minutes, {len(texts)} segments, {len(expected.text.split())} words as offline; {shown:.0%} "
        f"shown before their segment ended, {heard.retracted} characters taken back; model process {growth:+.0f} MB"
    )


class _Heard:
    """What the model process said."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.text = ""
        self.stable = self.retracted = 0
        self.memory: list[tuple[float, float]] = []
        """Seconds of the call, MB."""


async def _hear(child: Child, pcm: bytes) -> _Heard:
    heard = _Heard()
    events = child.events()
    message, _ = from_event(await anext(events))
    assert isinstance(message, Ready), message
    feeding = asyncio.create_task(_feed(child, pcm, heard))
    process, stable = psutil.Process(child.pid), ""
    try:
        async for event in events:
            message, _ = from_event(event)
            match message:
                case Partial():
                    stable += message.stable_delta
                case Segment():
                    heard.segments.append(message)
                    heard.stable += len(stable)
                    heard.retracted += len(stable) - agreement(stable, message.text)
                    heard.memory.append((message.end, rss(process)))
                    stable = ""
                case Final():
                    heard.text = message.text
                    break
    finally:
        feeding.cancel()
    return heard


async def _feed(child: Child, pcm: bytes, heard: _Heard) -> None:
    await child.send(SessionStart(16_000, 2, 1, None, "prefer", ""), 1)
    size = int(CHUNK_SECONDS * BYTES_PER_SECOND)
    for at in range(0, len(pcm), size):
        await child.send(SessionAudio(), 1, pcm[at : at + size])
        await asyncio.sleep(CHUNK_SECONDS / SPEED)
        while at / BYTES_PER_SECOND - (heard.segments[-1].end if heard.segments else 0) > MAX_UNCONFIRMED_SECONDS:
            await asyncio.sleep(CHUNK_SECONDS)
    await child.send(SessionEnd(), 1)


def _talk(rng: Random, said: list[bytes], seconds: float) -> bytes:
    audio = bytearray()
    order: list[bytes] = []
    while len(audio) < seconds * BYTES_PER_SECOND:
        order = order or rng.sample(said, len(said))
        audio += order.pop() + bytes(2 * round(16_000 * rng.choice([0.2, 0.3, 0.5, 0.8, 1.2, 3.0])))
        if rng.random() < 0.02:
            audio += bytes(2 * round(16_000 * rng.uniform(5, 25)))
    return bytes(audio)
