"""The child that brings the checkpoint: the real huggingface_hub, as a real process, against a small Hub of our own."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wyoming.event

from wyoming_qwen_asr.errors import CheckpointError
from wyoming_qwen_asr.events import Downloading, Failed, Located, Message, from_event
from wyoming_qwen_asr.model.fetch import locate
from wyoming_qwen_asr.text import LANGUAGES

from .conftest import DEMO, wait_until

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
REPOSITORY = "somebody/tiny-asr"
FOREIGN = "somebody/whisper"
WEIGHTS = "model.safetensors"
CHUNK = 10 << 20
"""Bytes that huggingface_hub takes at a time."""
CUT = CHUNK + 1000


def padded(weights: bytes) -> bytes:
    """The same in more than a chunk: the header of a safetensors file may end in blanks."""
    end = 8 + int.from_bytes(weights[:8], "little")
    return (end - 8 + CHUNK).to_bytes(8, "little") + weights[8:end] + b" " * CHUNK + weights[end:]


class Hub(ThreadingHTTPServer):
    """As much of https://huggingface.co as a download needs. Remembers what was asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        with zipfile.ZipFile(DEMO) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist()}
        self.files[WEIGHTS] = padded(self.files[WEIGHTS])
        self.files["pytorch_model.bin"] = b"anything at all"
        self.requests: list[str] = []
        self.fails: Callable[[str], tuple[int, str] | None] = lambda request: None
        """Status and X-Error-Code for "METHOD /path", if it is to fail."""
        self.cut = False
        """Whether the weights stop after CUT bytes; `halfway` is then set, and the rest waits for `resume`."""
        self.halfway, self.resume = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are part of the tests."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        request = f"{self.command} {self.path}"
        self.server.requests.append(request + (f" {self.headers['Range']}" if "Range" in self.headers else ""))
        if failure := self.server.fails(request):
            return self.answer(failure[0], b"", {"X-Error-Code": failure[1]})
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", owner, name] if f"{owner}/{name}" in (REPOSITORY, FOREIGN):
                self.info("main")
            case ["api", "models", owner, name, "revision", revision] if f"{owner}/{name}" in (REPOSITORY, FOREIGN):
                self.info(revision)
            case [owner, name, "resolve", commit, file] if commit in COMMITS.values() and file in self.server.files:
                self.file(
                    commit, file, self.server.files[file] if name != "whisper" or file != "config.json" else b"{}"
                )
            case _:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return None

    def info(self, revision: str) -> None:
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, content in self.server.files.items():
            sibling = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        body = {"id": REPOSITORY, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, commit: str, name: str, content: bytes) -> None:
        kind = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
        headers = {"X-Repo-Commit": commit, "ETag": f'"{kind(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.answer(206 if begin else 200, content[begin:], headers, hold=self.server.cut and name == WEIGHTS)

    def answer(self, status: int, body: bytes, headers: dict[str, str], hold: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):
            self.wfile.write(body[:CUT] if hold else body)
            if hold:
                self.server.halfway.set()
                self.server.resume.wait(60)
                if not self.server.cut:
                    self.wfile.write(body[CUT:])
                self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.resume.set()
    hub.stop()


class Fetch:
    """Runs of `python -m wyoming_qwen_asr.model.fetch` on one data directory."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.data_dir = folder / "data"
        self.home = folder / "home"
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, model: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "wyoming_qwen_asr.model.fetch",
            f"--model={model}",
            f"--data-dir={self.data_dir}",
        ]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=self.environ, stdin=pipe, stdout=pipe, stderr=pipe)
        self._started.append(process)
        return process

    def run(self, model: str) -> tuple[list[Message], int]:
        """What it says, and its exit code. It prints nothing but log lines."""
        process = self.start(model)
        said = []
        while (message := message_of(process)) is not None:
            said.append(message)
        assert process.stderr
        log = process.stderr.read().decode()
        assert "Traceback" not in log, log
        assert "%|" not in log, "progress bars do not belong into a log"
        return said, process.wait(60)

    def fails(self, model: str) -> tuple[Failed, int]:
        *before, last = (run := self.run(model))[0]
        assert all(isinstance(message, Downloading) for message in before)
        assert isinstance(last, Failed)
        assert len(last.message.splitlines()) == 1
        return last, run[1]

    def finds(self, model: str) -> Located:
        *before, last = (run := self.run(model))[0]
        check_progress(before)
        assert isinstance(last, Located), last
        assert run[1] == 0
        return last

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


def message_of(process: subprocess.Popen[bytes]) -> Message | None:
    event = wyoming.event.read_event(process.stdout)  # type: ignore[arg-type]
    return from_event(event)[0] if event else None


def check_progress(messages: Sequence[Message | None]) -> None:
    """It never falls, and never exceeds its total, which stays the same."""
    done = 0
    for message in messages:
        assert isinstance(message, Downloading)
        assert done <= message.done <= message.total == messages[0].total  # type: ignore[union-attr]
        done = message.done


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Iterator[Fetch]:
    fetch = Fetch(tmp_path, hub)
    yield fetch
    fetch.stop()


# --- what works ----------------------------------------------------------------------------------------------


def test_download_then_offline(hub: Hub, fetch: Fetch) -> None:
    """Progress while it comes, no weights that can run code; afterwards the network is asked for nothing."""
    blobs = fetch.data_dir / f"models/models--{REPOSITORY.replace('/', '--')}/blobs"
    blobs.mkdir(parents=True)
    with (blobs / "of-another-revision").open("wb") as file:
        file.truncate(1 << 30)
    hub.cut = True
    process = fetch.start(REPOSITORY)
    messages = [message_of(process)]
    wanted = sum(len(content) for name, content in hub.files.items() if not name.endswith((".bin", ".md")))
    while not (isinstance(messages[-1], Downloading) and messages[-1].done >= CHUNK):
        assert messages[-1] is not None
        messages.append(message_of(process))
    hub.cut = False
    hub.resume.set()
    while messages[-1]:
        messages.append(message_of(process))
    *progress, located, _ = messages
    check_progress(progress)
    assert isinstance(progress[0], Downloading)
    assert progress[0].total == wanted
    assert isinstance(located, Located)
    assert (located.name, located.languages) == (REPOSITORY, ["English", "German"])
    assert Path(located.path).is_relative_to(fetch.data_dir)
    assert process.wait(60) == 0
    assert not any("pytorch_model.bin" in request for request in hub.requests)

    hub.stop()
    hub.requests.clear()
    assert fetch.run(REPOSITORY) == ([located], 0)


def test_the_users_own_cache_is_used(hub: Hub, fetch: Fetch) -> None:
    """What another program downloaded is not downloaded again."""
    fetch.finds(REPOSITORY)
    hub.requests.clear()
    (fetch.home / "hub").parent.mkdir(exist_ok=True)
    (fetch.data_dir / "models").rename(fetch.home / "hub")
    located = fetch.finds(REPOSITORY)
    assert Path(located.path).is_relative_to(fetch.home)
    assert hub.requests == []


def test_a_revision_is_asked_for(hub: Hub, fetch: Fetch) -> None:
    assert fetch.finds(f"{REPOSITORY}@v1").path.endswith(COMMITS["v1"])
    assert any(f"/api/models/{REPOSITORY}/revision/v1" in request for request in hub.requests)
    assert not any(COMMITS["main"] in request for request in hub.requests)
    assert fetch.finds(REPOSITORY).path.endswith(COMMITS["main"])


def test_a_killed_download_is_resumed(hub: Hub, fetch: Fetch) -> None:
    """What is half there is not taken for whole; what has arrived is not asked for again."""
    hub.cut = True
    process = fetch.start(REPOSITORY)
    assert hub.halfway.wait(60)
    part = f"*/{hashlib.sha256(hub.files[WEIGHTS]).hexdigest()}.incomplete"
    wait_until(lambda: [file.stat().st_size for file in fetch.data_dir.rglob(part)] == [CHUNK], 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.cut = False
    hub.resume.set()
    hub.requests.clear()
    fetch.finds(REPOSITORY)
    (asked,) = [request for request in hub.requests if request.startswith("GET") and WEIGHTS in request]
    assert asked.endswith(f" bytes={CHUNK}-")


def test_a_broken_connection(hub: Hub, fetch: Fetch) -> None:
    """May work later; and later it does."""
    hub.cut = True
    hub.resume.set()  # the end comes before the rest
    failed, code = fetch.fails(REPOSITORY)
    assert (failed.code, code) == ("model-unavailable", 1)
    hub.cut = False
    fetch.finds(REPOSITORY)


# --- what does not ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("somebody/else", "the Hub has no model 'somebody/else'"),
        (f"{REPOSITORY}@v2", f"the Hub has no revision 'v2' of {REPOSITORY}"),
        ("some body/x", "'some body/x' is not a Hugging Face id"),
        (FOREIGN, "this is not a Qwen3-ASR model"),
    ],
)
def test_what_is_not_there(model: str, said: str, fetch: Fetch) -> None:
    failed, code = fetch.fails(model)
    assert failed.message.startswith(said)
    assert (failed.code, code) == ("model-invalid", 3)


API, FILE = "GET /api/", "HEAD /"


@pytest.mark.parametrize(
    ("where", "status", "error_code", "code", "said"),
    [
        (API, 403, "GatedRepo", 3, "ask for access at http"),
        (FILE, 401, "GatedRepo", 3, "ask for access at http"),
        (FILE, 403, "GatedRepo", 3, "set HF_TOKEN"),
        (FILE, 403, "", 3, "refuses access"),
        (API, 500, "", 1, "500 "),
        (FILE, 404, "", 1, "404 "),
        (API, 429, "", 1, "429 "),
    ],
)
def test_refusals(where: str, status: int, error_code: str, code: int, said: str, hub: Hub, fetch: Fetch) -> None:
    """Of the list of files or of a file: what the user can do, or that trying later may help."""
    hub.fails = lambda request: (status, error_code) if request.startswith(where) else None
    failed, exit_code = fetch.fails(REPOSITORY)
    assert said in failed.message
    assert (failed.code, exit_code) == ("model-invalid" if code == 3 else "model-unavailable", code)


def test_an_unreachable_hub(hub: Hub, fetch: Fetch) -> None:
    hub.stop()
    failed, code = fetch.fails(REPOSITORY)
    assert failed.message == f"the model cannot be downloaded from {hub.url}: Connection refused"
    assert (failed.code, code) == ("model-unavailable", 1)


def test_a_hub_that_goes_away_in_between(hub: Hub, fetch: Fetch) -> None:
    """huggingface_hub then returns what is there, which is half a model: no reason to call it broken."""
    hub.cut = True
    hub.resume.set()
    assert fetch.fails(REPOSITORY)[1] == 1
    calls: list[str] = []

    def second_call(request: str) -> tuple[int, str] | None:
        calls.extend([request] if request.startswith(API) else [])
        return (500, "") if len(calls) > 1 else None

    hub.fails = second_call
    failed, code = fetch.fails(REPOSITORY)
    assert (failed.code, code) == ("model-unavailable", 1)


def test_without_the_extra(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing/tokenizers.py").write_text("raise ModuleNotFoundError(\"No module named 'tokenizers'\")")
    fetch.environ["PYTHONPATH"] = str(tmp_path / "missing")
    failed, code = fetch.fails("demo")
    assert failed.message == "No module named 'tokenizers': install the [local] extra"
    assert (failed.code, code) == ("model-invalid", 3)


# --- models on this machine ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a checkpoint as a folder and as an archive."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(DEMO) as archive:
        archive.extractall("models/tiny")
    shutil.copy(DEMO, "tiny.zip")
    return tmp_path


def nothing(message: Message) -> None:
    raise AssertionError("nothing is downloaded")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("models/tiny", "tiny"),
        ("./models/tiny/", "tiny"),
        ("tiny.zip", "tiny.zip"),
        ("~/tiny.zip", "tiny.zip"),
    ],
)
def test_local_models(model: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    located = locate(model, "cpu", folder / "none", nothing)
    assert (located.name, located.languages) == (name, ["English", "German"])
    assert Path(located.path).exists()
    assert not (folder / "none").exists()


def test_the_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a checkpoint that does not list its languages has all of Qwen3-ASR's."""
    monkeypatch.chdir(folder / "models/tiny")
    config = json.loads(Path("config.json").read_text())
    Path("config.json").write_text(json.dumps({**config, "support_languages": None}))
    assert locate(".", "cpu", folder, nothing) == Located("tiny", ".", list(LANGUAGES.values()))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./none", "there is no model at the given place"),
        ("/none/at/all", "there is no model at the given place"),
        ("~nobody-of-this-name/x", "there is no model at the given place"),
        ("/" + "x" * 5000, "the model cannot be read"),
        ("models", "config.json is missing"),
        ("2b", "there is no model '2b': give 0.6b, 1.7b, a Hugging Face id or a directory"),
        ("a/b/c", "there is no model 'a/b/c'"),
        ("x" * 5000, "there is no model"),
    ],
)
def test_what_is_no_model(model: str, said: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        locate(model, "cpu", folder, nothing)
