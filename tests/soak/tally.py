"""How much of everything, what was counted, and what must not have happened."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random

from tests.conftest import Server

MAX_FAILURES = 20
"""Kept of one scenario: the first ones tell."""

LOG_FAULTS = re.compile(
    r"^(?:.*\n)?.*(?:Traceback|never retrieved|Unhandled exception).*\n(?:[ \t].*\n|\n)*(.*)", re.MULTILINE
)
"""A fault in the log: the line before it, what is indented under it, and in a group the line that ends it."""

LOG_EXCERPT = 3000
"""Characters of one."""


@dataclass(frozen=True)
class Size:
    """One round of every scenario, `rounds` of them."""

    rounds: int
    round_seconds: float
    """A deadline that only a hang reaches, for one scenario."""
    kills: int
    """Of the model process, over at least so many `utterances`."""
    utterances: int
    streams: int
    """Hostile Wyoming streams, through the network to a real server."""
    in_process: int
    """More of them, to a connection's code alone."""
    forms: int
    """Mutated uploads, besides those that are listed."""
    vanishing: int
    gaps: int
    """Utterances between which the model process may be evicted."""
    call_seconds: float
    """Of a call."""


CI = Size(
    rounds=1,
    round_seconds=400,
    kills=20,
    utterances=500,
    streams=10_000,
    in_process=200_000,
    forms=150,
    vanishing=200,
    gaps=24,
    call_seconds=600,
)
FULL = Size(
    rounds=20,
    round_seconds=3600,
    kills=50,
    utterances=500,
    streams=40_000,
    in_process=50_000,
    forms=500,
    vanishing=900,
    gaps=200,
    call_seconds=3600,
)


@dataclass
class Tally:
    """Of one scenario."""

    sessions: int = 0
    """Streams of audio opened, honest or not."""
    faults: int = 0
    """Processes killed or evicted, and clients gone, while others were served."""
    refused: int = 0
    """Bad inputs answered with an error."""
    utterances: int = 0
    """Of honest clients: each is owed a transcript."""
    lost: int = 0
    """Those that got neither a transcript nor an error."""
    failures: list[str] = field(default_factory=list)
    suppressed: int = 0
    _told: set[str] = field(default_factory=set)

    def fail(self, what: str, kind: str | None = None) -> None:
        """Of each kind the first is told, and not too many in all."""
        kind = kind or what
        if kind in self._told or len(self.failures) >= MAX_FAILURES:
            self.suppressed += 1
        else:
            self._told.add(kind)
            self.failures.append(what)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.fail(what)

    def read_log(self, server: Server, after: str = "") -> None:
        """Look for faults in what the server has logged since the last time, and forget that."""
        log, server.log = server.log, ""
        for found in LOG_FAULTS.finditer(log):
            self.fail(f"the server logged a fault{after}:\n{found[0][:LOG_EXCERPT]}", kind=found[1][:60])

    def add(self, other: "Tally") -> None:
        self.sessions += other.sessions
        self.faults += other.faults
        self.refused += other.refused
        self.utterances += other.utterances
        self.lost += other.lost
        self.failures += other.failures
        self.suppressed += other.suppressed

    def __str__(self) -> str:
        return (
            f"held {self.sessions} sessions · survived {self.faults} faults · refused {self.refused} bad inputs · "
            f"lost {self.lost} of {self.utterances} utterances"
        )


Scenario = Callable[[Size, Random, Tally], Awaitable[str]]
