"""The model process is killed at random moments, while it loads, listens or works: nobody may lose a word, hear one
twice, or be refused."""

import asyncio
import time
from random import Random

import psutil
from wyoming.asr import Transcript
from wyoming.client import AsyncClient
from wyoming.ping import Ping, Pong

from tests.conftest import Recording, Server, load_recordings, transcribe

from .service import heard_alone, honest, model_processes, next_event, running, say
from .tally import Size, Tally

CLIENTS = 8

KILL_AFTER_LOADS = 4.0
"""The longest time between two kills, in times that a load takes: so a quarter of them hits a process that loads."""


class _Run:
    """Clients and their killer on one server."""

    def __init__(self, server: Server, rng: Random, tally: Tally) -> None:
        self._server = server
        self._rng = rng
        self._tally = tally
        self.kills = 0
        self.delivered = 0
        self.wrong = 0
        self.doubled = 0

    async def killer(self, longest: float) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0, longest))
            for process in model_processes(self._server):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
                self.kills += 1

    async def client(self, seed: float, said: list[tuple[Recording, str]], size: Size) -> None:
        """Utterances, several on each connection, until there were enough of everything."""
        rng = Random(seed)
        while self._tally.utterances < size.utterances or self.kills < size.kills:
            async with self._server.client() as connection:
                for _ in range(rng.randint(1, 5)):
                    recording, text = rng.choice(said)
                    self._tally.utterances += 1
                    self._tally.sessions += 1
                    if not await self._utterance(connection, recording, text, rng):
                        break

    async def _utterance(self, connection: AsyncClient, recording: Recording, text: str, rng: Random) -> bool:
        """Whether the connection can be used for another one."""
        before = self.kills
        answer = await say(connection, recording.pcm, rng)
        where = f"{recording.path.name}, during {self.kills - before} kills"
        if not isinstance(answer, Transcript):
            self._tally.lost += 1
            self._tally.fail(f"lost: {where}: {answer.text if answer else 'the connection was closed'}")
            return False
        self.delivered += 1
        if answer.text != text:
            self.wrong += 1
            self._tally.fail(f"wrong: {answer.text!r} in place of {text!r}: {where}")
        await connection.write_event(Ping().event())  # the next answer is to this, unless one came twice
        if not (event := await next_event(connection)) or not Pong.is_type(event.type):
            self.doubled += 1
            self._tally.fail(f"{event} after the transcript: {where}")
            return False
        return True


async def kills(size: Size, rng: Random, tally: Tally) -> str:
    """All are delivered, as they are without kills."""
    recordings = load_recordings()
    async with running(tally) as server:
        began = time.monotonic()
        await transcribe(server, recordings[0].pcm)
        load_seconds = time.monotonic() - began
        said = list(zip(recordings, await heard_alone(server, recordings, tally), strict=True))
        run = _Run(server, rng, tally)
        killer = asyncio.create_task(run.killer(KILL_AFTER_LOADS * load_seconds))
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(run.client(rng.random(), said, size))
        finally:
            killer.cancel()
            await asyncio.wait([killer])
        await honest(server, recordings[3].pcm, said[3][1], tally, "after all kills")
        died = server.log.count("The model process died: killed")
        tally.require("New work is refused" not in server.log, "kills from outside opened the breaker")
    tally.faults += run.kills
    # Two kills may hit one process.
    tally.require(died > 0.5 * run.kills, f"{run.kills} kills, and {died} deaths in the server's log")
    return (
        f"{run.kills} kills under {tally.utterances} utterances: {run.delivered} delivered, {tally.lost} lost, "
        f"{run.doubled} doubled, {run.wrong} wrong"
    )
