"""The server is told to stop while its model process hangs and clients wait: they are told, and it goes."""

import asyncio
import contextlib
from random import Random

from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStart
from wyoming.error import Error

from tests.conftest import load_recordings, send_audio
from wyoming_qwen_asr.limits import DRAIN_SECONDS

from .service import FORM, honest, model_processes, next_event, running
from .tally import Size, Tally

LEAVE_SECONDS = 10.0
"""Besides the time that it gives its clients."""


async def stop(size: Size, rng: Random, tally: Tally) -> str:
    """One client has said everything, one is still speaking, one only listens."""
    recordings = load_recordings()
    said, text = recordings[3].pcm, recordings[3].text
    async with running(tally) as server, contextlib.AsyncExitStack() as connections:
        await honest(server, said, text, tally, "before the end")
        for process in model_processes(server):
            process.suspend()
        waiting, speaking, listening = [await connections.enter_async_context(server.client()) for _ in range(3)]
        await send_audio(waiting, said)
        for event in (Transcribe().event(), AudioStart(*FORM).event(), AudioChunk(*FORM, said[:9600]).event()):
            await speaking.write_event(event)
        await asyncio.sleep(0.5)
        server.process.terminate()
        async with asyncio.timeout(DRAIN_SECONDS + LEAVE_SECONDS):
            answers = [await next_event(client) for client in (waiting, speaking)]
            await next_event(listening)
            await server.process.wait()
    for answer, who in zip(answers, ("who waited", "who spoke"), strict=True):
        tally.sessions += 1
        tally.utterances += 1
        tally.lost += answer is None
        tally.require(
            answer is not None and Error.is_type(answer.type), f"the client {who} got {answer} in place of an error"
        )
    tally.faults += 1
    return "stopped with a hanging model process: clients in mid-utterance are told, nothing stays"
