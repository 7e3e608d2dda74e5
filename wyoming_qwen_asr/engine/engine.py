"""The owner of the model process: starts it on the first audio, ends it when idle, replaces it when it fails."""

import asyncio
import logging
from dataclasses import replace
from itertools import count

from ..errors import AsrError, Busy, ModelUnavailable, Stopping
from ..events import Failed, Final, Located, Message, Ready, Working
from ..limits import MAX_RETAINED_BYTES
from ..metrics import Metrics
from ..settings import Settings
from .faults import Breaker, Cause, Patience
from .files import ModelFiles
from .life import Life
from .session import Session, SessionOptions

STATES = ("draining", "checking", "downloading", "broken", "absent", "loading", "ready", "busy")
"""Told to stop; the checkpoint is looked for, or downloaded; the model process keeps failing, and new work is refused
but for trials; there is none, it loads, has nothing to do, works."""

_LOGGER = logging.getLogger(__name__)


class Engine:
    """`run` owns everything; `session` is the door for front ends; `model` and `state` are for info and health."""

    module = "wyoming_qwen_asr.model"
    """What the model process runs; tests have one that fails on command."""
    patience = Patience()

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._files = ModelFiles(settings, self._fail_all)
        self._breaker = Breaker(self.patience)
        self._sessions: dict[int, Session] = {}
        self._numbers = count(1)
        self._wake = asyncio.Event()
        self._life: Life | None = None
        self._draining = False
        self.last_fault: str | None = None
        """How the last model process ended that nobody asked to leave."""
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
        """One of STATES."""
        if self._draining:
            return "draining"
        if not self._files.located:
            return self._files.state
        if self._breaker.open:
            return "broken"
        if not self._life:
            return "absent"
        if not self._life.ready:
            return "loading"
        return "busy" if self._life.working else "ready"

    @property
    def progress(self) -> float | None:
        """Fraction of the download, 0 to 1; None when nothing is downloaded."""
        return self._files.progress

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    @property
    def retained(self) -> int:
        """Bytes of audio that all sessions retain."""
        return sum(session.retained for session in self._sessions.values())

    @property
    def model_pid(self) -> int | None:
        """Of the model process, while there is one."""
        return self._life.pid if self._life else None

    def session(self, options: SessionOptions) -> Session:
        """A new session, to be used as an asynchronous context manager. Raises Busy, ModelUnavailable, Stopping."""
        self._check(options)
        number = next(self._numbers)
        options = replace(options, language=options.language or self._settings.language)
        session = Session(
            *(number, options, self._settings.language_hint),
            *(self._stir, self._closed, lambda: self.retained),
        )
        session.record.loading(not (self._life and self._life.ready))
        self._sessions[number] = session
        if self._idle:
            self._idle.cancel()
        self._stir()
        return session

    def _check(self, options: SessionOptions) -> None:
        """Raises what speaks against another session."""
        if self._draining:
            raise Stopping("the server is stopping")
        most, each = self._settings.max_sessions, self._settings.max_sessions_per_address
        if len(self._sessions) >= most:
            raise Busy(f"{most} sessions are open already")
        if each and sum(session.address == options.address for session in self._sessions.values()) >= each:
            raise Busy(f"{each} sessions from this address are open already")
        if self.retained > MAX_RETAINED_BYTES:
            raise Busy("too much audio is waiting for the model already")
        self._files.check()
        # Last: whoever passes is the trial.
        if refusal := self._breaker.refusal(asyncio.get_running_loop().time()):
            raise refusal

    def drain(self) -> None:
        """From now on there are no new sessions; those that are open come to their end as ever."""
        self._draining = True

    def _stir(self) -> None:
        self._wake.set()
        if self._life:
            self._life.wake()

    def _closed(self, session: Session) -> None:
        if not self._sessions.pop(session.number, None):
            return
        _LOGGER.info("%s", session.record)
        session.record.count(self._metrics)
        if self._life and session.given:
            self._life.forget(session.number)
        self._stir()
        self._rest()

    def _rest(self) -> None:
        """If no session is open, the model process is ended in a while. Its last use does not matter: whoever holds a
        session open may speak any moment."""
        if self._idle:
            self._idle.cancel()
        if not self._sessions and self._settings.idle_seconds:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self._settings.idle_seconds, self._evict)

    def _evict(self) -> None:
        if self._life and not self._sessions:
            _LOGGER.info("Nobody has spoken for %d s: ending the model process", self._settings.idle_seconds)
            self._metrics.evictions.inc()
            self._life.leave()

    def _fail_all(self, error: AsrError) -> None:
        for session in self._sessions.values():
            session.fail(error)

    async def run(self) -> None:
        """Find the checkpoint, then run one model process after another, until cancelled.
        Raises CheckpointError when the checkpoint cannot be used."""
        located = await self._files.locate()
        if self._settings.preload and not self._draining:
            _LOGGER.info("Loading the model before anybody speaks")
            await self._live(located)
        while True:
            while all(session.finished for session in self._sessions.values()):
                self._wake.clear()
                await self._wake.wait()
            if wait := self._breaker.wait(asyncio.get_running_loop().time()):
                _LOGGER.info("The next model process starts in %.1f s", wait)
                await asyncio.sleep(wait)  # those who leave meanwhile are missed at the next turn
            else:
                await self._live(located)

    async def _live(self, located: Located) -> None:
        """One model process, from its start to its end."""
        settings = self._settings
        args = (
            *(f"--model={located.path}", f"--name={located.name}", f"--device={settings.device}"),
            *(f"--dtype={settings.dtype}", f"--threads={settings.threads}", f"--log-level={settings.log_level}"),
            *(f"--window-seconds={settings.window_seconds}", f"--chunk-size-sec={settings.chunk_size_sec}"),
            *(
                f"--unfixed-chunk-num={settings.unfixed_chunk_num}",
                f"--unfixed-token-num={settings.unfixed_token_num}",
            ),
        )
        self._metrics.loads.inc()
        life = self._life = Life(self._sessions, self.patience, self._hear)
        try:
            end = await life.run(self.module, args, located.languages)
        except Busy as error:
            _LOGGER.error("The model process: %s", error)
            self._fail_all(error)
            return
        finally:
            self._life = None
        self._bury(life, *(end or (None, 0)))

    def _hear(self, message: Message, number: int) -> None:
        """What the model process says, besides what only concerns itself."""
        match message:
            case Ready():
                self._metrics.load_seconds.observe(message.seconds)
                for each in self._sessions.values():
                    each.record.loading(False)
                _LOGGER.info("Model ready after %.1f s: %s", message.seconds, "; ".join(message.choices))
                self._rest()
            case Working():
                for each in self._sessions.values():
                    each.record.working(each.number in message.sessions)
            case Failed():
                pass  # its end tells more
            case _:
                if session := self._sessions.get(number):  # or it has gone meanwhile
                    session.deliver(message)
                    if isinstance(message, Final):
                        self._breaker.success()

    def _bury(self, life: Life, cause: Cause | None, code: int) -> None:
        """What the end of a model process means for the sessions that are open, and for the next process. No cause: it
        was asked to leave."""
        now = asyncio.get_running_loop().time()
        if cause:
            self._metrics.faults.labels(cause.value).inc()
            left = sum(not session.finished for session in self._sessions.values())
            status = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.last_fault = f"{cause} ({status})"
            _LOGGER.error("The model process died: %s; %d sessions are open", self.last_fault, left)
        was_open = self._breaker.open
        if cause is Cause.CANNOT_LOAD:
            reason = life.failure.message if life.failure else "no reason given"
            _LOGGER.error("The model cannot be loaded: %s", reason)
            self._breaker.trip(now, f"the model cannot be loaded: {reason}")
            self._fail_all(ModelUnavailable(reason))
        elif cause and cause is not Cause.KILLED:
            self._breaker.fault(now, f"the model process keeps failing ({cause})")
        for session in self._sessions.values():
            if not session.given:
                session.record.loading(True)
            elif not session.finished:
                struck = cause is not None and cause.strikes and session.number in life.working
                self._metrics.strikes.inc(struck)
                session.restart(struck=struck, killed=cause is Cause.KILLED)
                self._metrics.replays.inc(not session.finished)
        if self._breaker.open and not was_open:
            _LOGGER.error("New work is refused for %.0f s: the model process keeps failing", self.patience.trial)
        elif was_open and self._breaker.open and cause and cause is not Cause.KILLED:
            # Those who were here when it opened have had their trial.
            self._fail_all(self._breaker.unavailable())
