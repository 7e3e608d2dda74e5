"""What a session gives to model process after model process, and what its client sees of that. No processes here."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from wyoming_qwen_asr.audio import AudioFormat
from wyoming_qwen_asr.engine.replay import Cursor, Tries
from wyoming_qwen_asr.engine.session import Session, SessionOptions
from wyoming_qwen_asr.errors import BadRequest, ModelFailed, TimedOut
from wyoming_qwen_asr.events import (
    Final,
    Partial,
    Result,
    Segment,
    SessionAudio,
    SessionEnd,
    SessionError,
    SessionStart,
)
from wyoming_qwen_asr.limits import (
    MAX_PIECE_SECONDS,
    MAX_REPLAYS,
    MAX_RETAINED_BYTES,
    MAX_UNCONFIRMED_FILE_SECONDS,
    MAX_UNCONFIRMED_SECONDS,
    REPLAY_SECONDS,
)
from wyoming_qwen_asr.model.session import Pace, Stream
from wyoming_qwen_asr.text import join

FORM = AudioFormat(rate=48_000, width=2, channels=2)


def new(language: str | None = None) -> Session:
    options = SessionOptions(FORM, language, "names")
    return Session(1, options, "prefer", lambda: None, lambda _: None)


def taken(session: Session) -> tuple[SessionStart | None, bytes, bool]:
    """All that a model process would be sent now: the start, the audio, and whether the end came."""
    start: SessionStart | None = None
    audio, ended = b"", False
    while outgoing := session.outgoing(["English", "German"]):
        message, payload = outgoing
        match message:
            case SessionStart():
                assert not audio
                start = message
            case SessionAudio():
                audio += payload or b""
            case SessionEnd():
                ended = True
    return start, audio, ended


def pcm(seconds: float) -> bytes:
    """Bytes that are all different places."""
    return b"".join(i.to_bytes(4, "little") for i in range(round(seconds * FORM.rate)))


async def test_a_replay_starts_after_the_last_segment() -> None:
    """With the language heard so far; the final is what was delivered and what follows."""
    session = new()
    await session.feed(pcm(3))
    start, audio, ended = taken(session)
    assert start == SessionStart(48_000, 2, 2, None, "prefer", "names", None, 0.0)
    assert (audio, ended) == (pcm(3), False)
    session.deliver(Segment("One.", "English", 0.0, 2.0))
    session.restart(struck=True)
    await session.feed(b"tail")
    await session.end()
    start, audio, ended = taken(session)
    assert start == SessionStart(48_000, 2, 2, None, "prefer", "names", "English", 2.0)
    assert (audio, ended) == (pcm(3)[2 * FORM.bytes_per_second :] + b"tail", True)
    session.deliver(Segment("Two.", "English", 2.0, 3.0))
    session.deliver(Final("Two.", "English"))
    results = [result async for result in session.results()]
    assert results[-1] == Final("One. Two.", "English")
    session.close()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 90_000), min_size=1, max_size=8),
    ends=st.lists(st.floats(0, 2), max_size=4),
    deaths=st.sets(st.integers(0, 8), max_size=MAX_REPLAYS),
)
def test_no_byte_is_lost(chunks: list[int], ends: list[float], deaths: set[int]) -> None:
    """Whatever the chunks, segments and deaths: the last process has everything from its offset to the end, in whole
    frames, and the offset is where the last segment ended."""

    async def play() -> None:
        session = new()
        whole = pcm(sum(chunks) / FORM.frame_bytes / FORM.rate + 1)
        fed, done, heard = 0, 0.0, b""
        begin = 0
        for step, size in enumerate(chunks):
            await session.feed(whole[fed : fed + size])
            fed += size
            start, audio, _ = taken(session)
            if start:
                begin, heard = round(start.offset * FORM.bytes_per_second), b""
            heard += audio
            known = (begin + len(heard)) // FORM.frame_bytes / FORM.rate
            if ends and (end := min(done + ends.pop(), known)) > done:
                session.deliver(Segment("x", None, done, end))
                done = end
            if step in deaths:
                session.restart(struck=False)
        await session.end()
        start, audio, ended = taken(session)
        if start:
            begin, heard = round(start.offset * FORM.bytes_per_second), b""
            assert abs(start.offset - done) <= 1 / FORM.rate
        assert ended
        assert begin % FORM.frame_bytes == 0
        assert heard + audio == whole[begin:fed]
        session.close()

    asyncio.run(play())


class Lives(RuleBasedStateMachine):
    """One session and one model process after another, in any order of what can happen. Second n of the audio is the
    word wN, so that what the client must have seen is known at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.session = self.runner.run(self._new())
        self.fed = self.done = self.deaths = 0
        self.known: int | None = None  # seconds that the present process has; None before its start
        self.heard = 0  # bytes from the session's start, with those before the process
        self.said = 0  # up to this second it has said stable text
        self.ended = self.asked = self.over = False
        self.texts: list[str] = []  # of the segments of this process
        self.seen = ""  # by the client

    async def _new(self) -> Session:
        return new()

    def teardown(self) -> None:
        self.session.close()
        self.runner.close()

    def _look(self) -> None:
        while self.session._results:
            if isinstance(result := self.session._results.popleft(), Partial):
                self.seen += result.stable_delta
        assert words(0, self.fed).startswith(self.seen)

    @precondition(lambda self: not self.ended and not self.over)
    @rule(seconds=st.integers(1, 3))
    def feed(self, seconds: int) -> None:
        self.runner.run(self.session.feed(bytes(seconds * FORM.bytes_per_second)))
        self.fed += seconds

    @precondition(lambda self: not self.ended and self.fed)
    @rule()
    def end(self) -> None:
        self.runner.run(self.session.end())
        self.ended = True

    @precondition(lambda self: not self.over)
    @rule()
    def hand_over(self) -> None:
        async def take() -> tuple[SessionStart | None, bytes, bool]:
            return taken(self.session)

        start, audio, asked = self.runner.run(take())
        if start:
            assert start.offset == self.done
            self.said = self.done
            self.heard = self.done * FORM.bytes_per_second
        self.heard += len(audio)
        self.known = self.heard // FORM.bytes_per_second
        self.asked = self.asked or asked
        assert self.known == self.fed or (self.known == self.fed - 1 and not self.asked)

    @precondition(lambda self: not self.over and self.known is not None and self.said < self.known)
    @rule(data=st.data())
    def partial(self, data: st.DataObject) -> None:
        assert self.known is not None
        until = data.draw(st.integers(self.said + 1, self.known))
        before, self.said = self.said, until
        full = words(self.done, until)
        self.session.deliver(Partial(full[len(words(self.done, before)) :], "tail"))
        self._look()
        assert self.seen.startswith(words(0, until))

    @precondition(lambda self: not self.over and self.known is not None and self.done < self.known)
    @rule(data=st.data())
    def segment(self, data: st.DataObject) -> None:
        assert self.known is not None
        self._segment(data.draw(st.integers(self.done + 1, self.known)))

    def _segment(self, until: int) -> None:
        self.texts.append(words(self.done, until))
        self.session.deliver(Segment(self.texts[-1], "English", self.done, until))
        self.done = self.said = until
        self._look()
        assert self.seen.startswith(words(0, until))

    @precondition(lambda self: not self.over and self.deaths < MAX_REPLAYS)
    @rule()
    def die(self) -> None:
        async def die() -> None:
            self.session.restart(struck=False)

        self.deaths += self.known is not None
        self.runner.run(die())
        self.known, self.asked, self.texts = None, False, []
        self.said = self.done

    @precondition(lambda self: not self.over and self.asked and self.known is not None)
    @rule()
    def finish(self) -> None:
        if self.done < self.fed:
            self._segment(self.fed)
        self.session.deliver(Final(" ".join(self.texts), "English"))
        assert self.runner.run(self.session.final()).text == self.seen == words(0, self.fed)
        assert self.session.finished
        assert self.session.record.retracted == 0
        self.over = True

    @precondition(lambda self: self.over)
    @rule()
    def afterwards(self) -> None:
        """Nothing more is asked for, and nothing more is told."""
        self.session.deliver(Final("late", None))
        assert self.session.outgoing([]) is None
        assert not self.session._results


