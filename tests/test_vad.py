"""Where somebody speaks, what of it is recognised, where it is cut: pure functions, and the detector behind them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.model.resample import Samples
from wyoming_qwen_asr.model.vad import (
    EARLIEST_CUT,
    FRAME,
    LATEST_CUT,
    LEAD,
    LONGEST_SILENCE,
    PAUSE,
    PRE_ROLL,
    QUIET_FROM,
    TAIL,
    Detector,
    Segmented,
    Segmenter,
    Speech,
    cut,
    new_detector,
    quietest,
    trim,
)

from .conftest import Recording, load_recordings
from .reference import floats

property_test = settings(deadline=None, derandomize=True, max_examples=60)


def heard(*probabilities: float) -> Speech:
    speech = Speech()
    for probability in probabilities:
        speech.push(probability)
    return speech


def spoken(*stretches: tuple[float, float], until: float) -> Samples:
    """Noise where somebody speaks, from and to these seconds; a hum elsewhere."""
    audio = np.full(round(until * SAMPLE_RATE), 0.001, np.float32)
    for begin, end in stretches:
        part = audio[round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        part += np.random.default_rng(3).normal(0, 0.1, len(part)).astype(np.float32)
    return audio


def loud() -> Detector:
    return lambda frame: float(np.square(frame).mean() > 1e-4)


def segments(audio: Samples, detector: Callable[[], Detector] = loud, sizes: Sequence[int] = ()) -> list[Segmented]:
    """Of audio that comes in chunks of these sizes, then at once."""
    segmenter, found, at = Segmenter(detector), [], 0
    for size in sizes:
        segmenter.feed(audio[at : at + size])
        found += segmenter.listen(size)
        at += size
    segmenter.feed(audio[at:])
    segmenter.end()
    while not segmenter.over:
        found += segmenter.listen(40)
    return found


# --- speech and trimming ---


@pytest.mark.parametrize(
    ("probabilities", "first", "last"),
    [
        ([], None, 0),
        ([0.0, 0.29, 0.29], None, 0),
        ([1.0, 0.0, 1.0, 0.0, 1.0], None, 0),  # knocks
        ([0.0, 0.3, 0.2], 1, 3),
        ([0.0, 0.25, 0.3, 0.25, 0.25, 0.1], 2, 5),  # quieter, but still
        ([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0], 0, 6),
        ([1.0, 1.0, 0.0, 1.0, 0.0], 0, 2),  # a knock behind it
    ],
)
def test_speech(probabilities: list[float], first: int | None, last: int) -> None:
    speech = heard(*probabilities)
    assert speech.first == (None if first is None else first * FRAME)
    assert speech.last == last * FRAME
    assert speech.heard == len(probabilities) * FRAME


def test_trim() -> None:
    assert trim(Speech(9 * FRAME), 9 * FRAME) == (0, 0)
    assert trim(Speech(90_000, first=512, last=5000), 90_000) == (0, 5000 + TAIL)
    assert trim(Speech(90_000, first=50_000, last=89_600), 90_000) == (50_000 - PRE_ROLL, 90_000)


def test_what_is_said_settles_after_the_tail() -> None:
    speech = heard(*[1.0] * 5)
    while not speech.settled:
        before = trim(speech, speech.heard)
        speech.push(0.0)
        assert trim(speech, speech.heard)[1] > before[1], "the end is not known before"
    assert speech.heard >= speech.last + TAIL
    settled = trim(speech, speech.heard)
    for _ in range(20):
        speech.push(0.0)
        assert trim(speech, speech.heard) == settled
        assert speech.settled
    speech.push(1.0)
    speech.push(1.0)
    assert not speech.settled
    assert not heard(0.0, 0.0).settled, "nobody has spoken"


# --- cuts ---


def at(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


@pytest.mark.parametrize(
    ("speech", "expected"),
    [
        (Speech(at(9.9)), None),
        (Speech(LONGEST_SILENCE), LONGEST_SILENCE - LEAD),
        (Speech(at(15.0), first=at(1), last=at(14)), None),  # too early
        (Speech(at(17.0), first=at(1), last=at(16.6)), None),  # no pause yet
        (Speech(at(17.1), first=at(1), last=at(16.6)), at(16.6) + TAIL),
        (Speech(at(16.6), first=at(1), last=at(5)), at(16.6) - LEAD),  # a long silence
        (Speech(at(28.5), first=at(1), last=at(28.5)), None),  # 0.1 s still
    ],
)
def test_cuts(speech: Speech, expected: int | None) -> None:
    assert (at(0.5), at(16), at(0.3), at(1), at(0.4)) == (PAUSE, EARLIEST_CUT, TAIL, LEAD, PRE_ROLL)
    assert cut(speech, np.zeros(speech.heard, np.float32)) == expected


@pytest.mark.parametrize("begin", [0.0, 1.0, 7.3])
@pytest.mark.parametrize("quiet", [23.0, 24.43, 27.79])
def test_who_does_not_pause_is_cut_where_it_is_quietest(begin: float, quiet: float) -> None:
    """There are 210 ms of quiet: there, 50 ms from either end, whatever is quieter elsewhere."""
    audio = spoken((begin, 40), until=40)
    for from_, to, factor in ((quiet, quiet + 0.21, 0.2), (19.0, 21.0, 0.1), (28.1, 29.0, 0.1)):
        audio[at(begin + from_) : at(begin + to)] *= factor
    speech = Speech(at(begin) + LATEST_CUT, first=at(begin) + PRE_ROLL, last=at(begin) + LATEST_CUT)
    found = cut(speech, audio)
    assert found is not None
    assert quiet + 0.05 <= found / SAMPLE_RATE - begin <= quiet + 0.16


def test_quietest_is_within_its_bounds() -> None:
    for seconds in (28, 27.95):
        assert QUIET_FROM < quietest(spoken((0, 28), until=seconds)) < LATEST_CUT


# --- segments ---


def test_a_stream_of_speech_and_pauses() -> None:
    audio = spoken((2, 4), (4.5, 10), (11, 20), (20.7, 30), (45, 46), until=50)
    found = segments(audio)
    assert sum(segment.length for segment in found) == len(audio)
    ends = np.cumsum([segment.length for segment in found]) / SAMPLE_RATE
    said = [len(segment.audio) / SAMPLE_RATE for segment in found]
    assert ends == pytest.approx([20.3, 35.3, 50], abs=0.1)
    assert said == pytest.approx([20.3 - 1.6, 30.3 - 20.3, 46.3 - 44.6], abs=0.1)


def test_silence_is_let_go_of() -> None:
    found = segments(spoken((41, 42), until=60))
    assert [len(segment.audio) > 0 for segment in found] == [False, False, False, False, True, False]
    assert all(segment.length == pytest.approx(LONGEST_SILENCE - LEAD, abs=FRAME) for segment in found[:4])


def test_speech_at_both_ends_is_whole() -> None:
    audio = spoken((0, 3), until=3)
    (segment,) = segments(audio)
    assert np.array_equal(segment.audio, audio)
    assert segment.length == len(audio)


@pytest.mark.parametrize("length", [1, FRAME - 1, FRAME, FRAME + 1, 5000])
def test_short_streams(length: int) -> None:
    (segment,) = segments(np.zeros(length, np.float32))
    assert (len(segment.audio), segment.length) == (0, length)
    assert segments(np.zeros(0, np.float32)) == []


TIMES = st.lists(st.floats(0, 60), max_size=12).map(sorted)


@property_test
@given(TIMES, st.floats(0, 60), st.lists(st.integers(1, 80_000), max_size=30))
def test_segments_do_not_depend_on_chunks(times: list[float], until: float, sizes: list[int]) -> None:
    """Every sample is in one segment, what is recognised lies in its own, and is never too long."""
    audio = spoken(*zip(times[::2], times[1::2], strict=False), until=until)
    whole = segments(audio)
    assert sum(segment.length for segment in whole) == len(audio)
    begin = 0
    for segment in whole:
        assert len(segment.audio) <= LATEST_CUT
        own = audio[begin : begin + segment.length]
        assert segment.audio.tobytes() in own.tobytes()
        begin += segment.length
    pieces = segments(audio, sizes=sizes)
    assert [(each.audio.tobytes(), each.length) for each in pieces] == [(s.audio.tobytes(), s.length) for s in whole]


@property_test
@given(TIMES, st.floats(20, 60))
def test_a_segment_begins_afresh(times: list[float], until: float) -> None:
    """Who begins to listen at a cut, as a replay does, comes to the same segments."""
    audio = spoken(*zip(times[::2], times[1::2], strict=False), until=until)
    whole = segments(audio, new_counting)
    begin = 0
    for number, segment in enumerate(whole):
        rest = segments(audio[begin:], new_counting)
        assert [len(each.audio) for each in rest] == [len(each.audio) for each in whole[number:]]
        begin += segment.length


def new_counting() -> Detector:
    """A detector that remembers: loudness fades."""
    level = 0.0

    def probability(frame: Samples) -> float:
        nonlocal level
        level = max(0.7 * level, float(np.abs(frame).mean() * 10))
        return level

    return probability


@property_test
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5]), max_size=400))
def test_what_is_said_only_grows(probabilities: list[float]) -> None:
    """While a segment lasts, what is to be recognised begins where it began and never gets shorter."""
    speech, last = Speech(), (0, 0)
    for probability in probabilities:
        speech.push(probability)
        now = trim(replace(speech), speech.heard)
        assert last == (0, 0) or (now[0] == last[0] and now[1] >= last[1])
        last = now


# --- the detector ---


@pytest.mark.parametrize("decibels", [0, -20, -30])
def test_recordings_are_heard(recordings: list[Recording], decibels: int) -> None:
    """Whole, also where they are soft: they begin with 0.3 s of silence and end with 0.5 s of it."""
    for recording in recordings:
        audio = floats(recording.pcm) * np.float32(10 ** (decibels / 20))
        (segment,) = segments(audio, new_detector)
        speech = np.flatnonzero(np.abs(audio) > 0.03 * np.abs(audio).max())
        begin = audio.tobytes().index(segment.audio.tobytes()) // 4
        assert begin <= speech[0] - 800
        assert begin + len(segment.audio) >= speech[-1] + 800


def test_no_speech_is_not_heard() -> None:
    dice = np.random.default_rng(1)
    noise = dice.normal(0, 1, at(6)).astype(np.float32)
    hum = np.sin(2 * np.pi * 50 * np.arange(at(6)) / SAMPLE_RATE).astype(np.float32)
    for audio in (np.zeros(at(6), np.float32), 0.003 * noise, 0.1 * noise, 0.3 * hum):
        (segment,) = segments(audio, new_detector)
        assert not len(segment.audio)


def test_two_detectors_do_not_know_of_each_other() -> None:
    audio = floats(load_recordings()[3].pcm)
    one, other = new_detector(), new_detector()
    frames = [audio[i : i + FRAME] for i in range(0, len(audio) - FRAME, FRAME)]
    alone = [one(frame) for frame in frames]
    assert max(alone) > 0.9
    for frame in reversed(frames):
        other(frame)
    again = new_detector()
    assert [again(frame) for frame in frames] == alone
