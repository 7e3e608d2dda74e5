"""Places of files: how many are worked on at once, and how many may wait for that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import Busy
from ..limits import MAX_WAITING, WAIT_SECONDS


class Places:
    """`async with places.one():` around all of a file's work, the reading of it too: what waits costs no disk."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._most = count + MAX_WAITING
        self._here = 0
        """Who has a place or waits for one."""
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Raises Busy when too many wait already, or it takes too long."""
        if self._here >= self._most:
            raise Busy(f"{MAX_WAITING} files are waiting already")
        self._here += 1
        self._empty.clear()
        try:
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._free.acquire()
            except TimeoutError:
                raise Busy("the files before this one take too long") from None
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._here -= 1
            if not self._here:
                self._empty.set()

    async def empty(self) -> None:
        """Wait until nobody is here."""
        await self._empty.wait()
