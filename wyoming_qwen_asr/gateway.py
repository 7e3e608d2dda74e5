"""The gateway: the process that is always there. It accepts, translates, supervises, and never computes."""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from . import __version__
from .engine.engine import Engine
from .limits import DRAIN_SECONDS
from .metrics import Metrics
from .process import streams
from .settings import Settings
from .wyoming.discovery import Discovery
from .wyoming.server import WyomingServer

if TYPE_CHECKING:
    from .http.server import HttpServer

_LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

_M_MMAP_THRESHOLD = -3
"""Of malloc.h; 128 KiB is what glibc starts with."""


class CannotServe(Exception):
    """An address cannot be had: one line for the user, exit code 1."""


class Gateway:
    """One run: start up, serve, drain."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._engine = Engine(settings, self._metrics)
        self._wyoming = WyomingServer(self._engine, self._metrics, settings.max_connections)
        self._http: HttpServer | None = None
        self._discovery: Discovery | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._stdio: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or the end of stdin when that is served.
        Raises CannotServe, and CheckpointError when the model cannot be used."""
        _give_memory_back()
        stopped = asyncio.create_task(_signalled().wait())
        running: list[asyncio.Task[None]] = []
        try:
            await self._listen()
            running = [asyncio.create_task(self._engine.run()), *([self._stdio] if self._stdio else [])]
            if self._discovery:
                self._announcing = asyncio.create_task(self._discovery.register())
            await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                if task.done():
                    task.result()
        finally:
            await self._drain()
            for each in (stopped, *running):
                each.cancel()
            await asyncio.wait([stopped, *running])

    async def _listen(self) -> None:
        """Open every address: `describe` is answered before the model's files are even looked for."""
        settings = self._settings
        _LOGGER.info("wyoming-qwen-asr %s, model %s", __version__, settings.model)
        for uri in settings.uri:
            if uri == "stdio://":
                pipes = await _opened(streams(sys.stdin.buffer, sys.stdout.buffer), uri)
                self._stdio = asyncio.create_task(self._wyoming.serve_stdio(*pipes))
                continue
            address = await _opened(self._wyoming.listen(uri), uri)
            _LOGGER.info("Wyoming at %s", f"tcp://{address}" if address else uri)
            if address and settings.zeroconf and not self._discovery:
                self._discovery = Discovery(settings.zeroconf, address.host, address.port, settings.data_dir)
        if settings.http:
            from .http.server import HttpServer  # aiohttp is half of the gateway's memory

            self._http = HttpServer(self._engine, self._metrics, settings)
            address = await _opened(self._http.listen(settings.http), f"http://{settings.http}")
            _LOGGER.info("OpenAI-compatible API at http://%s/v1", address)

    async def _drain(self) -> None:
        """Be found no more, accept no more, let what is in flight come to its end."""
        _LOGGER.info("Stopping; sessions in flight: %d", self._engine.sessions)
        self._engine.drain()
        if self._discovery and self._announcing:
            self._announcing.cancel()
            await asyncio.wait([self._announcing])
            await self._discovery.unregister()
        closing = [self._wyoming.close(DRAIN_SECONDS)]
        if self._http:
            closing.append(self._http.close())
        await asyncio.gather(*closing)


async def _opened(opening: Awaitable[T], place: str) -> T:
    """The result of listening at a place. Raises CannotServe, with what the user can do about it."""
    try:
        return await opening
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            reason = "it is used by another program, perhaps by another wyoming-qwen-asr"
        raise CannotServe(f"cannot serve at {place}: {reason}") from None


def _give_memory_back() -> None:
    """Idle costs nothing: glibc, once it has seen a large buffer freed, keeps the next ones for itself, unless the size
    from which it asks the system is fixed. Other C libraries have no such call."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _signalled() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT. The second one ends the process at once, also where it is init, which the
    kernel protects from signals that nobody handles."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def caught(number: int) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, caught, number)
    return event
