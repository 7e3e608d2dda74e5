"""The HTTP sidecar: an aiohttp application on the same engine as Wyoming."""

import logging

from aiohttp import web

from ..engine.engine import Engine
from ..limits import DRAIN_SECONDS
from ..values import HostPort
from .openai import OpenAI, error_middleware


class HttpServer:
    """`listen`, `close`."""

    def __init__(self, engine: Engine) -> None:
        # It logs a traceback for every request that is not HTTP; faults of ours are logged by the middleware.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        app = web.Application(middlewares=[error_middleware])
        api = OpenAI(engine)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", api.models)
        app.router.add_post("/v1/audio/transcriptions", api.transcriptions)
        self._engine = engine
        self._runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,  # a gzip body could be a bomb
            handler_cancellation=True,  # what nobody waits for is not computed
            shutdown_timeout=DRAIN_SECONDS,
        )

    async def listen(self, address: HostPort) -> HostPort:
        """Serve from now on; where that came to be (port 0 is any). Raises OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, address.host, address.port)
        await site.start()
        return HostPort(address.host, self._runner.addresses[0][1])

    async def close(self) -> None:
        """Take no new requests, let those under way come to their end."""
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        """Alive is healthy: a model that sleeps, loads or is being downloaded needs no restart of the server."""
        engine = self._engine
        return web.json_response(
            {
                "status": "ok",
                "model": engine.model.name if engine.model else None,
                "state": engine.state,
                "download": engine.progress,
                "sessions": engine.sessions,
            }
        )
