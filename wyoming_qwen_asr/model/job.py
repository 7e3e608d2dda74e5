"""A recording under way: what stays of it from step to step, and the step that is computed."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .answer import Answer, Guess
from .features import LogMel


@dataclass(frozen=True)
class Recognition:
    """What was said. No speech is "" in the language None.

    ids: the model's answer, language tag (its own or the forced one) and text, without the end token; text_ids: those
    of the text; margins: by how much each of these was the likeliest, in nats.
    looped: it ran in circles and was cut. truncated: it wrote more than anybody can say in that time.
    """

    text: str
    language: str | None
    ids: tuple[int, ...] = ()
    text_ids: tuple[int, ...] = ()
    margins: tuple[float, ...] = field(default=(), compare=False)
    looped: bool = False
    truncated: bool = False


NOTHING = Recognition("", None)
"""Nobody spoke."""


@dataclass(frozen=True)
class Second:
    """A finished second: convolved rows [13, width], the floor of their features, and the power of the softest bin."""

    rows: Tensor
    floor: float
    softest: float

    def stale(self, floor: float, tolerance: float) -> bool:
        """Whether another floor would change the features by more than the tolerance."""
        return self.softest < max(floor, self.floor) and abs(floor - self.floor) > tolerance


class Job:
    """A recording under way: what stays from step to step, and the step that is computed.

    A step goes through `Network.hear`, `Network.encode` once a window, `Batch.prefill` until it is decoding, and
    `Batch.decode` until its answer is done.
    """

    def __init__(self, context: str | None, head: Tensor, suffix: Tensor, device: torch.device) -> None:
        self.context = context
        self.head, self.suffix = head, suffix  # rows [n, hidden] of the prompt before and after those of the sound
        self.log_mel = LogMel(device)
        self.seconds: list[Second | None] = []
        self.encoded: list[Tensor | None] = []  # rows [T, hidden] of finished windows; None is stale or new
        self.held = 0  # rows of its slot that stay: the head and finished windows
        self.used = 0  # when its slot was used last
        self.windows = self.rows = 0  # computed again
        self._most_held = 0
        self._drafted = self._accepted = 0  # of the steps before
        self.draft: list[int] = []  # the last answer
        # The step:
        self.answer: Answer | None = None
        self.mel = head[:0]
        self.floor = 0.0
        self.softest: list[float] = []  # of each finished second
        self.to_encode: deque[int] = deque()
        self.partial = head[:0]  # rows of the unfinished window
        self.to_read: Tensor | None = None  # rows [n, hidden] for the decoder, from row `base` of the slot on
        self.base = self.read = 0  # `read` of them are done
        self.guesses: list[Guess] = []  # what is likeliest behind the last row before the draft, and each of that
        self.prompt_rows = 0  # where in the slot the answer begins

    @property
    def encoding(self) -> bool:
        """Whether windows are still to be encoded."""
        return bool(self.to_encode)

    @property
    def decoding(self) -> bool:
        """Whether all of the prompt, and of the draft, is read."""
        return self.to_read is not None and self.read == len(self.to_read)

    @property
    def room(self) -> int:
        """The most rows of a slot that the step can come to need."""
        return self.prompt_rows + (self.answer.room if self.answer else 0)

    @property
    def resting(self) -> bool:
        """Whether there is no step under way."""
        return self.answer is None or self.answer.done

    def abandon(self) -> None:
        """The step is of no use any more. What it has encoded and read of finished windows stays, and what it has
        written goes into the draft of the next one."""
        if self.answer:
            self._drafted += self.answer.drafted
            self._accepted += self.answer.accepted
            self.draft = self.answer.likely
        self.answer = None

    def forget(self, length: int) -> None:
        """The slot holds no more than so many rows that stay."""
        self._most_held = max(self._most_held, self.held)
        self.held = min(self.held, length)

    def hold(self, length: int, window_tokens: int) -> None:
        """The slot has so many rows; those of the head and of finished windows stay."""
        if length >= len(self.head):
            windows = min(len(self.encoded), (length - len(self.head)) // window_tokens)
            self.held = max(self.held, len(self.head) + windows * window_tokens)

    def recount(self) -> None:
        """The decoder begins to read behind what the slot holds: what it held before counts as read anew."""
        self._most_held = max(self._most_held, self.held)
        self.rows += self._most_held - self.held

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Tokens drafted and accepted, windows and rows computed again."""
        now = (self.answer.drafted, self.answer.accepted) if self.answer else (0, 0)
        return self._drafted + now[0], self._accepted + now[1], self.windows, self.rows

    @property
    def result(self) -> Recognition:
        """What the answer says; final once it is done."""
        answer = self.answer
        assert answer
        ids, text_ids = tuple(answer.ids), tuple(answer.text_ids)
        margins = tuple(answer.text_margins)
        return Recognition(answer.text, answer.language, ids, text_ids, margins, answer.looped, answer.truncated)
