"""How soon is the text there? Clients that speak like Home Assistant, 1 to 8 at once, to a real server.

They send 10 ms at a time, at the pace of speech, and 0.7 s of silence at the end, as Home Assistant does before its
`audio-stop`. With the demo model, and with the 0.6B's shape and random weights, whose answers are scripted.
"""

import argparse
import asyncio
import time
from itertools import cycle, islice

from wyoming.asr import Transcribe
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient

from tests.conftest import Server, load_recordings

from ._measure import measured, percentile, table
from ._network import checkpoint

STREAMS = (1, 2, 4, 8)
CHUNK_BYTES = 320
SILENCE = bytes(22_400)
FORM = (16_000, 2, 1)


async def utterance(server: Server, pcm: bytes) -> tuple[float, float | None]:
    """Seconds from audio-stop to transcript, and from the first audio to the first chunk of text."""
    first: float | None = None
    async with AsyncTcpClient("127.0.0.1", server.port) as client:
        began = due = time.perf_counter()

        async def answer() -> float:
            nonlocal first
            while True:
                event = await client.read_event()
                assert event is not None
                if event.type == "transcript-chunk" and first is None:
                    first = time.perf_counter() - began
                if event.type == "transcript":
                    return time.perf_counter()

        answering = asyncio.create_task(answer())
        await client.write_event(Transcribe(language="en").event())
        await client.write_event(AudioStart(*FORM).event())
        for at in range(0, len(pcm), CHUNK_BYTES):
            due += CHUNK_BYTES / 32_000
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await client.write_event(AudioChunk(*FORM, pcm[at : at + CHUNK_BYTES]).event())
        await client.write_event(AudioStop().event())
        ended = time.perf_counter()
        return await answering - ended, first if first and first < ended - began else None


async def measure(server: Server, said: list[bytes], streams: int, rounds: int) -> list[object]:
    async def speak(number: int) -> list[tuple[float, float | None]]:
        await asyncio.sleep(number / streams)  # people do not begin together
        return [await utterance(server, pcm) for pcm in islice(cycle(said), number, number + rounds)]

    found = [pair for each in await asyncio.gather(*map(speak, range(streams))) for pair in each]
    finals = [1000 * final for final, _ in found]
    partials = [1000 * first for _, first in found if first is not None]
    shown = [percentile(partials, percent) if partials else "-" for percent in (50, 95)]
    return [len(found), percentile(finals, 50), percentile(finals, 95), *shown, f"{len(partials)}/{len(found)}"]


async def run(name: str, rounds: int, *flags: str, module: str = "wyoming_qwen_asr") -> None:
    english = [each.pcm for each in load_recordings() if each.language == "en"]
    spoken = {
        "2-4 s": [pcm + SILENCE for pcm in english],
        "8 s": [b"".join(english[i : i + 3]) + SILENCE for i in range(0, 9, 3)],
    }
    rows: list[list[object]] = []
    async with measured(*flags, "--preload", "--http=127.0.0.1:0", module=module) as server:
        await server.logged("Model ready", seconds=300)
        await utterance(server, spoken["2-4 s"][0])  # warms up
        for length, said in spoken.items():
            for streams in STREAMS:
                rows.append([f"{name}, {length}, {streams} at once", *await measure(server, said, streams, rounds)])
    heads = ("ms", "N", "final p50", "p95", "first text p50", "p95", "with text before the end")
    table(heads, rows)
    print()


async def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="utterances of each stream")
    parser.add_argument("--only", choices=["demo", "0.6b"])
    args = parser.parse_args()
    if args.only != "0.6b":
        await run("demo", args.rounds, "--model=demo", "--dtype=auto")
    if args.only != "demo":
        for dtype in ("auto", "int8"):
            with checkpoint() as folder:
                flags = (f"--model={folder}", f"--dtype={dtype}", "--language-hint=force")
                await run(f"0.6B shape, {dtype}", args.rounds, *flags, module="benchmarks._scripted_server")


if __name__ == "__main__":
    asyncio.run(main())
