"""Which unit comes when. Units run in the test's own thread, so what happens between two of them is settled."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.errors import AsrError, BadRequest
from wyoming_qwen_asr.events import Final, Hint, Message, Segment, SessionError, SessionStart, Working
from wyoming_qwen_asr.model import decoder as decoder_module
from wyoming_qwen_asr.model import network as network_module
from wyoming_qwen_asr.model import scheduler as scheduler_module
from wyoming_qwen_asr.model import vad
from wyoming_qwen_asr.model.answer import Answer
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.decoder import MAX_CACHE_ROWS
from wyoming_qwen_asr.model.network import PREFILL_ROWS, Batch, Job, Network, Piece
from wyoming_qwen_asr.model.resample import Samples
from wyoming_qwen_asr.model.scheduler import SLOTS, Scheduler
from wyoming_qwen_asr.text import join

from .conftest import DEMO, SECONDS, load_recordings

SAID = [recording.pcm for recording in load_recordings()]
ENGLISH, GERMAN = (pcm.ljust(102_400, b"\0") for pcm in (SAID[2], SAID[0]))
"""3.2 s with silence behind: a piece each, when cuts are short. Another language changes the second's text."""
SILENCE = bytes(14 * SAMPLE_RATE)
LONG = b"".join(SAID)
"""50 s: two pieces, of three windows and more."""
ROUNDS = 50
"""Of the loop, without anything said or computed: nothing more will be."""


