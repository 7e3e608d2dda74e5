"""What does a step cost, and the end? Streaming against the official package's way, 0.6B shape, same tokens on both
sides.

The official streaming feeds all audio again at every step; it needs vLLM, so here the package's transformers backend
does what it does: features, encoder, prompt and all but the last 5 tokens of the text again. Both sides have the same
random weights and write the same number of tokens (see _network.py).

- Flat: time of a step late in a stream against one early in it.
- Total: everything that 60 s of audio take, with a step every 2 s (the official default), against the re-feed.
- The end: from the last audio to the final text, of a speaker who does not pause before it, against the package's
  one-shot recognition of the same clip. The scheduler runs in real time here and picks its own steps.
"""

import argparse
import asyncio
import logging
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.network_fixtures import sound
from tests.reference import streamed
from wyoming_qwen_asr.events import Final, Message, SessionError, SessionStart
from wyoming_qwen_asr.model import scheduler as scheduler_module
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.hardware import pick_dtype
from wyoming_qwen_asr.model.int8 import quantise
from wyoming_qwen_asr.model.network import Network
from wyoming_qwen_asr.model.resample import Samples
from wyoming_qwen_asr.model.scheduler import Scheduler
from wyoming_qwen_asr.model.session import Pace, Part

from ._measure import median, table
from ._network import COMPUTE, REJECTED, checkpoint, computed, samples, scripted, tokens

CPU = torch.device("cpu")
CHUNK_SIZE_SEC = 2.0
"""The official default."""
ACCEPTANCES = (1.0, 0.75, 0.5)
FORCED = {"language": "English", "hint": "force", "context": ""}
FLAT_AIM, TOTAL_AIM = 1.1, 0.15
END_AIMS = {8: (0.35, 0.25), 24: (0.12, 0.08)}
"""Seconds of a clip: what is promised in bfloat16, and hoped for in 8 bits."""


def speaking() -> Callable[[Samples], float]:
    """Somebody speaks all the time: nothing can be done while they pause."""
    return lambda _: 1.0


def pcm_of(seconds: float) -> bytes:
    return (sound(seconds) * 32_767).to(torch.int16).numpy().tobytes()


