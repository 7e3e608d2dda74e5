"""Model processes that crash, hang, lie and run out of memory, under the real gateway: `tests.fake_model` fails on
command, and its texts show every byte that is lost or doubled. The real model process is killed in test_engine.py."""

import asyncio
import os
import re
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import psutil
import pytest
from wyoming.asr import Transcribe
from wyoming.error import Error

from wyoming_qwen_asr.audio import AudioFormat
from wyoming_qwen_asr.engine.engine import Engine
from wyoming_qwen_asr.engine.faults import Breaker, Cause, Patience, cause_of, oom_kills
from wyoming_qwen_asr.engine.session import SessionOptions
from wyoming_qwen_asr.errors import ModelUnavailable, Stopping
from wyoming_qwen_asr.metrics import Metrics
from wyoming_qwen_asr.process import Child
from wyoming_qwen_asr.settings import load

from .conftest import SECONDS, Recording, Server, answer_of, send_audio, serving, wait_until
from .fake_model import text_of
from .fake_server import PATIENCE

MODULE = "tests.fake_model"
ROOT = Path(__file__).parent.parent
AT_ONCE = 12
"""Utterances; fewer than there may be sessions."""


HANG_SECONDS = PATIENCE.hang_after(3.0) + PATIENCE.dump + 5.0
"""Until a hang is noticed, and a new process has answered; less than a load may take."""


@dataclass
class Faulty:
    """A server with the fake model."""

    server: Server
    folder: Path

    def once(self, word: str, place: str = "end") -> str:
        """A context that does this in one model process only."""
        return f"{word} {place} {self.folder / uuid.uuid4().hex}"

    def at_load(self, word: str | None) -> None:
        """What model processes do before they are loaded."""
        file = self.folder / "load"
        if word:
            file.write_text(word)
        else:
            file.unlink()

    def model_process(self) -> psutil.Process:
        (process,) = self.server.children(MODULE)
        return process

    @property
    def starts(self) -> int:
        return self.server.log.count(" started\n")

    async def state(self) -> str:
        async with aiohttp.ClientSession() as http, http.get(f"{self.server.http}/health") as response:
            return str((await response.json())["state"])


Say = Callable[[Faulty, Recording, str], Coroutine[None, None, str]]
"""An utterance with a context: its text, or the code of the error."""


async def over_wyoming(faulty: Faulty, recording: Recording, context: str = "") -> str:
    async with faulty.server.client() as client, asyncio.timeout(SECONDS):
        request = Transcribe(context={"text": context})
        with suppress(ConnectionError):  # an error may be waiting for us
            await send_audio(client, recording.pcm, request=request.event())
        answer = await answer_of(client)
    return str(answer.code) if isinstance(answer, Error) else answer.text


async def over_http(faulty: Faulty, recording: Recording, context: str = "") -> str:
    form = aiohttp.FormData({"prompt": context})
    form.add_field("file", recording.path.read_bytes(), filename="speech.wav")
    url = f"{faulty.server.http}/v1/audio/transcriptions"
    async with aiohttp.ClientSession() as http, asyncio.timeout(SECONDS), http.post(url, data=form) as response:
        answer = await response.json()
        if response.status != 200:
            if response.status == 503:
                assert int(response.headers["Retry-After"]) > 0
            return str(answer["error"]["code"])
        return str(answer["text"])


fronts = pytest.mark.parametrize("say", [over_wyoming, over_http])


StartFaulty = Callable[..., Awaitable[Faulty]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartFaulty]:
    """Start a server with the fake model, for one test."""
    stack = []

    async def start(*flags: str) -> Faulty:
        context = serving(*flags, environ=environ(tmp_path), module="tests.fake_server")
        stack.append(context)
        return Faulty(await context.__aenter__(), tmp_path)

    yield start
    for context in reversed(stack):
        await context.__aexit__(None, None, None)