def words(begin: int, end: int) -> str:
    return " ".join(f"w{second}" for second in range(begin, end))


Lives.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=50, stateful_step_count=20)
TestLives = Lives.TestCase


async def test_failures_reach_the_client_once() -> None:
    """With the class that the model process named; what comes later changes nothing."""
    session = new()
    await session.feed(b"1234")
    session.deliver(SessionError("bad-request", "too long"))
    session.deliver(Final("late", None))
    with pytest.raises(BadRequest, match="too long"):
        await session.final()
    with pytest.raises(BadRequest):
        await session.feed(b"1234")
    session.close()


async def test_the_second_strike_fails() -> None:
    """One that came through alone has none any more."""
    session = new()
    await session.feed(pcm(1))
    taken(session)
    session.restart(struck=True)
    assert session.tries.suspect
    taken(session)
    session.tries.acquit(proven=True)
    assert not session.tries.suspect
    for _ in range(2):
        taken(session)
        session.restart(struck=True)
    with pytest.raises(ModelFailed):
        await session.final()
    assert taken(session) == (None, b"", False)
    session.close()


async def test_a_replay_too_many() -> None:
    """Whatever ended the processes; but those that never had the audio, or were killed from outside, do not count."""
    session = new()
    await session.feed(pcm(1))
    for _ in range(50):
        session.restart(struck=False)
    for _ in range(50):
        assert taken(session)[0]
        session.restart(struck=False, killed=True)
    for _ in range(MAX_REPLAYS + 1):
        assert taken(session)[0]
        session.restart(struck=False)
    with pytest.raises(ModelFailed):
        await session.final()
    assert taken(session) == (None, b"", False)
    session.close()


