"""Which unit comes when. Units run in the test's own thread, so what happens between two of them is settled.

What `Stage.talk` plays is there at once, as a file is. See test_pacing.py for speech that is still going on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wyoming_qwen_asr.errors import AsrError, BadRequest
from wyoming_qwen_asr.events import Final, Hint, Message, Segment, SessionError, Working
from wyoming_qwen_asr.model import batch as batch_module
from wyoming_qwen_asr.model import decoder as decoder_module
from wyoming_qwen_asr.model import scheduler as scheduler_module
from wyoming_qwen_asr.model.answer import Answer
from wyoming_qwen_asr.model.batch import PREFILL_ROWS, Batch
from wyoming_qwen_asr.model.decoder import MAX_CACHE_ROWS
from wyoming_qwen_asr.model.job import Job
from wyoming_qwen_asr.model.network import Network, Piece
from wyoming_qwen_asr.model.resample import Samples
from wyoming_qwen_asr.model.scheduler import LISTEN_FRAMES, SLOTS, Scheduler
from wyoming_qwen_asr.model.session import Part, Step
from wyoming_qwen_asr.text import join

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
    detector,
    network,
    one_thread,
    plain,
)

ENGLISH, GERMAN = (pcm.ljust(102_400, b"\0") for pcm in (SAID[2], SAID[0]))
"""3.2 s with silence behind: a segment each, when cuts are short. Another language changes the second's text."""
SILENCE = bytes(7 * SECOND)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def short_cuts() -> Iterator[None]:
    with cut_short():
        yield


# --- live speech and files ---

TIMES = [1, 2, 4, 6, 12, 25, 40]
"""Units of a file: each kind is among them."""


@pytest.mark.parametrize("at", TIMES)
def test_live_speech_waits_for_one_unit(at: int) -> None:
    """A file is being heard, encoded, read, or decoded."""
    talks = {1: Talk(LONG, live=False), 2: Talk(SAID[3])}
    stage = Stage()
    stage.talk(1, talks[1])
    stage.talk(2, talks[2], at=at)
    stage.play()
    check(stage, talks)
    units = stage.of(2)
    assert units == list(range(at + 1, at + 1 + len(units)))
    assert stage.of(1)[-1] > units[-1]
    after = stage.log[stage.log.index((2, plain(talks[2]))) :]
    later = [entry for entry in after if isinstance(entry, Unit)]
    assert later == stage.computed()[units[-1] :], "the text is out before the file goes on"


def test_every_kind_of_unit_is_met_above() -> None:
    stage = Stage()
    stage.talk(1, Talk(LONG, live=False))
    kinds = [unit.kind for unit in stage.play().computed()]
    assert {kinds[at - 1] for at in TIMES} == {"hear", "encode", "prefill", "decode"}


@pytest.mark.parametrize("second", [1, 5, 18, 40])
def test_live_speech_waits_while_a_file_is_listened_to(second: int) -> None:
    talks = {1: Talk(LONG, live=False), 2: Talk(SAID[3])}
    stage = Stage()
    stage.talk(1, talks[1])
    heard = came = 0

    def listening(number: int) -> None:
        nonlocal heard, came
        heard += number == 1
        if heard == second and not came:
            came = stage.units + 1
            stage.say(2, talks[2])

    stage.listening = listening
    check(stage.play(), talks)
    assert stage.of(2)[0] <= came + 1
    assert stage.of(2) == list(range(stage.of(2)[0], stage.of(2)[-1] + 1))


def test_units_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []
    windows: list[Sequence[Tensor]] = []
    rows: list[int] = []
    listened: list[int] = []
    encoder = network().encoder
    convolve, attend, decode = encoder.convolve, encoder.attend, network().decoder.forward

    def convolved(mel: Tensor, inner: bool) -> Tensor:
        frames.append(mel.shape[1])
        return convolve(mel, inner)

    def attended(x: Sequence[Tensor]) -> list[Tensor]:
        windows.append(x)
        return attend(x)

    def decoded(x: Tensor, *more: Any, **options: Any) -> Tensor:
        rows.append(len(x))
        return decode(x, *more, **options)

    def detected(samples: Samples) -> float:
        listened[-1] += 1
        return detector()(samples)

    stage = Stage()
    stage.scheduler._detector = lambda: detected
    stage.listening = lambda _: listened.append(0)
    stage.talk(1, Talk(LONG, live=False))
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "convolve", convolved)
        patch.setattr(encoder, "attend", attended)
        patch.setattr(network().decoder, "forward", decoded)
        stage.play()
    kinds = [unit.kind for unit in stage.computed()]
    assert len(windows) == kinds.count("encode") > 4
    assert max(frames) <= 800
    assert all(len(x) == 1 for x in windows)
    assert max(len(x[0]) for x in windows) == 104
    assert len(rows) == kinds.count("prefill") + kinds.count("decode")
    assert max(rows) == PREFILL_ROWS
    assert max(listened) == LISTEN_FRAMES
    assert sum(listened) >= len(LONG) // 1024


