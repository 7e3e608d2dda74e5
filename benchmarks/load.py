"""How soon is the model there? Our model process up to Ready, against the official package loading the same weights."""

import asyncio
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tests.conftest import DEMO
from wyoming_qwen_asr.events import Ready, from_event
from wyoming_qwen_asr.process import Child

from ._measure import median, table

REPETITIONS = 7
AIM = 0.35

REFERENCE = """
import sys, torch, qwen_asr
qwen_asr.Qwen3ASRModel.from_pretrained(sys.argv[1], dtype=torch.float32)
print("ready", flush=True)
"""


async def ours(checkpoint: Path) -> float:
    """Seconds from the start of the process to its Ready."""
    began = time.perf_counter()
    child = await Child.spawn(
        "wyoming_qwen_asr.model",
        *(f"--model={checkpoint}", "--name=demo", "--device=cpu", "--dtype=float32", "--log-level=warning"),
    )
    try:
        message, _ = from_event(await anext(child.events()))
        assert isinstance(message, Ready), message
        return time.perf_counter() - began
    finally:
        await child.stop()


async def reference(checkpoint: Path) -> float:
    """Seconds from the start of a process to the model in it."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", REFERENCE, str(checkpoint)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    taken = 0.0
    async for line in process.stdout:
        if line == b"ready\n":
            taken = time.perf_counter() - began
    assert await process.wait() == 0
    assert taken
    return taken


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(DEMO) as archive:
            archive.extractall(folder)
        checkpoint = Path(folder)
        taken: dict[str, list[float]] = {"model process": [], "qwen-asr": []}
        for repetition in range(REPETITIONS + 1):
            pair = await ours(checkpoint), await reference(checkpoint)
            if repetition:  # the first one warms the page cache
                for values, value in zip(taken.values(), pair, strict=True):
                    values.append(value)

    rows = [(name, len(values), median(values), min(values), max(values)) for name, values in taken.items()]
    table(("start to ready, s", "N", "median", "min", "max"), rows)
    ratio = median(taken["model process"]) / median(taken["qwen-asr"])
    print(f"model process ÷ qwen-asr: {ratio:.2f} (aim: at most {AIM})")


if __name__ == "__main__":
    asyncio.run(main())
