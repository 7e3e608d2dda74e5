"""What an operator sees: the line of the log, /metrics, /health, /ready, the titles of the processes."""

import asyncio
import io
import os
import re
import wave
from pathlib import Path

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from wyoming.audio import AudioChunk

from wyoming_qwen_asr.engine.record import Record
from wyoming_qwen_asr.events import Final, Partial, Segment
from wyoming_qwen_asr.metrics import Metrics

from .conftest import SECONDS, Recording, Server, StartServer, metric, serving, transcribe

ROOT = Path(__file__).parent.parent

LINE = re.compile(r"utterance (?P<pairs>id=\d+ .*)")


def line(text: str) -> dict[str, str]:
    """The pairs of a line of the log."""
    found = LINE.search(text)
    assert found, text
    return dict(pair.split("=") for pair in found["pairs"].split())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_record_of_everything(clock: Clock) -> None:
    """Loaded for 2 s, waited 0.5 s after its end, computed for 1 s in all, replayed once, final 3.5 s after its end."""
    record = Record(7, "wyoming", clock)
    record.loading(True)
    record.heard(1.0)
    clock.now += 2
    record.loading(False)
    record.heard(3.0)
    record.ended()
    clock.now += 0.5
    record.working(True)
    clock.now += 0.75
    record.replayed()
    clock.now += 2
    record.loading(False)
    record.working(True)
    clock.now += 0.125
    record.emitted(Partial("Turn on", ""))
    record.working(True)
    record.emitted(Partial(" the light", ""))
    record.segment(Segment("Turn on the light", "English", 0.0, 2.0, 3, 20, 19, 1, 13))
    record.segment(Segment("", None, 2.0, 4.0, 2, 5, 5, 0, 7))
    clock.now += 0.125
    record.finished(4)
    clock.now += 10
    assert str(record) == (
        "utterance id=7 client=wyoming audio=4.000 queue=0.500 load=4.000 first_partial=5.375 final=3.500 rtf=0.250 "
        "steps=5 acceptance=0.96 windows=1 rows=20 replays=1 retracted=4 outcome=final"
    )


def test_a_record_of_nothing(clock: Clock) -> None:
    assert str(Record(1, "", clock)) == (
        "utterance id=1 client=- audio=0.000 queue=- load=0.000 first_partial=- final=- rtf=- "
        "steps=0 acceptance=- windows=0 rows=0 replays=0 retracted=0 outcome=cancelled"
    )


def test_the_first_partial_has_words(clock: Clock) -> None:
    """Whether they will stay or not."""
    for words in (Partial("a", ""), Partial("", "a")):
        record = Record(1, "wyoming", clock)
        record.heard(1.0)
        clock.now += 1
        record.emitted(Partial("", ""))
        record.emitted(Final("", None))
        clock.now += 1
        record.emitted(words)
        clock.now += 1
        record.emitted(words)
        assert record.first_partial_latency == 2


def test_a_record_of_a_stream(clock: Clock) -> None:
    """Computed while it is heard: it waits from its first audio on."""
    record = Record(1, "wyoming", clock)
    record.heard(0.5)
    clock.now += 0.25
    record.working(True)
    clock.now += 0.25
    record.working(False)
    record.heard(0.5)
    record.ended()
    record.failed("timeout")
    shown = line(str(record))
    assert (shown["queue"], shown["rtf"], shown["outcome"], shown["retracted"]) == ("0.250", "0.250", "timeout", "0")


def test_records_are_counted(clock: Clock) -> None:
    metrics = Metrics()
    for outcome in ("final", "final", "busy"):
        record = Record(1, "http", clock)
        record.heard(2.0)
        record.ended()
        record.segment(Segment("a", None, 0.0, 1.0, steps=2, drafted=7, accepted=5))
        record.finished(3) if outcome == "final" else record.failed(outcome)
        record.count(metrics)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert samples["qwen_asr_utterances_total", "final"] == 2
    assert samples["qwen_asr_utterances_total", "busy"] == 1
    assert samples["qwen_asr_audio_seconds_total",] == 4
    assert samples["qwen_asr_final_seconds_count",] == 2
    assert samples["qwen_asr_steps_total",] == 6
    assert samples["qwen_asr_drafted_tokens_total",] == 21
    assert samples["qwen_asr_accepted_tokens_total",] == 15
    assert samples["qwen_asr_retractions_total",] == 2
    assert samples["qwen_asr_retracted_characters_total",] == 6


