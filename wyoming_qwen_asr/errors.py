"""Every failure a user can meet: one tree, translated once per front end.

`code` is for machines (Wyoming's `error.code`, OpenAI's `error.code`), `status` is the HTTP status,
`retryable` says whether the same request may succeed later. The message is for a person and never holds
a path, a stack trace or a secret.
"""


class AsrError(Exception):
    """Base of the tree; on its own, a fault of ours."""

    code = "internal-error"
    status = 500
    retryable = True
    retry_after = 5
    """Seconds after which another try makes sense, where one does."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """Which part of the request is wrong, where the client's dialect can say so."""


class BadRequest(AsrError):
    """The client asked for something that makes no sense."""

    code = "bad-request"
    status = 400
    retryable = False


class BadAudio(BadRequest):
    """The audio cannot be read, or its format is not one we take."""

    code = "bad-audio"


class TooLarge(BadRequest):
    """The audio exceeds a limit."""

    code = "too-large"
    status = 413


class Busy(AsrError):
    """A limit on simultaneous work is reached."""

    code = "busy"
    status = 429


class TimedOut(AsrError):
    """No result within the deadline."""

    code = "timeout"
    status = 504


class ModelUnavailable(AsrError):
    """The model is being downloaded, or its process keeps failing."""

    code = "model-unavailable"
    status = 503


class ModelFailed(AsrError):
    """The model process fails over this very audio; other audio is recognised."""

    code = "model-failed"
    retryable = False


class Stopping(AsrError):
    """The server was told to stop: it takes no new work."""

    code = "stopping"
    status = 503


EXIT_CANNOT_LOAD = 3
"""Exit code of a process that met a CheckpointError: starting it again would not help."""


class CheckpointError(AsrError):
    """The checkpoint is missing, broken or of another kind, or the device asked for is not there."""

    code = "model-invalid"
    status = 503
    retryable = False


def by_code(code: str) -> type[AsrError]:
    """The class of the tree with this code, for errors that crossed a pipe; AsrError if there is none."""
    pending: list[type[AsrError]] = [AsrError]
    while pending:
        cls = pending.pop()
        if cls.code == code:
            return cls
        pending.extend(cls.__subclasses__())
    return AsrError
