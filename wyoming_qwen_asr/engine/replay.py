"""What a replay has to know: what its client already has, and how often it was tried. Pure."""

from ..errors import AsrError, ModelFailed
from ..events import Final, Partial, Result, Segment
from ..limits import MAX_REPLAYS, MAX_STRIKES, REPLAY_SECONDS
from ..text import agreement, join, separator


class Cursor:
    """What a client has of a session's text: the deltas of the Partials that `take` returns are, one after another, the
    text of the final. Stable text is never taken back, and never said twice. After `restart` the new model process
    decodes freely from the end of the last segment on; what it says is held back until it has said again what was
    emitted. Where it says something else, nothing is emitted until a segment tells the truth. Where that differs too,
    what was emitted is wrong for good: there is not another delta, and the final is what counts."""

    def __init__(self) -> None:
        self._text = ""  # of the segments that were delivered
        self._kept = 0  # characters of it from model processes that are gone
        self._heard = ""  # of the segment under way, from the present model process
        self._ahead = ""  # what was emitted beyond `_text`: bounded like a segment's text
        self.retracted = 0
        """Characters that were emitted and that the final does not begin with. It must be 0."""

    def take(self, result: Result) -> list[Result]:
        """What the client should see when the model process says this."""
        match result:
            case Partial():
                return self._partial(result)
            case Segment():
                more = separator(self._text, result.text) + result.text
                self._text += more
                self._heard = ""
                return [*self._certain(more), result]
            case Final():
                text = join([self._text[: self._kept], result.text])
                known = agreement(self._text, text)
                self._ahead = self._text[known:] + self._ahead  # of a process that changes its mind
                rest = self._certain(text[known:])
                self.retracted = self.retracted or len(self._ahead)
                return [*rest, Final(text, result.language)]
        return [result]

    def _partial(self, partial: Partial) -> list[Result]:
        self._heard += partial.stable_delta
        text = separator(self._text, self._heard) + self._heard
        if self.retracted or not text.startswith(self._ahead):
            return []
        delta, self._ahead = text[len(self._ahead) :], text
        lead = "" if text else separator(self._text, partial.tail)
        return [Partial(delta, lead + partial.tail)]

    def _certain(self, more: str) -> list[Result]:
        """The text goes on with this. Returned is what of it the client does not have yet."""
        same = agreement(self._ahead, more)
        if self.retracted or same < min(len(self._ahead), len(more)):
            self.retracted = self.retracted or len(self._ahead) - same
            return []
        self._ahead = self._ahead[same:]  # the next segment may say it: another process may cut elsewhere
        return [Partial(more[same:], "")] if more[same:] else []

    def restart(self) -> None:
        """Another model process goes on from the end of the last segment."""
        self._heard = ""
        self._kept = len(self._text)


class Tries:
    """Of one session with one model process after another. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.replays = 0
        self.strikes = 0
        self.suspect = False
        """It was computed when a model process crashed, hung or ran out of memory, and has not come through since, so
        it is computed alone."""
        self._failures = 0
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """A model process is given the audio."""
        if self.replays:
            self._since = now

    def died(self, now: float, *, struck: bool, killed: bool = False) -> AsrError | None:
        """That process is gone; an error when another try is not worth it. `struck`: it failed by itself, while it
        computed this session. `killed`: from outside, which says nothing about this session and costs it only time."""
        if self._since is not None:
            self._seconds += now - self._since
            self._since = None
        if struck:
            self.strikes += 1
            self.suspect = True
            if self.strikes >= MAX_STRIKES:
                return ModelFailed("the model process fails over this audio")
        self._failures += not killed
        if self._failures > MAX_REPLAYS or self._seconds > REPLAY_SECONDS:
            return ModelFailed("the model process died over this audio again and again")
        self.replays += 1
        return None

    def acquit(self, *, proven: bool) -> None:
        """It is no suspect any more; with proof (it was computed, and nothing happened) what was, was others' fault."""
        self.suspect = False
        if proven:
            self.strikes = 0
