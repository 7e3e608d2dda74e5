"""A model process that fails on command, with the real one's messages and ends. It understands no speech: the text it
gives is how many bytes it was sent and their checksum, so that a byte lost, doubled or moved shows.

A session's context is `WORD [PLACE [FILE]]`. WORD says what to do (FAULTS, and `slow`); PLACE says when: at the
session's `start`, its `first` or `second` audio, its `end` (the default), or with half of its `result` said. With FILE,
an absolute path that must not exist yet, it is done once: the next process finds the file. A file `load` in the folder
FAKE_MODEL holds a word for the time before the model is loaded.

With `partials` among the words the text streams instead: `streamed_text`. PLACE may be a number then: that of a word
of this process, when it has just been said. `contradiction` takes back the first segment.
"""

import asyncio
import ctypes
import faulthandler
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from wyoming_qwen_asr.errors import EXIT_CANNOT_LOAD
from wyoming_qwen_asr.events import (
    BadEvent,
    Failed,
    Final,
    Message,
    Partial,
    Ready,
    Segment,
    SessionAudio,
    SessionCancel,
    SessionEnd,
    SessionStart,
    Working,
    from_event,
    read_event,
    to_event,
    write_event,
)
from wyoming_qwen_asr.process import adopt, connect, say

LOAD_SECONDS = 0.2
COMPUTE_SECONDS = 0.1
FOREVER = 10_000

WORD_BYTES = 3200
"""Of audio, for a word that is streamed: 0.1 s in the format of the recordings."""
WORDS = 8
"""Of a segment."""


def _die(number: signal.Signals) -> NoReturn:
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(FOREVER)
    raise AssertionError


def _hang_in_python() -> None:
    while True:
        pass


