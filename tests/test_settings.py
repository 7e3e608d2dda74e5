"""Settings: where each can be given, which source wins, and the one clear line for what is wrong."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wyoming_qwen_asr import __version__
from wyoming_qwen_asr.settings import Settings, SettingsError, load
from wyoming_qwen_asr.values import HostPort

property_test = settings(deadline=None, derandomize=True)

DEFAULTS = Settings()
NAMES = [field.name for field in fields(Settings)]
SOURCES = ("json", "yaml", "environment", "flags")

# Per setting four texts that mean something else than the default, and what they mean.
GOOD: dict[str, list[tuple[str, Any]]] = {
    "uri": [
        ("tcp://localhost:1", ("tcp://localhost:1",)),
        ("tcp://[::1]:0 unix:///run/asr.sock", ("tcp://[::1]:0", "unix:///run/asr.sock")),
        ("stdio://", ("stdio://",)),
        ("tcp://a:1  tcp://b:2", ("tcp://a:1", "tcp://b:2")),
    ],
    "http": [
        ("localhost:80", HostPort("localhost", 80)),
        ("[::]:65535", HostPort("::", 65535)),
        ("false", None),
        ("Off", None),
    ],
    "model": [("0.6b", "0.6b"), ("demo", "demo"), ("Qwen/X@main", "Qwen/X@main"), ("/modèle/音声", "/modèle/音声")],
    "device": [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cuda:12", "cuda:12")],
    "dtype": [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")],
    "threads": [("1", 1), ("2", 2), ("64", 64), ("1024", 1024)],
    "language": [("en", "English"), ("pt_BR", "Portuguese"), ("German", "German"), ("yue", "Cantonese")],
    "language_hint": [("force", "force"), ("ignore", "ignore"), ("force", "force"), ("ignore", "ignore")],
    "chunk_size_sec": [("0.1", 0.1), ("2", 2.0), ("2.0", 2.0), ("30", 30.0)],
    "unfixed_chunk_num": [("0", 0), ("1", 1), ("4", 4), ("100", 100)],
    "unfixed_token_num": [("0", 0), ("1", 1), ("10", 10), ("100", 100)],
    "window_seconds": [("1", 1), ("2", 2), ("4", 4), ("7", 7)],
    "zeroconf": [("true", "qwen-asr"), ("kitchen", "kitchen"), ("On", "qwen-asr"), ("Küche", "Küche")],
    "idle_seconds": [("0", 0), ("1", 1), ("60", 60), ("999999999", 999_999_999)],
    "max_sessions": [("1", 1), ("2", 2), ("64", 64), ("1024", 1024)],
    "max_sessions_per_address": [("1", 1), ("2", 2), ("64", 64), ("1024", 1024)],
    "max_connections": [("1", 1), ("2", 2), ("400", 400), ("4096", 4096)],
    "preload": [("true", True), ("No", False), ("on", True), ("off", False)],
    "data_dir": [("/a", Path("/a")), ("b/c", Path("b/c")), ("~", Path.home()), ("~/x", Path.home() / "x")],
    "log_level": [("debug", "debug"), ("warning", "warning"), ("error", "error"), ("debug", "debug")],
}

# Texts that are wrong in every source, and values of other types, which only files can hold.
BAD: dict[str, list[str]] = {
    "uri": [
        *(" ", "10300", "localhost:10300", "stdio", "http://h:1", "unix://"),
        *(f"tcp://{rest}" for rest in ("", "h", "h:", ":1", "h:65536", "h:-1", "h:1/p", "u@h:1", "[::1:1", "[::1]x:1")),
    ],
    "http": [
        *("true", "10301", ":10301", "host", "host:", "host:x", "host:65536"),
        *("http://h:1", "h:1/v1", "u@h:1", "h h:1", "::1:80"),
    ],
    "model": ["a\0b", "a\nb", "\udcff"],
    "device": ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:٣", "cuda:300", "CPU", "cpu:0"],
    "dtype": ["int4", "bf16", "auto "],
    "threads": ["0", "-1", "1.5", "x", "٣", "1025", "9" * 5000],
    "language": ["tlh", "klingon", "e n", "-"],
    "language_hint": ["yes", "PREFER"],
    "chunk_size_sec": ["0", "0.05", "31", "-1", "1e0", "x", ".5", "1.2345", "9" * 5000],
    "unfixed_chunk_num": ["-1", "101", "1.5", "auto"],
    "unfixed_token_num": ["-1", "101", "x"],
    "window_seconds": ["0", "9", "auto", "1.5"],
    "zeroconf": ["x" * 41, "ü" * 21, "a\tb"],
    "idle_seconds": ["-1", "1e3", "900.0", "1_000", " 1", "1000000000", "9" * 5000],
    "max_sessions": ["0", "-1", "1025", "auto", "x"],
    "max_sessions_per_address": ["0", "-1", "1025", "x"],
    "max_connections": ["0", "-1", "4097", "auto", "x"],
    "preload": ["maybe", "1", "truee"],
    "data_dir": ["a\0b", "~nobody-of-this-name/x", "\udcff"],
    "log_level": ["verbose", "INFO", "10"],
}
NO_TEXT: list[Any] = [True, {}, {"a": 1}, ["a", 1], [[]], [None]]


def spelled(source: str, name: str) -> str:
    """A setting's name as it is written in a source."""
    return {"environment": "QWEN_ASR_" + name.upper(), "flags": "--" + name.replace("_", "-")}.get(source, name)