@cache
def network() -> Network:
    return Network.load(open_checkpoint(DEMO), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The demo model is too small for two threads to be worth waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def cut_short() -> Iterator[None]:
    """Pieces of 3 to 6 s, so that little audio has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vad, "EARLIEST_CUT", 3 * SAMPLE_RATE)
        for module in (vad, scheduler_module):
            patch.setattr(module, "LATEST_CUT", 6 * SAMPLE_RATE)
        yield


@pytest.fixture
def short_cuts() -> Iterator[None]:
    with cut_short():
        yield


@dataclass(frozen=True)
class Talk:
    """A session's audio and what is known about it."""

    pcm: bytes
    live: bool = True
    language: str | None = None
    hint: Hint = "prefer"
    context: str = ""


def floats(pcm: bytes) -> Samples:
    return np.asarray(np.frombuffer(pcm, "<i2") / np.float32(32_768), np.float32)


def plain(talk: Talk) -> Final:
    """One piece after another, each alone: what a session has to come to, however it is scheduled."""
    return _plain(talk.pcm, talk.language, talk.hint, talk.context, vad.LATEST_CUT)


@cache
def _plain(pcm: bytes, language: str | None, hint: Hint, context: str, cut: int) -> Final:
    assert cut == vad.LATEST_CUT
    samples = floats(pcm)
    texts: list[str] = []
    heard = None
    while len(samples):
        end = vad.cut_point(samples) or len(samples)
        kind: Hint = hint if language or hint == "ignore" else "prefer"
        (result,) = network().recognise([Piece(samples[:end], context, language or heard, kind)])
        heard = heard or result.language
        texts.append(result.text)
        samples = samples[end:]
    return Final(join(texts), heard)


@dataclass(frozen=True)
class Unit:
    kind: str
    sessions: list[int]


class Stage(Executor):
    """A scheduler, and the executor of its units. `cues`: what happens once unit n (from 1) has been decided on."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(network(), self._emit)
        self.scheduler._compute = self
        self.log: list[Unit | tuple[int, Message]] = []
        self.cues: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self.units = 0
        self.watch: Callable[[], None] = lambda: None

    async def _emit(self, message: Message, session: int) -> None:
        await asyncio.sleep(0)  # a pipe may be full
        self.log.append((session, message))

    def submit(self, call: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        if call is scheduler_module._unit:
            self.units += 1
            parts = args[2]
            job = parts[0].job
            kind = "hear" if job is None else "encode" if job.windows else "decode" if job.decoding else "prefill"
            self.log.append(Unit(kind, [part.number for part in parts]))
            self._cue(self.units)
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        self.watch()
        return future

    def _cue(self, unit: int) -> None:
        for action in self.cues.pop(unit, []):
            action()

    def talk(self, number: int, talk: Talk, at: int = 0) -> None:
        """At unit `at` a session begins, and all of it is there."""

        def begin() -> None:
            start = SessionStart(SAMPLE_RATE, 2, 1, talk.language, talk.hint, talk.context, live=talk.live)
            self.scheduler.start(number, start)
            for i in range(0, len(talk.pcm), 40_000):
                self.scheduler.audio(number, talk.pcm[i : i + 40_000])
            self.scheduler.end(number)

        self.cues[at].append(begin)

    def cancel(self, number: int, at: int) -> None:
        self.cues[at].append(lambda: self.scheduler.cancel(number))

    def play(self) -> "Stage":
        """Until nothing is left to do. Cues for later units than there are come when the others are done."""
        asyncio.run(self._play())
        return self

    async def _play(self) -> None:
        self._cue(0)
        running = asyncio.create_task(self.scheduler.run())
        async with asyncio.timeout(SECONDS):
            while True:
                before, quiet = len(self.log), 0
                while quiet < ROUNDS and not running.done():
                    await asyncio.sleep(0)
                    quiet = quiet + 1 if before == len(self.log) else 0
                    before = len(self.log)
                if running.done():
                    running.result()
                if not self.cues:
                    break
                self._cue(min(self.cues))
        running.cancel()
        assert not self.scheduler._streams
        assert all(not lane.parts and not lane.batch.cache.lengths for lane in self.scheduler._lanes.values())

    def ends(self) -> dict[int, list[Message]]:
        """How each session ended."""
        found: dict[int, list[Message]] = defaultdict(list)
        for session, message in self.said():
            if isinstance(message, Final | SessionError):
                found[session].append(message)
        return found

    def said(self) -> list[tuple[int, Message]]:
        return [entry for entry in self.log if not isinstance(entry, Unit)]

    def computed(self) -> list[Unit]:
        return [entry for entry in self.log if isinstance(entry, Unit)]

    def of(self, number: int) -> list[int]:
        """Which units, counted from 1, were this session's."""
        return [i for i, unit in enumerate(self.computed(), 1) if number in unit.sessions]


def check(stage: Stage, talks: dict[int, Talk]) -> None:
    """Each has its text, and only that."""
    assert stage.ends() == {number: [plain(talk)] for number, talk in talks.items()}


# --- live speech and files ---


@pytest.mark.parametrize("at", [1, 2, 4, 6, 10, 15, 25])
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
    assert {kinds[at - 1] for at in (1, 2, 4, 6, 10, 15, 25)} == {"hear", "encode", "prefill", "decode"}


def test_units_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []
    rows: list[Sequence[int]] = []
    encode, decode = network().encoder.forward, network().decoder.forward

    def encoder(mels: Sequence[Tensor], inner: bool = False) -> list[Tensor]:
        frames.append(sum(mel.shape[1] for mel in mels))
        return encode(mels, inner)

    def decoder(x: Tensor, counts: Sequence[int], *more: Any, **options: Any) -> Tensor:
        rows.append(counts)
        return decode(x, counts, *more, **options)

    stage = Stage()
    stage.talk(1, Talk(LONG, live=False))
    with monkeypatch.context() as patch:
        patch.setattr(network().encoder, "forward", encoder)
        patch.setattr(network().decoder, "forward", decoder)
        stage.play()
    kinds = [unit.kind for unit in stage.computed()]
    assert len(frames) == kinds.count("encode") > 4
    assert max(frames) == 800
    assert len(rows) == kinds.count("prefill") + kinds.count("decode")
    assert max(max(counts) for counts in rows) == PREFILL_ROWS


def test_files_share_steps_and_do_not_slow_live_steps(short_cuts: None) -> None:
    talks = {1: Talk(LONG, live=False), 2: Talk(LONG[:500_000], live=False), 3: Talk(SAID[3])}
    stage = Stage()
    stage.talk(1, talks[1])
    stage.talk(2, talks[2])
    stage.talk(3, talks[3], at=60)
    check(stage.play(), talks)
    steps = [unit.sessions for unit in stage.computed() if unit.kind == "decode"]
    assert max(map(len, steps)) > SLOTS // 2, "pieces of a file are decoded together"
    assert any(set(sessions) == {1, 2} for sessions in steps)
    assert all(sessions == [3] for sessions in steps if 3 in sessions)


# --- fair among equals ---


@pytest.mark.parametrize("live", [True, False])
def test_who_comes_later_is_not_kept_waiting(short_cuts: None, live: bool) -> None:
    """Eight places are taken by one session: the next free one is the other's, whatever the first has left."""
    talks = {1: Talk(LONG, live, "English"), 2: Talk(SAID[3], live)}
    stage = Stage()
    stage.talk(1, talks[1])
    stage.talk(2, talks[2], at=40)
    places: list[int] = []  # in the order in which they were given
    lane, known = stage.scheduler._lanes[live], set()
    arrived = 0

    def watch() -> None:
        nonlocal arrived
        for part in lane.parts:
            if part not in known:
                known.add(part)
                places.append(part.number)
        if stage.units == 40:
            arrived = len(places)
            assert len(lane.parts) == SLOTS

    stage.watch = watch
    check(stage.play(), talks)
    assert places[arrived] == 2
    assert len(places) > arrived + 1


def test_reading_and_decoding_take_turns() -> None:
    talks = {1: Talk(SAID[8]), 2: Talk(LONG[:800_000])}
    stage = Stage()
    stage.talk(1, talks[1])
    stage.talk(2, talks[2], at=6)
    check(stage.play(), talks)
    kinds = [unit.kind for unit in stage.computed()]
    assert kinds[:6] == ["hear", "encode", "prefill", "decode", "decode", "decode"]
    reading = [i for i in stage.of(2) if stage.computed()[i - 1].sessions == [2]]
    assert reading[:6] == [7, 9, 11, 13, 15, 17]
    assert all(stage.computed()[i - 1] == Unit("decode", [1]) for i in (8, 10, 12, 14, 16))


def test_places_go_round(short_cuts: None) -> None:
    """Three sessions with more pieces than there are places have two or three places each."""
    stage = Stage()
    for number in (1, 2, 3):
        stage.talk(number, Talk(LONG, live=False, language="English"))
    places: list[list[int]] = []
    lane = stage.scheduler._lanes[False]
    stage.watch = lambda: places.append([part.number for part in lane.parts])
    stage.play()
    assert sorted(places[0].count(number) for number in (1, 2, 3)) == [2, 3, 3]
    full = [place for place in places if len(place) == SLOTS]
    assert all(2 <= place.count(number) <= 4 for place in full for number in (1, 2, 3))


# --- leaving ---


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 12, 20])
@pytest.mark.parametrize("live", [True, False])
def test_a_cancelled_session_costs_no_further_unit(short_cuts: None, at: int, live: bool) -> None:
    talks = {1: Talk(LONG[:600_000], live), 2: Talk(SAID[5], live), 3: Talk(SAID[8], live)}
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
    monkeypatch.setattr(scheduler_module, "WORKING_SECONDS", 0.0)
    stage = Stage()
    stage.talk(1, Talk(SAID[5]))
    stage.play()
    signs = [message for _, message in stage.said() if isinstance(message, Working)]
    assert signs == [*[Working([1])] * stage.units, Working([])]


