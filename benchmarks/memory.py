"""What does waiting cost? Memory of the gateway before any audio, against the aims and a bare asyncio."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import psutil

from tests.conftest import wait_until

from ._measure import measured, median, table
from .describe import describes

REPETITIONS = 3
DESCRIBES = 5
AIM_USS, AIM_RSS = 35.0, 55.0
"""MB, of the gateway with HTTP."""

BARE = "import asyncio; asyncio.run(asyncio.sleep(60))"
SETTLE_SECONDS = 1.0
"""Until the bare loop runs, and a gateway has freed what starting took."""

Memory = tuple[float, float]
"""USS (what ending the process would give back) and RSS, in MB (10⁶ bytes)."""


def memory(pid: int) -> Memory:
    taken = psutil.Process(pid).memory_full_info()
    return taken.uss / 1e6, taken.rss / 1e6


async def gateway(*flags: str) -> Memory:
    """Of a gateway that has found its checkpoint, and answered a few times."""
    async with measured(*flags) as server:
        own = psutil.Process(server.process.pid)
        await asyncio.to_thread(wait_until, own.children)  # the child that looks for the checkpoint comes,
        await asyncio.to_thread(wait_until, lambda: not own.children())  # and goes
        await describes(server, DESCRIBES)
        await asyncio.sleep(SETTLE_SECONDS)
        return memory(own.pid)


async def bare() -> Memory:
    """Of an interpreter with an event loop and nothing else."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", BARE)
    try:
        await asyncio.sleep(SETTLE_SECONDS)
        return memory(process.pid)
    finally:
        process.kill()
        await process.wait()


async def main() -> None:
    measure: dict[str, Callable[[], Awaitable[Memory]]] = {
        "gateway": gateway,
        "gateway --no-http": partial(gateway, "--http=off"),
        "gateway --zeroconf": partial(gateway, "--uri=tcp://0.0.0.0:0", "--zeroconf"),
        "bare asyncio": bare,
    }
    found: dict[str, list[Memory]] = {name: [] for name in measure}
    for _ in range(REPETITIONS):
        for name, one in measure.items():
            found[name].append(await one())
    medians = {name: (median([m[0] for m in taken]), median([m[1] for m in taken])) for name, taken in found.items()}
    base_uss, base_rss = medians["bare asyncio"]
    table(
        ("memory, MB", "N", "USS", "RSS", "USS ÷ bare", "RSS ÷ bare"),
        [
            (name, REPETITIONS, uss, rss, uss / base_uss, rss / base_rss)
            for name, (uss, rss) in {**medians, "aim": (AIM_USS, AIM_RSS)}.items()
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