def load_from(folder: Path, **sources: Mapping[str, Any] | Sequence[str]) -> Settings:
    """`load` with the settings of each source: mappings, or the text of a file, or literal flags."""
    environ, flags = {}, []
    options = folder / "options.json"
    for source, given_there in sources.items():
        if source == "json":
            options.write_text(given_there if isinstance(given_there, str) else json.dumps(given_there))
        elif source == "yaml":
            file = folder / "settings.yaml"
            file.write_text(given_there if isinstance(given_there, str) else yaml.safe_dump(given_there))
            flags.append(f"--config={file}")
        elif source == "environment":
            assert isinstance(given_there, Mapping)
            environ = {spelled(source, name): value for name, value in given_there.items()}
        elif isinstance(given_there, Mapping):
            flags += [f"{spelled(source, name)}={value}" for name, value in given_there.items()]
        else:
            flags += given_there
    return load(flags, {"PATH": "/bin", **environ}, options)


def refused(folder: Path, **sources: Mapping[str, Any] | Sequence[str]) -> str:
    """The error's text: one line."""
    with pytest.raises(SettingsError) as caught:
        load_from(folder, **sources)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    return str(caught.value)


def begins(folder: Path, source: str) -> str:
    """How errors name a source."""
    files = {"json": f"{folder / 'options.json'}: ", "yaml": f"{folder / 'settings.yaml'}: "}
    return files.get(source, f"{source}: ")


def test_the_tables_are_complete() -> None:
    assert set(GOOD) == set(BAD) == set(NAMES)


def test_defaults(tmp_path: Path) -> None:
    assert load_from(tmp_path) == DEFAULTS
    assert (DEFAULTS.model, DEFAULTS.device, DEFAULTS.dtype, DEFAULTS.zeroconf) == ("auto", "auto", "auto", None)


@pytest.mark.parametrize("name", NAMES)
def test_the_strongest_source_wins(name: str, tmp_path: Path) -> None:
    """flags > environment > YAML > options.json > default; the other settings keep their defaults."""
    sources: dict[str, dict[str, str]] = {}
    for source, (text, value) in zip(SOURCES, GOOD[name], strict=True):
        sources[source] = {name: text}
        found = load_from(tmp_path, **sources)
        assert getattr(found, name) == value
        assert all(getattr(found, n) == getattr(DEFAULTS, n) for n in NAMES if n != name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", SOURCES)
def test_bad_values(name: str, source: str, tmp_path: Path) -> None:
    """One line that says where, what, and what stands there."""
    values: list[Any] = [*BAD[name]]
    if source in ("json", "yaml"):
        values = [
            v for v in [*values, *NO_TEXT] if v != "\udcff" and (name, v) not in (("zeroconf", True), ("preload", True))
        ]
    for value in values:
        said = refused(tmp_path, **{source: {name: value}})
        assert said.startswith(begins(tmp_path, source) + spelled(source, name)), said
        assert repr(value)[:50] in said, said


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "[[[[1]]]]", "2024-02-03", "&a [*a]", ".nan", "1e999"])
def test_yaml_values_of_odd_types(value: str, tmp_path: Path) -> None:
    assert refused(tmp_path, yaml=f"threads: {value}").startswith(begins(tmp_path, "yaml") + "threads ")


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_keys(source: str, tmp_path: Path) -> None:
    said = refused(tmp_path, **{source: {"modell": "demo"}})
    assert said.startswith(begins(tmp_path, source)), said
    assert spelled(source, "modell") in said


@pytest.mark.parametrize(
    ("yaml_text", "named"), [("1: x", "1"), ("true: x", "True"), ("null: x", "None"), ("Model: x", "Model")]
)
def test_yaml_keys_that_are_no_names(yaml_text: str, named: str, tmp_path: Path) -> None:
    assert refused(tmp_path, yaml=yaml_text).endswith(f"there is no setting {named}")