def test_segments_come_in_their_order(short_cuts: None) -> None:
    talk = Talk(LONG, live=False, language="English")
    stage = Stage()
    stage.talk(1, talk)
    check(stage.play(), {1: talk})
    segments = [message for _, message in stage.said() if isinstance(message, Segment)]
    assert len(segments) > SLOTS
    assert segments[0].start == 0
    assert all(a.end == b.start for a, b in pairwise(segments))
    assert segments[-1].end == pytest.approx(len(LONG) / 2 / SAMPLE_RATE)
    assert join([segment.text for segment in segments]) == plain(talk).text


@pytest.mark.parametrize(
    ("language", "hint"),
    [(language, hint) for language in (None, "German") for hint in ("prefer", "force", "ignore")],
)
def test_later_pieces_expect_the_language_of_the_first_with_speech(
    short_cuts: None, language: str | None, hint: Hint
) -> None:
    """However soon they could begin: the texts are those of one piece after another."""
    talk = Talk(SILENCE + ENGLISH + GERMAN + ENGLISH + GERMAN, False, language, hint)
    if language is None:
        assert (plain(talk) == plain(replace(talk, hint="ignore"))) == (hint == "ignore"), "it matters"
    stage = Stage()
    stage.talk(1, talk)
    check(stage.play(), {1: talk})
    steps = [unit.sessions for unit in stage.computed() if unit.kind == "decode"]
    assert max(map(len, steps)) > 1


