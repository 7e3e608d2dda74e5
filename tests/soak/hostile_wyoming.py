"""Hostile Wyoming clients beside honest ones: every bad stream ends, and nobody else notices."""

import asyncio
import contextlib
import time
from random import Random

from tests.conftest import Server, load_recordings
from wyoming_qwen_asr.events import READER_LIMIT, BadEvent, read_event

from .mutate import KNOWN, hostile
from .service import heard_alone, honest, model_processes, rss, running, settled
from .tally import Size, Tally

HOSTILE = 6
"""At once: with the honest one far fewer than sessions and connections are allowed."""

END_SECONDS = 60.0
"""From the end of a hostile stream to the end of its connection: the model may have to load meanwhile."""

MAX_GROWTH = 20.0
"""MB of the gateway's memory, over all streams of a round."""

ANSWERS = {"info", "pong", "transcript-start", "transcript-chunk", "transcript", "transcript-stop", "error"}

WARM_UP = 300
"""Streams until the gateway's memory is what it is at work."""

LOG_EVERY = 250


class _Run:
    """Streams sent by several clients in turn."""

    def __init__(self, server: Server, rng: Random, tally: Tally, pcm: bytes) -> None:
        self._server = server
        self._rng = rng
        self._tally = tally
        self._pcm = pcm
        self.sent = 0

    async def send(self, count: int) -> None:
        """So many streams, unless honest clients suffer already."""
        end = self.sent + count
        async with asyncio.TaskGroup() as clients:
            for _ in range(HOSTILE):
                clients.create_task(self._client(end))

    async def _client(self, end: int) -> None:
        while self.sent < end and not self._tally.lost:
            self.sent += 1
            number = self.sent
            stream = KNOWN[number - 1] if number <= len(KNOWN) else hostile(self._rng, self._pcm)
            how = self._rng.random()
            await self._stream(number, stream, how)
            if number % LOG_EVERY == 0:
                self._tally.read_log(self._server, f" around stream {number}")

    async def _stream(self, number: int, stream: bytes, how: float) -> None:
        """Send, hear the answers to the end. `how` picks a way of sending."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port, limit=READER_LIMIT)
        sending = asyncio.create_task(_send(writer, stream, how))
        try:
            async with asyncio.timeout(END_SECONDS):
                answers = await _answers(reader)
        except TimeoutError:
            self._tally.fail(f"stream {number} has not ended {END_SECONDS:.0f} s after its last byte: {shown(stream)}")
            return
        except BadEvent as error:
            self._tally.fail(f"the answer to stream {number} is not Wyoming: {error}: {shown(stream)}")
            return
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            writer.close()
        self._tally.refused += "error" in answers
        self._tally.require(answers <= ANSWERS, f"stream {number} is answered {answers}: {shown(stream)}")


async def _send(writer: asyncio.StreamWriter, stream: bytes, how: float) -> None:
    """At once, in parts, or byte by byte; then no more."""
    with contextlib.suppress(OSError):
        size = 1 if how < 0.05 else max(1, int(how * len(stream))) if how < 0.5 else len(stream)
        for at in range(0, len(stream) if size > 1 else min(len(stream), 400), max(1, size)):
            writer.write(stream[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()


async def _answers(reader: asyncio.StreamReader) -> set[str]:
    """Types of the events until the connection ends. Raises BadEvent."""
    kinds = set()
    with contextlib.suppress(ConnectionError):
        while event := await read_event(reader):
            kinds.add(event.type)
    return kinds


def shown(stream: bytes) -> str:
    """As much of it as tells."""
    return f"{stream[:1500]!r}{'…' if len(stream) > 1500 else ''}"


async def hostile_wyoming(size: Size, rng: Random, tally: Tally) -> str:
    """Honest clients get their transcripts all the while; memory, sessions and the log stay clean."""
    recordings = load_recordings()
    async with running(tally) as server:
        texts = await heard_alone(server, recordings, tally)
        run = _Run(server, rng, tally, recordings[3].pcm)
        await run.send(WARM_UP)
        await settled(server, tally)
        models = model_processes(server)
        before = rss(server.process.pid)

        async def listen() -> None:
            while True:
                n = Random(tally.utterances).randrange(len(recordings))
                await honest(server, recordings[n].pcm, texts[n], tally, f"after {run.sent} hostile streams")
                await asyncio.sleep(0.2)

        listening = asyncio.create_task(listen())
        began = time.monotonic()
        try:
            await run.send(size.streams)
        finally:
            listening.cancel()
            await asyncio.wait([listening])
        rate = size.streams / (time.monotonic() - began)
        tally.sessions += run.sent
        await settled(server, tally)
        await honest(server, recordings[3].pcm, texts[3], tally, "after all hostile streams")
        tally.require(model_processes(server) == models, "the model process did not survive")
        growth = rss(server.process.pid) - before
        tally.require(growth < MAX_GROWTH, f"the gateway has grown by {growth:.1f} MB")
    return (
        f"{run.sent} hostile streams ({rate:.0f}/s): {tally.refused} refused with an error, none left open, "
        f"gateway grew by {growth:.1f} MB; {tally.utterances} honest utterances: {tally.lost} lost"
    )
