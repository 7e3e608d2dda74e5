"""The model process: loads the network, recognises what the gateway sends, says what it heard.

Started by the gateway; events on stdin and stdout, everything else on stderr. Leaves when stdin ends. While it
loads, the gateway keeps the audio that arrives.
"""

import argparse
import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from setproctitle import setproctitle
from wyoming.event import Event

from ..errors import EXIT_CANNOT_LOAD, AsrError, CheckpointError
from ..events import (
    BadEvent,
    Failed,
    Message,
    Ready,
    SessionAudio,
    SessionCancel,
    SessionEnd,
    SessionStart,
    from_event,
    read_event,
    to_event,
    write_event,
)
from ..logs import log_to_stderr
from ..process import adopt, connect, say
from .hardware import spin_briefly
from .stream import UNFIXED_CHUNKS, UNFIXED_TOKENS

if TYPE_CHECKING:
    from .network import Network
    from .scheduler import Scheduler


def main() -> None:
    began = time.monotonic()
    out = adopt()
    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint that is complete on disk")
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--window-seconds", type=int, default=8)
    parser.add_argument("--chunk-size-sec", type=float, default=0.0, help="0: auto")
    parser.add_argument("--unfixed-chunk-num", type=int, default=UNFIXED_CHUNKS)
    parser.add_argument("--unfixed-token-num", type=int, default=UNFIXED_TOKENS)
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args()
    setproctitle(f"wyoming-qwen-asr: model {args.name}")
    log_to_stderr(args.log_level)
    spin_briefly()
    # From its first weight on, for each thread that computes has OpenMP threads of its own.
    compute = ThreadPoolExecutor(1, thread_name_prefix="network")
    try:
        network, choices = compute.submit(_load, args).result()
    except (AsrError, ImportError) as error:
        error = error if isinstance(error, AsrError) else CheckpointError(f"{error}: install the [local] extra")
        say(out, Failed(error.code, str(error)))
        sys.exit(EXIT_CANNOT_LOAD)
    say(out, Ready(time.monotonic() - began, choices))
    # A gateway that dies may do so in the middle of an event; we are gone in a moment, too.
    with contextlib.suppress(ConnectionError, BadEvent):
        asyncio.run(_serve(network, compute, out, args))
    sys.stderr.flush()
    os._exit(0)  # without waiting for a computation that nobody waits for


def _load(args: argparse.Namespace) -> tuple["Network", list[str]]:
    """The network on its device, and what was picked for it and why."""
    import torch

    from .checkpoint import open_checkpoint
    from .hardware import pick_device, pick_dtype, pick_threads
    from .int8 import quantise
    from .network import Network

    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    threads, why_threads = pick_threads(args.threads)
    torch.set_num_threads(threads)
    try:
        network = Network.load(open_checkpoint(args.model, args.name), device, dtype)
        if args.dtype == "int8":
            why_dtype += f"; {quantise(network.decoder)}"
        network.pack()
    except torch.OutOfMemoryError:
        raise CheckpointError(f"{args.name} does not fit into the memory of {device}") from None
    network.encoder.set_window(args.window_seconds)
    dtype_name = str(dtype).removeprefix("torch.")
    return network, [
        f"{args.name} on {device} ({why_device})",
        f"{dtype_name} ({why_dtype})",
        f"{threads} threads ({why_threads})",
    ]


async def _serve(network: "Network", compute: Executor, out: BinaryIO, args: argparse.Namespace) -> None:
    """Answer until stdin ends."""
    from .scheduler import Scheduler
    from .session import Pace

    reader, writer = await connect(out)
    writer.transport.set_write_buffer_limits(0)  # `emit` returns when the pipe has it all

    async def emit(message: Message, session: int) -> None:
        await write_event(writer, to_event(message, session))

    pace = Pace(args.chunk_size_sec or None, args.unfixed_chunk_num, args.unfixed_token_num)
    scheduler = Scheduler(network, compute, emit, pace)
    working = asyncio.create_task(scheduler.run())
    while event := await _next(reader, working):
        _dispatch(scheduler, event)


async def _next(reader: asyncio.StreamReader, working: asyncio.Task[None]) -> Event | None:
    """The next event, or the exception that ended the scheduler."""
    reading = asyncio.create_task(read_event(reader))
    await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        working.result()
    return await reading


def _dispatch(scheduler: "Scheduler", event: Event) -> None:
    message, session = from_event(event)
    match message:
        case SessionStart():
            scheduler.start(session, message)
        case SessionAudio():
            scheduler.audio(session, event.payload or b"")
        case SessionEnd():
            scheduler.end(session)
        case SessionCancel():
            scheduler.cancel(session)


if __name__ == "__main__":
    main()