def _hang_with_the_lock() -> None:
    """Of Python's, waiting in C for a mutex that it holds itself; a sleep would end with the first signal."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def _hoard() -> None:
    """Until the limit of a control group is met; without one, the machine is spared."""
    hoard = []
    for _ in range(64):
        hoard.append(b"x" * (1 << 24))
    raise AssertionError("there is no limit of memory")


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: _die(signal.SIGKILL),
    "crash": lambda: _die(signal.SIGSEGV),
    "abort": lambda: _die(signal.SIGABRT),
    "stop": lambda: _die(signal.SIGSTOP),
    "exit": lambda: os._exit(1),
    "hang-py": _hang_in_python,
    "hang-gil": _hang_with_the_lock,
    "oom": _hoard,
    "garbage": lambda: os.write(FakeModel.fd, b"\x00\xff no event\n"),
    "half-event": lambda: os.write(FakeModel.fd, b'{"type": "final", "data_length": 300}\n{"text'),
    "stdout-noise": lambda: [print("noise", flush=True), os.write(1, b"more of it\n")],
}


class FakeModel:
    """One process."""

    fd = -1
    """Of the pipe that carries events."""

    def __init__(self, out: BinaryIO) -> None:
        FakeModel.fd = out.fileno()
        self._out = out
        self._writer: asyncio.StreamWriter | None = None
        self._words: dict[int, list[str]] = {}
        self._audio: dict[int, bytes] = {}
        self._chunks: dict[int, int] = {}
        self._starts: dict[int, SessionStart] = {}
        self._said: dict[int, list[str]] = {}  # words that were streamed
        self._due: asyncio.Queue[int] = asyncio.Queue()

    async def run(self) -> None:
        reader, self._writer = await connect(self._out)
        computing = asyncio.create_task(self._compute())
        while event := await read_event(reader):
            message, number = from_event(event)
            await self._dispatch(message, number, event.payload or b"")
        computing.cancel()

    async def _say(self, message: Message, number: int | None = None) -> None:
        assert self._writer
        await write_event(self._writer, to_event(message, number))

    async def _dispatch(self, message: Message, number: int, payload: bytes) -> None:
        match message:
            case SessionStart():
                self._words[number] = message.context.split()
                self._audio[number] = b""
                self._chunks[number] = 0
                self._starts[number] = message
                self._said[number] = []
                await self._obey(number, "start")
            case SessionAudio() if number in self._audio:
                self._audio[number] += payload
                self._chunks[number] += 1
                if "partials" in self._words[number]:
                    await self._stream(number, self._audio[number])
                await self._obey(number, {1: "first", 2: "second"}.get(self._chunks[number], ""))
            case SessionEnd() if number in self._audio:
                self._due.put_nowait(number)
            case SessionCancel():
                self._audio.pop(number, None)

    async def _stream(self, number: int, audio: bytes, *, ended: bool = False) -> None:
        """Say the words that are new, and a segment after so many of them."""
        said, words = self._said[number], words_of(audio, ended=ended)
        for word in words[len(said) :]:
            if len(said) % WORDS == 0:
                await self._say(Partial("", "…"), number)
            await self._say(Partial(f" {word}" if len(said) % WORDS else word, "…"), number)
            said.append(word)
            await self._obey(number, str(len(said)))
            if len(said) % WORDS == 0:
                await self._segment(number, min(len(said) * WORD_BYTES, len(audio)))
        if ended and len(said) % WORDS:
            await self._segment(number, len(audio))

    async def _segment(self, number: int, end: int) -> None:
        """Of the last words; it ends with this byte."""
        start, said = self._starts[number], self._said[number]
        begin = (len(said) - 1) // WORDS * WORDS
        text = "taken back" if begin == 0 and "contradiction" in self._words[number] else " ".join(said[begin:])
        first, last = (
            start.offset + at / (start.rate * start.width * start.channels) for at in (begin * WORD_BYTES, end)
        )
        steps = len(said) - begin
        segment = Segment(text, "English", first, last, steps, drafted=10, accepted=9, windows=1, rows=2)
        await self._say(segment, number)

    async def _compute(self) -> None:
        """What has ended is computed together, as the real scheduler does it."""
        while True:
            batch = [await self._due.get()]
            while not self._due.empty():
                batch.append(self._due.get_nowait())
            await self._say(Working(batch))
            await asyncio.sleep(COMPUTE_SECONDS)
            for number in batch:
                if number in self._audio:
                    await self._obey(number, "end")
            for number in batch:
                if number in self._audio:
                    await self._finish(number)
            await self._say(Working([]))

    async def _finish(self, number: int) -> None:
        audio = self._audio.pop(number)
        if "slow" in self._words[number]:
            for _ in range(30):
                await asyncio.sleep(0.15)
                await self._say(Working([number]))
        if "result" in self._words[number] and self._once(number):
            os.write(FakeModel.fd, b'{"type": "final", "data_length": 300}\n{"text": "half')
            FAULTS[self._words[number][0]]()
        text = text_of(audio)
        if "partials" in self._words[number]:
            await self._stream(number, audio, ended=True)
            text = " ".join(self._said[number])
            if "contradiction" in self._words[number]:
                text = " ".join(["taken back", *self._said[number][WORDS:]])
        await self._say(Final(text, "English"), number)

    async def _obey(self, number: int, place: str) -> None:
        word, when = [*self._words[number], "", ""][:2]
        if word in FAULTS and place == (when or "end") and self._once(number):
            if place != "end":
                await self._say(Working([number]))  # whose fault it is
            FAULTS[word]()

    def _once(self, number: int) -> bool:
        """Whether this is to be done still."""
        if not "".join(self._words[number][2:3]).startswith("/"):
            return True
        try:
            os.close(os.open(self._words[number][2], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def text_of(pcm: bytes) -> str:
    """What the fake model makes of a session's audio."""
    return f"{len(pcm)} bytes, {zlib.crc32(pcm):08x}."


def words_of(pcm: bytes, *, ended: bool = True) -> list[str]:
    """Those that the fake model streams: one for each tenth of a second, and one for what remains at the end."""
    whole = len(pcm) if ended else len(pcm) // WORD_BYTES * WORD_BYTES
    return [f"{zlib.crc32(pcm[at : at + WORD_BYTES]):08x}" for at in range(0, whole, WORD_BYTES)]


def streamed_text(pcm: bytes) -> str:
    """What the fake model makes of a session's audio with `partials`."""
    return " ".join(words_of(pcm))


def main() -> None:
    out = adopt()
    faulthandler.register(signal.SIGUSR1)
    word = Path(os.environ.get("FAKE_MODEL", "/nowhere"), "load")
    if word.exists():
        if (said := word.read_text()) == "exit3":
            say(out, Failed("model-invalid", "the weights are gone"))
            sys.exit(EXIT_CANNOT_LOAD)
        print("At load:", said, flush=True)
        FAULTS[said]()
    time.sleep(LOAD_SECONDS)
    say(out, Ready(LOAD_SECONDS, ["a fake"]))
    with suppress(ConnectionError, BadEvent):  # a gateway that dies may do so in the middle of an event
        asyncio.run(FakeModel(out).run())
    os._exit(0)


if __name__ == "__main__":
    main()
