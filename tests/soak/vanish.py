"""Clients vanish in mid-utterance, politely or not: nothing of them may stay."""

import asyncio
import socket
import struct
from random import Random

from tests.conftest import Server, load_recordings

from .mutate import utterance, wire
from .service import heard_alone, honest, running, settled
from .tally import Size, Tally

AT_ONCE = 8


async def vanish(size: Size, rng: Random, tally: Tally) -> str:
    """They leave after a random byte of an utterance, some with a reset, some when it is already being recognised."""
    recordings = load_recordings()
    async with running(tally) as server:
        (text,) = await heard_alone(server, recordings[3:4], tally)
        places = asyncio.Semaphore(AT_ONCE)

        async def leave(seed: float) -> None:
            async with places:
                own = Random(seed)
                await _leave(server, wire(*utterance(own.choice(recordings).pcm)), own)

        await asyncio.gather(*(leave(rng.random()) for _ in range(size.vanishing)))
        tally.sessions += size.vanishing
        tally.faults += size.vanishing
        await settled(server, tally)
        await honest(server, recordings[3].pcm, text, tally, "after clients vanished")
    return f"{size.vanishing} clients left in mid-utterance, none of their sessions stayed"


async def _leave(server: Server, stream: bytes, rng: Random) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    end = len(stream) if rng.random() < 0.2 else rng.randrange(len(stream))
    writer.write(stream[:end])
    await writer.drain()
    await asyncio.sleep(rng.choice((0, 0.01, 0.1)))
    if rng.random() < 0.5:  # with a reset
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