@pytest.fixture(scope="module")
async def faulty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Faulty]:
    """A server that tests share: each ends with an utterance that is heard, so that earlier faults are forgotten."""
    folder = tmp_path_factory.mktemp("faults")
    async with serving(environ=environ(folder), module="tests.fake_server") as server:
        yield Faulty(server, folder)


def environ(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_MODEL": str(folder)}


async def told(say: Say, recording: Recording) -> str:
    """What the fake model makes of a recording. A file is decoded, which may change its samples by one."""
    if say is over_wyoming:
        return text_of(recording.pcm)
    child = await Child.spawn("wyoming_qwen_asr.decode", str(recording.path))
    pcm = b"".join([event.payload or b"" async for event in child.events()])
    await child.stop()
    return text_of(pcm)


async def heard(faulty: Faulty, recording: Recording) -> bool:
    """Whether another client is served as if nothing had been."""
    return await over_wyoming(faulty, recording) == text_of(recording.pcm)


# --- killed in each state ------------------------------------------------------------------------------------------


@fronts
@pytest.mark.parametrize("place", ["start", "first", "second", "end", "result"])
async def test_killed_while_it_works(faulty: Faulty, clear: list[Recording], say: Say, place: str) -> None:
    """At the first word, at the first audio, in the middle, when all is said, and with half of the result written."""
    begun = len(faulty.server.log)
    replayed = faulty.server.log.count("replays=1")
    assert await say(faulty, clear[0], faulty.once("kill", place)) == await told(say, clear[0])
    assert faulty.server.log[begun:].count("died: killed (signal 9)") == 1
    await faulty.server.logged("replays=1", replayed + 1)  # written once the client has its answer


@fronts
async def test_killed_while_it_loads_and_while_it_idles(start: StartFaulty, clear: list[Recording], say: Say) -> None:
    faulty = await start()
    answer = asyncio.create_task(say(faulty, clear[0], ""))
    await faulty.server.logged("Model process .* started")
    await asyncio.to_thread(wait_until, lambda: bool(faulty.server.children(MODULE)))
    faulty.model_process().kill()
    assert await answer == await told(say, clear[0])
    faulty.model_process().kill()
    await faulty.server.logged("died: killed", 2)
    assert await say(faulty, clear[1], "") == await told(say, clear[1])
    assert "replays=1" not in faulty.server.log  # none of them had been given anything


@fronts
async def test_killed_while_the_server_stops(start: StartFaulty, clear: list[Recording], say: Say) -> None:
    """What is in flight is finished by another process; new work is refused meanwhile."""
    faulty = await start()
    answer = asyncio.create_task(say(faulty, clear[0], "slow"))
    await faulty.server.logged("Model ready")
    await asyncio.sleep(0.5)
    faulty.server.process.terminate()
    await faulty.server.logged("Stopping")
    faulty.model_process().kill()
    assert await answer == await told(say, clear[0])
    async with asyncio.timeout(SECONDS):
        assert await faulty.server.process.wait() == 0


async def test_no_new_sessions_while_the_server_stops() -> None:
    engine = Engine(load([], {}), Metrics())
    engine.drain()
    assert engine.state == "draining"
    with pytest.raises(Stopping):
        engine.session(SessionOptions(AudioFormat()))


# --- faults of its own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "place", "cause"),
    [
        ("crash", "end", Cause.CRASH),
        ("crash", "first", Cause.CRASH),
        ("abort", "end", Cause.CRASH),
        ("exit", "end", Cause.EXIT),
        ("hang-py", "end", Cause.HANG),
        ("hang-gil", "end", Cause.HANG),
        ("stop", "end", Cause.HANG),
        ("stop", "second", Cause.HANG),
        ("garbage", "end", Cause.NONSENSE),
        ("garbage", "first", Cause.NONSENSE),
        ("half-event", "end", Cause.NONSENSE),
    ],
)
async def test_a_fault_costs_no_transcript(
    faulty: Faulty, clear: list[Recording], word: str, place: str, cause: Cause
) -> None:
    """Neither to whose audio it was, nor to those beside."""
    begun = len(faulty.server.log)
    others = [asyncio.create_task(over_wyoming(faulty, recording)) for recording in clear[1:4]]
    async with asyncio.timeout(HANG_SECONDS):
        assert await over_wyoming(faulty, clear[0], faulty.once(word, place)) == text_of(clear[0].pcm)
    assert await asyncio.gather(*others) == [text_of(recording.pcm) for recording in clear[1:4]]
    log = faulty.server.log[begun:]
    assert re.findall(r"The model process died: (.+) \(", log) == [cause]
    if word.startswith("hang"):
        assert "most recent call first" in log, "where it hangs is not told"