def test_files_share_steps_and_do_not_slow_live_steps(short_cuts: None) -> None:
    talks = {1: Talk(LONG, live=False), 2: Talk(LONG[:500_000], live=False), 3: Talk(SAID[3])}
    stage = Stage()
    stage.talk(1, talks[1])
    stage.talk(2, talks[2])
    stage.talk(3, talks[3], at=60)
    check(stage.play(), talks)
    steps = [unit.sessions for unit in stage.computed() if unit.kind == "decode"]
    assert max(sessions.count(1) for sessions in steps) > 1, "segments of a file are decoded together"
    assert any(set(sessions) == {1, 2} for sessions in steps)
    assert any(3 in sessions for sessions in steps)
    assert all(sessions == [3] for sessions in steps if 3 in sessions)


# --- fair among equals ---


def backlog(stage: Stage, number: int) -> int:
    """Segments of a session that are complete, and wait for a place."""
    stream = stage.scheduler._streams.get(number)
    return sum(part.closed and not part.known and not part.step for part in stream.parts) if stream else 0


@pytest.mark.parametrize("live", [True, False])
def test_who_comes_later_is_not_kept_waiting(short_cuts: None, live: bool) -> None:
    """All places are taken by one session: the next free one is the other's, whatever the first has left."""
    talks = {1: Talk(LONG * 2, live, "English"), 2: Talk(SAID[3], live)}
    stage = Stage()
    stage.talk(1, talks[1])
    places: list[int] = []  # in the order in which they were given
    lane, known = stage.scheduler._lanes[live], set()
    came = due = 0

    def watch() -> None:
        nonlocal came, due
        for part in lane.parts:
            assert part.step
            if (part, part.step) not in known and part.step.exact:
                known.add((part, part.step))
                places.append(part.number)
        if not came and len(lane.parts) == SLOTS and backlog(stage, 1) > 2:
            came = stage.units
            stage.say(2, talks[2])
        stream = stage.scheduler._streams.get(2)
        if not due and came and stream and any(part.closed for part in stream.parts):
            due = len(places)

    stage.watch = watch
    check(stage.play(), talks)
    assert came
    assert due
    assert 2 in places[due : due + 2], "the next one, or the one behind it when that was given away before"
    assert len(places) > due + 2


