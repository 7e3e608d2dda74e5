"""The answer to one utterance: `transcript-start`, a `transcript-chunk` for every bit of text that will not change,
`transcript` with all of it, `transcript-stop`.

Older clients know `transcript` alone. Home Assistant closes its connection after that, and before 2026.10 it reads
nothing until it has sent its `audio-stop`.
"""

import asyncio
import contextlib

from wyoming.asr import Transcript, TranscriptChunk, TranscriptStart, TranscriptStop

from ..engine.session import Session
from ..errors import TimedOut
from ..events import Final, Partial, write_event
from ..text import language_code


class Answer:
    """`run` gives that of a session; `end` alone says what does not need one."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._started = False
        self._untold = ""  # bounded like the session's text

    async def run(self, session: Session) -> None:
        """From the session's first result to its last. Raises AsrError, and OSError when the client is gone."""
        async for result in session.results():
            match result:
                case Partial():
                    await self.more(result.stable_delta, session.language)
                case Final():
                    await self.end(result.text, result.language)

    async def more(self, text: str, language: str | None) -> None:
        """Text goes on. While the client does not read, it is kept for a later chunk: whoever only reads after his
        `audio-stop` is neither waited for nor given up."""
        self._untold += text
        if self._untold and not self._writer.transport.get_write_buffer_size():
            await self._tell(language)

    async def end(self, text: str, language: str | None) -> None:
        """This is all of it."""
        await self._tell(language)
        await write_event(self._writer, Transcript(text=text, language=language_code(language)).event())
        with contextlib.suppress(OSError, TimedOut):  # the client has what it waited for, and may be gone
            await write_event(self._writer, TranscriptStop().event())

    async def _tell(self, language: str | None) -> None:
        """What is not told yet, after the start of it all."""
        if not self._started:
            self._started = True
            await write_event(self._writer, TranscriptStart(language=language_code(language)).event())
        if self._untold:
            chunk, self._untold = self._untold, ""
            await write_event(self._writer, TranscriptChunk(chunk).event())