async def test_a_process_that_is_stopped_before_it_hears_anything(faulty: Faulty, clear: list[Recording]) -> None:
    """It never says that it works: what counts is that all audio was sent."""
    assert await heard(faulty, clear[0])
    faulty.model_process().suspend()
    async with asyncio.timeout(HANG_SECONDS):
        assert await heard(faulty, clear[1])


async def test_slow_is_not_hanging(faulty: Faulty, clear: list[Recording]) -> None:
    """For longer than a hang may last, with signs of progress."""
    begun = len(faulty.server.log)
    plain = faulty.server.log.count("replays=0")
    assert await over_wyoming(faulty, clear[0], "slow") == text_of(clear[0].pcm)
    await faulty.server.logged("replays=0", plain + 1)
    assert "died" not in faulty.server.log[begun:]


async def test_who_only_slept_is_spared(start: StartFaulty, clear: list[Recording]) -> None:
    """A machine that was suspended wakes gateway and model process in any order."""
    faulty = await start()
    answer = asyncio.create_task(over_wyoming(faulty, clear[0], "slow"))
    await faulty.server.logged("Model ready")
    await asyncio.sleep(0.5)
    process = faulty.model_process()
    process.suspend()
    await faulty.server.logged("has said nothing")
    process.resume()
    assert await answer == text_of(clear[0].pcm)
    assert "died" not in faulty.server.log


async def test_what_libraries_print_is_no_event(faulty: Faulty, clear: list[Recording]) -> None:
    begun = len(faulty.server.log)
    assert await over_wyoming(faulty, clear[0], "stdout-noise") == text_of(clear[0].pcm)
    await faulty.server.logged("noise\nmore of it\n")
    assert "died" not in faulty.server.log[begun:]


@fronts
@pytest.mark.parametrize("word", ["crash", "stop"])
async def test_poisoned_audio_among_good(faulty: Faulty, clear: list[Recording], say: Say, word: str) -> None:
    """Twenty are answered, one gets an error: after two model processes, the second for it alone."""
    starts, places = faulty.starts, asyncio.Semaphore(AT_ONCE)

    async def answer(recording: Recording, context: str) -> str:
        async with places:
            return await say(faulty, recording, context)

    good = [clear[i % len(clear)] for i in range(20)]
    answers = [asyncio.create_task(answer(recording, "")) for recording in good[:5]]
    poison = asyncio.create_task(answer(clear[0], word))
    answers += [asyncio.create_task(answer(recording, "")) for recording in good[5:]]
    texts = {recording.path: await told(say, recording) for recording in clear}
    assert await asyncio.gather(*answers) == [texts[recording.path] for recording in good]
    assert await poison == "model-failed"
    assert faulty.starts - starts <= 3
    assert await heard(faulty, clear[1])


@fronts
async def test_a_process_that_always_crashes(start: StartFaulty, clear: list[Recording], say: Say) -> None:
    """After a few tries new work is refused at once, for a while; then one is the trial; mended, it works by itself."""
    faulty = await start()
    faulty.at_load("crash")
    assert await say(faulty, clear[0], "") == "model-unavailable"
    starts = faulty.starts
    assert starts <= 4
    assert await faulty.state() == "broken"
    for _ in range(5):
        assert await say(faulty, clear[0], "") == "model-unavailable"
    assert faulty.starts - starts <= 1  # five errors, one trial at most
    faulty.at_load(None)
    await _healed(faulty, clear[0], say)