def test_time_for_replays() -> None:
    """Only that counts which is spent on replays, whoever ended the processes."""
    for killed in (False, True):
        tries = Tries()
        tries.begin(0.0)
        assert tries.died(1000.0, struck=False, killed=killed) is None
        tries.begin(2000.0)
        assert tries.died(2000.0 + REPLAY_SECONDS / 2, struck=False, killed=killed) is None
        tries.begin(3000.0)
        assert tries.died(3001.0 + REPLAY_SECONDS / 2, struck=False, killed=killed) is not None


async def test_nothing_is_emitted_twice() -> None:
    """After a replay, deltas resume where the text agrees again; where it does not, they stop until the segment."""
    session = new()
    await session.feed(pcm(3))

    async def emitted() -> list[Partial]:
        found = []
        while session._results:
            result = session._results.popleft()
            if isinstance(result, Partial):
                found.append(result)
        return found

    taken(session)
    session.deliver(Partial("Turn on", " the"))
    assert await emitted() == [Partial("Turn on", " the")]
    session.restart(struck=False)
    for delta in ("", "Turn", " on", " the", ""):
        session.deliver(Partial(delta, "…"))
    assert await emitted() == [Partial("", "…"), Partial(" the", "…"), Partial("", "…")]
    taken(session)
    session.restart(struck=False)
    for delta in ("Turn off", " the light"):
        session.deliver(Partial(delta, ""))
    assert await emitted() == []
    session.deliver(Segment("Turn off the light", "English", 0.0, 1.0))
    session.deliver(Partial("in", ""))
    assert await emitted() == []
    session.deliver(Final("Turn off the light", "English"))
    assert await emitted() == []
    assert session.record.retracted == len("n the")
    session.close()


def texts(results: list[Result]) -> list[str]:
    """The deltas."""
    return [result.stable_delta for result in results if isinstance(result, Partial)]


def test_deltas_are_the_whole_text() -> None:
    """With what stands between segments, as their scripts write it, and the rest of a segment before it."""
    cursor = Cursor()
    assert cursor.take(Partial("", "Tu")) == [Partial("", "Tu")]
    assert cursor.take(Partial("Turn", " on")) == [Partial("Turn", " on")]
    one = Segment("Turn on.", "English", 0.0, 1.0)
    assert cursor.take(one) == [Partial(" on.", ""), one]
    assert cursor.take(Partial("", "No")) == [Partial("", " No")]
    assert cursor.take(Partial("Now", "")) == [Partial(" Now", "")]
    assert cursor.take(Partial(".", "你")) == [Partial(".", "你")]
    two = Segment("Now.", "English", 1.0, 2.0)
    assert cursor.take(two) == [two]
    assert cursor.take(Partial("你", "好")) == [Partial("你", "好")]
    three = Segment("你好。", "Chinese", 2.0, 3.0)
    assert cursor.take(three) == [Partial("好。", ""), three]
    silence = Segment("", None, 3.0, 4.0)
    assert cursor.take(silence) == [silence]
    assert cursor.take(Final("Turn on. Now.你好。", "English")) == [Final("Turn on. Now.你好。", "English")]
    assert cursor.retracted == 0


def test_a_replay_may_cut_elsewhere() -> None:
    """What was emitted of one segment is then said in two, or in one that is longer."""
    cursor = Cursor()
    cursor.take(Partial("a b c", ""))
    cursor.restart()
    assert texts(cursor.take(Segment("a b", None, 0.0, 1.0))) == []
    assert cursor.take(Partial("", "c")) == []
    assert cursor.take(Partial("c", "")) == [Partial("", "")]
    cursor.restart()
    assert texts(cursor.take(Segment("c d e", None, 1.0, 2.0))) == [" d e"]
    assert cursor.take(Final("c d e f", None)) == [Partial(" f", ""), Final("a b c d e f", None)]
    assert cursor.retracted == 0


def test_what_no_segment_says_again_is_retracted() -> None:
    cursor = Cursor()
    cursor.take(Segment("a", None, 0.0, 1.0))
    cursor.take(Partial("b", ""))
    assert cursor.take(Segment("", None, 1.0, 2.0)) == [Segment("", None, 1.0, 2.0)]
    assert cursor.take(Final("a", None)) == [Final("a", None)]
    assert cursor.retracted == len(" b")
    turncoat = Cursor()
    turncoat.take(Segment("Turn on", None, 0.0, 1.0))
    assert turncoat.take(Final("Turn off", None)) == [Final("Turn off", None)]
    assert turncoat.retracted == 1


