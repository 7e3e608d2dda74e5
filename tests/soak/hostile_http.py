"""Hostile requests to the file endpoint: each is answered as OpenAI's clients expect, and none hurts another."""

import asyncio
import contextlib
import json
from random import Random
from urllib.parse import urlsplit

from tests.conftest import Server, load_recordings

from .service import heard_alone, honest, model_processes, rss, running, settled
from .tally import Size, Tally
from .uploads import SERVED, Request, file, listed, mutated, post, wav

AT_ONCE = 4

ANSWER_SECONDS = 60.0
"""What takes longer hangs, and so does the rest."""

MAX_GROWTH = 30.0
"""MB of the gateway's memory."""


async def hostile_http(size: Size, rng: Random, tally: Tally) -> str:
    """4xx in the envelope, or the text where the request can still be understood; never a 5xx."""
    recordings = load_recordings()
    pcm = recordings[3].pcm
    async with running(tally) as server:
        texts = await heard_alone(server, recordings[3:4], tally)
        before, models = rss(server.process.pid), model_processes(server)
        requests = [*listed(pcm), *(mutated(rng, pcm) for _ in range(size.forms))]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(request: Request) -> None:
            async with places:
                await _try(server, request, tally)
                tally.read_log(server, f" around {request.name!r}")

        async with asyncio.TaskGroup() as clients:
            for request in requests:
                clients.create_task(one(request))
        await settled(server, tally)
        tally.sessions += len(requests)
        tally.require(model_processes(server) == models, "the model process did not survive")
        growth = rss(server.process.pid) - before
        tally.require(growth < MAX_GROWTH, f"the gateway has grown by {growth:.1f} MB")
        await honest(server, pcm, texts[0], tally, "after hostile requests")
        await _try(server, Request("an honest upload", post(file(wav(pcm))), SERVED), tally)
    return (
        f"{len(requests)} hostile requests: {tally.refused} refused in OpenAI's form or before it, "
        f"gateway grew by {growth:.1f} MB"
    )


async def _try(server: Server, request: Request, tally: Tally) -> None:
    """Send it and judge the answer. Raises AssertionError when there is none."""
    address = urlsplit(server.http)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    hearing = asyncio.create_task(_hear(reader))
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            with contextlib.suppress(ConnectionError):
                writer.write(request.data)
                await writer.drain()
            if request.hang_up:
                return
            answer = await hearing
    except TimeoutError:
        raise AssertionError(f"{request.name}: no answer to {request.data[:300]!r}") from None
    finally:
        hearing.cancel()
        writer.close()
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    if wrong := _wrong(request, head, body):
        tally.fail(f"{request.name}: {wrong}: {answer[-200:]!r}\nto {request.data[:300]!r}", kind=request.name + wrong)
    tally.refused += not head.startswith(b"HTTP/1.1 200 ")


async def _hear(reader: asyncio.StreamReader) -> bytes:
    """All that is answered, even if the connection is reset after it."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while some := await reader.read(1 << 16):
            answer += some
    return answer


def _wrong(request: Request, head: bytes, body: bytes) -> str | None:
    """What is wrong with an answer."""
    try:
        protocol, status, *_ = head.split(None, 2)
        if int(status) not in request.statuses:
            return f"answered {status.decode()}"
        if not request.envelope:
            return None
        if protocol != b"HTTP/1.1":
            return f"answered in {protocol.decode()}"
        answer = json.loads(body)
        if int(status) == 200:
            return None if isinstance(answer["text"], str) else "no text"
        error = answer["error"]
        if error.keys() != {"message", "type", "param", "code"} or not error["message"]:
            return "not OpenAI's envelope"
        leaks = [word for word in ("/tmp", "Traceback", ".py") if word in error["message"]]
        return f"the message tells of {leaks[0]}" if leaks else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return "not OpenAI's envelope"