@fronts
async def test_a_model_that_cannot_be_loaded(start: StartFaulty, clear: list[Recording], say: Say) -> None:
    """The reason is told, and it is not tried in circles."""
    faulty = await start()
    faulty.at_load("exit3")
    for _ in range(3):
        assert await say(faulty, clear[0], "") == "model-unavailable"
    assert faulty.starts == 1
    assert await faulty.state() == "broken"
    assert "the weights are gone" in faulty.server.log
    faulty.at_load(None)
    await _healed(faulty, clear[0], say)


async def _healed(faulty: Faulty, recording: Recording, say: Say) -> None:
    async with asyncio.timeout(SECONDS):
        while (answer := await say(faulty, recording, "")) == "model-unavailable":
            await asyncio.sleep(0.3)
    assert answer == await told(say, recording)
    assert await faulty.state() in ("ready", "busy")


async def test_a_load_that_hangs(start: StartFaulty, clear: list[Recording]) -> None:
    faulty = await start("--no-http")
    faulty.at_load("hang-py")
    answer = asyncio.create_task(over_wyoming(faulty, clear[0]))
    await faulty.server.logged("At load: hang-py")
    faulty.at_load(None)
    assert await answer == text_of(clear[0].pcm)
    assert "has not loaded in time" in faulty.server.log


async def test_out_of_memory(start: StartFaulty, clear: list[Recording]) -> None:
    """The kernel's own choice is the model process, and it is called what it is."""
    root = Path("/sys/fs/cgroup")
    group = (root if (root / "cgroup.procs").exists() else root / "memory") / f"test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        limit = group / ("memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes")
        limit.write_text(str(200 << 20))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        pytest.skip("no control group of ours to be had")
    faulty = await start("--no-http")
    try:
        (group / "cgroup.procs").write_text(str(faulty.server.process.pid))
        assert await over_wyoming(faulty, clear[0], faulty.once("oom")) == text_of(clear[0].pcm)
        assert "died: out of memory (signal 9)" in faulty.server.log
        assert await over_wyoming(faulty, clear[0], "oom") == "model-failed"
        assert await heard(faulty, clear[1])
    finally:
        await faulty.server.stop()
        group.rmdir()


@pytest.mark.parametrize("state", ["loading", "ready", "hang-py", "hang-gil", "stop"])
async def test_no_orphan(start: StartFaulty, clear: list[Recording], state: str) -> None:
    """A gateway that is killed takes the model process with it, whatever that is doing."""
    faulty = await start("--no-http")
    if state == "loading":
        faulty.at_load("hang-py")
    context = faulty.once(state if state in ("hang-py", "hang-gil", "stop") else "slow")
    answer = asyncio.create_task(over_wyoming(faulty, clear[0], context))
    if state == "loading":
        await faulty.server.logged("At load: hang-py")
    elif state == "ready":
        await faulty.server.logged("Model ready")
    else:
        await asyncio.to_thread(wait_until, Path(context.split()[2]).exists)
    process = faulty.model_process()
    await faulty.server.kill()
    try:
        await asyncio.to_thread(process.wait, 5)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with pytest.raises((ConnectionError, AssertionError, asyncio.IncompleteReadError)):
        await answer