SPEECH = st.text("ab你 .", max_size=6)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(data=st.data(), segments=st.lists(SPEECH, max_size=5), lies=st.sets(st.integers(0, 4), max_size=2))
def test_any_stream(data: st.DataObject, segments: list[str], lies: set[int]) -> None:
    """Whatever is said, in whatever parts, by however many processes: the deltas are the text of the final. Where a
    segment is not what was said of it, they end before it does, and what is wrong is counted."""
    cursor, seen, past, lied = Cursor(), "", 0, ""
    for number, text in enumerate(segments):
        for life in range(data.draw(st.integers(1, 3))):
            if life:
                cursor.restart()
                past = number
            said, expected = 0, f"x{text}" if number in lies else text
            for end in sorted(data.draw(st.lists(st.integers(0, len(expected)), max_size=3))):
                new = "".join(texts(cursor.take(Partial(expected[said:end], "…"))))
                assert not (new and lied), "a delta after one that was wrong"
                seen, said = seen + new, end
        emitted = "".join(texts(cursor.take(Segment(text, None, number, number + 1))))
        assert not (emitted and lied)
        seen += emitted
        whole = join(segments[: number + 1])
        if not seen.startswith(whole):
            lied = lied or seen
    final = join(segments)
    *rest, last = cursor.take(Final(join(segments[past:]), None))
    assert last == Final(final, None)
    seen += "".join(texts(rest))
    if cursor.retracted:
        assert lies
        right = len(seen) - cursor.retracted
        assert seen[:right] == final[:right]
        assert seen[right : right + 1] != final[right : right + 1]
    else:
        assert seen == final


async def test_bounds() -> None:
    """Audio waits for the model; results that nobody takes end the session."""
    session = new()
    await session.feed(pcm(MAX_UNCONFIRMED_SECONDS + 1))
    more = asyncio.create_task(session.feed(b"1234"))
    await asyncio.sleep(0.2)
    assert not more.done(), "audio is taken without end"
    taken(session)
    session.deliver(Segment("x", None, 0.0, 20.0))
    await more
    for _ in range(2000):
        session.deliver(Partial("x", ""))
    with pytest.raises(TimedOut):
        await session.final()
    session.close()


@pytest.mark.parametrize(
    ("live", "others", "seconds"),
    [
        (True, 0, MAX_UNCONFIRMED_SECONDS),
        (False, 0, MAX_UNCONFIRMED_FILE_SECONDS),
        (True, MAX_RETAINED_BYTES + 1, MAX_PIECE_SECONDS),
        (True, MAX_RETAINED_BYTES // 2 + 1, MAX_UNCONFIRMED_SECONDS),
        (False, MAX_RETAINED_BYTES // 2 + 1, MAX_PIECE_SECONDS),
    ],
)
async def test_how_far_audio_may_be_ahead(live: bool, others: int, seconds: float) -> None:
    """Of a file further, but less when others need the memory; a piece may always be, or nothing would ever get on."""
    options = SessionOptions(FORM, live=live)
    session = Session(1, options, "prefer", lambda: None, lambda _: None, lambda: others)
    await session.feed(pcm(seconds))
    await asyncio.wait_for(session.feed(pcm(0.1)), 5)
    more = asyncio.create_task(session.feed(b"1234"))
    await asyncio.sleep(0.1)
    assert not more.done()
    session.fail(TimedOut("enough"))
    with pytest.raises(TimedOut):
        await more
    session.close()


async def test_a_language_that_the_model_does_not_know_is_detected() -> None:
    for language, expected in (("French", None), ("German", "German")):
        session = new(language)
        await session.feed(b"1234")
        start, _, _ = taken(session)
        assert start is not None
        assert start.language == expected
        session.close()


@pytest.mark.parametrize(
    ("language", "hint", "expected"),
    [
        (None, "prefer", "prefer"),
        (None, "force", "prefer"),
        (None, "ignore", "ignore"),
        ("German", "force", "force"),
        ("German", "ignore", "ignore"),
    ],
)
def test_the_language_of_later_pieces(language: str | None, hint: str, expected: str) -> None:
    """One that was only heard is never forced, and with `ignore` every piece is detected."""
    start = SessionStart(16_000, 2, 1, language, hint, "", "English")  # type: ignore[arg-type]
    stream = Stream(1, start, lambda ids: "", Pace(), lambda: lambda frame: 0.0)
    assert stream.hint == expected