async def test_an_utterance_leaves_a_line_and_counts(start_server: StartServer, clear: list[Recording]) -> None:
    server = await start_server()
    await transcribe(server, clear[0].pcm)
    async with aiohttp.ClientSession() as http:
        for form in ({"file": clear[1].path.open("rb")}, {"file": io.BytesIO(b"no audio")}):
            await http.post(f"{server.http}/v1/audio/transcriptions", data=form)
    await server.logged("utterance id=3")
    first, second, third = (line(each) for each in server.log.splitlines() if "utterance id=" in each)
    assert (first["id"], first["client"], first["outcome"]) == ("1", "wyoming", "final")
    assert float(first["audio"]) == pytest.approx(len(clear[0].pcm) / 32000, abs=0.001)
    assert float(first["load"]) > 0
    assert 0 < float(first["rtf"]) < 60
    assert float(first["queue"]) < float(first["final"])
    assert (second["client"], second["outcome"], second["load"], second["replays"]) == ("http", "final", "0.000", "0")
    assert (third["client"], third["outcome"]) == ("http", "cancelled")
    for name, labels, value in (
        ("qwen_asr_utterances_total", {"outcome": "final"}, 2),
        ("qwen_asr_utterances_total", {"outcome": "cancelled"}, 1),
        ("qwen_asr_refusals_total", {"code": "bad-audio"}, 1),
        ("qwen_asr_final_seconds_count", {}, 2),
        ("qwen_asr_queue_seconds_count", {}, 2),
        ("qwen_asr_loads_total", {}, 1),
        ("qwen_asr_load_seconds_count", {}, 1),
        ("qwen_asr_sessions", {}, 0),
        ("qwen_asr_wyoming_connections", {}, 0),
        ("qwen_asr_http_connections", {}, 1),
        ("qwen_asr_state", {"state": "ready"}, 1),
        ("qwen_asr_state", {}, 1),
    ):
        assert await metric(server, name, **labels) == value, name
    heard = len(clear[0].pcm + clear[1].pcm) / 32000
    assert await metric(server, "qwen_asr_audio_seconds_total") == pytest.approx(heard, abs=0.01)
    gateway, model = await metric(server, "process_resident_memory_bytes"), server.model_process()
    assert 20e6 < gateway < await metric(server, "qwen_asr_model_process_resident_memory_bytes")
    model.kill()
    await server.logged("died")
    assert await metric(server, "qwen_asr_faults_total") == 1
    assert await metric(server, "qwen_asr_model_process_resident_memory_bytes") == 0


async def test_processes_have_titles(start_server: StartServer, clear: list[Recording]) -> None:
    server = await start_server("--no-http")
    await transcribe(server, clear[0].pcm)
    assert title(psutil.Process(server.process.pid)) == "wyoming-qwen-asr"
    assert title(server.model_process()) == "wyoming-qwen-asr: model demo"


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()


async def ready(server: Server) -> tuple[int, dict[str, object], str | None]:
    """Status, answer and Retry-After of /ready."""
    async with aiohttp.ClientSession() as http, http.get(f"{server.http}/ready") as response:
        return response.status, await response.json(), response.headers.get("Retry-After")


async def test_ready_while_the_model_comes_and_goes(start_server: StartServer, clear: list[Recording]) -> None:
    """A model that is absent or loads is no reason to send nobody."""
    server = await start_server("--idle-seconds=1")
    await server.logged("Wyoming at")
    async with asyncio.timeout(30):
        while (found := await ready(server))[1]["state"] == "checking":
            assert found[0] == 503
            await asyncio.sleep(0.05)
    assert found == (200, {"ready": True, "state": "absent"}, None)
    async with server.client() as client:
        await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
        seen: set[object] = set()
        async with asyncio.timeout(30):
            while not {"loading", "ready"} <= seen:
                status, answer, _ = await ready(server)
                assert status == 200
                seen.add(answer["state"])
    async with asyncio.timeout(30):
        while (await ready(server))[1]["state"] != "absent":
            await asyncio.sleep(0.05)


async def test_ready_while_stopping(clear: list[Recording]) -> None:
    """Until the last utterance is answered: no new work, and /ready says so."""
    async with serving() as server:
        pcm = b"".join(recording.pcm for recording in clear) * 8
        async with aiohttp.ClientSession() as http:
            form = {"file": _wav(pcm)}
            request = asyncio.ensure_future(http.post(f"{server.http}/v1/audio/transcriptions", data=form))
            await server.logged("Model ready")
            server.process.terminate()
            await server.logged("Stopping")
            status, answer, retry = await ready(server)
            assert (status, answer["state"], retry) == (503, "draining", "5")
            url = f"{server.http}/v1/audio/transcriptions"
            async with http.post(url, data={"file": clear[0].path.open("rb")}) as refused:
                assert refused.status == 503
                assert refused.headers["Retry-After"]
                assert (await refused.json())["error"]["code"] == "stopping"
            assert (await request).status == 200
        await asyncio.wait_for(server.process.wait(), SECONDS)


def _wav(pcm: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(pcm)
    file.seek(0)
    return file


async def test_ready_while_downloading(start_server: StartServer, tmp_path: Path) -> None:
    """And while that fails, as here, where nobody answers: alive, but an utterance would get an error."""
    environ = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    server = await start_server("--model=org/model", f"--data-dir={tmp_path}", environ=environ)
    await server.logged("trying again")
    status, answer, retry = await ready(server)
    assert (status, answer["state"], retry) == (503, "downloading", "5")
    assert answer["reason"]


async def test_ready_when_the_model_keeps_failing(clear: list[Recording], tmp_path: Path) -> None:
    """Refused at once, over both protocols, with the time after which another try makes sense; /health says why."""
    (tmp_path / "load").write_text("exit3")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_MODEL": str(tmp_path)}
    async with serving(environ=environ, module="tests.fake_server") as server:
        url = f"{server.http}/v1/audio/transcriptions"
        async with aiohttp.ClientSession() as http:
            for _ in range(2):
                async with http.post(url, data={"file": clear[0].path.open("rb")}) as refused:
                    assert refused.status == 503
                    assert int(refused.headers["Retry-After"]) >= 1
                    assert (await refused.json())["error"]["code"] == "model-unavailable"
            status, answer, _ = await ready(server)
            assert (status, answer["state"]) == (503, "broken")
            async with http.get(f"{server.http}/health") as health:
                assert health.status == 200
                assert "cannot load" in (await health.json())["last_fault"]
        async with server.client() as client:
            await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
            event = await asyncio.wait_for(client.read_event(), SECONDS)
            assert event is not None
            assert event.data["code"] == "model-unavailable"
        assert await metric(server, "qwen_asr_refusals_total", code="model-unavailable") == 3
