"""The HTTP sidecar: an aiohttp application on the same engine as Wyoming."""

import asyncio
import contextlib
import logging

from aiohttp import web

from ..engine.engine import STATES, Engine
from ..limits import DRAIN_SECONDS
from ..metrics import CONTENT_TYPE, Metrics
from ..settings import Settings
from ..values import HostPort
from .connections import Connections
from .openai import OpenAI, errors_in_envelopes

CLOSE_SECONDS = 1.0
"""For answers to get out, once the time for requests is over."""

NOT_READY = {
    "checking": "the model's files are being checked",
    "downloading": "the model is being downloaded",
    "broken": "the model process keeps failing",
    "draining": "the server is stopping",
}
"""States in which an utterance would get an error, and what to say about them."""


class HttpServer:
    """`listen`, `close`."""

    def __init__(self, engine: Engine, metrics: Metrics, settings: Settings) -> None:
        # It logs a traceback for every request that is not HTTP; faults of ours are logged by the middleware.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        self._engine = engine
        self._metrics = metrics
        self._connections = Connections(metrics, settings.max_connections)
        self._listener: asyncio.Server | None = None
        self._api = OpenAI(engine, settings)
        app = web.Application(middlewares=[errors_in_envelopes(metrics, self._connections)])
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._text)
        app.router.add_get("/v1/models", self._api.models)
        app.router.add_post("/v1/audio/transcriptions", self._api.transcriptions)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,  # a gzip body could be a bomb
            handler_cancellation=True,  # what nobody waits for is not computed
            shutdown_timeout=CLOSE_SECONDS,
        )
        metrics.gauge("http_connections", "Open HTTP connections", lambda: len(self._connections))
        metrics.gauge("sessions", "Open sessions", lambda: engine.sessions)
        metrics.gauge("retained_bytes", "Audio whose text is not delivered", lambda: engine.retained)
        metrics.gauge(
            "download_ratio", "Of the model, 1 when it is there", lambda: 1.0 if engine.model else _done(engine)
        )
        metrics.state(STATES, lambda: engine.state)
        metrics.model_process(lambda: engine.model_pid)

    async def listen(self, address: HostPort) -> HostPort:
        """Serve from now on; where that came to be (port 0 is any). Raises OSError."""
        await self._runner.setup()
        assert self._runner.server
        self._connections.serve(self._runner.server)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._connections.accept, address.host, address.port)
        return HostPort(address.host, self._listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Let the requests under way come to their end, answering /health and /ready meanwhile; new work is refused by
        the engine. Then take no new requests."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._api.places.empty()
        if self._listener:
            self._listener.close()
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
                "last_fault": engine.last_fault,
            }
        )

    async def _ready(self, request: web.Request) -> web.Response:
        """Whether an utterance would be taken and answered. One for which the model has to load first would."""
        state = self._engine.state
        if reason := NOT_READY.get(state):
            answer = {"ready": False, "state": state, "reason": reason}
            return web.json_response(answer, status=503, headers={"Retry-After": "5"})
        return web.json_response({"ready": True, "state": state})

    async def _text(self, request: web.Request) -> web.Response:
        """For Prometheus."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _done(engine: Engine) -> float:
    return engine.progress or 0.0
