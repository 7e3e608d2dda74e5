"""Hostile Wyoming streams against a connection's own code, in this process: far more than go through a network."""

import asyncio
import gc
import logging
from itertools import count
from random import Random
from typing import Any, cast

import psutil

from tests.conftest import load_recordings
from wyoming_qwen_asr.engine.engine import Engine
from wyoming_qwen_asr.engine.session import Session, SessionOptions
from wyoming_qwen_asr.errors import Busy
from wyoming_qwen_asr.events import READER_LIMIT, Final, Located, read_event
from wyoming_qwen_asr.gateway import _give_memory_back
from wyoming_qwen_asr.metrics import Metrics
from wyoming_qwen_asr.wyoming.connection import Connection

from .hostile_wyoming import ANSWERS, shown
from .mutate import KNOWN, hostile
from .service import rss
from .tally import Size, Tally

WARM_UP = 2000
"""Streams until memory is what it is at work."""

MAX_GROWTH = 10.0
"""MB."""

END_SECONDS = 30.0
"""For one stream; milliseconds are usual."""

AT_ONCE = 4


class _Engine:
    """Takes sessions as the real one does; each has its final as soon as it ends."""

    name = "demo"
    model = Located("demo", "/nowhere", ["English", "German"])

    def __init__(self) -> None:
        self.open: set[Session] = set()
        self._numbers = count(1)

    def session(self, options: SessionOptions) -> Session:
        number = next(self._numbers)
        if number % 50 == 0:
            raise Busy("as every now and then")
        session = _Session(number, options, "prefer", lambda: None, self.open.discard)
        self.open.add(session)
        return session


class _Session(Session):
    async def end(self) -> None:
        await super().end()
        self.deliver(Final("heard", "English"))


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self._closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def abort(self) -> None:
        self._closing = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass


class _Faults(logging.Handler):
    """Errors that were logged; warnings are what hostile clients deserve."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(logging.ERROR)
        self._tally = tally

    def emit(self, record: logging.LogRecord) -> None:
        self._tally.fail(f"logged: {logging.Formatter().format(record)[:3000]}", kind=record.getMessage()[:60])


class _Run:
    def __init__(self, tally: Tally, rng: Random, pcm: bytes) -> None:
        self._tally = tally
        self._rng = rng
        self._pcm = pcm
        self._metrics = Metrics()
        self.engine = _Engine()
        self.sent = 0

    async def send(self, streams: int) -> None:
        """So many, several at a time."""
        end = self.sent + streams
        async with asyncio.TaskGroup() as clients:
            for _ in range(AT_ONCE):
                clients.create_task(self._client(end))

    async def _client(self, end: int) -> None:
        while self.sent < end:
            self.sent += 1
            stream = KNOWN[self.sent - 1] if self.sent <= len(KNOWN) else hostile(self._rng, self._pcm)
            reader = asyncio.StreamReader(limit=READER_LIMIT)
            cut = self._rng.randrange(len(stream) + 1) if self._rng.random() < 0.3 else len(stream)
            reader.feed_data(stream[:cut])
            serving = asyncio.create_task(self._serve(reader))
            if cut < len(stream):
                await asyncio.sleep(0)
                reader.feed_data(stream[cut:])
            reader.feed_eof()
            try:
                async with asyncio.timeout(END_SECONDS):
                    self._judge(stream, await serving)
            except TimeoutError:
                self._tally.fail(f"no end after {END_SECONDS:.0f} s: {shown(stream)}", kind="no end")
            except Exception as error:
                self._tally.fail(f"{error!r} escaped: {shown(stream)}", kind=repr(error)[:60])

    async def _serve(self, reader: asyncio.StreamReader) -> set[str]:
        """The types of the answers."""
        transport, loop = _Transport(), asyncio.get_running_loop()
        writer = asyncio.StreamWriter(transport, asyncio.streams.FlowControlMixin(), None, loop)
        await Connection(cast(Engine, self.engine), self._metrics, reader, writer, "hostile").run()
        answers = asyncio.StreamReader(limit=READER_LIMIT)
        answers.feed_data(transport.written)
        answers.feed_eof()
        kinds = set()
        while event := await read_event(answers):
            kinds.add(event.type)
        return kinds

    def _judge(self, stream: bytes, answers: set[str]) -> None:
        self._tally.refused += "error" in answers
        self._tally.require(answers <= ANSWERS, f"answered {answers}: {shown(stream)}")


async def streams(size: Size, rng: Random, tally: Tally) -> str:
    """No exception escapes, none is logged, no session stays, memory stays what it is."""
    run = _Run(tally, rng, load_recordings()[3].pcm)
    loop, log, faults = asyncio.get_running_loop(), logging.getLogger("wyoming_qwen_asr"), _Faults(tally)
    loop.set_exception_handler(lambda _, context: tally.fail(f"unretrieved: {context}", kind=str(context["message"])))
    _give_memory_back()  # as the gateway does, or what is measured is the allocator's habits
    log.addHandler(faults)
    log.propagate = False
    try:
        await run.send(WARM_UP)
        gc.collect()
        before = rss(psutil.Process())
        await run.send(size.in_process)
        await asyncio.sleep(0)
        gc.collect()
        growth = rss(psutil.Process()) - before
    finally:
        log.removeHandler(faults)
        log.propagate = True
        loop.set_exception_handler(None)
    tally.sessions += run.sent
    tally.require(not run.engine.open, f"{len(run.engine.open)} sessions stay open")
    tally.require(growth < MAX_GROWTH, f"memory has grown by {growth:.1f} MB")
    return f"{run.sent} hostile streams in process: {tally.refused} refused with an error, grew by {growth:.1f} MB"