class Clock:
    """Seconds that units of each step take, by the audio that was heard until its end."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # end in the stream, duration
        self._spent = 0.0
        self._begin = 0

    def __enter__(self) -> "Clock":
        self._unit, self._finish = scheduler_module._unit, Part.finish

        def unit(*args: Any) -> None:
            began = time.perf_counter()
            try:
                self._unit(*args)
            finally:
                self._spent += time.perf_counter() - began

        def finish(part: Part, *args: Any) -> None:
            assert part.step
            self.steps.append(((self._begin + part.step.end) / samples(1), self._spent))
            if part.closed:
                self._begin += part.length or 0
            self._spent = 0.0
            self._finish(part, *args)

        scheduler_module._unit = unit  # type: ignore[assignment]
        Part.finish = finish  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        scheduler_module._unit = self._unit
        Part.finish = self._finish  # type: ignore[method-assign]

    def total(self) -> float:
        return sum(duration for _, duration in self.steps)


def stream(network: Network, seconds: float, acceptance: float) -> Clock:
    """As fast as it goes, a step every CHUNK_SIZE_SEC."""
    with scripted(acceptance), Clock() as clock:
        chunk = 2 * samples(CHUNK_SIZE_SEC / 4)
        pieces = [chunk] * (int(seconds / CHUNK_SIZE_SEC * 4) + 1)
        streamed(network, pcm_of(seconds), pieces, Pace(CHUNK_SIZE_SEC), speaking, **FORCED)
    return clock


async def end(network: Network, seconds: float, acceptance: float) -> float:
    """From the last audio to the final text, in real time."""
    done = asyncio.get_running_loop().create_future()

    async def emit(message: Message, _: int) -> None:
        assert not isinstance(message, SessionError), message
        if isinstance(message, Final):
            done.set_result(time.perf_counter())

    with scripted(acceptance):
        scheduler = Scheduler(network, COMPUTE, emit, detector=speaking)
        running = asyncio.create_task(scheduler.run())
        scheduler.start(1, SessionStart(16_000, 2, 1, **FORCED))  # type: ignore[arg-type]
        pcm, size = computed(pcm_of, seconds), 320
        due = time.perf_counter()
        for at in range(0, len(pcm), size):
            due += size / 32_000
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            scheduler.audio(1, pcm[at : at + size])
        ended = time.perf_counter()
        scheduler.end(1)
        await asyncio.wait({done, running}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
    return float(await done - ended)


class Official:
    """The package, with its transformers backend."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import qwen_asr

            logging.getLogger("transformers").setLevel(logging.ERROR)
            self._model = qwen_asr.Qwen3ASRModel.from_pretrained(str(folder), dtype=dtype)
            torch.set_flush_denormal(False)  # one of its libraries loses subnormal numbers for good

    @torch.inference_mode()
    def recognise(self, seconds: float, prefix: int, new: int) -> float:
        """How long a recording takes, with so many tokens of the text given and so many to write."""
        audio = sound(seconds).numpy()
        began = time.perf_counter()
        text = self._model._build_text_prompt(context="", force_language="English")
        inputs = self._model.processor(text=[text], audio=[audio], return_tensors="pt", padding=True)
        given = torch.full((1, prefix), 300)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], given], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["input_features"] = inputs["input_features"].to(self._model.model.dtype)
        out = self._model.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + new
        return time.perf_counter() - began

    def refeed(self, seconds: float) -> float:
        """How long all steps of a stream take."""
        spent, written = 0.0, 0
        for number in range(1, int(seconds / CHUNK_SIZE_SEC) + 1):
            heard = number * CHUNK_SIZE_SEC
            prefix = max(0, written - REJECTED) if number > 2 else 0
            written = tokens(heard)
            spent += self.recognise(heard, prefix, written - prefix)
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench streaming", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of the stream whose steps are compared")
    parser.add_argument("--total-seconds", type=float, default=60)
    parser.add_argument("--repetitions", type=int, default=5, help="of each clip's end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="*", choices=["flat", "total", "end"], default=["flat", "total", "end"])
    parser.add_argument("--tiny", action="store_true", help="a network of no interest, to try this out")
    args = parser.parse_args()
    computed(torch.set_num_threads, args.threads)
    logging.disable(logging.WARNING)  # of answers that ran on
    networks, official = computed(load, args.dtype, args.tiny)
    plain = networks[args.dtype]
    computed(stream, plain, 4, 1.0)  # warms up
    computed(official.recognise, 4, 0, 4)
    print(f"{args.threads} threads, {args.dtype} on both sides\n")
    if "flat" in args.only:
        flat(plain, args.minutes)
    if "total" in args.only:
        total(networks, official, args.total_seconds)
    if "end" in args.only:
        ends(networks, official, args.repetitions)


def load(name: str, tiny: bool) -> tuple[dict[str, Network], Official]:
    dtype, _ = pick_dtype(name, CPU)
    with checkpoint(tiny) as folder:
        opened = open_checkpoint(folder)
        networks = {each: Network.load(opened, CPU, dtype) for each in (name, "int8")}
        quantise(networks["int8"].decoder)
        for network in networks.values():
            network.pack()
        return networks, Official(folder, dtype)


def flat(network: Network, minutes: float) -> None:
    clock = computed(stream, network, 60 * minutes, 0.75)
    spent: dict[int, list[float]] = defaultdict(list)
    for heard, duration in clock.steps:
        spent[int(heard / 60.001)].append(duration)
    last = max(spent)
    table(
        ("step of 2 s of new audio, ms", "N", "mean"),
        [(f"minute {minute + 1}", len(spent[minute]), 1000 * np.mean(spent[minute])) for minute in (0, last)],
    )
    ratio = np.mean(spent[last]) / np.mean(spent[0])
    print(f"minute {last + 1} ÷ minute 1: {ratio:.2f} (aim: at most {FLAT_AIM})\n")


def total(networks: dict[str, Network], official: Official, seconds: float) -> None:
    theirs = computed(official.refeed, seconds)
    rows: list[tuple[str, float, float]] = [("official re-feed", theirs, 1.0)]
    for name, network in networks.items():
        for acceptance in ACCEPTANCES:
            ours = computed(stream, network, seconds, acceptance).total()
            rows.append((f"ours, {name}, {acceptance:.0%} of drafts right", ours, ours / theirs))
    table((f"compute for {seconds:.0f} s of audio", "s", "÷ official"), rows)
    print(f"aim: at most {TOTAL_AIM}\n")


def ends(networks: dict[str, Network], official: Official, repetitions: int) -> None:
    rows = []
    for seconds, (promised, hoped) in END_AIMS.items():
        theirs, ours = [], defaultdict(list)
        for _ in range(repetitions):  # in turns, so that a machine that grows busy does so for all
            theirs.append(computed(official.recognise, seconds, 0, tokens(seconds)))
            for name, network in networks.items():
                for acceptance in ACCEPTANCES:
                    # Not always at the same place between two steps.
                    length = seconds - random.Random(len(theirs)).uniform(0, 0.5)
                    ours[name, acceptance].append(asyncio.run(end(network, length, acceptance)))
        rows.append((f"{seconds} s, official one-shot", repetitions, median(theirs), 1.0))
        for (name, acceptance), taken in ours.items():
            label = f"{seconds} s, ours, {name}, {acceptance:.0%} right"
            rows.append((label, len(taken), median(taken), median(taken) / median(theirs)))
        print(f"{seconds} s: aim at most {promised}, hoped for in int8 {hoped}")
    table(("last audio to final", "N", "median s", "÷ one-shot"), rows)


if __name__ == "__main__":
    main()
