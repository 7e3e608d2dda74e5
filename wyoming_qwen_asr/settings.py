"""All settings, read once: flags > environment > YAML file > /data/options.json > default.

A setting `idle_seconds` is the flag `--idle-seconds`, the variable `QWEN_ASR_IDLE_SECONDS` and the key
`idle_seconds` in both files. To add one, add a field here and a row to the table in README.md; a test
compares them. Limits that no user needs to turn stand below as constants, each with its reason.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from . import __version__
from .events import Hint
from .text import language_name

MAX_CONNECTIONS = 64
"""Wyoming TCP connections. Home Assistant holds one per utterance and one per poll."""

MAX_SESSIONS = 16
"""Streams of audio at once: more than a house has microphones."""

MAX_UTTERANCE_SECONDS = 600.0
"""Of one session. Home Assistant ends a command after 15 s, a dictation rarely lasts ten minutes."""

MAX_RETAINED_BYTES = 32 * 1024 * 1024
"""Audio of one session that the model has not finished with; ten minutes of 16 kHz mono are 19 MB."""

MAX_CONTEXT_CHARACTERS = 2000
"""Names and terms that bias one utterance; the model takes about 10,000 tokens, and reads all of them each time."""

MAX_UPLOAD_BYTES = 200 * 1024 * 1024
"""One file sent to the HTTP endpoint."""

UTTERANCE_IDLE_SECONDS = 30.0
"""Silence on a connection in mid-utterance: the client is gone."""

CONNECTION_IDLE_SECONDS = 300.0
"""Silence on a connection between utterances."""

LOAD_SECONDS = 300.0
"""A model that is not loaded by then will not be."""

FINAL_SECONDS = 60.0
"""From the end of the audio to its final, besides twice the audio's length: slower than that is a hang."""

MAX_RESTARTS = 2
"""How often a session's audio is given to a new model process before its client gets an error."""

DRAIN_SECONDS = 20.0
"""What is in flight may finish after SIGTERM; container runtimes kill after 30 s when told so."""

OPTIONS_JSON = Path("/data/options.json")
"""Where Home Assistant's Supervisor writes an app's options."""

_PREFIX = "QWEN_ASR_"


class SettingsError(ValueError):
    """An unknown key or a bad value: one line for the user, exit code 2."""


@dataclass(frozen=True)
class HostPort:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# --- values: each turns text (flags, environment) or a YAML/JSON value into the setting's type -----------------


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError("must be text")
    return str(value)


def _uris(value: Any) -> tuple[str, ...]:
    uris = value.split() if isinstance(value, str) else value
    if not isinstance(uris, list | tuple) or not uris:
        raise ValueError("must be a URI or a list of them")
    for uri in uris:
        parts = urlsplit(_text(uri))
        if parts.scheme == "tcp":
            if not parts.hostname or parts.port is None:
                raise ValueError(f"{uri!r} is not of the form tcp://HOST:PORT")
        elif not (parts.scheme == "unix" and parts.path) and uri != "stdio://":
            raise ValueError(f"{uri!r} is none of tcp://HOST:PORT, unix:///PATH, stdio://")
    return tuple(uris)


def _host_port(value: Any) -> HostPort | None:
    if value is False or str(value).lower() in ("false", "none", "off"):
        return None
    try:
        parts = urlsplit(f"//{_text(value)}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None:
        raise ValueError("is not of the form HOST:PORT")
    return HostPort(host, port)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return parse


def _device(value: Any) -> str:
    kind, _, index = _text(value).partition(":")
    if value in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal()):
        return str(value)
    raise ValueError("must be one of auto, cpu, cuda, cuda:N")


def _whole(minimum: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not str(value).isdecimal() or int(value) < minimum:
            raise ValueError(f"must be a whole number from {minimum}")
        return int(value)

    return parse


def _threads(value: Any) -> int:
    return 0 if value == "auto" else _whole(1)(value)


def _language(value: Any) -> str | None:
    if value == "auto":
        return None
    name = language_name(_text(value))
    if name is None:
        raise ValueError("is not a language of Qwen3-ASR; codes like en, de, zh, yue, or auto")
    return name


def _zeroconf(value: Any) -> str | None:
    if value is False or str(value).lower() == "false":
        return None
    name = "" if value is True or str(value).lower() == "true" else _text(value)
    if len(name.encode()) > 40:
        raise ValueError("is longer than 40 bytes")
    return name or DEFAULT_NAME


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


DEFAULT_NAME = "qwen-asr"


def _setting(default: Any, help_text: str, parse: Callable[[Any], Any] = _text, **flag: Any) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse, "flag": flag})


