"""What a stream of audio has to come to, however it arrives: the reference for everything that is cached or ahead."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from wyoming_qwen_asr.events import Final, Hint, Message, Partial, Segment, SessionError, SessionStart
from wyoming_qwen_asr.model.job import Recognition
from wyoming_qwen_asr.model.network import Network, Piece
from wyoming_qwen_asr.model.resample import Samples
from wyoming_qwen_asr.model.scheduler import Scheduler
from wyoming_qwen_asr.model.session import Pace, Stream
from wyoming_qwen_asr.model.vad import Detector, Segmenter, new_detector
from wyoming_qwen_asr.text import agreement, join


def floats(pcm: bytes) -> Samples:
    """16-bit PCM as the network takes it."""
    return np.asarray(np.frombuffer(pcm, "<i2") / np.float32(32_768), np.float32)


@dataclass(frozen=True)
class Offline:
    """One segment after another, each given to the plain decoder as a whole."""

    text: str
    language: str | None
    segments: list[Recognition]


def offline(
    network: Network,
    samples: Samples,
    language: str | None = None,
    hint: Hint = "prefer",
    context: str = "",
    detector: Callable[[], Detector] = new_detector,
) -> Offline:
    """The same trim, the same cuts, the plain decoder. samples [n]: float32 mono at 16 kHz."""
    segmenter = Segmenter(detector)
    segmenter.feed(samples)
    segmenter.end()
    heard: str | None = None
    segments: list[Recognition] = []
    for segment in segmenter.listen(len(samples)):
        kind: Hint = hint if language or hint == "ignore" else "prefer"
        (result,) = network.recognise([Piece(segment.audio, context, language or heard, kind)])
        heard = heard or result.language
        segments.append(result)
    return Offline(join(each.text for each in segments if each.text), heard, segments)


class Inline(Executor):
    """Computes in the thread of whoever asks, so that what happens when is settled."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Streamed:
    """What a session came to whose audio was heard bit by bit."""

    early: int = 0
    """Characters that were delivered, or said to be stable, before the audio ended."""
    retracted: int = 0
    """Characters said to be stable that the segments do not begin with."""
    segments: list[Segment] = field(default_factory=list)
    ids: list[tuple[int, ...]] = field(default_factory=list)
    """Of the segments."""
    final: Final | None = None


def streamed(
    network: Network,
    pcm: bytes,
    chunks: Iterable[int],
    pace: Pace | None = None,
    detector: Callable[[], Detector] = new_detector,
    **start: Any,
) -> Streamed:
    """16-bit PCM at 16 kHz, fed in chunks of so many bytes; after each, everything is computed that is due. So there
    are as many steps as there can be, wherever they may fall. `start`: fields of SessionStart."""
    heard = Streamed()
    stable = ""

    async def emit(message: Message, _: int) -> None:
        nonlocal stable
        match message:
            case Partial():
                stable += message.stable_delta
            case Segment():
                kept = agreement(stable, message.text)
                heard.retracted += len(stable) - kept
                heard.segments.append(message)
                stable = ""
            case Final():
                heard.final = message
            case SessionError():
                raise AssertionError(message)

    async def play() -> None:
        scheduler = Scheduler(network, Inline(), emit, pace or Pace(chunk_size_sec=0.5), detector)
        delivered = scheduler._deliver

        async def deliver(stream: Stream) -> None:
            done = [part.result.ids for part in takewhile(lambda part: part.done, stream.parts)]
            await delivered(stream)
            heard.ids += done

        scheduler._deliver = deliver  # type: ignore[method-assign]
        running = asyncio.create_task(scheduler.run())
        scheduler.start(1, SessionStart(16_000, 2, 1, **({"language": None, "hint": "prefer", "context": ""} | start)))
        at = 0
        for size in chunks:
            if at >= len(pcm):
                break
            scheduler.audio(1, pcm[at : at + size])
            at += size
            await _idle(scheduler, running)
        scheduler.audio(1, pcm[at:])
        await _idle(scheduler, running)
        heard.early = sum(len(segment.text) for segment in heard.segments) + len(stable)
        scheduler.end(1)
        while not heard.final:
            await _idle(scheduler, running)
        running.cancel()

    asyncio.run(play())
    return heard


async def _idle(scheduler: Scheduler, running: asyncio.Task[None]) -> None:
    """Until the scheduler waits for news."""
    while scheduler._news.is_set() or not scheduler._news._waiters:
        await asyncio.sleep(0)
        if running.done():
            running.result()
