"""How a model process can come to its end, whose fault it was, and when the next one may start. Pure but for one file
of the kernel's."""

import random
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..errors import EXIT_CANNOT_LOAD, AsrError, ModelUnavailable
from ..limits import LOAD_SECONDS, MAX_PIECE_SECONDS


class Cause(StrEnum):
    """What ended a model process that nobody asked to leave; in the log and as a label of the metrics."""

    KILLED = "killed"
    """By a signal from outside."""
    MEMORY = "out of memory"
    CRASH = "native crash"
    HANG = "hang"
    NONSENSE = "nonsense on its pipe"
    EXIT = "exit"
    """An exception of Python's, or a library that calls exit."""
    CANNOT_LOAD = "cannot load"

    @property
    def strikes(self) -> bool:
        """Whether the audio that was being computed is suspected of it."""
        return self in (Cause.MEMORY, Cause.CRASH, Cause.HANG)


_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""The last two: a library built for another CPU."""


def cause_of(code: int, *, out_of_memory: bool) -> Cause:
    """From an exit code (negative for a signal), and whether the kernel has killed for memory meanwhile."""
    if code == EXIT_CANNOT_LOAD:
        return Cause.CANNOT_LOAD
    if code >= 0:
        return Cause.EXIT
    if -code in _CRASHES:
        return Cause.CRASH
    return Cause.MEMORY if -code == signal.SIGKILL and out_of_memory else Cause.KILLED


def oom_kills(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How often the kernel has killed in our control group because memory ran out; 0 where nobody counts.
    `memory.events` of version 2 (https://docs.kernel.org/admin-guide/cgroup-v2.html), `memory.oom_control` of 1."""
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        return 0
    # In a container the path may be the host's, and our group's files lie at the root.
    places = [root / path.lstrip("/") / "memory.events" for controllers, path in groups if not controllers]
    places += [root / "memory.events"]
    places += [root / "memory" / path.lstrip("/") / "memory.oom_control" for c, path in groups if c == "memory"]
    places += [root / "memory/memory.oom_control"]
    for place in places:
        try:
            counts = dict(line.split(maxsplit=1) for line in place.read_text().splitlines())
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


@dataclass(frozen=True)
class Patience:
    """How long is waited for what, in seconds; tests have less."""

    load: float = LOAD_SECONDS
    hang: float = 20.0
    """Without a word while there is work. Progress is told once a second, but a GPU's first kernels take several."""
    hang_per_audio: float = 0.5
    """More per second of the longest pending piece: reading it in says nothing, and a slow CPU takes half real time."""
    dump: float = 1.0
    """To write where it hangs; whoever says something meanwhile is spared."""
    alone: float = 40.0
    """A suspect keeps others waiting for so long at most, from when it is given to a loaded process: longer than it
    takes to notice that it hangs."""
    window: float = 300.0
    """Faults that are older say nothing about the next start."""
    faults: int = 3
    """So many within the window, without a final in between, open the breaker."""
    trial: float = 60.0
    """Between two trials while the breaker is open; also the longest back-off."""

    def hang_after(self, pending: float) -> float:
        """The longest silence with so many seconds of audio pending; they are read in by the piece."""
        return self.hang + self.hang_per_audio * min(pending, MAX_PIECE_SECONDS)


class Breaker:
    """Decides when to start again after a fault, and whether new work is worth accepting. Times are of one clock.

    It counts what the process does by itself. Who kills it from outside says nothing about the next one.
    """

    def __init__(self, patience: Patience, jitter: Callable[[], float] = random.random) -> None:
        self._patience = patience
        self._jitter = jitter
        self._faults: deque[float] = deque(maxlen=64)  # more change nothing
        self._next_start = 0.0
        self._next_trial = 0.0
        self._reason: str | None = None

    @property
    def open(self) -> bool:
        """Broken: only trials are admitted."""
        return self._reason is not None

    def fault(self, now: float, reason: str) -> None:
        """The process failed. The next start waits 0, 1, 2, 4 … seconds, and up to a fifth more, so that what several
        servers of one machine fight about is not asked for by all at once."""
        self._faults.append(now)
        while now - self._faults[0] > self._patience.window:
            self._faults.popleft()
        in_row = len(self._faults)
        wait = min(2.0 ** (in_row - 2), self._patience.trial) if in_row > 1 else 0.0
        self._next_start = now + wait * (1 + 0.2 * self._jitter())
        if self.open or in_row >= self._patience.faults:
            self.trip(now, reason)

    def trip(self, now: float, reason: str) -> None:
        """Open at once: another start would meet the same."""
        self._reason = reason
        self._next_trial = now + self._patience.trial

    def success(self) -> None:
        """A final was delivered."""
        self._faults.clear()
        self._next_start = 0.0
        self._reason = None

    def wait(self, now: float) -> float:
        """Seconds until the next process may start."""
        return max(0.0, self._next_start - now)

    def refusal(self, now: float) -> AsrError | None:
        """Why new work cannot be accepted. Whoever is not refused while it is open is the trial."""
        if self._reason is None:
            return None
        left = self._next_trial - now
        if left <= 0:
            self._next_trial = now + self._patience.trial
            return None
        return self.unavailable(left)

    def unavailable(self, seconds: float | None = None) -> AsrError:
        """The error for work that is lost by this, with the seconds after which it is worth another try."""
        seconds = self._patience.trial if seconds is None else seconds
        error = ModelUnavailable(f"{self._reason}; the next try is in {seconds:.0f} s")
        error.retry_after = max(1, round(seconds))
        return error