@dataclass(frozen=True)
class Settings:
    """What the user can turn. Built by `load`; nothing else in the project reads flags or the environment."""

    uri: tuple[str, ...] = _setting(
        ("tcp://0.0.0.0:10300",),
        "where to serve Wyoming: tcp://HOST:PORT, unix:///PATH or stdio://; may be given several times",
        _uris,
        action="append",
    )
    http: HostPort | None = _setting(
        HostPort("0.0.0.0", 10301),  # noqa: S104 — a server for the home network
        "where to serve the OpenAI-compatible API: HOST:PORT",
        _host_port,
    )
    model: str = _setting("auto", "auto, 0.6b, 1.7b, a Hugging Face id (ID@REVISION), a directory, or demo")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N", _device)
    dtype: str = _setting(
        "auto", "auto, float32, bfloat16 or float16", _one_of("auto", "float32", "bfloat16", "float16")
    )
    threads: int = _setting(0, "CPU threads of the model process: auto or a number", _threads)
    language: str | None = _setting(None, "language of requests that name none: auto (detect) or a code", _language)
    language_hint: Hint = _setting(
        "prefer",
        "what a request's language means: prefer (silence stays silent), force (blindly) or ignore (always detect)",
        _one_of("prefer", "force", "ignore"),
    )
    zeroconf: str | None = _setting(
        None,
        f"let Home Assistant find the server by itself; the name on the network, {DEFAULT_NAME} if none is given",
        _zeroconf,
        nargs="?",
        const=True,
        metavar="NAME",
    )
    idle_seconds: int = _setting(900, "end the model process after so long without a session; 0: never", _whole(0))
    data_dir: Path = _setting(Path("~/.cache/wyoming-qwen-asr").expanduser(), "where models are kept", _path)
    log_level: str = _setting("info", "debug, info, warning or error", _one_of("debug", "info", "warning", "error"))


def load(argv: Sequence[str], environ: Mapping[str, str], options_json: Path = OPTIONS_JSON) -> Settings:
    """Settings from all sources. Raises SettingsError; `--help` and `--version` print and exit."""
    flags = vars(_parser().parse_args(argv))
    if flags.pop("no_http", False):
        flags["http"] = False
    variables = {k.removeprefix(_PREFIX).lower(): v for k, v in environ.items() if k.startswith(_PREFIX)}
    config = flags.pop("config", None) or variables.pop("config", None)

    values: dict[str, Any] = {}
    for source, given in (
        (str(options_json), _read_json(options_json)),
        (str(config), _read_yaml(Path(config)) if config else {}),
        ("environment", variables),
        ("flags", flags),
    ):
        values |= _parse(source, given)
    return Settings(**values)


def _parse(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one source. None and "" are what form fields left empty look like: not given."""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(Settings)}
    values = {}
    for key, value in given.items():
        if key not in known:
            raise SettingsError(f"{source}: there is no setting {_spelled(source, str(key))}")
        if value is None or value == "":
            continue
        try:
            values[key] = known[key].metadata["parse"](value)
        except ValueError as error:
            raise SettingsError(f"{source}: {_spelled(source, key)} {error}, not {value!r}") from None
    return values


def _spelled(source: str, key: str) -> str:
    """A key as the user wrote it there."""
    if source == "flags":
        return "--" + key.replace("_", "-")
    return _PREFIX + key.upper() if source == "environment" else key


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return _mapping(path, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return _mapping(path, yaml.safe_load(path.read_text()) or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: must hold keys and values")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wyoming-qwen-asr",
        description="Qwen3-ASR as a Wyoming server and an OpenAI-compatible API.",
        epilog=f"Each setting can also be given as {_PREFIX}NAME in the environment, in the --config file "
        f"and in {OPTIONS_JSON}; the first of these that names it wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for each in fields(Settings):
        assert each.default is not MISSING
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            help=f"{each.metadata['help']} (default: {shown(each)})",
            **{"metavar": each.name.rpartition("_")[2].upper(), **each.metadata["flag"]},
        )
    parser.add_argument("--no-http", action="store_true", help="do not serve the OpenAI-compatible API")
    parser.add_argument("--config", metavar="FILE.yaml", help="a file with settings")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def shown(setting: Field[Any]) -> str:
    """The default of a setting as help texts and the README write it."""
    if setting.name == "zeroconf":
        return "off"
    if isinstance(setting.default, tuple):
        return " ".join(setting.default)
    return "auto" if setting.default in (0, None) else str(setting.default).replace(str(Path.home()), "~")
