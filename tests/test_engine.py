"""The model process comes and goes; nobody who speaks notices. Real processes, really killed."""

import asyncio
import re
import shutil
import signal
import zipfile
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStop
from wyoming.error import Error

from .conftest import (
    DEMO,
    SECONDS,
    Recording,
    StartServer,
    open_sessions,
    send_audio,
    transcribe,
    transcript_of,
)

MODULE = "wyoming_qwen_asr.model"


async def test_loaded_on_the_first_audio_and_evicted_when_idle(
    start_server: StartServer, clear: list[Recording]
) -> None:
    """Nothing before somebody speaks; nothing of it left when nobody has for a while; and again."""
    server = await start_server("--idle-seconds=1", "--no-http")
    for round_ in (1, 2):
        assert not server.children(MODULE)
        assert (await transcribe(server, clear[0].pcm)).text == clear[0].text
        process = server.model_process()
        await server.logged("ending the model process", round_)
        await asyncio.to_thread(process.wait, 10)
    assert (await transcribe(server, clear[1].pcm)).text == clear[1].text


async def test_an_open_session_is_not_idle(start_server: StartServer, clear: list[Recording]) -> None:
    """Eviction counts open sessions, not the time since the last use."""
    server = await start_server("--idle-seconds=1", "--no-http")
    async with server.client() as client:
        await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm[:32000]).event())
        await server.logged("Model ready")
        await asyncio.sleep(2.5)
        await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm[32000:]).event())
        await client.write_event(AudioStop().event())
        assert (await transcript_of(client)).text == clear[0].text
    assert "ending the model process" not in server.log


async def test_a_dead_model_process_costs_no_transcript(start_server: StartServer, clear: list[Recording]) -> None:
    """Killed while it loads, while audio arrives, and between utterances."""
    server = await start_server("--no-http")
    async with server.client() as client:
        await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm[:32000]).event())
        await server.logged("Model process .* started")
        server.model_process().kill()
        await server.logged("died")
        await server.logged("Model ready")
        server.model_process().kill()
        await server.logged("died", 2)
        await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm[32000:]).event())
        await client.write_event(AudioStop().event())
        assert (await transcript_of(client)).text == clear[0].text
    server.model_process().kill()
    await server.logged("died", 3)
    assert (await transcribe(server, clear[1].pcm)).text == clear[1].text


async def test_eight_sessions_survive_together(start_server: StartServer, clear: list[Recording]) -> None:
    server = await start_server("--no-http")
    await transcribe(server, clear[0].pcm)
    process = server.model_process()
    process.send_signal(signal.SIGSTOP)  # so that all of them are in its hands when it dies
    answers = [asyncio.create_task(transcribe(server, recording.pcm)) for recording in clear]
    await asyncio.sleep(0.5)
    assert not any(answer.done() for answer in answers)
    process.kill()
    texts = [answer.text for answer in await asyncio.gather(*answers)]
    assert texts == [recording.text for recording in clear]


async def test_kills_from_outside_are_nobodys_fault(start_server: StartServer, clear: list[Recording]) -> None:
    """However often a process is killed that has not heard anything yet: nobody is refused, nobody waits longer."""
    server = await start_server("--no-http")
    async with server.client() as client:
        await send_audio(client, clear[0].pcm)
        for death in range(1, 8):
            await server.logged("Model process .* started", death)
            server.model_process().kill()
            await server.logged("died: killed", death)
        assert (await transcript_of(client)).text == clear[0].text
    assert "starts in" not in server.log


async def test_long_audio_is_recognised_while_it_comes(start_server: StartServer, clear: list[Recording]) -> None:
    """Cut in the pauses, so the text is that of the parts; the audio of finished parts is let go; and a new model
    process goes on after the last part."""
    server = await start_server("--no-http", "--log-level=debug")
    pause = (np.random.default_rng(0).normal(size=24_000) * 10).astype("<i2").tobytes()
    spoken = [clear[i] for i in (0, 1, 2, 4)]
    part = b"".join(recording.pcm + bytes(32_000) for recording in spoken) + pause
    async with server.client() as client:
        for _ in range(4):
            await client.write_event(AudioChunk(16000, 2, 1, part).event())
        await server.logged("Model ready")
        await server.logged("segment")
        server.model_process().kill()
        await server.logged("Model ready", 2)
        await client.write_event(AudioStop().event())
        text = (await transcript_of(client)).text
    assert text.count("intercom") == 4


async def test_a_client_that_leaves_costs_nothing(start_server: StartServer, clear: list[Recording]) -> None:
    """Its session is closed, whatever it was doing."""
    server = await start_server()
    for end in (False, True):
        async with server.client() as client:
            await client.write_event(Transcribe().event())
            await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
            if end:
                await client.write_event(AudioStop().event())
    assert (await transcribe(server, clear[1].pcm)).text == clear[1].text
    async with asyncio.timeout(SECONDS):
        while await open_sessions(server):
            await asyncio.sleep(0.1)


