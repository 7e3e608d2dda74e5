"""What a replay has to know: what its client already has, and how often it was tried. Pure."""

from ..errors import AsrError, ModelFailed
from ..events import Partial
from ..limits import MAX_REPLAYS, MAX_STRIKES, REPLAY_SECONDS


class Cursor:
    """What a client already has of the segment that is being recognised: stable text is never taken back, and never
    said twice. After `restart` the new model process decodes freely from the segment's beginning; what it says is held
    back until it has said again what was emitted. Where it says something else, nothing more of this segment is
    emitted: the segment itself tells the truth soon."""

    def __init__(self) -> None:
        self._emitted = ""  # bounded like a segment's text: half a minute of speech
        self._heard = ""  # of the present model process

    def partial(self, partial: Partial) -> Partial | None:
        """What of it the client should see."""
        self._heard += partial.stable_delta
        if not self._heard.startswith(self._emitted):
            return None
        delta = self._heard[len(self._emitted) :]
        self._emitted = self._heard
        return Partial(delta, partial.tail)

    def segment(self) -> None:
        """The segment is delivered; the next one begins."""
        self._emitted = self._heard = ""

    def restart(self) -> None:
        """Another model process goes on, from the beginning of the segment."""
        self._heard = ""


class Tries:
    """Of one session with one model process after another. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.replays = 0
        self.strikes = 0
        self.suspect = False
        """It was computed when a model process crashed, hung or ran out of memory, and has not come through since, so
        it is computed alone."""
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """A model process is given the audio."""
        if self.replays:
            self._since = now

    def died(self, now: float, *, struck: bool) -> AsrError | None:
        """That process is gone; an error when another try is not worth it. `struck`: it failed by itself, while it
        computed this session."""
        if self._since is not None:
            self._seconds += now - self._since
            self._since = None
        if struck:
            self.strikes += 1
            self.suspect = True
            if self.strikes >= MAX_STRIKES:
                return ModelFailed("the model process fails over this audio")
        if self.replays >= MAX_REPLAYS or self._seconds > REPLAY_SECONDS:
            return ModelFailed("the model process died over this audio again and again")
        self.replays += 1
        return None

    def acquit(self, *, proven: bool) -> None:
        """It is no suspect any more; with proof (it was computed, and nothing happened) what was, was others' fault."""
        self.suspect = False
        if proven:
            self.strikes = 0