# --- errors ---


def poison(patch: pytest.MonkeyPatch, unit: str, error: Exception) -> None:
    """That unit fails for whoever has the context "poison", and for all that are computed with it."""
    poisoned: list[Job] = []
    hear = Network.hear

    def heard(self: Network, piece: Piece) -> Job:
        if piece.context == "poison" and unit == "hear":
            raise error
        job = hear(self, piece)
        if piece.context == "poison":
            poisoned.append(job)
        return job

    patch.setattr(Network, "hear", heard)
    if unit in ("hear", "take"):
        take = Answer.take

        def taken(self: Answer, token: int) -> None:
            if len(self.ids) > 4 and any(job.answer is self for job in poisoned):
                raise error
            take(self, token)

        patch.setattr(Answer, "take", taken)
        return
    owner = Network if unit == "encode" else Batch
    work = getattr(owner, unit)

    def worked(self: Any, jobs: Any) -> None:
        if any(job in poisoned for job in ([jobs] if isinstance(jobs, Job) else jobs)):
            raise error
        work(self, jobs)

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


def test_a_suspect_that_is_cancelled_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [plain(Talk(SAID[8]))]
    poison(monkeypatch, "decode", RuntimeError("broken"))
    failed = 0
    for _ in range(2):
        stage = Stage()
        for number, context in ((1, ""), (2, "poison"), (3, "")):
            stage.talk(number, Talk(SAID[8], context=context))
        if failed:
            stage.cancel(1, at=failed)
        units = stage.play().computed()
        failed = failed or next(i for i, unit in enumerate(units, 1) if unit == Unit("decode", [1, 2]))
    assert stage.of(1)[-1] == failed
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
    monkeypatch.setattr(Network, "wait", broken)
    stage = Stage()
    stage.talk(1, Talk(SAID[3]))
    with pytest.raises(RuntimeError, match="device-side"):
        stage.play()
    assert not stage.ends()


# --- memory ---


