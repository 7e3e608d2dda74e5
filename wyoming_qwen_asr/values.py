"""Values of settings: text from a flag or the environment, or a value from YAML or JSON → the setting's type.

Each function raises ValueError with what the value must be.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .text import language_name

DEFAULT_NAME = "qwen-asr"
"""On the network, for zeroconf."""


@dataclass(frozen=True)
class HostPort:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def text(value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError("must be text")
    if re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", str(value)):
        raise ValueError("must be text without control characters, in UTF-8")
    return str(value)


def _is(value: Any, meant: bool) -> bool:
    """Whether a YAML or JSON value, or the text of a variable, says yes (or no)."""
    words = ("true", "on", "yes") if meant else ("false", "off", "no", "none")
    return value is meant or (isinstance(value, str) and value.lower() in words)


def yes_no(value: Any) -> bool:
    for meant in (True, False):
        if _is(value, meant):
            return meant
    raise ValueError("must be yes or no")


def uris(value: Any) -> tuple[str, ...]:
    """One, several with blanks between them, or a list of such."""
    given = value if isinstance(value, list) else [value]
    uris = tuple(uri for each in given for uri in text(each).split())
    if not uris:
        raise ValueError("must be a URI or a list of them")
    for uri in uris:
        tcp = uri.startswith("tcp://") and _address(uri.removeprefix("tcp://"))
        if not tcp and not re.fullmatch(r"unix://[^?#\[\]]+|stdio://", uri):
            raise ValueError(f"holds {uri!r}, which is none of tcp://HOST:PORT, unix:///PATH, stdio://")
    return uris


def host_port(value: Any) -> HostPort | None:
    if _is(value, False):
        return None
    if not (address := _address(text(value))):
        raise ValueError("is not of the form HOST:PORT")
    return address


def _address(uri: str) -> HostPort | None:
    """HOST:PORT, with brackets around the host if it is an IPv6 address."""
    found = re.fullmatch(r"(?:\[([^][/?#@]+)]|([^][/?#@:\s]+)):([0-9]{1,5})", uri)
    if not found or int(found[3]) > 65535:
        return None
    return HostPort(found[1] or found[2], int(found[3]))


def one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return parse


def device(value: Any) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,2})?", text(value)):
        raise ValueError("must be one of auto, cpu, cuda, cuda:N")
    return str(value)


def whole(minimum: int, maximum: int = 999_999_999) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = int(value) if re.fullmatch("[0-9]{1,9}", str(value)) else -1
        if not minimum <= number <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return number

    return parse


def number_or_auto(minimum: int, maximum: int) -> Callable[[Any], int]:
    """0 means auto."""
    return lambda value: 0 if value == "auto" else whole(minimum, maximum)(value)


def seconds_or_auto(minimum: float, maximum: float) -> Callable[[Any], float]:
    """0 means auto."""

    def parse(value: Any) -> float:
        if value == "auto":
            return 0.0
        seconds = float(value) if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", str(value)) else -1.0
        if not minimum <= seconds <= maximum:
            raise ValueError(f"must be auto, or seconds from {minimum:g} to {maximum:g}")
        return seconds

    return parse


def language(value: Any) -> str | None:
    if value == "auto":
        return None
    name = language_name(text(value))
    if name is None:
        raise ValueError("is not a language of Qwen3-ASR; codes like en, de, zh, yue, or auto")
    return name


def zeroconf(value: Any) -> str | None:
    if _is(value, False):
        return None
    name = DEFAULT_NAME if _is(value, True) else text(value)
    if len(name.encode()) > 40:
        raise ValueError("is longer than 40 bytes")
    return name


def path(value: Any) -> Path:
    try:
        return Path(text(value)).expanduser()
    except RuntimeError:
        raise ValueError("begins with a home directory that is not known") from None
