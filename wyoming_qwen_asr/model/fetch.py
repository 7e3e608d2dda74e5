"""`python -m wyoming_qwen_asr.model.fetch`: make sure that a checkpoint is complete on disk, then leave.

Says `Downloading` now and then, and at the end `Located` or `Failed`. When the files are there, the network is not
asked for anything. Imports torch only when `--model auto` has to look at a GPU.
"""

import argparse
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING

from setproctitle import setproctitle

from ..errors import EXIT_CANNOT_LOAD, AsrError, CheckpointError, ModelUnavailable
from ..events import Downloading, Failed, Located, Message
from ..logs import log_to_stderr
from ..process import adopt, say
from ..text import LANGUAGES
from .hardware import pick_model

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

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
    if path := _local(model):
        return _verified(path, path.resolve().name)
    repository, _, revision = model.partition("@")
    repository = REPOSITORIES.get(repository.lower(), repository)
    if repository.count("/") != 1:
        raise CheckpointError(f"there is no model {model!r}: give 0.6b, 1.7b, a Hugging Face id or a directory")
    return _from_hub(repository, revision or None, data_dir / "models", tell)


def _local(model: str) -> Path | None:
    """The path that `model` is, or must be by its looks; None for the names of repositories."""
    with suppress(OSError, RuntimeError):  # too long for a path, or of somebody who has no home here
        path = Path(model).expanduser()
        if path.exists():
            return path
    return Path(model) if model.startswith((".", "/", "~")) else None


def _verified(path: Path, name: str) -> Located:
    from .checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, name)
    return Located(name, str(path), list(checkpoint.languages or LANGUAGES.values()))


def _from_hub(repository: str, revision: str | None, cache: Path, tell: Callable[[Message], None]) -> Located:
    """From our own cache or the user's Hugging Face cache, else downloaded into our own."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    snapshot = partial(snapshot_download, repository, revision=revision, allow_patterns=PATTERNS)
    try:
        for place in (cache, None):  # None: where other programs of this user keep theirs
            with suppress(OSError, CheckpointError):  # absent, out of reach, or half downloaded
                return _verified(Path(snapshot(cache_dir=place, local_files_only=True)), repository)
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=30)
        with _progress(_blobs(info), cache / f"models--{repository.replace('/', '--')}" / "blobs", tell):
            found = Path(snapshot(cache_dir=cache))
    except HFValidationError:
        raise CheckpointError(f"{repository!r} is not a Hugging Face id") from None
    except Exception as error:  # the errors of its HTTP library, which differ between its versions
        raise _translated(error, repository, revision, constants.ENDPOINT) from None
    if not all((found / file.rfilename).exists() for file in info.siblings or [] if _wanted(file.rfilename)):
        raise ModelUnavailable("the download of the model stopped before its end")  # the Hub went away in between
    return _verified(found, repository)


def _translated(error: BaseException | None, repository: str, revision: str | None, hub: str) -> AsrError:
    """What an exception of huggingface_hub means. The cause at its root is what a user understands."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    reason = ""
    while error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if isinstance(error, GatedRepoError):
            return CheckpointError(
                f"{repository} is given to registered users only: ask for access at {hub}/{repository} "
                "and set HF_TOKEN to an access token of yours"
            )
        if isinstance(error, RepositoryNotFoundError):
            return CheckpointError(f"the Hub has no model {repository!r}; if it is a private one, set HF_TOKEN")
        if isinstance(error, RevisionNotFoundError):
            return CheckpointError(f"the Hub has no revision {revision!r} of {repository}")
        if status in (401, 403):
            return CheckpointError(f"the Hub refuses access to {repository}: check the access token in HF_TOKEN")
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        error = error.__cause__ or error.__context__
    return ModelUnavailable(f"the model cannot be downloaded from {hub}: {reason}")


def _wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def _blobs(info: "ModelInfo") -> dict[str, int]:
    """Sizes of the files to be downloaded, by the names that they have in the cache's folder of blobs."""
    files = [file for file in info.siblings or [] if _wanted(file.rfilename)]
    return {(file.lfs.sha256 if file.lfs else file.blob_id) or "": file.size or 0 for file in files}


@contextmanager
def _progress(sizes: Mapping[str, int], folder: Path, tell: Callable[[Message], None]) -> Iterator[None]:
    """While inside, tell how many bytes have arrived: the library's own bars count files, not bytes."""
    finished = threading.Event()

    def watch() -> None:
        done = 0
        while True:
            arrived = sum(min(size, _arrived(folder, blob)) for blob, size in sizes.items())
            done = max(done, arrived)  # for a moment, a file that is being renamed is not there
            tell(Downloading(done, sum(sizes.values())))
            if finished.wait(PROGRESS_SECONDS):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _arrived(folder: Path, blob: str) -> int:
    """Bytes of a blob: of the whole file, or of the largest of those that are to become it."""
    sizes = [0]
    for path in folder.glob(f"{blob}*"):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def main() -> int:
    out = adopt()
    setproctitle("wyoming-qwen-asr: fetch")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args()
    log_to_stderr(args.log_level)

    tell = partial(say, out)
    try:
        tell(locate(args.model, args.device, args.data_dir, tell))
    except (AsrError, ImportError) as error:
        error = error if isinstance(error, AsrError) else CheckpointError(f"{error}: install the [local] extra")
        tell(Failed(error.code, str(error)))
        return EXIT_CANNOT_LOAD if isinstance(error, CheckpointError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