@pytest.mark.parametrize(("most", "shared"), [(MAX_CACHE_ROWS, range(4, 9)), (1024, range(2, 5)), (256, range(1, 2))])
def test_the_cache_is_bounded(short_cuts: None, monkeypatch: pytest.MonkeyPatch, most: int, shared: range) -> None:
    """What does not fit beside the others waits for them; what fits nowhere has it for itself."""
    talks = {n: Talk(b"".join(SAID[n : n + 3]), live=False, language="English") for n in range(6)}
    for module in (decoder_module, network_module):
        monkeypatch.setattr(module, "MAX_CACHE_ROWS", most)
    stage = Stage()
    for number, talk in talks.items():
        stage.talk(number, talk)
    jobs = 0
    batch = stage.scheduler._lanes[False].batch

    def watch() -> None:
        nonlocal jobs
        slots, rows = len(batch.cache.lengths), batch.cache.rows
        assert batch.cache.keys.shape[1:3] == batch.cache.values.shape[1:3] == (slots, rows)
        assert slots * rows <= most or len(batch.jobs) <= 1
        assert slots <= SLOTS
        jobs = max(jobs, len(batch.jobs))

    stage.watch = watch
    check(stage.play(), talks)
    assert jobs in shared


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
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(TALKS), st.integers(0, 90), st.none() | st.integers(0, 60)), min_size=1, max_size=11
    )
)
def test_each_session_ends_once_with_its_text(sessions: list[tuple[Talk, int, int | None]]) -> None:
    """Whoever comes when, and whoever leaves."""
    stage = Stage()
    with cut_short():
        for number, (talk, begin, stay) in enumerate(sessions, 1):
            stage.talk(number, talk, at=begin)
            if stay is not None:
                stage.cancel(number, at=begin + stay)
        stage.play()
        ends = stage.ends()
        for number, (talk, _, stay) in enumerate(sessions, 1):
            if stay is None or number in ends:
                assert ends[number] == [plain(talk)]
                last = [message for session, message in stage.said() if session == number][-1]
                assert isinstance(last, Final)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_jobs_may_come_and_go_at_any_step(data: st.DataObject) -> None:
    """The network's units by themselves: ids are those of each piece alone."""
    pieces = [Piece(floats(SAID[i])) for i in (3, 5, 8, 13, 14)]
    pieces[1] = Piece(pieces[1].samples, language="German")
    pieces[3] = Piece(pieces[3].samples, language="English", hint="force")
    singles = [network().recognise([piece])[0] for piece in pieces]
    batch = Batch(network())
    jobs = [network().hear(piece) for piece in pieces]
    wanted = dict(enumerate(jobs))
    while wanted:
        index = data.draw(st.sampled_from([*wanted, -1, -1, -1]))
        job = wanted.get(index)
        if job is None or job.decoding:
            some = data.draw(st.sets(st.sampled_from(list(wanted)), min_size=1))
            batch.decode([wanted[i] for i in some if wanted[i].decoding])
        elif job.windows:
            network().encode(job)
        else:
            batch.prefill(job)
        for i, done in list(wanted.items()):
            if done.answer.done:
                assert done.result == singles[i]
                del wanted[i]
        if wanted and data.draw(st.integers(0, 40)) == 0:
            wanted.pop(data.draw(st.sampled_from(list(wanted))))
        batch.retain(wanted.values())
    assert not batch.jobs
    assert not batch.cache.lengths


def test_a_failed_step_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have taken their token, others have not: the latter read their last one again, and only once."""
    pieces = [Piece(floats(SAID[i])) for i in (3, 5, 8)]
    batch = Batch(network())
    jobs = [network().hear(piece) for piece in pieces]
    for job in jobs:
        network().encode(job)
        batch.prefill(job)
    batch.decode(jobs)
    with monkeypatch.context() as patch:
        take = Answer.take

        def taken(self: Answer, token: int) -> None:
            if self is jobs[1].answer:
                raise RuntimeError("broken")
            take(self, token)

        patch.setattr(Answer, "take", taken)
        with pytest.raises(RuntimeError, match="broken"):
            batch.decode(jobs)
    while not all(job.answer.done for job in jobs):
        batch.decode(jobs)
        for slot, job in enumerate(batch.jobs):
            assert job.answer.done or batch.cache.lengths[slot] == job.prompt_rows + job.answer.kept
    assert [job.result for job in jobs] == [network().recognise([piece])[0] for piece in pieces]
