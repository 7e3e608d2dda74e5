"""`wyoming-qwen-asr` from the outside: its exit codes, and the one line on stderr that says why."""

import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from wyoming_qwen_asr import __version__

from .conftest import DEMO

PROGRAM = ("-m", "wyoming_qwen_asr")


def run(*flags: str, environ: dict[str, str] | None = None, program: tuple[str, ...] = PROGRAM) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QWEN_ASR_")}
    command = [sys.executable, *program, *flags]
    env = clean | (environ or {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    return done.returncode, done.stdout, done.stderr


def line(*flags: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code, and the one line on stderr without the program's name."""
    code, stdout, stderr = run(*flags, environ=environ)
    assert stdout == ""
    (said,) = stderr.splitlines()
    assert said.startswith("wyoming-qwen-asr: ")
    return code, said.removeprefix("wyoming-qwen-asr: ")


# --- 0 -------------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert run("--version") == (0, f"{__version__}\n", "")
    code, stdout, stderr = run("--help")
    assert (code, stderr) == (0, "")
    assert "--idle-seconds" in stdout


# --- 2: a setting is wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        (["--nope"], {}, "flags: unrecognized arguments: --nope"),
        (["--threads=x"], {}, "flags: --threads must be a whole number from 1 to 1024, not 'x'"),
        ([], {"QWEN_ASR_NOPE": "1"}, "environment: there is no setting QWEN_ASR_NOPE"),
        (
            [],
            {"QWEN_ASR_DEVICE": "gpu"},
            "environment: QWEN_ASR_DEVICE must be one of auto, cpu, cuda, cuda:N, not 'gpu'",
        ),
        (["--config=/none.yaml"], {}, "/none.yaml: No such file or directory"),
    ],
)
def test_bad_settings(flags: list[str], environ: dict[str, str], said: str) -> None:
    assert line(*flags, environ=environ) == (2, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modell: demo", "there is no setting modell"),
        (
            "language: klingon",
            "language is not a language of Qwen3-ASR; codes like en, de, zh, yue, or auto, not 'klingon'",
        ),
        ("a: [", "is broken: "),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    code, error = line(environ={"QWEN_ASR_CONFIG": str(file)})
    assert code == 2
    assert error.startswith(f"{file}: {said}")


@pytest.mark.parametrize("options", [{"modell": "demo"}, {"model": ["demo"]}])
def test_bad_options_of_the_supervisor(options: dict[str, object], tmp_path: Path) -> None:
    """/data/options.json cannot be written here: the same main() reads another file."""
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    program = (
        "import sys; from pathlib import Path; from wyoming_qwen_asr import __main__ as main, settings\n"
        f"main.load = lambda argv, environ: settings.load(argv, environ, Path({str(file)!r}))\n"
        "sys.exit(main.main())"
    )
    code, stdout, stderr = run(program=("-c", program))
    (said,) = stderr.splitlines()
    assert (code, stdout) == (2, "")
    assert said.startswith(f"wyoming-qwen-asr: {file}: ")
    assert "model" in said


# --- 3: the model cannot be used -------------------------------------------------------------------------------

ANYWHERE = ("--uri=tcp://127.0.0.1:0", "--no-http")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper/config.json").write_text('{"model_type": "whisper"}')
    archive = DEMO.read_bytes()
    (tmp_path / "truncated.zip").write_bytes(archive[: len(archive) // 2])
    with zipfile.ZipFile(DEMO) as whole:
        whole.extractall(tmp_path / "cut")
    with (tmp_path / "cut/model.safetensors").open("r+b") as weights:
        weights.truncate(1_000_000)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("missing", "there is no model at the given place"),
        ("empty", "config.json is missing: this is not a whole Qwen3-ASR model"),
        ("whisper", "this is not a Qwen3-ASR model: config.json says 'whisper'"),
        ("truncated.zip", "the model is neither a folder nor a whole .zip file"),
        ("cut", "model.safetensors was not downloaded to its end: 1000000 of 2567704 bytes"),
    ],
)
def test_models_that_cannot_be_used(model: str, said: str, models: Path) -> None:
    assert line(*ANYWHERE, f"--model={models / model}", "--log-level=error") == (3, said)


def test_the_line_ends_the_log(models: Path) -> None:
    """With the log switched on, too, the reason comes last and once, without a traceback."""
    code, stdout, stderr = run(*ANYWHERE, f"--model={models / 'missing'}", "--log-level=debug")
    assert (code, stdout) == (3, "")
    assert stderr.splitlines()[-1] == "wyoming-qwen-asr: there is no model at the given place"
    assert stderr.count("there is no model") == 1
    assert "Traceback" not in stderr


# --- 1: cannot serve -------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


QUIET = ("--model=demo", "--log-level=error")


@pytest.mark.parametrize(
    "flags", [("--uri=tcp://127.0.0.1:{}", "--no-http"), ("--uri=tcp://127.0.0.1:0", "--http=127.0.0.1:{}")]
)
def test_a_port_that_is_taken(flags: tuple[str, ...], taken: int) -> None:
    code, said = line(*QUIET, *(flag.format(taken) for flag in flags))
    assert code == 1
    assert re.fullmatch(
        rf"cannot serve at (tcp|http)://127\.0\.0\.1:{taken}: it is used by another program,"
        " perhaps by another wyoming-qwen-asr",
        said,
    )


def test_a_unix_socket_that_is_taken(tmp_path: Path) -> None:
    """The program that serves there keeps it."""
    path = tmp_path / "asr.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        code, said = line(*QUIET, f"--uri=unix://{path}", "--no-http")
        assert (code, path.is_socket()) == (1, True)
        assert said.endswith("perhaps by another wyoming-qwen-asr")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize(
    "uri", ["tcp://no-such-host.invalid:0", "tcp://203.0.113.7:0", "unix:///none/asr.sock", "unix:///" + "x" * 200]
)
def test_addresses_that_cannot_be_had(uri: str) -> None:
    code, said = line(*QUIET, f"--uri={uri}", "--no-http")
    assert code == 1
    assert said.startswith(f"cannot serve at {uri}: ")
