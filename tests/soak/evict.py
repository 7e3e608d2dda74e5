"""The model process is ended whenever nobody has spoken for a second: traffic in between must not notice."""

import asyncio
from random import Random

from tests.conftest import load_recordings

from .service import eventually, heard_alone, honest, model_processes, running
from .tally import Size, Tally

IDLE_SECONDS = 1
SPEAKERS = 2


async def evict(size: Size, rng: Random, tally: Tally) -> str:
    """Utterances at random gaps around the idle time; never two model processes, none that stays."""
    recordings = load_recordings()
    most = 0
    seen: set[int] = set()
    async with running(tally, f"--idle-seconds={IDLE_SECONDS}") as server:
        texts = await heard_alone(server, recordings, tally)

        async def watch() -> None:
            nonlocal most
            while True:
                pids = {process.pid for process in model_processes(server)}
                most = max(most, len(pids))
                seen.update(pids)
                await asyncio.sleep(0.05)

        async def speaker(seed: float, goal: int) -> None:
            own = Random(seed)
            while tally.utterances < goal:
                n = own.randrange(len(recordings))
                await honest(server, recordings[n].pcm, texts[n], tally, "between evictions", pace=own)
                # Often close to the moment of eviction, when a session and the end of the process cross.
                near = IDLE_SECONDS + own.uniform(-0.05, 0.1)
                await asyncio.sleep(own.choice((own.uniform(0, 2 * IDLE_SECONDS), near)))

        watching = asyncio.create_task(watch())
        try:
            await speaker(rng.random(), size.gaps // 2)
            await asyncio.gather(*(speaker(rng.random(), size.gaps) for _ in range(SPEAKERS)))
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        gone = await eventually(lambda: not model_processes(server), IDLE_SECONDS + 10)
        tally.require(gone, "the model process stays though nobody speaks")
    tally.require(most == 1, f"{most} model processes at once")
    tally.require(len(seen) > 1, "no model process was ever evicted")
    tally.faults += len(seen)
    return f"{tally.utterances} utterances over {len(seen)} model processes, never two at once, {tally.lost} lost"
