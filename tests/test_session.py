"""What a session gives to model process after model process, and what its client sees of that. No processes here."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wyoming_qwen_asr.audio import AudioFormat
from wyoming_qwen_asr.engine.session import Session, SessionOptions
from wyoming_qwen_asr.errors import AsrError, BadRequest, Busy, TimedOut
from wyoming_qwen_asr.events import Final, Partial, Segment, SessionAudio, SessionEnd, SessionError, SessionStart
from wyoming_qwen_asr.limits import MAX_RESTARTS, MAX_RETAINED_BYTES
from wyoming_qwen_asr.model.resample import Resampler
from wyoming_qwen_asr.model.scheduler import _hint, _Stream

FORM = AudioFormat(rate=48_000, width=2, channels=2)


def new(language: str | None = None, overdue: Callable[[Session], None] = lambda _: None) -> Session:
    options = SessionOptions(FORM, language, "names")
    return Session(1, options, "prefer", lambda: None, overdue, lambda _: None)


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
    session.restart(blame=True)
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
    deaths=st.sets(st.integers(0, 8), max_size=MAX_RESTARTS),
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
                session.restart(blame=True)
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


async def test_one_death_too_many() -> None:
    session = new()
    for _ in range(MAX_RESTARTS + 5):
        session.restart(blame=False)
    for _ in range(MAX_RESTARTS):
        session.restart(blame=True)
    assert taken(session)[0]
    session.restart(blame=True)
    with pytest.raises(AsrError):
        await session.final()
    assert taken(session) == (None, b"", False)
    session.close()


async def test_bounds() -> None:
    """Audio that nobody takes, results that nobody takes, and time."""
    session = new()
    chunk = bytes(MAX_RETAINED_BYTES // 8)
    for _ in range(8):
        await session.feed(chunk)
    with pytest.raises(Busy):
        await session.feed(b"1234")
    for _ in range(2000):
        session.deliver(Partial("x", ""))
    with pytest.raises(TimedOut):
        await session.final()
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
    assert _hint(_Stream(start, Resampler(AudioFormat()), language="English")) == expected
