"""Does live speech wait for files? Final latency of a paced stream while a long file runs, against an idle model.

The scheduler and a network of the 0.6B's shape in one process; see _network.py for what it says.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field

import torch

from tests.network_fixtures import sound
from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.events import Final, Message, Segment, SessionError, SessionStart
from wyoming_qwen_asr.limits import MAX_UNCONFIRMED_FILE_SECONDS
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.hardware import pick_device, pick_dtype, pick_threads
from wyoming_qwen_asr.model.network import Network
from wyoming_qwen_asr.model.scheduler import Scheduler

from ._measure import percentile, table
from ._network import COMPUTE, checkpoint, computed, scripted

AIM = 1.5
UTTERANCE_SECONDS = 4.0
CHUNK_SECONDS = 0.1
BLOCKS = 4
"""Unloaded and loaded take turns, so that a machine that grows warm or busy does so for both."""

FILE_SECONDS = 3600.0


@dataclass
class Bench:
    """A scheduler and two kinds of clients."""

    scheduler: Scheduler = field(init=False)
    finals: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    delivered: float = 0.0  # seconds of the present file
    news: asyncio.Event = field(default_factory=asyncio.Event)
    files: float = 0.0  # seconds, of all files
    number: int = 0

    async def emit(self, message: Message, session: int) -> None:
        assert not isinstance(message, SessionError), message
        if isinstance(message, Segment) and session not in self.finals:
            self.files += message.end - self.delivered
            self.delivered = message.end
            self.news.set()
        if isinstance(message, Final) and session in self.finals:
            self.finals.pop(session).set_result(None)

    def begin(self, *, live: bool) -> int:
        # The tag is given: random weights would not come to write one.
        start = SessionStart(SAMPLE_RATE, 2, 1, "English", "force", "", live=live)
        self.number += 1
        self.scheduler.start(self.number, start)
        return self.number

    async def utterance(self, pcm: bytes) -> float:
        """Speak one, in real time. Seconds from its end to its final."""
        number = self.begin(live=True)
        final = self.finals[number] = asyncio.get_running_loop().create_future()
        size = int(CHUNK_SECONDS * SAMPLE_RATE) * 2
        for at in range(0, len(pcm), size):
            await asyncio.sleep(CHUNK_SECONDS)
            self.scheduler.audio(number, pcm[at : at + size])
        ended = time.perf_counter()
        self.scheduler.end(number)
        await final
        return time.perf_counter() - ended

    async def file(self, minute: bytes) -> None:
        """A long file as far ahead as the gateway would be; then the next one."""
        while True:
            number, self.delivered, fed = self.begin(live=False), 0.0, 0.0
            try:
                while fed < FILE_SECONDS:
                    while fed + 60 - self.delivered <= MAX_UNCONFIRMED_FILE_SECONDS:
                        self.scheduler.audio(number, minute)
                        fed += 60
                    self.news.clear()
                    await self.news.wait()
            finally:
                self.scheduler.cancel(number)


async def measure(bench: Bench, count: int) -> tuple[list[float], list[float], float]:
    """Latencies without and with a file, in seconds, and seconds of the file done in a second."""
    dice = random.Random(1)
    spoken = [pcm_of(UTTERANCE_SECONDS, seed) for seed in range(4)]
    minute = pcm_of(60, 9)
    running = asyncio.create_task(bench.scheduler.run())
    alone: list[float] = []
    loaded: list[float] = []
    busy = 0.0
    await bench.utterance(spoken[0])  # warms up
    for block in range(BLOCKS):
        taken, file = (loaded, asyncio.create_task(bench.file(minute))) if block % 2 else (alone, None)
        began = time.perf_counter()
        for i in range(-(-count * 2 // BLOCKS)):
            await asyncio.sleep(dice.random())  # so that they end anywhere in the file's units
            taken.append(await bench.utterance(spoken[i % len(spoken)]))
            if running.done():
                running.result()
        if file:
            busy += time.perf_counter() - began
            file.cancel()
            await asyncio.wait([file])
    running.cancel()
    return alone, loaded, bench.files / busy


def pcm_of(seconds: float, seed: int) -> bytes:
    return (sound(seconds, seed) * 32_767).to(torch.int16).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench live_under_load", description=__doc__)
    parser.add_argument("--utterances", type=int, default=40, help="with and without a file, each")
    parser.add_argument("--tiny", action="store_true", help="a network of no interest, to try this out")
    args = parser.parse_args()
    device, _ = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    threads, _ = pick_threads(0)
    computed(torch.set_num_threads, threads)
    with checkpoint(args.tiny) as folder:
        network = computed(Network.load, open_checkpoint(folder), device, dtype)
        computed(network.pack)
    bench = Bench()
    bench.scheduler = Scheduler(network, COMPUTE, bench.emit, detector=lambda: lambda _: 1.0)
    with scripted(0.75):
        alone, loaded, speed = asyncio.run(measure(bench, args.utterances))
    rows = [
        (name, len(taken), *(1000 * percentile(taken, percent) for percent in (50, 95, 100)))
        for name, taken in (("alone", alone), ("while a file runs", loaded))
    ]
    table(("end of speech to final, ms", "N", "p50", "p95", "max"), rows)
    print(f"{device}, {dtype}, {threads} threads; the file runs at {speed:.2f} × real time beside it")
    print(f"p95 while a file runs ÷ alone: {percentile(loaded, 95) / percentile(alone, 95):.2f} (aim: at most {AIM})")


if __name__ == "__main__":
    main()