async def test_a_gateway_that_is_gone_before_its_child_begins(tmp_path: Path) -> None:
    """No signal comes any more: the child sees by its stdin that nobody is there."""
    (tmp_path / "load").write_text("hang-py")
    ours, theirs = os.pipe()
    os.close(theirs)
    command = (sys.executable, "-m", MODULE)
    process = await asyncio.create_subprocess_exec(*command, stdin=ours, env=environ(tmp_path))
    os.close(ours)
    try:
        async with asyncio.timeout(SECONDS / 2):
            assert await process.wait() == 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_preload(start: StartFaulty, clear: list[Recording]) -> None:
    """Loaded before anybody speaks; evicted when idle, and then loaded for speech only."""
    faulty = await start("--preload", "--idle-seconds=1")
    await faulty.server.logged("Model ready")
    assert await faulty.state() == "ready"
    await faulty.server.logged("ending the model process")
    async with asyncio.timeout(SECONDS):
        while await faulty.state() != "absent":
            await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    assert faulty.starts == 1
    assert await heard(faulty, clear[0])


# --- what is pure --------------------------------------------------------------------------------------------------


def test_causes() -> None:
    expected = {
        **{(-number, False): Cause.CRASH for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)},
        (-signal.SIGKILL, False): Cause.KILLED,
        (-signal.SIGKILL, True): Cause.MEMORY,
        (-signal.SIGTERM, True): Cause.KILLED,
        (-signal.SIGSEGV, True): Cause.CRASH,
        (3, False): Cause.CANNOT_LOAD,
        (0, False): Cause.EXIT,
        (1, True): Cause.EXIT,
    }
    assert {given: cause_of(given[0], out_of_memory=given[1]) for given in expected} == expected
    assert [cause for cause in Cause if cause.strikes] == [Cause.MEMORY, Cause.CRASH, Cause.HANG]


@pytest.mark.parametrize(
    ("own", "place", "text", "kills"),
    [
        ("0::/a/b\n", "a/b/memory.events", "low 0\noom 7\noom_kill 3\n", 3),
        ("0::/host/path\n", "memory.events", "oom_kill 2\n", 2),
        ("3:memory:/a\n0::/\n", "memory/a/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", 5),
        ("3:memory:/host\n", "memory/memory.oom_control", "oom_kill 1\n", 1),
        ("0::/\n", "elsewhere", "", 0),
        ("0::/\n", "memory.events", "nonsense\n\n", 0),
    ],
)
def test_kills_for_memory_are_counted(tmp_path: Path, own: str, place: str, text: str, kills: int) -> None:
    (tmp_path / "own").write_text(own)
    (tmp_path / "root" / place).parent.mkdir(parents=True)
    (tmp_path / "root" / place).write_text(text)
    assert oom_kills(tmp_path / "root", tmp_path / "own") == kills
    assert oom_kills(tmp_path, tmp_path / "nothing") == 0


def test_back_off_and_breaker() -> None:
    """0, 1, 2, 4 … 60 s with up to a fifth more; three faults in five minutes open it, a final closes it."""
    patience = replace(Patience(), faults=100, window=1e9)
    for jitter in (0.0, 1.0):
        breaker = Breaker(patience, lambda jitter=jitter: jitter)  # type: ignore[misc]
        waits = []
        for _ in range(9):
            breaker.fault(10.0, "x")
            waits.append(breaker.wait(10.0))
        assert waits == pytest.approx([each * (1 + 0.2 * jitter) for each in (0, 1, 2, 4, 8, 16, 32, 60, 60)])
        breaker.success()
        assert breaker.wait(10.0) == 0

    breaker = Breaker(Patience(), lambda: 0.0)
    for now in (0.0, 200.0, 301.0, 602.0):  # never three within 300 s
        breaker.fault(now, "x")
        assert not breaker.open
    breaker.fault(603.0, "native crash")
    breaker.fault(604.0, "native crash")
    assert breaker.open
    refusal = breaker.refusal(614.0)
    assert isinstance(refusal, ModelUnavailable)
    assert refusal.retry_after == 50
    assert "native crash" in str(refusal)
    assert breaker.refusal(664.0) is None  # the trial
    assert breaker.refusal(664.0) is not None  # and only one
    assert breaker.refusal(724.0) is None
    breaker.fault(730.0, "hang")  # long after the others: the trial failed
    assert breaker.open
    breaker.success()
    assert not breaker.open
    assert breaker.refusal(731.0) is None
