"""The model process is killed at random moments, while it loads, listens or works: nobody may lose a word."""

import asyncio
import time
from random import Random

import psutil
from wyoming.asr import Transcript
from wyoming.error import Error

from tests.conftest import Recording, Server, load_recordings, transcribe
from wyoming_qwen_asr.limits import MAX_RESTARTS

from .service import SETTLE_SECONDS, eventually, heard_alone, honest, model_processes, running, say
from .tally import Size, Tally

CLIENTS = 8

NOTICE_SECONDS = 1.0
"""A kill that came so long before an utterance may still be counted against it."""

KILL_AFTER_LOADS = 3.0
"""The longest time between two kills, in times that a load takes: so a third of them hits a process that loads."""


class _Run:
    """Clients and their killer on one server."""

    def __init__(self, server: Server, rng: Random, tally: Tally) -> None:
        self._server = server
        self._rng = rng
        self._tally = tally
        self.killed: list[float] = []
        """When."""
        self.delivered = 0
        self.wrong = 0
        self.errors = 0

    async def killer(self, longest: float) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0, longest))
            for process in model_processes(self._server):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
                self.killed.append(time.monotonic())

    @property
    def kills(self) -> int:
        return len(self.killed)

    async def client(self, seed: float, said: list[tuple[Recording, str]], size: Size) -> None:
        """Utterances, several on each connection, until there were enough of everything."""
        rng = Random(seed)
        while self._tally.utterances < size.utterances or self.kills < size.kills:
            async with self._server.client() as connection:
                for _ in range(rng.randint(1, 5)):
                    recording, text = rng.choice(said)
                    began = time.monotonic()
                    self._tally.utterances += 1
                    self._tally.sessions += 1
                    answer = await say(connection, recording.pcm, rng)
                    kills = sum(when > began - NOTICE_SECONDS for when in self.killed)
                    where = f"{recording.path.name}, during {kills} kills"
                    if isinstance(answer, Transcript):
                        self._judge(answer.text, text, where)
                        continue
                    if answer is None:
                        self._tally.lost += 1
                        self._tally.fail(f"lost: {where}")
                    else:
                        self.errors += 1
                        self._tally.require(kills > MAX_RESTARTS, f"an error too early: {where}: {answer.text}")
                    break

    async def hopeless(self, pcm: bytes) -> None:
        """An utterance over which one model process after another dies is refused, not tried for ever."""
        before = self.kills
        killer = asyncio.create_task(self.killer(0.1))  # far sooner than any of them has loaded
        try:
            await eventually(lambda: self.kills > before, SETTLE_SECONDS)  # the one that is there
            before = self.kills
            async with self._server.client() as connection:
                answer = await say(connection, pcm)
        finally:
            killer.cancel()
            await asyncio.wait([killer])
        died = self.kills - before
        self._tally.require(isinstance(answer, Error), f"answered {answer} after {died} kills in a row")
        # The next process may be there, and killed, before we hear that.
        self._tally.require(died <= MAX_RESTARTS + 2, f"{died} model processes were given to one utterance")

    def _judge(self, heard: str, text: str, where: str) -> None:
        self.delivered += 1
        if heard != text:
            self.wrong += 1
            self._tally.fail(f"wrong: {heard!r} in place of {text!r}: {where}")


async def kills(size: Size, rng: Random, tally: Tally) -> str:
    """Delivered, lost, wrong, and refused: an error after too many restarts is allowed, and counted."""
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
        await run.hopeless(recordings[3].pcm)
        await honest(server, recordings[3].pcm, said[3][1], tally, "after all kills")
        died = server.log.count("The model process died")
    tally.faults += run.kills
    # Two kills may hit one process.
    tally.require(died > 0.5 * run.kills, f"{run.kills} kills, and {died} deaths in the server's log")
    return (
        f"{run.kills} kills under {tally.utterances} utterances: {run.delivered} delivered, {tally.lost} lost, "
        f"{run.wrong} wrong, {run.errors} refused after more than {MAX_RESTARTS} restarts"
    )
