"""Speech that is still going on: when there are steps, what becomes of them, and what is shown."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.events import Final, Message, Partial, Segment, Working
from wyoming_qwen_asr.model import batch as batch_module
from wyoming_qwen_asr.model import decoder as decoder_module
from wyoming_qwen_asr.model import session as session_module
from wyoming_qwen_asr.model import stream as stream_module
from wyoming_qwen_asr.model.batch import fit_together
from wyoming_qwen_asr.model.decoder import MAX_CACHE_ROWS
from wyoming_qwen_asr.model.network import Network
from wyoming_qwen_asr.model.scheduler import SLOTS
from wyoming_qwen_asr.model.session import STEP_REST, STEP_SECONDS, Pace, Part
from wyoming_qwen_asr.model.vad import (
    EARLIEST_CUT,
    FRAME,
    LATEST_CUT,
    LEAD,
    LONGEST_SILENCE,
    PRE_ROLL,
    QUIET_FROM,
    TAIL,
)

from .reference import floats
from .stage import (
    LONG,
    SAID,
    SECOND,
    Stage,
    Talk,
    Unit,
    check,
    check_session,
    cut_short,
    network,
    one_thread,
    plain,
    reference,
    retractions,
)

IDLE = 1_000_000
"""Units between two chunks: the next one comes when there is nothing else to do."""
SILENCE = bytes(2 * SECOND)


def loud(pcm: bytes) -> bytes:
    """Without the silence around it."""
    (found,) = np.nonzero(np.abs(floats(pcm)) > 0.01)
    return pcm[2 * found[0] : 2 * found[-1]]


STEADY = b"".join(loud(pcm) for pcm in SAID)
"""30 s without a pause, from the first sample on: what is heard of it is recognised from there."""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def short_cuts() -> Iterator[None]:
    with cut_short():
        yield


def steps(stage: Stage, number: int = 1) -> list[Unit]:
    """The first unit of each step of a session."""
    return [unit for unit in stage.computed() if unit.kind == "hear" and unit.sessions == [number]]


# --- partials ---


@pytest.mark.parametrize("size", [640, 16_000])
@pytest.mark.parametrize("pace", [Pace(0.5), Pace(0.2, 1, 2)])
def test_nothing_that_was_shown_is_taken_back(size: int, pace: Pace) -> None:
    """Of the recordings; the demo model is sure of few words before they are over."""
    said = 0
    for number, pcm in enumerate(SAID[1::3]):
        stage = Stage(pace)
        talk = Talk(pcm)
        stage.feed(1 + number, talk, [size], IDLE)
        check(stage.play(), {1 + number: talk})
        (partials, _) = stage.partials(1 + number)
        assert partials
        assert not retractions(stage, 1 + number)
        stable = "".join(shown.stable_delta for shown in partials)
        said += len(stable)
        (segment,) = stage.segments(1 + number)
        assert segment.steps >= len(partials)
    assert said


def test_what_is_shown_goes_on(short_cuts: None) -> None:
    """Each partial says something new; the unfixed text replaces the last one's, and stable text was unfixed before."""
    talk = Talk(LONG[: 25 * SECOND])
    stage = Stage()
    stage.feed(1, talk, [8_000], IDLE)
    check(stage.play(), {1: talk})
    segments = stage.segments(1)
    assert sum(bool(partials) for partials in stage.partials(1)) >= len(segments) - 2
    for partials, segment in zip(stage.partials(1), segments, strict=False):
        for before, after in pairwise(partials):
            assert (after.stable_delta, after.tail) != ("", before.tail)
        if segment.text:
            assert 0 < segment.accepted <= segment.drafted
            assert len(partials) <= segment.steps


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([LONG[:300_000], STEADY[:250_000], SAID[3] + SILENCE + SAID[19], SAID[8], SAID[0]]),
            st.lists(st.integers(100, 40_000), min_size=1, max_size=8),
            st.sampled_from([0, 1, 2, 5, 20, IDLE]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([Pace(0.1, 0, 0), Pace(0.5), Pace(1.5), Pace()]),
)
def test_the_text_does_not_depend_on_chunks(sessions: list[tuple[bytes, list[int], int]], pace: Pace) -> None:
    """Nor on how fast they come, nor on who else is there."""
    stage = Stage(pace)
    stage.cost = lambda _: 0.01
    with cut_short():
        talks = {number: Talk(pcm) for number, (pcm, _, _) in enumerate(sessions, 1)}
        for number, (_, sizes, every) in enumerate(sessions, 1):
            stage.feed(number, talks[number], sizes, every)
        check(stage.play(), talks)


