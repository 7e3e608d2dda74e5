"""All settings, read once: flags > environment > YAML file > /data/options.json > default.

A setting `idle_seconds` is the flag `--idle-seconds`, the variable `QWEN_ASR_IDLE_SECONDS` and the key
`idle_seconds` in both files. To add one, add a field here and a row to the table in README.md; a test
compares them. Limits that no user needs to turn are in limits.py.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, values
from .events import Hint
from .values import HostPort

DATA_DIR = "~/.cache/wyoming-qwen-asr"

OPTIONS_JSON = Path("/data/options.json")
"""Where Home Assistant's Supervisor writes an app's options."""

_PREFIX = "QWEN_ASR_"

_OF_KUBERNETES = re.compile(_PREFIX + r"(SERVICE|PORT)(_.*)?")
"""What Kubernetes puts into the environment of every container when there is a Service named qwen-asr."""


class SettingsError(ValueError):
    """An unknown key or a bad value: one line for the user, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def _default_data_dir() -> Path:
    try:
        return values.path(DATA_DIR)
    except ValueError:  # a user without a home, as some containers have
        return Path("/var/cache/wyoming-qwen-asr")


def _setting(default: Any, help_text: str, parse: Callable[[Any], Any] = values.text, **flag: Any) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse, "flag": flag})


@dataclass(frozen=True)
class Settings:
    """What the user can turn. Built by `load`; nothing else in the project reads flags or the environment."""

    uri: tuple[str, ...] = _setting(
        ("tcp://0.0.0.0:10300",),
        "where to serve Wyoming: tcp://HOST:PORT, unix:///PATH or stdio://; may be given several times",
        values.uris,
        action="append",
    )
    http: HostPort | None = _setting(
        HostPort("0.0.0.0", 10301),  # noqa: S104 — a server for the home network
        "where to serve the OpenAI-compatible API: HOST:PORT",
        values.host_port,
    )
    model: str = _setting("auto", "auto, 0.6b, 1.7b, a Hugging Face id (ID@REVISION), a directory, or demo")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N", values.device)
    dtype: str = _setting(
        "auto",
        "auto, float32, bfloat16, float16, or int8 for decoding on a CPU",
        values.one_of("auto", "float32", "bfloat16", "float16", "int8"),
    )
    threads: int = _setting(0, "CPU threads of the model process: auto or a number", values.number_or_auto(1, 1024))
    language: str | None = _setting(
        None, "language of requests that name none: auto (detect) or a code", values.language
    )
    language_hint: Hint = _setting(
        "prefer",
        "what a request's language means: prefer (silence stays silent), force (blindly) or ignore (always detect)",
        values.one_of("prefer", "force", "ignore"),
    )
    chunk_size_sec: float = _setting(
        0.0,
        "while somebody speaks, recognise again after so much audio: auto (0.5 s, rarer on a slow machine) or seconds",
        values.seconds_or_auto(0.1, 30.0),
    )
    unfixed_chunk_num: int = _setting(
        2,  # these three are named, and have the defaults, as in the official package's streaming
        "show no text in so many first steps of a segment",
        values.whole(0, 100),
    )
    unfixed_token_num: int = _setting(
        5, "hold back so many last tokens of what is shown while somebody speaks", values.whole(0, 100)
    )
    window_seconds: int = _setting(
        8,  # what the model is run with offline; it was trained with 1 to 8
        "how far the audio encoder sees: a whole number of seconds; fewer make steps cheaper, and texts may differ",
        values.whole(1, 8),
    )
    zeroconf: str | None = _setting(
        None,
        f"let Home Assistant find the server by itself; under this name ({values.DEFAULT_NAME} if none is given)",
        values.zeroconf,
        nargs="?",
        const=True,
        metavar="NAME",
    )
    max_sessions: int = _setting(
        16,  # more than a house has microphones
        "streams of audio at once; files take at most half of them; the next one is told that the server is busy",
        values.whole(1, 1024),
    )
    max_sessions_per_address: int = _setting(
        0,  # all satellites of a house come from Home Assistant's address
        "of these, at most so many from one address: auto (all of them) or a number",
        values.number_or_auto(1, 1024),
    )
    max_connections: int = _setting(
        64,  # Home Assistant holds one per utterance and one per poll
        "connections at once, for Wyoming and HTTP each; at the limit the longest silent one gives way",
        values.whole(1, 4096),
    )
    idle_seconds: int = _setting(
        900, "end the model process after so long without a session; 0: never", values.whole(0)
    )
    preload: bool = _setting(
        False,
        "load the model at start rather than with the first audio; it is ended when idle all the same",
        values.yes_no,
        nargs="?",
        const=True,
        metavar="YES",
    )
    data_dir: Path = _setting(_default_data_dir(), "where models are kept", values.path)
    log_level: str = _setting(
        "info", "debug, info, warning or error", values.one_of("debug", "info", "warning", "error")
    )


def load(argv: Sequence[str], environ: Mapping[str, str], options_json: Path = OPTIONS_JSON) -> Settings:
    """Settings from all sources. Raises SettingsError; `--help` and `--version` print and exit."""
    flags = vars(_parser().parse_args(argv))
    if flags.pop("no_http", False):
        flags["http"] = False
    variables = {
        name.removeprefix(_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(_PREFIX) and not _OF_KUBERNETES.fullmatch(name)
    }
    configs = flags.pop("config", None), variables.pop("config", None)
    config = configs[0] or configs[1]

    merged: dict[str, Any] = {}
    for source, given in (
        (str(options_json), _read(options_json, json.loads) if _exists(options_json) else {}),
        (str(config), _read(config, _yaml) if config else {}),
        ("environment", variables),
        ("flags", flags),
    ):
        merged |= _parse(source, given)
    return Settings(**merged)


def _parse(source: str, given: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of one source. None and "" are what form fields left empty look like: not given."""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(Settings)}
    parsed = {}
    for key, value in given.items():
        if key not in known:
            raise SettingsError(f"{source}: there is no setting {_spelled(source, str(key))}")
        if value in (None, "", [], [""]):
            continue
        try:
            parsed[key] = known[key].metadata["parse"](value)
        except ValueError as error:
            raise SettingsError(f"{source}: {_spelled(source, key)} {error}, not {_shortened(value)}") from None
    return parsed


def _spelled(source: str, key: str) -> str:
    """A key as the user wrote it there."""
    if source == "flags":
        return "--" + key.replace("_", "-")
    return _PREFIX + key.upper() if source == "environment" else key


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "such a number"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a /data that is none of ours
        return False


def _read(file: Path | str, parse: Callable[[bytes], Any]) -> dict[Any, Any]:
    """The keys and values in a file. Raises SettingsError."""
    try:
        value = parse(values.path(str(file)).read_bytes())
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except Exception as error:  # PyYAML lets KeyError, AttributeError and others through
        raise SettingsError(f"{file}: is broken: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{file}: must hold keys and values")
    return value


def _yaml(text: bytes) -> Any:
    import yaml

    return yaml.safe_load(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"flags: {message}")


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
    if setting.name in ("zeroconf", "preload"):
        return "off"
    if setting.name == "data_dir":
        return DATA_DIR
    if isinstance(setting.default, tuple):
        return " ".join(setting.default)
    return "auto" if setting.default in (0, None) else str(setting.default)
