"""Both ends of a child process of ours: it speaks events on its stdin and stdout, and dies with its parent.

Parent: `Child.spawn`, `send`, `messages`, `stop`. Child: `adopt()` first of all, then `say()` or `connect()`.
"""

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from wyoming.event import Event
from wyoming.event import write_event as write_now

from .errors import Busy
from .events import READER_LIMIT, WRITE_SECONDS, Message, read_event, to_event, write_event

STOP_SECONDS = 2.0
"""What a child may take to leave once its stdin is closed; then it is killed."""

_PR_SET_PDEATHSIG = 1


class Child:
    """A running `python -m MODULE ARGS`, the leader of its own session, with pipes for events."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self.asked_to_leave = False

    @classmethod
    async def spawn(cls, module: str, *args: str) -> "Child":
        """Start it, from the main thread: PR_SET_PDEATHSIG fires when the spawning *thread* ends.
        Raises Busy when the machine has no room for another process."""
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", module, *args),  # -P: no imports from the working directory
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the parent's to handle; and one group to kill
                limit=READER_LIMIT,
            )
        except OSError as error:
            raise Busy(f"no process can be started: {error.strerror}") from None
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(
        self,
        message: Message,
        session: int | None = None,
        payload: bytes | None = None,
        seconds: float = WRITE_SECONDS,
    ) -> None:
        """Raises TimedOut when the child does not read, ConnectionError when it is gone."""
        await write_event(self._stdin, to_event(message, session, payload), seconds)

    async def events(self) -> AsyncIterator[Event]:
        """What the child says until it closes its end. Raises BadEvent for anything else."""
        while event := await read_event(self._stdout):
            yield event

    def close_stdin(self) -> None:
        """Ask the child to leave."""
        self.asked_to_leave = True
        self._stdin.close()

    @property
    def gone(self) -> bool:
        """Whether it has closed its end, by dying or otherwise, and all it said is read."""
        return self._stdout.at_eof()

    def dump(self) -> None:
        """Have it write its stacks to stderr: `faulthandler.register(SIGUSR1)` is for the child to do. One that has not
        come so far dies of it."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL for the child and whatever it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def stop(self) -> int:
        """Close stdin, wait a little, kill. The exit code, negative for a signal. Safe to call again."""
        self.close_stdin()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._ended()
        except TimeoutError:
            pass
        finally:  # also when cancelled; a killed process ends in milliseconds
            self.kill()
            await self._ended()
        return await self._process.wait()

    async def _ended(self) -> None:
        """asyncio learns of a process's end only once all it has said is read."""
        while await self._stdout.read(READER_LIMIT):
            pass
        await self._process.wait()


def adopt() -> BinaryIO:
    """In the child, before anything heavy: die with the parent, be killed first when memory runs out, and keep
    the real stdout for events alone. Returns it; what libraries print goes to stderr."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    stdin = select.poll()
    stdin.register(0, 0)  # a hang-up is always told
    if stdin.poll(0):  # the parent died before the line above, perhaps before we began
        sys.exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def say(out: BinaryIO, message: Message, payload: bytes | None = None) -> None:
    """In the child, outside of a loop: tell the parent, or leave at once when it is gone."""
    try:
        write_now(to_event(message, payload=payload), out)
    except BrokenPipeError:
        os._exit(1)


async def connect(out: BinaryIO) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """In the child, once its loop runs: stdin to read from, `out` to write to."""
    return await streams(sys.stdin.buffer, out)


async def streams(source: BinaryIO, sink: BinaryIO) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Asyncio's reader and writer on two pipe files. Raises ValueError for files of another kind."""
    for file in (source, sink):
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or file.isatty()):
            raise ValueError("it is neither a pipe nor a terminal")
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READER_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sink)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)