# --- pacing ---


@pytest.mark.parametrize("chunk", [0.3, 1.0])
def test_a_step_for_so_much_new_audio(chunk: float) -> None:
    """Whatever the clock says."""
    stage = Stage(Pace(chunk_size_sec=chunk))
    stage.cost = lambda _: 10.0
    talk = Talk(STEADY[: 10 * SECOND])
    stage.feed(1, talk, [SECOND // 20], IDLE)
    check(stage.play(), {1: talk})
    ends = [0, *(unit.end for unit in steps(stage) if not unit.exact)]
    most = chunk * SAMPLE_RATE + SAMPLE_RATE // 20 + FRAME
    assert all(chunk * SAMPLE_RATE <= after - before <= most for before, after in pairwise(ends))
    assert len(ends) - 1 == stage.segments(1)[0].steps > 6


@pytest.mark.parametrize("waits", [False, True], ids=["alone", "a file waits"])
@pytest.mark.parametrize("cost", [0.001, 0.02, 0.06, 0.3])
def test_steps_follow_one_another(cost: float, waits: bool) -> None:
    """On a fast machine they come as the audio does, on a slow one they get fewer; they leave time for a file."""
    stage = Stage(Pace())
    stage.cost = lambda _: cost
    talk = Talk(STEADY[: 12 * SECOND])
    if waits:
        stage.cues[0].append(lambda: stage.say(2, Talk(b"", live=False), end=False))
        stage.at(12.5, lambda: stage.scheduler.cancel(2))
    rest = STEP_REST if waits else 1.0
    stage.speak(1, talk)
    check(stage.play(), {1: talk})
    begun = [unit for unit in steps(stage) if not unit.exact]
    assert len(begun) > 1
    computed = stage.computed()
    for before, after in pairwise(begun):
        last = computed[computed_index(computed, after) - 1]
        took = last.began + cost - before.began
        assert after.end - before.end >= STEP_SECONDS * SAMPLE_RATE
        assert after.began >= before.began + rest * took - 1e-9
        enough = (before.end + STEP_SECONDS * SAMPLE_RATE) / SAMPLE_RATE
        due = max(before.began + rest * took, enough)
        assert after.began <= due + 0.1 + FRAME / SAMPLE_RATE + 1e-9, "it comes when it is due, by the next chunk"


def computed_index(computed: list[Unit], wanted: Unit) -> int:
    return next(i for i, unit in enumerate(computed) if unit is wanted)


@pytest.mark.parametrize("cost", [0.001, 0.06, 0.3])
@pytest.mark.parametrize("pace", [Pace(), Pace(0.5)])
def test_a_step_takes_all_that_has_come(cost: float, pace: Pace) -> None:
    stage = Stage(pace)
    stage.cost = lambda _: cost
    talk = Talk(STEADY[: 8 * SECOND])
    stage.speak(1, talk)
    check(stage.play(), {1: talk})
    begun = [unit for unit in steps(stage) if not unit.exact]
    assert len(begun) > 1
    for unit in begun:
        come = int(unit.began / 0.1 + 1e-6) * SAMPLE_RATE // 10
        assert unit.end == come - come % FRAME


def test_there_is_no_backlog() -> None:
    """What comes in a long step is one more step."""
    stage = Stage(Pace(chunk_size_sec=0.5))
    stage.cost = lambda unit: 5.0 if (unit.kind, unit.end) == ("encode", first) else 0.0
    first = SAMPLE_RATE // FRAME * FRAME
    talk = Talk(STEADY[: 8 * SECOND])
    stage.speak(1, talk, chunk=SECOND)
    check(stage.play(), {1: talk})
    ends = [unit.end // FRAME for unit in steps(stage)]
    whole = [second * SAMPLE_RATE // FRAME for second in (1, 6, 7)]
    assert ends[:3] == whole


def test_files_are_worked_on_between_steps() -> None:
    """Somebody who speaks for long does not keep them waiting until the end."""
    talks = {1: Talk(STEADY[: 12 * SECOND]), 2: Talk(SAID[8], live=False)}
    stage = Stage(Pace())
    stage.cost = lambda _: 0.06
    stage.speak(1, talks[1])
    stage.at(1.0, lambda: stage.say(2, talks[2]))
    check(stage.play(), talks)
    assert stage.log.index((2, plain(talks[2]))) < stage.log.index((1, stage.partials(1)[0][-1]))
    assert stage.computed()[stage.of(2)[-1] - 1].began < 12


def test_steps_go_round() -> None:
    """More people speak than there are places, on a machine that cannot follow: each has its share."""
    talks = {number: Talk(STEADY[number * SECOND : (number + 8) * SECOND]) for number in range(1, SLOTS + 4)}
    stage = Stage(Pace(chunk_size_sec=0.3))
    stage.cost = lambda _: 0.02
    for number, talk in talks.items():
        stage.speak(number, talk)
    check(stage.play(), talks)
    counts = [stage.segments(number)[0].steps for number in talks]
    assert max(counts) < 16, "it cannot follow"
    assert 2 * min(counts) >= max(counts) - 1, counts


# --- the end of the audio ---


class Layer:
    """Calls something between two layers of the first unit that is like this one, and of a step that is `exact`."""

    def __init__(self, stage: Stage, unit: Unit, action: Callable[[], None]) -> None:
        self._stage, self._wanted, self._action = stage, unit, action
        self.unit = 0
        """In which it was, counted from 1,"""
        self.later = 0
        """and how many more layers that unit computed."""
        network().check = self._check

    def _check(self) -> None:
        unit = self._stage.computed()[-1]
        if not self.unit and unit == self._wanted and unit.exact == self._wanted.exact:
            self.unit = self._stage.units
            self._action()
        elif self.unit == self._stage.units:
            self.later += 1
        self._stage.scheduler._check()


def said_after(stage: Stage, unit: int) -> list[tuple[int, Message]]:
    wanted = stage.computed()[unit - 1]
    at = next(i for i, entry in enumerate(stage.log) if entry is wanted)
    return [entry for entry in stage.log[at:] if not isinstance(entry, Unit)]


@pytest.mark.parametrize("kind", ["encode", "prefill", "decode"])
def test_the_end_stops_a_step_between_two_layers(kind: str) -> None:
    pcm = STEADY[: 3 * SECOND]
    stage = Stage()
    stage.cues[0].append(lambda: stage.say(1, Talk(pcm), end=False))
    layer = Layer(stage, Unit(kind, [1], exact=False), lambda: stage.scheduler.end(1))
    check(stage.play(), {1: Talk(pcm)})
    assert layer.unit
    assert not layer.later
    assert [unit.exact for unit in stage.computed()[layer.unit :]] == [True] * (stage.units - layer.unit)
    assert [unit.kind for unit in stage.computed()[layer.unit :]][:2] == ["hear", "encode"]
    assert not any(isinstance(message, Partial) for _, message in said_after(stage, layer.unit))


@pytest.mark.parametrize("kind", ["encode", "prefill", "decode"])
def test_the_end_does_not_stop_a_step_that_may_stand(kind: str) -> None:
    pcm = SAID[3]
    stage = Stage()
    stage.cues[0].append(lambda: stage.say(1, Talk(pcm), end=False))
    layer = Layer(stage, Unit(kind, [1]), lambda: stage.scheduler.end(1))
    check(stage.play(), {1: Talk(pcm)})
    assert layer.unit
    assert layer.later == 2
    assert [unit.kind for unit in stage.computed()[layer.unit :]].count("hear") == 0
    assert not any(isinstance(message, Partial) for _, message in said_after(stage, layer.unit)), "nobody waits for it"


def test_a_step_of_somebody_who_speaks_does_not_stand() -> None:
    """Even if it was of all that there is in the end: its features may be a little off."""
    pcm = STEADY[: 2 * 100 * FRAME]
    stage = Stage()
    stage.cues[0].append(lambda: stage.say(1, Talk(pcm), end=False))
    stage.cues[IDLE].append(lambda: stage.scheduler.end(1))
    check(stage.play(), {1: Talk(pcm)})
    *_, before, last = steps(stage)
    assert before.end == last.end == 100 * FRAME
    assert (before.exact, last.exact) == (False, True)


@pytest.mark.parametrize("kind", ["encode", "prefill", "decode"])
@pytest.mark.parametrize("exact", [True, False])
def test_who_leaves_stops_the_unit(kind: str, exact: bool) -> None:
    talks = {2: Talk(SAID[5]), 3: Talk(SAID[17], live=False)}
    stage = Stage()
    stage.cues[0].append(lambda: stage.say(1, Talk(SAID[3] if exact else STEADY[: 3 * SECOND]), end=False))
    layer = Layer(stage, Unit(kind, [1], exact), lambda: stage.scheduler.cancel(1))
    stage.feed(2, talks[2], [8_000], IDLE, at=IDLE)
    stage.feed(3, talks[3], [8_000], 2, at=IDLE)
    stage.play()
    assert layer.unit
    assert not layer.later
    assert not [unit for unit in stage.of(1) if unit > layer.unit]
    assert 1 not in stage.ends()
    check(stage, talks)


@pytest.mark.parametrize("leave", ["end", "cancel"])
def test_others_in_the_unit_are_not_stopped(leave: str) -> None:
    """A step that is decoded together with others is left behind the token."""
    talks = {number: Talk(STEADY[number * SECOND : (number + 3) * SECOND]) for number in (1, 2, 3)}
    stage = Stage(Pace(chunk_size_sec=2.5))
    for number, talk in talks.items():
        stage.cues[0].append(partial(stage.say, number, talk, end=False))
    layer = Layer(stage, Unit("decode", [1, 2, 3], exact=False), lambda: getattr(stage.scheduler, leave)(1))
    stage.cues[IDLE] += [lambda: stage.scheduler.end(2), lambda: stage.scheduler.end(3)]
    stage.play()
    assert layer.unit
    assert layer.later == 2, "the unit is computed to its end"
    later = stage.computed()[layer.unit :]
    assert Unit("decode", [2, 3]) in [unit for unit in later if not unit.exact], "the others go on"
    assert all(unit.exact for unit in later if 1 in unit.sessions)
    if leave == "cancel":
        assert stage.of(1)[-1] == layer.unit
        del talks[1]
    check(stage, talks)
    assert all(stage.partials(number)[0] for number in (2, 3))


# --- ahead of the end ---


def test_a_pause_is_recognised_ahead() -> None:
    """So that there is nothing to do at the end."""
    pcm = SAID[3]
    stage = Stage()
    done: list[int] = []
    stage.cues[0].append(lambda: stage.say(1, Talk(pcm[: -SECOND // 10]), end=False))
    stage.cues[IDLE].append(lambda: stage.scheduler.audio(1, pcm[-SECOND // 10 :]))
    stage.cues[IDLE + 1] += [lambda: done.append(stage.units), lambda: stage.scheduler.end(1)]
    check(stage.play(), {1: Talk(pcm)})
    assert done == [stage.units]
    assert [type(message) for _, message in stage.said()[-3:]] == [Working, Segment, Final]
    assert steps(stage)[-1].exact


def test_the_voice_has_stopped_after_so_much_silence() -> None:
    """No sooner, and as soon as that is heard."""
    pcm = loud(SAID[3]) + SILENCE
    spoken = len(loud(SAID[3])) // 2
    stage = Stage(Pace(chunk_size_sec=100.0))
    come: list[int] = []
    stage.feed(1, Talk(pcm), [2 * FRAME], IDLE)

    def watch() -> None:
        if steps(stage) and not come:
            come.append(stage.fed[1] // 2)

    stage.watch = watch
    check(stage.play(), {1: Talk(pcm)})
    (step,) = steps(stage)
    assert step.exact
    assert abs(step.end - spoken - TAIL) <= FRAME
    assert step.end <= come[0] <= step.end + FRAME


@pytest.mark.parametrize("pause", [0.32, 0.4, 1.0])
def test_speech_that_goes_on_makes_the_step_void(pause: float) -> None:
    """Whether or not it has come to its answer by then."""
    pcm = loud(SAID[2]) + bytes(int(pause * SAMPLE_RATE) * 2) + loud(SAID[20])
    talk = Talk(pcm)
    ahead = len(loud(SAID[2])) // 2 + TAIL
    for every in (1, 2, IDLE):
        stage = Stage()
        stage.feed(1, talk, [2 * FRAME], every)
        check(stage.play(), {1: talk})
        assert any(unit.exact and abs(unit.end - ahead) <= FRAME for unit in steps(stage))
        assert steps(stage)[-1].exact
        assert len(stage.segments(1)) == 1
    assert plain(talk).text != plain(Talk(loud(SAID[2]))).text


# --- who goes first ---


def test_what_is_complete_goes_before_steps_of_those_who_speak() -> None:
    talks = {1: Talk(STEADY[: 3 * SECOND]), 2: Talk(SAID[3])}
    stage = Stage()
    stage.cues[0].append(lambda: stage.say(1, talks[1], end=False))
    Layer(stage, Unit("decode", [1], exact=False), lambda: stage.say(2, talks[2]))
    stage.cues[IDLE].append(lambda: stage.scheduler.end(1))
    check(stage.play(), talks)
    units = stage.computed()
    exact = [i for i in stage.of(2) if units[i - 1].exact]
    assert exact == list(range(exact[0], exact[-1] + 1)), "nothing comes between"
    again = [i for i in stage.of(1) if i > exact[-1]]
    assert not units[again[0] - 1].exact
    assert units[again[0] - 1].kind == "decode", "and then the step goes on"


def test_a_full_lane_of_steps_gives_way_to_one_that_stands() -> None:
    """Before those who wait for a place to speak on."""
    speakers = range(1, SLOTS + 2)
    talks = {number: Talk(STEADY[number * SECOND : (number + 3) * SECOND]) for number in speakers}
    talks[20] = Talk(loud(SAID[3]) + SILENCE)
    stage = Stage(Pace(chunk_size_sec=2.5))
    for number in speakers:
        stage.feed(number, talks[number], [3 * SECOND], IDLE)
    stage.cues[0].append(lambda: stage.say(20, Talk(loud(SAID[3])), end=False))
    lane = stage.scheduler._lanes[True]
    passing: list[Part] = []
    left: list[Part] = []

    def watch() -> None:
        """Once the lane is full, and another one waits, somebody stops speaking."""
        assert len(lane.parts) <= SLOTS
        waiting = (stage.scheduler._streams[number].next(0.0, rest=False) for number in speakers)
        if not passing and len(lane.parts) == SLOTS and any(waiting):
            passing.extend(lane.parts)
            stage.hear(20, SILENCE)
        if passing and not left and any(part.number == 20 for part in lane.parts):
            left.extend(part for part in passing if part not in lane.parts)
            assert left == passing[-1:], "the youngest"
            assert left[0].step is left[0].last is None, "it has come to no answer"

    stage.watch = watch
    stage.cues[IDLE + 1].append(lambda: stage.scheduler.end(20))
    check(stage.play(), talks)
    assert left
    units = stage.of(20)
    assert units == list(range(units[0], units[-1] + 1))


def test_steps_that_stand_do_not_give_way_to_each_other() -> None:
    talks = {number: Talk(SAID[number]) for number in range(1, SLOTS + 4)}
    stage = Stage(Pace(chunk_size_sec=100.0))
    for number, talk in talks.items():
        stage.talk(number, talk)
    check(stage.play(), talks)
    assert [len(steps(stage, number)) for number in talks] == [1] * len(talks)


# --- long speech ---


def test_text_that_may_lose_its_end_is_not_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From QUIET_FROM on until the cut; the unfixed text goes on."""
    monkeypatch.setattr(stream_module, "SURE_NATS", 0.0)  # the demo model is not sure of so long a text
    early, late = long_partials()
    assert any(shown.stable_delta for shown in early)
    assert len(late) > 4
    assert not any(shown.stable_delta for shown in late)
    monkeypatch.setattr(session_module, "QUIET_FROM", LATEST_CUT)
    _, late = long_partials()
    assert any(shown.stable_delta for shown in late), "there would be some"


def long_partials() -> tuple[list[Partial], list[Partial]]:
    """Before QUIET_FROM, and from there on."""
    talk = Talk(b"".join(loud(pcm) + bytes(SECOND // 5) for pcm in SAID[1:23]))
    stage = Stage()
    early: list[Partial] = []
    late: list[Partial] = []

    def saying(_: int, message: Message) -> None:
        if isinstance(message, Partial):
            (late if steps(stage)[-1].end >= QUIET_FROM else early).append(message)

    stage.saying = saying
    stage.feed(1, talk, [18 * SECOND, *[20_000] * 40], IDLE)
    check(stage.play(), {1: talk})
    first, *_ = stage.segments(1)
    assert QUIET_FROM < first.end * SAMPLE_RATE < len(talk.pcm) / 2
    return early, late


def test_audio_of_the_past_is_forgotten() -> None:
    """Silence of ten seconds is a segment of its own, delivered before anybody speaks again."""
    pcm = bytes(25 * SECOND) + SAID[3] + bytes(25 * SECOND) + SAID[5]
    talk = Talk(pcm)
    stage = Stage()
    most: list[int] = []
    silent = 0

    def watch() -> None:
        nonlocal silent
        if stream := stage.scheduler._streams.get(1):
            most.append(len(stream._segmenter.samples) + sum(map(len, stream._arrived)))
            most.append(sum(len(part.audio) for part in stream.parts))
        silent = silent if stage.units else len(stage.segments(1))

    stage.watch = watch
    stage.feed(1, talk, [3_200], IDLE)
    check(stage.play(), {1: talk})
    segments = stage.segments(1)
    assert max(most) <= LONGEST_SILENCE + EARLIEST_CUT + FRAME + 1_600 < len(pcm) // 4
    assert silent == 2
    assert (LONGEST_SILENCE - LEAD) / SAMPLE_RATE <= segments[0].end - segments[0].start < 10
    assert [segment.text for segment in segments if segment.text] == [plain(Talk(SAID[i])).text for i in (3, 5)]
    assert PRE_ROLL < LEAD


def test_segments_are_delivered_while_somebody_speaks(short_cuts: None) -> None:
    """Each as soon as it is cut off, with what it took."""
    talk = Talk(LONG[: 20 * SECOND])
    stage = Stage()
    stage.feed(1, talk, [3_200], IDLE)
    late = 0.0

    def saying(_: int, message: Any) -> None:
        nonlocal late
        if isinstance(message, Segment):
            late = max(late, stage.fed[1] / SECOND - message.end)

    stage.saying = saying
    check(stage.play(), {1: talk})
    segments = stage.segments(1)
    assert len(segments) > 4
    assert late < 1.0
    assert sum(segment.steps for segment in segments) <= len(steps(stage))
    assert all(segment.steps and segment.drafted and segment.accepted for segment in segments[:-1])


def test_the_language_of_a_step_that_may_change_is_not_expected_later(
    short_cuts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment is complete, but its last step waits for its turn: what was heard in the one before does not count."""
    english, german = (pcm.ljust(102_400, b"\0") for pcm in (SAID[2], SAID[0]))
    talk = Talk(english + german)
    others = {number: Talk(loud(SAID[22])) for number in range(2, SLOTS)}
    assert all(plain(each) for each in (talk, *others.values()))
    assert reference(talk).segments[1] != reference(Talk(talk.pcm, language="German")).segments[1]
    hear: Callable[..., None] = Network.hear

    def misheard(self: Network, job: Any, *given: Any) -> None:
        *most, language, hint, exact = given
        if not exact:
            language, hint = "German", "force"
        hear(self, job, *most, language, hint, exact)

    monkeypatch.setattr(Network, "hear", misheard)
    stage = Stage()
    spoken = len(SAID[2]) - 18_000
    stage.cues[0].append(lambda: stage.say(1, Talk(talk.pcm[:spoken]), end=False))
    for number, other in others.items():
        stage.talk(number, other, at=IDLE)
    stage.cues[IDLE] += [lambda: stage.scheduler.audio(1, talk.pcm[spoken:]), lambda: stage.scheduler.end(1)]
    waiting = 0

    def watch() -> None:
        nonlocal waiting
        if (stream := stage.scheduler._streams.get(1)) and len(stream.parts) > 1:
            first, second, *_ = stream.parts
            waiting += first.last is not None and first.step is not None and not first.begun and second.closed

    stage.watch = watch
    check(stage.play(), {1: talk, **others})
    assert waiting, "both are complete, and the first one's last step has not begun"


# --- more than there is room for ---


@pytest.mark.parametrize(("most", "sessions"), [(MAX_CACHE_ROWS, SLOTS + 4), (1024, 5), (256, 3)])
def test_places_in_the_cache_are_given_up(monkeypatch: pytest.MonkeyPatch, most: int, sessions: int) -> None:
    """Between two steps by those who rest, and the texts are still right."""
    for module in (decoder_module, batch_module):
        monkeypatch.setattr(module, "MAX_CACHE_ROWS", most)
    talks = {n: Talk(STEADY[n * SECOND : (n + 9) * SECOND]) for n in range(1, sessions + 1)}
    stage = Stage(Pace(chunk_size_sec=1.0))
    for number, talk in talks.items():
        stage.feed(number, talk, [SECOND + number * 1_000], 60)
    batch = stage.scheduler._lanes[True].batch

    def watch() -> None:
        slots, rows = len(batch.cache.lengths), batch.cache.rows
        assert slots <= SLOTS
        assert slots * rows <= most or len(batch.jobs) <= 1
        assert len(batch.jobs) <= SLOTS

    stage.watch = watch
    check(stage.play(), talks)
    assert sum(segment.rows for number in talks for segment in stage.segments(number)) > 0
    assert sum(segment.steps for number in talks for segment in stage.segments(number)) > sessions


def test_what_is_complete_takes_the_room_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps fill the cache: one that stands does not have to wait for them, nor does it get more."""
    for module in (decoder_module, batch_module):
        monkeypatch.setattr(module, "MAX_CACHE_ROWS", 1024)
    talks = {n: Talk(STEADY[n * SECOND : (n + 9) * SECOND]) for n in (1, 2, 3)}
    stage = Stage(Pace(chunk_size_sec=8.5))
    for number in (1, 2):
        stage.cues[0].append(partial(stage.say, number, talks[number], end=False))
        stage.cues[IDLE].append(partial(stage.scheduler.end, number))
    layer = Layer(stage, Unit("decode", [1, 2], exact=False), lambda: stage.say(3, talks[3]))
    batch = stage.scheduler._lanes[True].batch

    def watch() -> None:
        using = [job for job in batch.jobs if not job.resting]
        assert not using or fit_together(using), "whatever they write"
        assert len(batch.cache.lengths) * batch.cache.rows <= 1024

    stage.watch = watch
    check(stage.play(), talks)
    assert layer.unit
    exact = [i for i in stage.of(3) if stage.computed()[i - 1].exact]
    assert exact == list(range(exact[0], exact[-1] + 1))
    assert stage.partials(1)[0], "the older one goes on"
    assert len([unit for unit in steps(stage, 2) if not unit.exact]) == 2, "the younger one begins again"


def test_nothing_is_recomputed_where_there_is_room() -> None:
    """The slots of those who rest stay, whoever speaks, comes and goes beside them."""
    talks = {n: Talk(STEADY[n * SECOND : (n + 11) * SECOND]) for n in range(1, SLOTS + 1)}
    stage = Stage(Pace(chunk_size_sec=1.0))
    for number, talk in talks.items():
        stage.feed(number, talk, [SECOND], IDLE)
    stage.talk(20, Talk(SAID[3], live=False), at=50)
    stage.play()
    for number, talk in talks.items():
        check_session(stage, number, talk)
    segments = [segment for number in talks for segment in stage.segments(number)]
    assert sum(segment.rows for segment in segments) == 104 * sum(segment.windows for segment in segments)
