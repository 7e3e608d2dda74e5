"""`python -m wyoming_qwen_asr.model.fetch`: make sure that a checkpoint is complete on disk, then leave.

Says `Downloading` now and then, and at the end `Located` or `Failed`. When the files are there, the network is not
asked for anything. Imports torch only when `--model auto` has to look at a GPU.
"""

import argparse
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files as resources
from pathlib import Path

from wyoming.event import write_event

from ..errors import AsrError, CheckpointError, ModelUnavailable
from ..events import Downloading, Failed, Located, Message, to_event
from ..process import adopt
from ..text import LANGUAGES
from . import log_to_stderr
from .checkpoint import open_checkpoint
from .hardware import pick_model

REPOSITORIES = {"0.6b": "Qwen/Qwen3-ASR-0.6B", "1.7b": "Qwen/Qwen3-ASR-1.7B"}

PATTERNS = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
"""Of a repository's files: weights as safetensors alone, for pickled ones can run code."""

PROGRESS_SECONDS = 1.0

_LOGGER = logging.getLogger(__name__)


def locate(model: str, device: str, data_dir: Path, tell: Callable[[Message], None]) -> Located:
    """Find, or download, and verify. `model` as in the settings. Raises CheckpointError when that cannot succeed,
    ModelUnavailable when it may later."""
    if model == "auto":
        model, reason = pick_model(device)
        _LOGGER.info("Model %s: %s", model, reason)
    if model == "demo":
        return _verified(Path(str(resources("wyoming_qwen_asr") / "demo_model.zip")), "demo")
    name = REPOSITORIES.get(model.lower(), model)
    path = Path(model).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        return _verified(path, path.name)
    if name.count("/") != 1:
        raise CheckpointError(f"there is no model {model!r}: give 0.6b, 1.7b, a Hugging Face id or a directory")
    return _from_hub(*name.partition("@")[::2], data_dir / "models", tell)


def _verified(path: Path, name: str) -> Located:
    checkpoint = open_checkpoint(path, name)
    return Located(name, str(path), list(checkpoint.languages or LANGUAGES.values()))


def _from_hub(repository: str, revision: str, cache: Path, tell: Callable[[Message], None]) -> Located:
    """From our own cache or the user's Hugging Face cache, else downloaded into our own."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        for place in (cache, None):  # None: where other programs of this user keep theirs
            try:
                found = snapshot_download(repository, revision=revision or None, cache_dir=place, local_files_only=True)
                return _verified(Path(found), repository)
            except (LocalEntryNotFoundError, CheckpointError):
                continue  # absent, or half downloaded
        with _progress(repository, revision, cache, tell):
            found = snapshot_download(repository, revision=revision or None, cache_dir=cache, allow_patterns=PATTERNS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at {revision!r}" if revision else ""
        raise CheckpointError(f"the Hub has no model {repository!r}{at} ({type(error).__name__})") from None
    except (OSError, HfHubHTTPError) as error:
        raise ModelUnavailable(f"the model cannot be downloaded: {_first_line(error)}") from None
    return _verified(Path(found), repository)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _progress(repository: str, revision: str, cache: Path, tell: Callable[[Message], None]) -> Iterator[None]:
    """While inside, tell how many bytes have arrived: the library's own bars count files, not bytes."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision or None, files_metadata=True, timeout=30)
    wanted = [f.size or 0 for f in info.siblings or [] if any(fnmatch(f.rfilename, p) for p in PATTERNS)]
    blobs = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    done = threading.Event()

    def watch() -> None:
        while True:
            sizes = (blob.stat().st_size for blob in blobs.glob("*") if blob.exists())
            tell(Downloading(sum(sizes), sum(wanted)))
            if done.wait(PROGRESS_SECONDS):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main() -> int:
    out = adopt()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args()
    log_to_stderr(args.log_level)

    def tell(message: Message) -> None:
        write_event(to_event(message), out)

    try:
        tell(locate(args.model, args.device, args.data_dir, tell))
    except AsrError as error:
        tell(Failed(error.code, str(error)))
        return 3 if isinstance(error, CheckpointError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
