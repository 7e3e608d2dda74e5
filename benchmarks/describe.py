"""Does `describe` stay quick while the model loads, while it works, and while hundreds of connections are held open?
Round trips against those of an idle server."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from urllib.request import urlopen

from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.event import read_event

from tests.conftest import Server, load_recordings, transcript_of, wait_until

from ._measure import measured, percentile, table

COUNT = 1000
WARM_UP = 300
LOADS = 3
"""At least; a slow load gives more of them."""
STREAMS = 8
SILENT = 400


def describe(port: int) -> float:
    """Milliseconds from opening a connection to the whole answer."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as file:
        connection.sendall(b'{"type": "describe"}\n')
        event = read_event(file)
        taken = time.perf_counter() - began
        assert event is not None
        assert event.type == "info", event
    return 1000 * taken


async def describes(server: Server, count: int) -> list[float]:
    """So many, one after another."""
    return [await asyncio.to_thread(describe, server.port) for _ in range(count)]


def state(server: Server) -> str:
    with urlopen(f"{server.http}/health") as answer:
        return str(json.load(answer)["state"])


async def loading(server: Server, count: int) -> tuple[list[float], int]:
    """Those that began and ended while the model was loading, over as many loads as that takes."""
    pcm = load_recordings()[3].pcm
    form = (16000, 2, 1)
    taken: list[float] = []
    loads = 0
    while len(taken) < count or loads < LOADS:
        loads += 1
        async with server.client() as client:
            for event in (Transcribe().event(), AudioStart(*form).event(), AudioChunk(*form, pcm).event()):
                await client.write_event(event)
            before = after = "absent"
            while after not in ("ready", "busy"):
                before, one = after, (await describes(server, 1))[0]
                after = await asyncio.to_thread(state, server)
                if before == after == "loading":
                    taken.append(one)
            await client.write_event(AudioStop().event())
            await transcript_of(client)
        server.model_process().kill()
        await asyncio.to_thread(wait_until, lambda: state(server) == "absent")
    return taken, loads


async def transcribing(server: Server, count: int) -> list[float]:
    """While streams of audio keep the model busy; they come from a process of their own."""
    load = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks._streams", str(server.port), str(STREAMS)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert load.stdout
        assert await asyncio.wait_for(load.stdout.readline(), 60) == b"going\n"
        return await describes(server, count)
    finally:
        load.kill()
        await load.wait()


async def crowded(server: Server, count: int) -> list[float]:
    """While somebody holds silent connections, far more than there may be, and opens each anew that is closed."""
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(SILENT)]

    async def hold(number: int) -> None:
        while True:
            reader, writer = silent[number]
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            await asyncio.sleep(1)
            silent[number] = await asyncio.open_connection("127.0.0.1", server.port)

    holding = [asyncio.create_task(hold(number)) for number in range(SILENT)]
    try:
        return await describes(server, count)
    finally:
        for task in holding:
            task.cancel()
        await asyncio.wait(holding)
        for _, writer in silent:
            writer.close()


async def main() -> None:
    async with measured() as server:
        await describes(server, WARM_UP)
        idle = await describes(server, COUNT)
        during_load, loads = await loading(server, COUNT)
        during_work = await transcribing(server, COUNT)
        idle_again = await describes(server, COUNT)
        during_siege = await crowded(server, COUNT)

    p50, p99 = percentile(idle, 50), percentile(idle, 99)
    table(
        ("describe, ms", "N", "p50", "p99", "max", "p50 ÷ idle", "p99 ÷ idle"),
        [
            (
                *(name, len(taken), percentile(taken, 50), percentile(taken, 99), max(taken)),
                *(percentile(taken, 50) / p50, percentile(taken, 99) / p99),
            )
            for name, taken in (
                ("idle, no model", idle),
                (f"loading ({loads} loads)", during_load),
                (f"transcribing ({STREAMS} streams)", during_work),
                ("idle, model loaded", idle_again),
                (f"{SILENT} silent connections", during_siege),
            )
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