def test_a_place_goes_to_who_has_the_fewest(short_cuts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if that one had its turn last."""
    talks = {1: Talk(LONG, language="English"), 2: Talk(LONG[: 30 * SECOND], language="English")}
    stage = Stage()
    stage.talk(1, talks[1])
    lane = stage.scheduler._lanes[True]
    last = again = 0
    begin = Part.begin

    def began(part: Part, step: Step) -> None:
        nonlocal last, again
        places = [each.number for each in lane.parts]
        for stream in stage.scheduler._streams.values():
            if (due := stream.next(stage.now, rest=False)) and due[1].exact == step.exact:
                assert places.count(part.number) <= places.count(stream.number)
                again += last == part.number != stream.number
        last = part.number
        begin(part, step)

    def watch() -> None:
        if backlog(stage, 1) > 2 and not stage.fed[2]:
            stage.say(2, talks[2])

    monkeypatch.setattr(Part, "begin", began)
    stage.watch = watch
    check(stage.play(), talks)
    assert again


def test_reading_and_decoding_take_turns() -> None:
    talks = {1: Talk(SAID[8], language="English"), 2: Talk(LONG[:500_000], language="English")}
    stage = Stage()
    stage.talk(1, talks[1])
    stage.talk(2, talks[2], at=0)
    check(stage.play(), talks)
    units = [unit for unit in stage.computed() if unit.exact]
    reading = [i for i, unit in enumerate(units) if unit.sessions == [2] and unit.kind != "decode"]
    shared = [i for i, unit in enumerate(units) if unit.kind == "decode" and 1 in unit.sessions]
    between = range(shared[0], shared[-1])
    kinds = [units[i].kind == "decode" for i in between if i <= reading[-1]]
    assert len(kinds) > 6
    assert all(a != b for a, b in pairwise(kinds))


def test_places_go_round(short_cuts: None) -> None:
    """Three sessions with more segments than there are places have two or three places each."""
    talks = {number: Talk(LONG, live=False, language="English") for number in (1, 2, 3)}
    stage = Stage()
    for number, talk in talks.items():
        stage.talk(number, talk)
    places: list[list[int]] = []
    lane = stage.scheduler._lanes[False]

    def watch() -> None:
        if len(lane.parts) == SLOTS and all(backlog(stage, number) for number in talks):
            places.append([part.number for part in lane.parts])

    stage.watch = watch
    check(stage.play(), talks)
    assert len(places) > 20
    assert all(2 <= place.count(number) <= 4 for place in places for number in talks)


# --- leaving ---


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 12, 20])
@pytest.mark.parametrize("live", [True, False])
def test_a_cancelled_session_costs_no_further_unit(short_cuts: None, at: int, live: bool) -> None:
    talks = {1: Talk(LONG[:600_000], live), 2: Talk(LONG[600_000:900_000], live), 3: Talk(SAID[8], live)}
    stage = Stage()
    for number, talk in talks.items():
        stage.talk(number, talk)
    stage.cancel(2, at=at)
    stage.play()
    assert not [unit for unit in stage.of(2) if unit > at]
    assert 2 not in stage.ends()
    del talks[2]
    check(stage, talks)


def test_a_session_cancelled_in_its_last_unit() -> None:
    """Its text is there, but nobody waits for it."""
    at = 0
    for _ in range(2):
        stage = Stage()
        stage.talk(1, Talk(SAID[3]))
        stage.talk(2, Talk(SAID[5]))
        if at:
            stage.cancel(2, at=at)
        at = stage.play().of(2)[-1]
    assert stage.ends() == {1: [plain(Talk(SAID[3]))]}
    assert {session for session, message in stage.said() if isinstance(message, Segment)} == {1}


def test_a_session_cancelled_while_something_is_said(short_cuts: None) -> None:
    """A pipe may be full for a while, in which anything may come."""
    talks = {1: Talk(SAID[3]), 2: Talk(LONG[:300_000]), 3: Talk(SAID[8], live=False)}
    when = 0
    while not cancelled_at(when, talks):
        when += 1
    assert when > 10


def cancelled_at(when: int, talks: dict[int, Talk]) -> bool:
    """Whether the second was over when it was cancelled."""
    stage = Stage()
    for number, talk in talks.items():
        stage.talk(number, talk)
    said = units = 0

    def saying(_: int, message: Message) -> None:
        nonlocal said, units
        if said == when:
            units = stage.units
            stage.scheduler.cancel(2)
        said += 1

    stage.saying = saying
    stage.play()
    if (2, plain(talks[2])) in stage.log:
        return True
    assert all(unit <= units for unit in stage.of(2))
    assert stage.ends() == {number: [plain(talks[number])] for number in (1, 3)}
    return False


def test_audio_for_a_session_that_is_gone() -> None:
    stage = Stage()
    stage.talk(1, Talk(SAID[3]))
    stage.cancel(1, at=2)
    stage.cues[3] += [lambda: stage.scheduler.audio(1, SAID[3]), lambda: stage.scheduler.end(1)]
    assert not stage.play().ends()


def test_sessions_without_audio() -> None:
    stage = Stage()
    stage.talk(1, Talk(b""))
    stage.talk(2, Talk(b"\0"))
    stage.play()
    assert stage.said() == [(1, Final("", None)), (2, Final("", None))]
    assert not stage.units


def test_sessions_without_speech() -> None:
    """No unit of the network's: nobody speaks."""
    stage = Stage()
    stage.talk(1, Talk(SILENCE))
    stage.talk(2, Talk(bytes(100)))
    check(stage.play(), {1: Talk(SILENCE), 2: Talk(bytes(100))})
    assert not stage.units


# --- what the gateway is told ---


def test_working_is_said_before_the_unit(short_cuts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "WORKING_SECONDS", 1000.0)
    stage = Stage()
    stage.talk(1, Talk(LONG[:600_000], live=False))
    stage.talk(2, Talk(SAID[5]), at=9)
    stage.talk(3, Talk(SAID[8]), at=12)
    stage.play()
    now: list[int] = []
    for entry in stage.log:
        if isinstance(entry, Unit):
            assert sorted(set(entry.sessions)) == now
        elif isinstance(entry[1], Working):
            assert entry[0] == 0
            assert entry[1].sessions != now, "said twice"
            now = entry[1].sessions
    assert stage.log[-1] == (0, Working([]))


def test_working_is_said_again_as_time_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "WORKING_SECONDS", 1.0)
    stage = Stage()
    stage.cost = lambda _: 0.5
    stage.talk(1, Talk(SAID[5]))
    stage.play()
    signs = [message for _, message in stage.said() if isinstance(message, Working)]
    assert signs == [*[Working([1])] * ((stage.units + 1) // 2), Working([])]


def test_segments_come_in_their_order(short_cuts: None) -> None:
    talk = Talk(LONG, live=False, language="English")
    stage = Stage()
    stage.talk(1, talk)
    reversals = 0

    def watch() -> None:
        nonlocal reversals
        if stream := stage.scheduler._streams.get(1):
            done = [part.done for part in stream.parts]
            reversals += any(later and not first for first, later in pairwise(done))

    stage.watch = watch
    check(stage.play(), {1: talk})
    segments = stage.segments(1)
    assert len(segments) > SLOTS
    assert reversals, "a later one was done before an earlier one"
    assert join([segment.text for segment in segments if segment.text]) == plain(talk).text


def test_segments_of_a_replay_begin_where_it_begins() -> None:
    stage = Stage()
    start = replace(Talk(ENGLISH).start, offset=7.5, heard="German")
    stage.cues[0] += [
        lambda: stage.scheduler.start(1, start),
        lambda: stage.hear(1, bytes(len(ENGLISH))),
        lambda: stage.scheduler.end(1),
    ]
    (segment,) = stage.play().segments(1)
    assert segment.start == 7.5
    assert segment.end == pytest.approx(10.7)
    assert stage.ends() == {1: [Final("", "German")]}


@pytest.mark.parametrize(
    ("language", "hint"),
    [(language, hint) for language in (None, "German") for hint in ("prefer", "force", "ignore")],
)
def test_later_segments_expect_the_language_of_the_first_with_speech(
    short_cuts: None, language: str | None, hint: Hint
) -> None:
    """However soon they could begin: the texts are those of one segment after another."""
    talk = Talk(SILENCE + ENGLISH + GERMAN + ENGLISH + GERMAN, False, language, hint)
    if language is None:
        assert (plain(talk) == plain(replace(talk, hint="ignore"))) == (hint == "ignore"), "it matters"
    busy = Talk(LONG[:800_000], live=False)
    stage = Stage()
    stage.talk(1, talk)
    stage.talk(2, busy)
    together = 0

    def watch() -> None:
        nonlocal together
        parts = stage.scheduler._lanes[False].parts
        together = max(together, sum(part.number == 1 and part.closed for part in parts))

    stage.watch = watch
    check(stage.play(), {1: talk, 2: busy})
    assert together > 1


# --- errors ---


def poison(patch: pytest.MonkeyPatch, unit: str, error: Exception) -> None:
    """That unit fails for whoever has the context "poison", and for all that are computed with it."""
    if unit == "take":
        take = Answer.take

        def taken(self: Answer, token: int, *more: Any) -> None:
            if len(self.ids) > 4 and self._context == "poison":
                raise error
            take(self, token, *more)

        patch.setattr(Answer, "take", taken)
        return
    owner = Network if unit in ("hear", "encode") else Batch
    work = getattr(owner, unit)

    def worked(self: Any, jobs: Any, *more: Any) -> None:
        if any(job.context == "poison" for job in ([jobs] if isinstance(jobs, Job) else jobs)):
            raise error
        work(self, jobs, *more)

    patch.setattr(owner, unit, worked)


@pytest.mark.parametrize("unit", ["hear", "encode", "prefill", "decode", "take"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), BadRequest("too loud"), torch.OutOfMemoryError("full")])
def test_an_error_is_its_session_s_alone(
    short_cuts: None, monkeypatch: pytest.MonkeyPatch, unit: str, error: Exception
) -> None:
    talks = {1: Talk(SAID[3]), 3: Talk(SAID[8]), 4: Talk(LONG[:400_000])}
    expected = {number: [plain(talk)] for number, talk in talks.items()}
    poison(monkeypatch, unit, error)
    stage = Stage()
    for number, talk in sorted((talks | {2: Talk(SAID[5], context="poison")}).items()):
        stage.talk(number, talk)
    stage.play()
    wrong = SessionError("internal-error", "the model failed on this audio")
    if isinstance(error, AsrError):
        wrong = SessionError(error.code, "too loud")
    assert stage.ends() == expected | {2: [wrong]}
    last = stage.computed()[stage.of(2)[-1] - 1]
    assert last.sessions == [2], "tried alone"
    assert (0, Working([2])) in stage.log, "and named alone"


def test_suspects_are_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is cancelled is not tried."""
    expected = [plain(Talk(SAID[8]))]
    poison(monkeypatch, "take", RuntimeError("broken"))
    failed = 0
    for _ in range(2):
        stage = Stage()
        for number, context in ((1, ""), (2, "poison"), (3, "")):
            stage.talk(number, Talk(SAID[8], context=context))
        if failed:
            stage.cancel(1, at=failed)
        units = stage.play().computed()
        if not failed:
            last = stage.of(2)[-1]
            assert [units[i - 1].sessions for i in (last - 1, last)] == [[1], [2]]
            assert units[last - 3] == Unit("decode", [1, 2, 3])
            assert stage.ends()[1] == expected
            failed = last - 2
    assert stage.of(1)[-1] == failed
    assert units[failed].sessions == [2]
    assert stage.ends()[3] == expected
    assert isinstance(stage.ends()[2][0], SessionError)


def test_a_context_that_is_too_long() -> None:
    talks = {1: Talk(SAID[3]), 2: Talk(SAID[5], context="kitchen " * 4000)}
    stage = Stage()
    for number, talk in talks.items():
        stage.talk(number, talk)
    (error,) = stage.play().ends()[2]
    assert isinstance(error, SessionError)
    assert "too long" in error.message
    assert stage.ends()[1] == [plain(talks[1])]


def test_a_gpu_that_is_broken_for_good_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the sessions go to the next one, without an error."""

    def broken(*_: object) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(Batch, "decode", broken)
    monkeypatch.setattr(Batch, "prefill", broken)
    monkeypatch.setattr(Scheduler, "_fail", lambda *_: pytest.fail("it is nobody's fault"))
    monkeypatch.setattr(Network, "encode", lambda _, job: job.to_encode.clear())
    monkeypatch.setattr(Network, "wait", broken)
    stage = Stage()
    stage.talk(1, Talk(SAID[3]))
    with pytest.raises(RuntimeError, match="device-side"):
        stage.play()
    assert not stage.ends()


# --- memory ---


@pytest.mark.parametrize(("most", "shared"), [(MAX_CACHE_ROWS, range(4, 9)), (1024, range(2, 5)), (256, range(1, 2))])
@pytest.mark.parametrize("live", [True, False])
def test_the_cache_is_bounded(
    short_cuts: None, monkeypatch: pytest.MonkeyPatch, most: int, shared: range, live: bool
) -> None:
    """What does not fit beside the others waits for them; what fits nowhere has it for itself."""
    talks = {n: Talk(b"".join(SAID[n : n + 3]), live, language="English") for n in range(6)}
    for module in (decoder_module, batch_module):
        monkeypatch.setattr(module, "MAX_CACHE_ROWS", most)
    stage = Stage()
    for number, talk in talks.items():
        stage.talk(number, talk)
    jobs = 0
    batch = stage.scheduler._lanes[live].batch

    def watch() -> None:
        nonlocal jobs
        check_cache(batch, most)
        jobs = max(jobs, sum(not job.resting for job in batch.jobs))

    stage.watch = watch
    check(stage.play(), talks)
    assert jobs in shared


def check_cache(batch: Batch, most: int) -> None:
    slots, rows = len(batch.cache.lengths), batch.cache.rows
    assert batch.cache.keys.shape[1:3] == batch.cache.values.shape[1:3] == (slots, rows)
    assert slots * rows <= most or len(batch.jobs) <= 1
    assert slots <= SLOTS


# --- anything in any order ---

TALKS = [
    Talk(SAID[3]),
    Talk(SAID[5], live=False),
    Talk(SAID[13], language="German"),
    Talk(SAID[14], language="English", hint="force"),
    Talk(LONG[320_000:700_000], live=False),
    Talk(SILENCE + SAID[8] + SILENCE + SAID[17], live=False),
    Talk(SILENCE),
    Talk(b"", live=False),
    Talk(LONG[900_000:1_200_000]),
    Talk(ENGLISH + GERMAN + GERMAN),
]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(TALKS),
            st.integers(0, 90),
            st.none() | st.integers(0, 60),
            st.lists(st.integers(1, 40_000), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 2_000),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=11,
    )
)
def test_each_session_ends_once_with_its_text(
    sessions: list[tuple[Talk, int, int | None, list[int], int]],
) -> None:
    """Whoever comes when, however slowly and in what chunks, and whoever leaves."""
    stage = Stage()
    with cut_short():
        for number, (talk, begin, stay, sizes, every) in enumerate(sessions, 1):
            stage.feed(number, talk, sizes, every, at=begin)
            if stay is not None:
                stage.cancel(number, at=begin + stay)
        batches = [lane.batch for lane in stage.scheduler._lanes.values()]

        def watch() -> None:
            for batch in batches:
                check_cache(batch, MAX_CACHE_ROWS)

        stage.watch = watch
        stage.play()
        ends = stage.ends()
        for number, (talk, _, stay, _, _) in enumerate(sessions, 1):
            if stay is None or number in ends:
                check_session(stage, number, talk)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_jobs_may_come_and_go_at_any_step(data: st.DataObject) -> None:
    """The network's units by themselves: ids are those of each piece alone."""
    pieces = [Piece(floats(SAID[i])) for i in (3, 5, 8, 13, 14)]
    pieces[1] = Piece(pieces[1].samples, language="German")
    pieces[3] = Piece(pieces[3].samples, language="English", hint="force")
    singles = [network().recognise([piece])[0] for piece in pieces]
    batch = Batch(network())
    jobs = [heard(piece) for piece in pieces]
    wanted = dict(enumerate(jobs))
    while wanted:
        index = data.draw(st.sampled_from([*wanted, -1, -1, -1]))
        job = wanted.get(index)
        if job is None or job.decoding:
            some = data.draw(st.sets(st.sampled_from(list(wanted)), min_size=1))
            batch.decode([wanted[i] for i in some if wanted[i].decoding])
        elif job.encoding:
            network().encode(job)
        else:
            batch.prefill(job)
        for i, done in list(wanted.items()):
            if done.resting:
                assert done.result.ids == singles[i].ids
                assert done.result.text == singles[i].text
                del wanted[i]
        if wanted and data.draw(st.integers(0, 40)) == 0:
            wanted.pop(data.draw(st.sampled_from(list(wanted))))
        batch.retain(wanted.values())
    assert not batch.jobs
    assert not batch.cache.lengths


