"""The Wyoming server: TCP, Unix sockets, stdin and stdout."""

import asyncio
import contextlib
import socket
from pathlib import Path
from urllib.parse import urlsplit

from ..engine.engine import Engine
from ..errors import Busy, TimedOut
from ..events import READER_LIMIT
from ..metrics import Metrics
from ..values import HostPort
from .connection import LINGER_SECONDS, Connection


class WyomingServer:
    """All addresses Wyoming is served at."""

    def __init__(self, engine: Engine, metrics: Metrics, max_connections: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self._max_connections = max_connections
        metrics.gauge("wyoming_connections", "Open Wyoming connections", lambda: len(self._connections))
        self._listeners: list[asyncio.Server] = []
        self._sockets: list[Path] = []
        self._connections: set[Connection] = set()

    async def listen(self, uri: str) -> HostPort | None:
        """Serve at a URI from now on; for tcp, where that came to be. Raises OSError."""
        parts = urlsplit(uri)
        if parts.scheme == "unix":
            path = Path(parts.netloc + parts.path)
            self._listeners.append(await asyncio.start_unix_server(self._accept, sock=_bound(path), limit=READER_LIMIT))
            self._sockets.append(path)
            return None
        assert parts.hostname is not None
        listener = await asyncio.start_server(self._accept, parts.hostname, parts.port, limit=READER_LIMIT)
        self._listeners.append(listener)
        return HostPort(parts.hostname, listener.sockets[0].getsockname()[1])

    async def serve_stdio(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection on stdin and stdout, until stdin ends, however long it is silent."""
        await self._serve(Connection(self._engine, self._metrics, reader, writer, "stdio", idle_seconds=None))

    async def close(self, seconds: float) -> None:
        """Take no new connections and wait so long for the utterances that are under way."""
        for listener in self._listeners:
            listener.close()
        for connection in self._connections:
            connection.leave()
        await self._closed(seconds)
        for connection in self._connections:
            connection.interrupt(TimedOut("the server is stopping"))
        await self._closed(2 * LINGER_SECONDS)
        for path in self._sockets:
            path.unlink(missing_ok=True)

    async def _closed(self, seconds: float) -> None:
        """Wait for the connections, but no longer."""
        if self._connections:
            await asyncio.wait([connection.task for connection in self._connections], timeout=seconds)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")  # an address and a port; "" from a Unix socket
        connection = Connection(self._engine, self._metrics, reader, writer, peer[0] if peer else "unix socket")
        if len(self._connections) >= self._max_connections and not self._make_room():
            await connection.refuse(Busy(f"{self._max_connections} connections are open already, all with a session"))
            return
        await self._serve(connection)

    def _make_room(self) -> bool:
        """The connection without a session that has been silent for longest gives way, if there is one: whoever opens
        hundreds and says nothing keeps nobody out."""
        idle = [connection for connection in self._connections if not connection.has_session]
        if not idle:
            return False
        longest = min(idle, key=lambda connection: connection.heard)
        self._connections.discard(longest)  # at once: the next one may come before this one has left
        self._metrics.gave_way.inc()
        longest.abort()
        return True

    async def _serve(self, connection: Connection) -> None:
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


def _bound(path: Path) -> socket.socket:
    """A Unix socket at a path. One that a killed server left behind is replaced, one that is served is not, where
    asyncio would replace both. Raises OSError."""
    if path.is_socket():
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
    bound = socket.socket(socket.AF_UNIX)
    try:
        bound.bind(str(path))
    except BaseException:
        bound.close()
        raise
    return bound
