"""One session in the model process: a stream of audio, its segments, and what was made of them so far."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import numpy as np

from ..audio import SAMPLE_RATE, AudioFormat
from ..events import Hint, SessionStart
from ..text import echoes
from .answer import Answer
from .job import NOTHING, Job, Recognition
from .resample import Resampler, Samples
from .stream import UNFIXED_CHUNKS, UNFIXED_TOKENS, RollbackStream
from .vad import FRAME, QUIET_FROM, Detector, Segmented, Segmenter

STEP_SECONDS = 0.5
"""New audio that a step is worth."""

STEP_REST = 1.25
"""From the beginning of a step to that of the next one while a file waits, as a multiple of what it took: the file gets
on, too. Where nothing waits there is no rest, for a step writes all that was said since the one before: the sooner it
begins, the less is left for the end. Either way a slow machine has longer and fewer steps, and never a backlog."""


@dataclass(frozen=True)
class Pace:
    """When there is a step, and what of it is shown; the names are those of the official package's streaming."""

    chunk_size_sec: float | None = None
    """New audio that a step needs. None: STEP_SECONDS, and while files wait, rests as STEP_REST says."""
    unfixed_chunk_num: int = UNFIXED_CHUNKS
    unfixed_token_num: int = UNFIXED_TOKENS

    @property
    def chunk(self) -> int:
        """In samples."""
        return int((self.chunk_size_sec or STEP_SECONDS) * SAMPLE_RATE)


@dataclass(frozen=True)
class Step:
    """A decode of the first `end` samples of a part."""

    end: int
    exact: bool
    """Whether it stands if these turn out to be all."""
    began: float
    language: str | None = None
    """The one that is expected."""