async def test_sigterm_finishes_what_is_in_flight(start_server: StartServer, clear: list[Recording]) -> None:
    """Utterances that are being recognised, and one still being spoken; then exit 0, and nothing is left."""
    server = await start_server()
    async with server.client() as speaking:
        await speaking.write_event(AudioChunk(16000, 2, 1, clear[0].pcm[:32000]).event())
        answers = [asyncio.create_task(transcribe(server, recording.pcm)) for recording in clear]
        await server.logged("Model process .* started")
        await asyncio.sleep(0.5)
        server.process.terminate()
        await server.logged("Stopping")
        await speaking.write_event(AudioChunk(16000, 2, 1, clear[0].pcm[32000:]).event())
        await speaking.write_event(AudioStop().event())
        assert (await transcript_of(speaking)).text == clear[0].text
        assert [a.text for a in await asyncio.gather(*answers)] == [r.text for r in clear]
    async with asyncio.timeout(SECONDS):
        assert await server.process.wait() == 0


async def test_sigterm_waits_for_nobody_who_is_silent(start_server: StartServer, clear: list[Recording]) -> None:
    """A connection that has had its transcript is closed at once."""
    server = await start_server("--no-http")
    async with server.client() as client:
        await send_audio(client, clear[0].pcm)
        await transcript_of(client)
        server.process.terminate()
        async with asyncio.timeout(10):
            assert await client.read_event() is None
            assert await server.process.wait() == 0


async def test_an_evicted_process_that_does_not_leave(start_server: StartServer, clear: list[Recording]) -> None:
    """It is killed, and the next utterance gets a new one."""
    server = await start_server("--idle-seconds=1", "--no-http")
    await transcribe(server, clear[0].pcm)
    server.model_process().send_signal(signal.SIGSTOP)
    await server.logged("ending the model process")
    assert (await transcribe(server, clear[1].pcm)).text == clear[1].text


async def test_audio_before_a_model_that_cannot_be_used(start_server: StartServer, tmp_path: Path) -> None:
    """The client that was first is told, not only the log."""
    server = await start_server(f"--model={tmp_path / 'none'}", "--no-http")
    server.expected_code = 3
    async with server.client() as client:
        await client.write_event(AudioChunk(16000, 2, 1, bytes(32000)).event())
        event = await asyncio.wait_for(client.read_event(), SECONDS)
        assert event is not None
        assert Error.from_event(event).code == "model-unavailable"
    async with asyncio.timeout(SECONDS):
        await server.process.wait()


async def test_no_process_to_be_had(start_server: StartServer, clear: list[Recording]) -> None:
    """Where the machine has no room for another process, the client is told, and the gateway lives."""
    server = await start_server("--no-http")
    await transcribe(server, clear[0].pcm)
    limits = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, (12, limits[1]))
    server.model_process().kill()
    await server.logged("died")
    async with server.client() as client:
        await send_audio(client, clear[0].pcm)
        event = await asyncio.wait_for(client.read_event(), SECONDS)
        assert event is not None
        assert Error.from_event(event).code == "busy"
    psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, limits)
    assert (await transcribe(server, clear[1].pcm)).text == clear[1].text


async def test_the_second_signal_ends_at_once(start_server: StartServer, clear: list[Recording]) -> None:
    server = await start_server("--no-http")
    async with server.client() as client:
        await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
        await server.logged("Model ready")
        process = server.model_process()
        server.process.terminate()
        await server.logged("Stopping")
        server.process.terminate()
        server.expected_code = 128 + signal.SIGTERM
        async with asyncio.timeout(5):
            await server.process.wait()
        await asyncio.to_thread(psutil.wait_procs, [process], 5)
        assert not process.is_running()


async def test_no_orphan(start_server: StartServer, clear: list[Recording]) -> None:
    """A gateway that is killed takes the model process with it, while it loads and when it is ready."""
    for moment in ("Model process .* started", "Model ready"):
        server = await start_server("--no-http")
        async with server.client() as client:
            await client.write_event(AudioChunk(16000, 2, 1, clear[0].pcm).event())
            await server.logged(moment)
            process = server.model_process()
            await server.kill()
            await asyncio.to_thread(process.wait, 5)


async def test_weights_that_break_later(start_server: StartServer, clear: list[Recording], tmp_path: Path) -> None:
    """Verified at the start, gone when needed: an error for each utterance, with the reason; no restart in circles."""
    with zipfile.ZipFile(DEMO) as archive:
        archive.extractall(tmp_path)
    weights = tmp_path / "model.safetensors"
    server = await start_server(f"--model={tmp_path}")
    async with asyncio.timeout(SECONDS), aiohttp.ClientSession() as http:
        while (await (await http.get(f"{server.http}/health")).json())["state"] == "checking":
            await asyncio.sleep(0.1)
    shutil.move(weights, tmp_path / "away")
    for _ in range(3):
        async with server.client() as client:
            await send_audio(client, clear[0].pcm)
            event = await asyncio.wait_for(client.read_event(), SECONDS)
            assert event is not None
            assert Error.from_event(event).code == "model-unavailable"
            assert "model.safetensors is missing" in Error.from_event(event).text
    assert len(re.findall("Model process .* started", server.log)) == 1
