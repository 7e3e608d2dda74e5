"""One model process, from its start to its end: what it is told, what it says, and whether it still gets on."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from ..errors import TimedOut
from ..events import BadEvent, Failed, Message, Ready, SessionCancel, SessionStart, Working, from_event
from ..process import STOP_SECONDS, Child
from .faults import Cause, Patience, cause_of, oom_kills
from .session import Session

_LOGGER = logging.getLogger(__name__)


class Life:
    """`run` lives it. `sessions` are those that are open, kept by the engine; `hear` is told what concerns one of them,
    or that the model is ready."""

    def __init__(
        self,
        sessions: Mapping[int, Session],
        patience: Patience,
        hear: Callable[[Message, int], None],
    ) -> None:
        self._sessions = sessions
        self._patience = patience
        self._hear = hear
        self._child: Child | None = None
        self._pumping: asyncio.Task[None] | None = None
        self._loaded = asyncio.Event()
        self._news = asyncio.Event()
        self._cancelled: list[int] = []  # sessions it has yet to be told to forget
        self._verdict: Cause | None = None  # why we end it
        self._over = False
        self.failure: Failed | None = None
        """Why it cannot load."""
        self.working: list[int] = []
        """The sessions that are being computed."""
        self._began = self._heard = asyncio.get_running_loop().time()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._loaded.is_set()

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def wake(self) -> None:
        """A session has something for it."""
        self._news.set()

    def forget(self, number: int) -> None:
        """Nobody waits for this session any more."""
        self._cancelled.append(number)
        self._news.set()

    def leave(self) -> None:
        """Ask it to go; what does not is killed. What sessions have for it now is for the next one."""
        if self._child and self._pumping:
            self._pumping.cancel()
            self._child.close_stdin()
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._child.kill)

    async def run(self, module: str, args: Sequence[str], languages: Sequence[str]) -> tuple[Cause, int] | None:
        """Start it and wait for its end: the cause and the exit code, None when it was asked to leave.
        Raises Busy when the machine has no room for another process."""
        kills = oom_kills()
        child = self._child = await Child.spawn(module, *args)
        _LOGGER.info("Model process %d started", child.pid)
        pump = self._pumping = asyncio.create_task(self._pump(child, languages))
        pump.add_done_callback(lambda _: child.kill() if not child.asked_to_leave else None)  # none talks to it
        watch = asyncio.create_task(self._watch(child))
        try:
            async for event in child.events():
                self._heard = asyncio.get_running_loop().time()
                self._understand(*from_event(event))
        except BadEvent as error:
            if not child.gone:  # half an event is what a process leaves that died while it spoke
                _LOGGER.error("The model process talks nonsense: %s", error)
                self._verdict = self._verdict or Cause.NONSENSE
                child.kill()
        finally:
            self._over = True
            left = child.asked_to_leave
            for task in (pump, watch):
                task.cancel()
            code = await child.stop()
        if self._verdict:
            return self._verdict, code
        return None if left else (cause_of(code, out_of_memory=oom_kills() > kills), code)

    def _understand(self, message: Message, number: int) -> None:
        match message:
            case Ready():
                self._loaded.set()
            case Failed():
                self.failure = message
            case Working():
                self._judge(message.sessions)
        self._hear(message, number)

    def _judge(self, working: list[int]) -> None:
        """A suspect that was computed and now is not, has come through."""
        for number in set(self.working) - set(working):
            if (session := self._sessions.get(number)) and session.all_sent:
                session.tries.acquit(proven=True)
        self.working = working
        self._news.set()

    async def _pump(self, child: Child, languages: Sequence[str]) -> None:
        """Tell it what the sessions have for it, each in turn, until it is gone."""
        try:
            await self._loaded.wait()  # until then they keep their audio; `_watch` has the deadline
            while True:
                self._news.clear()
                said = False
                while self._cancelled:
                    await child.send(SessionCancel(), self._cancelled.pop(), None, self._patience.hang)
                for session in self._admitted():
                    if outgoing := session.outgoing(languages):
                        message, payload = outgoing
                        if isinstance(message, SessionStart) and session.tries.suspect:
                            asyncio.get_running_loop().call_later(self._patience.alone, self._release, session)
                        await child.send(message, session.number, payload, self._patience.hang)
                        said = True
                if not said:
                    await self._news.wait()
        except ConnectionError:
            pass  # it is gone: the reading side knows why
        except TimedOut:
            await self._end(child, "does not read", spare=False)  # an event was cut off

    def _admitted(self) -> list[Session]:
        """Whose audio may be computed now: while there are suspects, one of them alone. So who is to blame shows, and
        poisoned audio takes nobody with it twice."""
        suspects = (each for each in self._sessions.values() if each.tries.suspect and not each.finished)
        return list(islice(suspects, 1)) or list(self._sessions.values())

    def _release(self, session: Session) -> None:
        """It has kept the others waiting for long enough."""
        if not self._over:
            session.tries.acquit(proven=False)
            self._news.set()

    async def _watch(self, child: Child) -> None:
        """End a process that does not get on."""
        loop = asyncio.get_running_loop()
        while not self._verdict:
            due = self._due()
            left = due - loop.time() if due is not None else self._patience.hang
            if left > 0:
                await asyncio.sleep(min(left, self._patience.hang / 2))  # nothing that begins meanwhile is due sooner
            else:
                doing = "has said nothing while there was work" if self.ready else "has not loaded in time"
                since = self._heard if self.ready else self._began
                await self._end(child, f"{doing}, for {loop.time() - since:.0f} s", spare=self.ready)

    def _due(self) -> float | None:
        """When it has been silent for too long, by the loop's clock; None while it has nothing to do.

        That a process answers pings would prove little: its main thread may loop for ever. What counts is progress: a
        process with work says at least once a second that a unit of it is done.
        """
        if not self.ready:
            return self._began + self._patience.load
        given = [session for session in self._sessions.values() if session.given and not session.finished]
        since = self._heard
        if not self.working:
            ends = [session.end_sent for session in given if session.end_sent is not None]
            if not ends:
                return None
            since = max(since, min(ends))
        return since + self._patience.hang_after(max((session.pending for session in given), default=0.0))

    async def _end(self, child: Child, what: str, *, spare: bool) -> None:
        """Have it write where it hangs, then kill it and whatever it started. With `spare`, one that says something
        meanwhile only slept, with all of the machine perhaps, and may go on."""
        heard = self._heard
        _LOGGER.error("The model process %s", what)
        self._verdict = Cause.HANG  # before the signal: a process that has not come far dies of it
        child.dump()
        await asyncio.sleep(self._patience.dump)
        if spare and self._heard > heard:
            _LOGGER.warning("The model process goes on")
            self._verdict = None
        else:
            child.kill()