@dataclass(eq=False)
class Part:
    """A segment of a session: the one that is being spoken, or a closed one."""

    number: int
    """The session's."""
    stable: RollbackStream
    context: str = ""
    audio: Samples = field(default_factory=lambda: np.zeros(0, np.float32))
    """What is to be recognised of it, as far as it is known."""
    length: int | None = None
    """How many samples of the session it took, once it is closed."""
    settled: bool = False
    """Whether `audio` is all of it, unless somebody goes on speaking."""

    job: Job | None = None
    fed: int = 0
    """Samples that the job has."""
    step: Step | None = None
    """Under way,"""
    begun: bool = False
    """and computed already in part."""
    last: Step | None = None
    """The last one that came to an answer,"""
    result: Recognition = NOTHING
    """and that answer."""
    steps: int = 0
    """Answers while it was spoken."""
    shown: int = 0
    """Samples that the last hypothesis which was shown had heard."""
    tail: str = ""
    """The unfixed text that was last shown."""
    rested: float = 0.0
    """The time from which on another step may begin while a file waits."""

    @property
    def closed(self) -> bool:
        return self.length is not None

    @property
    def known(self) -> bool:
        """Whether there is an answer that stands for all of the audio."""
        if not len(self.audio):
            return True
        return self.last is not None and self.last.exact and self.last.end == len(self.audio)

    @property
    def done(self) -> bool:
        """Whether its text is there."""
        return self.closed and self.known and self.step is None

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Tokens drafted and accepted, windows and rows computed again; see events.Segment."""
        return self.job.counts if self.job else (0, 0, 0, 0)

    @property
    def stage(self) -> Literal["hear", "encode", "prefill", "decode"]:
        """The next unit of the step under way."""
        if not (self.job and self.begun):
            return "hear"
        if self.job.encoding:
            return "encode"
        return "decode" if self.job.decoding else "prefill"

    @property
    def tagged(self) -> bool:
        """Whether it is settled which language is spoken in it, or that none is."""
        return self.closed and (self.known or (not self.outdated and self._answer is not None and self._answer.tagged))

    @property
    def tag(self) -> str | None:
        """The language that is spoken in it, once that is settled."""
        if not self.tagged:
            return None
        return self.result.language if self.known or not self._answer else self._answer.language

    @property
    def _answer(self) -> Answer | None:
        """Of the step under way; before that has begun, the job has that of the one before."""
        return self.job.answer if self.job and self.step and self.begun else None

    @property
    def outdated(self) -> bool:
        """Whether the step under way is not worth its end: only that of all audio counts now."""
        if self.step is None or not (self.closed or self.settled):
            return False
        return not (self.step.exact and self.step.end == len(self.audio))

    def due(self, now: float, pace: Pace, rest: bool) -> Step | None:
        """The step that is worth beginning; `rest`: at its time, for others wait."""
        end = len(self.audio)
        if self.step or self.known:
            return None
        if self.closed or self.settled:
            return Step(end, True, now)
        new = end - (self.last.end if self.last else 0)
        return Step(end, False, now) if new >= pace.chunk and (now >= self.rested or not rest) else None

    def begin(self, step: Step) -> None:
        self.step, self.begun = step, False

    def finish(self, result: Recognition, now: float, pace: Pace) -> None:
        """The step under way has come to an answer."""
        assert self.step
        self.last, self.step, self.result = self.step, None, result
        if not self.closed:
            self.steps += 1
        if pace.chunk_size_sec is None:
            self.rested = self.last.began + STEP_REST * (now - self.last.began)

    def abandon(self) -> None:
        """The step under way is of no use any more."""
        self.step = None
        if self.job:
            self.job.abandon()

    def show(self, pace: Pace) -> tuple[str, str] | None:
        """What its last answer adds to the stable text, and the unfixed text after that; None when nothing changes, and
        when too little was heard since the one before to confirm it."""
        assert self.last
        if self.last.end - self.shown < pace.chunk:
            return None
        self.shown = self.last.end
        # The end may come to belong to the next segment, and the whole to be no speech at all.
        frozen = self.shown >= QUIET_FROM or echoes(self.result.text, self.context, so_far=True)
        delta, tail = self.stable.step(self.result.text_ids, self.result.margins, frozen)
        if not delta and tail == self.tail:
            return None
        self.tail = tail
        return delta, tail


class Stream:
    """A session, as far as it has come. `arrive` and `end` take audio; `listen` finds speech and segments in it, with
    the detector, which takes time; `sort` makes parts of them."""

    def __init__(
        self,
        number: int,
        start: SessionStart,
        decode: Callable[[Sequence[int]], str],
        pace: Pace,
        detector: Callable[[], Detector],
    ) -> None:
        self.number, self.start = number, start
        self._decode, self._pace = decode, pace
        self._resampler = Resampler(AudioFormat(start.rate, start.width, start.channels))
        self._segmenter = Segmenter(detector)
        self._arrived: list[Samples] = []
        self._ended = False
        self.parts: deque[Part] = deque()
        """Closed ones that are not delivered, in their order, and the one that is being spoken."""
        self.listened = 0
        """When it had its turn of listening,"""
        self.turn = 0
        """and when the last of its parts got a place, among those of all sessions."""
        self.done = 0
        """Samples delivered."""
        self.texts: list[str] = []
        self.language: str | None = start.heard
        """Of the first delivered segment with speech; the later ones get it as a hint."""

    def arrive(self, pcm: bytes) -> None:
        self._arrived.append(self._resampler.feed(pcm))

    def end(self) -> None:
        self._arrived.append(self._resampler.flush())
        self._ended = True

    @property
    def unheard(self) -> bool:
        """Whether `listen` has something to do."""
        if self._ended:
            return not self._segmenter.over
        return sum(map(len, self._arrived)) + self._segmenter.unheard >= FRAME

    @property
    def over(self) -> bool:
        return self._segmenter.over and not self.parts

    def take(self) -> tuple[Samples, bool]:
        """What has arrived, for `listen`; whether it is the end."""
        samples = np.concatenate([np.zeros(0, np.float32), *self._arrived])
        self._arrived.clear()
        return samples, self._ended

    def listen(self, samples: Samples, last: bool, frames: int) -> list[Segmented]:
        """Look at so many frames at most of what was taken so far."""
        self._segmenter.feed(samples)
        if last:
            self._segmenter.end()
        return self._segmenter.listen(frames)

    def sort(self, segments: Sequence[Segmented]) -> None:
        """Close the parts of the segments that were found, and update the one that is being spoken."""
        for segment in segments:
            part = self._open_part()
            part.audio, part.length = segment.audio, segment.length
        if len(audio := self._segmenter.audio):
            part = self._open_part()
            part.audio, part.settled = audio, self._segmenter.settled

    def _open_part(self) -> Part:
        if not self.parts or self.parts[-1].closed:
            stable = RollbackStream(self._decode, self._pace.unfixed_chunk_num, self._pace.unfixed_token_num)
            self.parts.append(Part(self.number, stable, self.start.context))
        return self.parts[-1]

    def expected(self, part: Part) -> str | None:
        """The language of a part: the client's, or that of the first part before it with speech."""
        before = takewhile(lambda each: each is not part, self.parts)
        return self.start.language or self.language or next(filter(None, (each.tag for each in before)), None)

    @property
    def hint(self) -> Hint:
        """A language heard earlier in the session is a preference at most, whatever the client's would be."""
        return self.start.hint if self.start.language or self.start.hint == "ignore" else "prefer"

    def next(self, now: float, rest: bool) -> tuple[Part, Step] | None:
        """The first part with a step that is due (see Part.due), and may begin: it has to be known what it is to
        expect. That must not depend on how fast the part before is: a replay has to come to the same text."""
        known = bool(self.start.language or self.language or self.start.hint == "ignore")
        for part in self.parts:
            spoken = self.start.live and part is self.parts[0]
            if (part.closed or spoken) and (step := part.due(now, self._pace, rest)):
                return part, replace(step, language=self.expected(part))
            known = known or bool(part.tag)
            if not known and not part.tagged:
                return None
        return None
