"""The owner of the model process: starts it on the first audio, ends it when idle, replaces it when it dies."""

import asyncio
import logging
from dataclasses import replace
from itertools import count

from ..errors import AsrError, Busy, ModelUnavailable, TimedOut
from ..events import WRITE_SECONDS, BadEvent, Failed, Final, Located, Message, Ready, SessionCancel, from_event
from ..limits import FINAL_SECONDS, LOAD_SECONDS, MAX_SESSIONS
from ..process import STOP_SECONDS, Child
from ..settings import Settings
from .files import ModelFiles
from .session import Session, SessionOptions

MAX_BACKOFF_SECONDS = 10.0
"""Between the deaths of one model process and the start of the next; people are waiting."""

_LOGGER = logging.getLogger(__name__)


class Engine:
    """`run` owns everything; `session` is the door for front ends; `model` and `state` are for info and health."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = ModelFiles(settings, self._fail_all)
        self._sessions: dict[int, Session] = {}
        self._numbers = count(1)
        self._wake = asyncio.Event()
        self._cancelled: list[int] = []  # sessions the model process has yet to be told to forget
        self._child: Child | None = None
        self._ready = False
        self._heard = 0.0  # when the model process said something, by the loop's clock
        self._faults = 0  # in a row
        self._idle: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """The model's name; until the checkpoint is found, what the setting says."""
        return self._files.located.name if self._files.located else self._settings.model

    @property
    def model(self) -> Located | None:
        """The checkpoint, once it is known to be complete on disk."""
        return self._files.located

    @property
    def state(self) -> str:
        """One of "checking", "downloading", "idle", "loading", "ready"."""
        if not self._files.located:
            return self._files.state
        if self._child is None:
            return "idle"
        return "ready" if self._ready else "loading"

    @property
    def progress(self) -> float | None:
        """Fraction of the download, 0 to 1; None when nothing is downloaded."""
        return self._files.progress

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    def session(self, options: SessionOptions) -> Session:
        """A new session, to be used as an asynchronous context manager. Raises Busy, ModelUnavailable."""
        if len(self._sessions) >= MAX_SESSIONS:
            raise Busy(f"{MAX_SESSIONS} sessions are open already")
        self._files.check()
        number = next(self._numbers)
        options = replace(options, language=options.language or self._settings.language)
        session = Session(number, options, self._settings.language_hint, self._wake.set, self._overdue, self._closed)
        self._sessions[number] = session
        if self._idle:
            self._idle.cancel()
        self._wake.set()
        return session

    def _closed(self, session: Session) -> None:
        if not self._sessions.pop(session.number, None):
            return
        self._cancelled.append(session.number)
        self._wake.set()
        if not self._sessions and self._settings.idle_seconds:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._settings.idle_seconds, self._evict)

    def _evict(self) -> None:
        if self._child and not self._sessions:
            _LOGGER.info("Nobody has spoken for %d s: ending the model process", self._settings.idle_seconds)
            self._child.close_stdin()
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._child.kill)

    def _overdue(self, session: Session) -> None:
        """A session's time is up. If the model process has been silent all the while, it hangs."""
        session.fail(TimedOut("no transcript in time"))
        if self._child and asyncio.get_running_loop().time() - self._heard > FINAL_SECONDS:
            _LOGGER.error("The model process has said nothing for %.0f s: it hangs", FINAL_SECONDS)
            self._child.kill()

    def _fail_all(self, error: AsrError) -> None:
        for session in self._sessions.values():
            session.fail(error)

    async def run(self) -> None:
        """Find the checkpoint, then run one model process after another, until cancelled.
        Raises CheckpointError when the checkpoint cannot be used."""
        located = await self._files.locate()
        while True:
            while all(session.finished for session in self._sessions.values()):
                self._wake.clear()
                await self._wake.wait()
            await self._live(located)
            if self._faults:
                await asyncio.sleep(min(self._faults - 1, MAX_BACKOFF_SECONDS))

    async def _live(self, located: Located) -> None:
        """One model process, from its start to its end."""
        settings = self._settings
        try:
            child = self._child = await Child.spawn(
                "wyoming_qwen_asr.model",
                *(f"--model={located.path}", f"--name={located.name}", f"--device={settings.device}"),
                *(f"--dtype={settings.dtype}", f"--threads={settings.threads}", f"--log-level={settings.log_level}"),
            )
        except Busy as error:
            _LOGGER.error("The model process: %s", error)
            self._faults += 1
            self._fail_all(error)
            return
        _LOGGER.info("Model process %d started: %s", child.pid, located.name)
        self._cancelled.clear()
        overdue = asyncio.get_running_loop().call_later(LOAD_SECONDS, self._load_overdue)
        pump = asyncio.create_task(self._pump(child, located.languages))
        pump.add_done_callback(lambda _: child.kill() if not child.asked_to_leave else None)  # none talks to it
        failure: Failed | None = None
        try:
            async for event in child.events():
                message, number = from_event(event)
                self._heard = asyncio.get_running_loop().time()
                match message:
                    case Ready():
                        self._ready = True
                        overdue.cancel()
                        _LOGGER.info("Model ready after %.1f s: %s", message.seconds, "; ".join(message.choices))
                    case Failed():
                        failure = message
                    case _:
                        self._deliver(message, number)
        except BadEvent as error:
            _LOGGER.error("Model process: %s", error)
        finally:
            self._child = None
            self._ready = False
            overdue.cancel()
            pump.cancel()
            evicted = child.asked_to_leave
            code = await child.stop()
        self._bury(code, failure, evicted=evicted)

    def _deliver(self, message: Message, number: int) -> None:
        """Hand a result to its session, unless that has gone meanwhile."""
        if session := self._sessions.get(number):
            session.deliver(message)
            if isinstance(message, Final):
                self._faults = 0

    def _bury(self, code: int, failure: Failed | None, *, evicted: bool) -> None:
        """What the end of a model process means for the sessions that are open."""
        if failure:
            _LOGGER.error("The model cannot be loaded: %s", failure.message)
        elif not evicted:
            self._faults += 1
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            _LOGGER.error("The model process died (%s); %d sessions go to the next one", cause, len(self._sessions))
        for session in self._sessions.values():
            if failure:
                session.fail(ModelUnavailable(failure.message))
            else:
                session.restart(blame=not evicted)

    def _load_overdue(self) -> None:
        _LOGGER.error("The model has not loaded within %.0f s", LOAD_SECONDS)
        if self._child:
            self._child.kill()

    async def _pump(self, child: Child, languages: list[str]) -> None:
        """Tell the model process what the sessions have for it, each in turn, until it is gone."""
        try:
            while True:
                self._wake.clear()
                said = False
                # While it loads it may not read for long: importing torch from a slow disk holds Python's lock.
                seconds = WRITE_SECONDS if self._ready else LOAD_SECONDS
                while self._cancelled:
                    await child.send(SessionCancel(), self._cancelled.pop(), None, seconds)
                for session in list(self._sessions.values()):
                    if outgoing := session.outgoing(languages):
                        message, payload = outgoing
                        await child.send(message, session.number, payload, seconds)
                        said = True
                if not said:
                    await self._wake.wait()
        except ConnectionError:
            pass  # it is gone: the reading side knows why
        except TimedOut:
            _LOGGER.error("The model process does not read: it hangs")