def heard(piece: Piece) -> Job:
    job = network().open(piece.context)
    network().hear(job, piece.samples, len(piece.samples), piece.language, piece.hint)
    return job


def test_a_failed_step_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have taken their token, others have not: the latter read their last one again, and only once."""
    pieces = [Piece(floats(SAID[i])) for i in (3, 5, 8)]
    batch = Batch(network())
    jobs = [heard(piece) for piece in pieces]
    answers = [job.answer for job in jobs if job.answer]
    for job in jobs:
        network().encode(job)
        batch.prefill(job)
    batch.decode(jobs)
    with monkeypatch.context() as patch:
        take = Answer.take

        def taken(self: Answer, token: int, *more: Any) -> None:
            if self is answers[1]:
                raise RuntimeError("broken")
            take(self, token, *more)

        patch.setattr(Answer, "take", taken)
        with pytest.raises(RuntimeError, match="broken"):
            batch.decode(jobs)
    while not all(answer.done for answer in answers):
        batch.decode(jobs)
        for slot, job in enumerate(batch.jobs):
            answer = answers[jobs.index(job)]
            assert answer.done or batch.cache.lengths[slot] == job.prompt_rows + answer.kept
    assert [job.result.ids for job in jobs] == [network().recognise([piece])[0].ids for piece in pieces]
