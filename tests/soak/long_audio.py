"""One long utterance, sent as fast as it goes: memory follows the audio that is not recognised yet, no more."""

import asyncio
from random import Random

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop

from tests.conftest import load_recordings

from .service import FORM, eventually, honest, model_processes, next_event, rss, running, settled
from .tally import Size, Tally

PIECE_SECONDS = 28
"""The most audio that stays retained while nothing cuts it."""

MODEL_GROWTH = 400.0
"""MB that the model process may take for pieces of that length, over what it has after a short utterance."""

BYTES_PER_SECOND = 32_000
CHUNK_BYTES = 3200
CATCH_UP_SECONDS = 120.0


async def long_audio(size: Size, rng: Random, tally: Tally) -> str:
    """A transcript comes, and the retained audio goes while the utterance still lasts."""
    recordings = load_recordings()
    pcm = _long(rng, [recording.pcm for recording in recordings], size.long_seconds)
    async with running(tally) as server:
        await honest(server, recordings[3].pcm, recordings[3].text, tally, "before long audio")
        (model,) = model_processes(server)
        gateway = server.process.pid
        model_before, gateway_before = rss(model), rss(gateway)
        peak = model_before

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, rss(model))
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        try:
            async with server.client() as client:
                await client.write_event(Transcribe().event())
                await client.write_event(AudioStart(*FORM).event())
                for at in range(0, len(pcm), CHUNK_BYTES):
                    await client.write_event(AudioChunk(*FORM, pcm[at : at + CHUNK_BYTES]).event())
                sent = rss(gateway) - gateway_before
                # A piece is all that may be left of it, twice when the buffer has just grown.
                bound = gateway_before + 2 * PIECE_SECONDS * BYTES_PER_SECOND / 1e6 + 2
                dropped = await eventually(lambda: rss(gateway) < bound, CATCH_UP_SECONDS)
                open_growth = rss(gateway) - gateway_before
                tally.require(dropped, f"{open_growth:.1f} MB stay in the gateway while the utterance lasts")
                await client.write_event(AudioStop().event())
                tally.utterances += 1
                tally.sessions += 1
                event = await next_event(client)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        tally.lost += event is None
        words = Transcript.from_event(event).text.split() if event and Transcript.is_type(event.type) else []
        tally.require(len(words) > 0.2 * size.long_seconds, f"the answer to long audio is {event}")
        tally.require(peak - model_before < MODEL_GROWTH, f"the model process grew by {peak - model_before:.0f} MB")
        await settled(server, tally)
        await honest(server, recordings[3].pcm, recordings[3].text, tally, "after long audio")
        growth = rss(gateway) - gateway_before
    return (
        f"{size.long_seconds} s at once ({len(pcm) / 1e6:.1f} MB): {len(words)} words; model process +"
        f"{peak - model_before:.0f} MB at most; gateway +{sent:.1f} MB when sent, +{open_growth:.1f} recognised, "
        f"+{growth:.1f} after it"
    )


def _long(rng: Random, said: list[bytes], seconds: int) -> bytes:
    """Utterances with pauses between them."""
    audio = bytearray()
    while len(audio) < seconds * BYTES_PER_SECOND:
        audio += rng.choice(said) + bytes(2 * round(rng.uniform(0.2, 1.5) * FORM[0]))
    return bytes(audio[: seconds * BYTES_PER_SECOND])