@pytest.mark.parametrize("name", NAMES)
def test_empty_is_not_given(name: str, tmp_path: Path) -> None:
    """As compose files (`${MODEL:-}`) and empty form fields give it; weaker sources then count."""
    text, value = GOOD[name][0]
    empty: list[dict[str, Any]] = [
        {"yaml": {name: None}},
        {"yaml": {name: ""}},
        {"environment": {name: ""}},
        {"flags": {name: ""}},
    ]
    for sources in empty:
        assert getattr(load_from(tmp_path, json={name: text}, **sources), name) == value
    assert load_from(tmp_path, json={name: None}) == load_from(tmp_path, json={name: ""}) == DEFAULTS


@pytest.mark.parametrize(
    ("sources", "http"),
    [
        ({"flags": ["--no-http"]}, None),
        ({"yaml": "http: false"}, None),
        ({"yaml": "http: no"}, None),
        ({"json": {"http": False}}, None),
        ({"yaml": "http: false", "environment": {"http": "h:1"}}, HostPort("h", 1)),
        ({"environment": {"http": "h:1"}, "flags": ["--no-http"]}, None),
    ],
)
def test_http_can_be_switched_off(sources: dict[str, Any], http: HostPort | None, tmp_path: Path) -> None:
    assert load_from(tmp_path, **sources).http == http


@pytest.mark.parametrize(
    ("sources", "uri"),
    [
        ({"flags": ["--uri", "tcp://a:1", "--uri", "stdio://"]}, ("tcp://a:1", "stdio://")),
        ({"flags": ["--uri", "", "--uri", "tcp://a:1"]}, ("tcp://a:1",)),
        ({"yaml": "uri: [tcp://a:1, 'unix:///x']"}, ("tcp://a:1", "unix:///x")),
        ({"environment": {"uri": " tcp://a:1  tcp://b:2 "}}, ("tcp://a:1", "tcp://b:2")),
        ({"environment": {"uri": "tcp://a:1"}, "flags": ["--uri=tcp://b:2"]}, ("tcp://b:2",)),
    ],
)
def test_several_uris(sources: dict[str, Any], uri: tuple[str, ...], tmp_path: Path) -> None:
    """The flag is given several times; a stronger source replaces, it does not add."""
    assert load_from(tmp_path, **sources).uri == uri


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        ({"flags": ["--zeroconf"]}, "qwen-asr"),
        ({"flags": ["--zeroconf", "kitchen"]}, "kitchen"),
        ({"flags": ["--zeroconf", "--no-http"]}, "qwen-asr"),
        ({"flags": ["--zeroconf=false"]}, None),
        ({"yaml": "zeroconf: true"}, "qwen-asr"),
        ({"yaml": "zeroconf: kitchen", "flags": ["--zeroconf=off"]}, None),
        ({"json": {"zeroconf": True}, "yaml": "zeroconf: false"}, None),
    ],
)
def test_zeroconf_with_and_without_a_name(sources: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    assert load_from(tmp_path, **sources).zeroconf == name


@pytest.mark.parametrize("name", ["threads", "language", "max_sessions_per_address"])
def test_auto_overrides_a_weaker_source(name: str, tmp_path: Path) -> None:
    weaker = {name: GOOD[name][0][0]}
    assert getattr(load_from(tmp_path, json=weaker, environment={name: "auto"}), name) == getattr(DEFAULTS, name)


def test_numbers_in_files_need_no_quotes(tmp_path: Path) -> None:
    assert load_from(tmp_path, yaml="threads: 2\nidle_seconds: 0\nmodel: 0.6").threads == 2


def test_config_from_the_environment(tmp_path: Path) -> None:
    """QWEN_ASR_CONFIG names the file; the flag replaces it; empty, neither names one."""
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("threads: 2\nmodel: a")
    b.write_text("threads: 3")
    environ = {"QWEN_ASR_CONFIG": str(a)}
    found = load([], environ, tmp_path / "none")
    assert (found.threads, found.model) == (2, "a")
    found = load([f"--config={b}"], environ, tmp_path / "none")
    assert (found.threads, found.model) == (3, "auto")
    assert load(["--config="], {"QWEN_ASR_CONFIG": ""}, tmp_path / "none") == DEFAULTS


BROKEN = [
    "a: [",
    "a: b: c",
    "\tmodel: x",
    "model: \0",
    "!!bool maybe",
    "!!timestamp x",
    "[" * 100_000,
    "{a: 1}: b",
    "&a *a",
]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_yaml(text: str, tmp_path: Path) -> None:
    assert refused(tmp_path, yaml=text).startswith(begins(tmp_path, "yaml") + "is broken: ")


@pytest.mark.parametrize("text", ["", "{", "nul", "[" * 100_000, '{"model": "a', "\0"])
def test_broken_json(text: str, tmp_path: Path) -> None:
    assert refused(tmp_path, json=text).startswith(begins(tmp_path, "json") + "is broken: ")


@pytest.mark.parametrize("text", ["[]", "[a]", "1", "text", "false"])
def test_files_that_hold_no_mapping(text: str, tmp_path: Path) -> None:
    assert refused(tmp_path, yaml=text) == begins(tmp_path, "yaml") + "must hold keys and values"


@pytest.mark.parametrize("text", ["", "# nothing", "{}", "null", "---\n"])
def test_empty_yaml(text: str, tmp_path: Path) -> None:
    assert load_from(tmp_path, yaml=text) == DEFAULTS


def test_files_are_utf_8(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("\ufeffmodel: ü".encode())
    assert load([f"--config={tmp_path / 'c.yaml'}"], {}, tmp_path / "none").model == "ü"
    (tmp_path / "c.yaml").write_bytes(b"model: \xff")
    with pytest.raises(SettingsError, match="is broken"):
        load([f"--config={tmp_path / 'c.yaml'}"], {}, tmp_path / "none")


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), ("x" * 999, "too long")):
        with pytest.raises(SettingsError, match=reason) as caught:
            load([f"--config={path}"], {}, tmp_path / "none")
        assert str(caught.value).count(str(path)) == 1


