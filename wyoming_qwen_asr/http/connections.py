"""HTTP connections: how many there may be, and for how long one may be silent. aiohttp bounds neither."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from ..limits import HTTP_IDLE_SECONDS
from ..metrics import Metrics


class Connections:
    """`accept` is asyncio's protocol factory, `request` surrounds each request."""

    def __init__(self, metrics: Metrics, most: int) -> None:
        self._metrics = metrics
        self._most = most
        self._server: web.Server | None = None
        self._asking: set[RequestHandler] = set()
        self._silent: dict[RequestHandler, asyncio.TimerHandle] = {}
        """Those without a request, the longest silent first, with what will close them. A request counts from the end
        of its header to the end of its handler: who sends the header, or reads the answer, too slowly is silent."""

    def serve(self, server: web.Server) -> None:
        """The server whose connections they are."""
        self._server = server

    def __len__(self) -> int:
        return len(self._asking) + sum(each.transport is not None for each in self._silent)

    def accept(self) -> RequestHandler:
        """What is to handle a connection that comes."""
        assert self._server
        connection = self._server()
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._arrived, connection)  # by then it has its transport, but nothing is read
        return connection

    def _arrived(self, connection: RequestHandler) -> None:
        """A new connection. At the limit the longest silent one gives way; there is one, because requests are bounded
        by the places of files and their waiting room."""
        for gone in [each for each in self._silent if not each.transport]:
            self._silent.pop(gone).cancel()
        if len(self) >= self._most and self._silent:
            self._metrics.gave_way.inc()
            self._end(next(iter(self._silent)))
        self._fall_silent(connection)

    @asynccontextmanager
    async def request(self, request: web.Request) -> AsyncIterator[None]:
        connection = request.protocol
        if timer := self._silent.pop(connection, None):
            timer.cancel()
        self._asking.add(connection)
        try:
            yield
        finally:
            self._asking.discard(connection)
            self._fall_silent(connection)

    def _fall_silent(self, connection: RequestHandler) -> None:
        self._silent[connection] = asyncio.get_running_loop().call_later(HTTP_IDLE_SECONDS, self._end, connection)

    def _end(self, connection: RequestHandler) -> None:
        if timer := self._silent.pop(connection, None):
            timer.cancel()
        if connection.transport:
            connection.transport.abort()  # closing would wait until it has read its answer
