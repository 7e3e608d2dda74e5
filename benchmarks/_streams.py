"""Load on a server, from a process of its own: `python -m benchmarks._streams PORT STREAMS`.

Says "going" once every stream has had a transcript, and goes on until it is killed.
"""

import asyncio
import sys
from itertools import cycle, islice

from tests.conftest import Client, load_recordings, send_audio, transcript_of


async def main(port: int, streams: int) -> None:
    audio = [recording.pcm for recording in load_recordings()]
    waiting = set(range(streams))

    async def stream(number: int) -> None:
        async with Client("127.0.0.1", port) as client:
            for pcm in islice(cycle(audio), number, None):
                await send_audio(client, pcm)
                await transcript_of(client)
                if waiting:
                    waiting.discard(number)
                    if not waiting:
                        print("going", flush=True)

    await asyncio.gather(*map(stream, range(streams)))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
