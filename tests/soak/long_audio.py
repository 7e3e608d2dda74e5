"""One long utterance, sent as fast as it goes: memory follows the audio that is not recognised yet, no more."""

import asyncio
from random import Random

import psutil
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop

from tests.conftest import load_recordings
from wyoming_qwen_asr.limits import MAX_UTTERANCE_SECONDS

from .service import FORM, honest, model_processes, next_event, rss, running, settled
from .tally import Size, Tally

SECONDS = round(0.97 * MAX_UTTERANCE_SECONDS)
PIECE_SECONDS = 28
"""The most audio that is retained while nothing cuts it."""

MODEL_GROWTH = 400.0
"""MB that the model process may take for pieces of that length, over what it has after a short utterance."""

BYTES_PER_SECOND = 32_000
CHUNK_BYTES = 3200

GATEWAY_GROWTH = 2 * PIECE_SECONDS * BYTES_PER_SECOND / 1e6 + 2
"""MB that may stay when the rest is recognised: a piece, in a buffer that has just grown, and a little for luck."""

CATCH_UP_SECONDS = 90


async def long_audio(size: Size, rng: Random, tally: Tally) -> str:
    """A transcript comes, and the retained audio goes while the utterance still lasts."""
    recordings = load_recordings()
    said, text = recordings[3].pcm, recordings[3].text
    audio = _long(rng, [recording.pcm for recording in recordings])
    async with running(tally) as server:
        await honest(server, said, text, tally, "before long audio")
        (model,) = model_processes(server)
        before, model_before = rss(server.process.pid), rss(model)
        peak = _Peak(model)
        try:
            async with server.client() as client:
                await client.write_event(Transcribe().event())
                await client.write_event(AudioStart(*FORM).event())
                for at in range(0, len(audio), CHUNK_BYTES):
                    await client.write_event(AudioChunk(*FORM, audio[at : at + CHUNK_BYTES]).event())
                sent = rss(server.process.pid) - before
                for _ in range(CATCH_UP_SECONDS):  # the client must not seem to be gone meanwhile
                    await client.write_event(AudioChunk(*FORM, bytes(640)).event())
                    await asyncio.sleep(1)
                    if (recognised := rss(server.process.pid) - before) < GATEWAY_GROWTH:
                        break
                await client.write_event(AudioStop().event())
                tally.utterances += 1
                tally.sessions += 1
                event = await next_event(client)
        finally:
            grown = await peak.stop() - model_before
        tally.lost += event is None
        words = Transcript.from_event(event).text.split() if event and Transcript.is_type(event.type) else []
        tally.require(len(words) > 0.2 * SECONDS, f"the answer to long audio is {event}")
        tally.require(grown < MODEL_GROWTH, f"the model process grew by {grown:.0f} MB")
        await settled(server, tally)
        await honest(server, said, text, tally, "after long audio")
        after = rss(server.process.pid) - before
        for growth, when in ((recognised, "while the utterance lasts"), (after, "after it")):
            tally.require(growth < GATEWAY_GROWTH, f"{growth:.1f} MB stay in the gateway {when}")
    return (
        f"{SECONDS} s at once ({len(audio) / 1e6:.1f} MB): {len(words)} words; model process +{grown:.0f} MB at most; "
        f"gateway +{sent:.1f} MB when sent, +{recognised:.1f} when recognised, +{after:.1f} after it"
    )


class _Peak:
    """The most memory that a process has, from now on until `stop`."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._most = rss(process)
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self._most = max(self._most, rss(self._process))
            await asyncio.sleep(0.05)

    async def stop(self) -> float:
        self._watching.cancel()
        await asyncio.wait([self._watching])
        return self._most


def _long(rng: Random, said: list[bytes]) -> bytes:
    """Utterances with pauses between them."""
    audio = bytearray()
    while len(audio) < SECONDS * BYTES_PER_SECOND:
        audio += rng.choice(said) + bytes(2 * round(rng.uniform(0.2, 1.5) * FORM[0]))
    return bytes(audio[: SECONDS * BYTES_PER_SECOND])