def test_an_options_json_out_of_reach_is_none(tmp_path: Path) -> None:
    """Only the Supervisor's is ours: elsewhere /data may be anything."""
    (tmp_path / "file").touch()
    assert load([], {}, tmp_path / "file" / "options.json") == load([], {}, tmp_path / ("x" * 999)) == DEFAULTS


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nope"], "flags: unrecognized arguments: --nope"),
        (["nope"], "flags: unrecognized arguments: nope"),
        (["--a\nb"], "flags: unrecognized arguments: --a b"),
        (["--threads"], "flags: argument --threads: expected one argument"),
        (["--thread=1"], "flags: unrecognized arguments: --thread=1"),
        (["--no-http=1"], "flags: argument --no-http: ignored explicit argument '1'"),
    ],
)
def test_bad_flags(flags: list[str], said: str, tmp_path: Path) -> None:
    assert refused(tmp_path, flags=flags) == said


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as stopped:
            load([flag], {})
        assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(spelled("flags", name) in shown for name in NAMES)
    assert shown.endswith(f"{__version__}\n")


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some containers run as a user that has none: "~" is then a bad value, and the help still works."""

    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", lambda path: unknown(path) if str(path).startswith("~") else path)
    monkeypatch.setattr(Path, "home", unknown)
    assert load_from(tmp_path, flags=["--data-dir=/data"]).data_dir == Path("/data")
    assert "home directory" in refused(tmp_path, flags=["--data-dir=~/x"])


def settings_or_line(flags: list[str], environ: dict[str, str], options: Path = Path("/none")) -> bool:
    """Whether `load` gives Settings, or an error of one line."""
    try:
        return isinstance(load(flags, environ, options), Settings)
    except SettingsError as error:
        return len(str(error).splitlines()) == 1


ANYTHING = st.text() | st.sampled_from(
    [text for name in NAMES for text in BAD[name] + [good for good, _ in GOOD[name]]]
)


@property_test
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING))
def test_any_text_gives_settings_or_a_line(texts: dict[str, str]) -> None:
    assert settings_or_line([], {spelled("environment", name): text for name, text in texts.items()})
    assert settings_or_line([f"{spelled('flags', name)}={text}" for name, text in texts.items()], {})


@property_test
@given(st.lists(ANYTHING | st.sampled_from([spelled("flags", name) for name in NAMES]), max_size=3))
def test_any_flags_give_settings_or_a_line(flags: list[str]) -> None:
    assert settings_or_line([flag for flag in flags if flag not in ("-h", "--help", "--version")], {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@property_test
@given(st.dictionaries(st.sampled_from(NAMES), JSON).map(json.dumps) | st.text())
def test_any_file_gives_settings_or_a_line(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_text(content, "utf-8", "surrogatepass")
    assert settings_or_line([f"--config={file}"], {})
    assert settings_or_line([], {}, file)


def test_what_kubernetes_adds_to_the_environment_is_not_ours() -> None:
    """It names variables after its Services, and one may well be called qwen-asr."""
    environ = {"QWEN_ASR_SERVICE_HOST": "10.0.0.1", "QWEN_ASR_PORT": "tcp://10.0.0.1:1", "QWEN_ASR_PORT_1_TCP": "x"}
    assert load([], environ) == load([], {})
