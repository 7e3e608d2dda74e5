"""A Qwen3-ASR checkpoint: what is in it, whether it is whole, and its weights.

The layout is that of the official repositories (Qwen/Qwen3-ASR-0.6B and 1.7B): config.json, a tokenizer, and
safetensors in one file or in shards with an index. It may lie in a directory or in one .zip.
Opening reads the small files and the headers of the weights only, and needs no torch.
"""

import json
import zipfile
import zlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .architecture import DecoderConfig, EncoderConfig, Shapes
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PREFIX = "thinker."  # official names put everything under the "thinker" of the Omni family
_DTYPES = ("BF16", "F16", "F32")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library

_Dir = Path | zipfile.Path


@dataclass(frozen=True)
class Checkpoint:
    """An opened, verified checkpoint. `languages` are Qwen's names, empty when the checkpoint does not say."""

    name: str
    path: Path
    encoder: EncoderConfig
    decoder: DecoderConfig
    languages: tuple[str, ...]
    tokenizer: Tokenizer

    @property
    def shapes(self) -> Shapes:
        """Names (as in `weights`) and shapes of all tensors of the network."""
        tower = {f"audio_tower.{name}": shape for name, shape in self.encoder.shapes().items()}
        return tower | self.decoder.shapes()

    def weights(self, device: "torch.device", dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
        """Every tensor in `shapes`. From a directory, files are mapped, so that only what is used is read.

        Raises CheckpointError when the files changed or cannot be read.
        """
        from safetensors import SafetensorError  # brings torch, which opening must not

        shapes = self.shapes
        try:
            with _reading(self.path) as root:
                weights = {
                    name: tensor.to(device, dtype)
                    for shard in _shards(root)
                    for name, tensor in _tensors(root / shard, shapes)
                }
        except SafetensorError as error:
            raise CheckpointError("the weights of the model are broken") from error
        if {name: tuple(tensor.shape) for name, tensor in weights.items()} != shapes:
            raise CheckpointError("the weights of the model were exchanged while it was being loaded")
        return weights


def open_checkpoint(path: Path, name: str = "") -> Checkpoint:
    """Open a directory or a .zip and check that it is a whole Qwen3-ASR model, without reading its weights.

    `name` is what users see; the default is the name of the directory or archive. Raises CheckpointError, with one
    line for the user.
    """
    with _reading(path) as root:
        config = _json(root, "config.json")
        encoder, decoder = _network(config)
        tokenizer = _tokenizer(root, config)
        if tokenizer.size > decoder.vocab_size:
            raise CheckpointError("the tokenizer belongs to another model: it has more tokens than the network")
        languages = config.get("support_languages")
        checkpoint = Checkpoint(
            name=name or (path.name if path.is_dir() else path.stem),
            path=path,
            encoder=encoder,
            decoder=decoder,
            languages=tuple(map(str, languages)) if isinstance(languages, list) else (),
            tokenizer=tokenizer,
        )
        _verify(root, checkpoint.shapes)
    return checkpoint


def _network(config: Mapping[str, Any]) -> tuple[EncoderConfig, DecoderConfig]:
    """Both sections of config.json, if they describe Qwen3-ASR."""
    kind = config.get("model_type")
    if kind != "qwen3_asr":
        raise CheckpointError(f"this is not a Qwen3-ASR model: config.json says {kind!r}")
    thinker = config.get("thinker_config")
    if not isinstance(thinker, dict):
        raise CheckpointError("this is Qwen3-ASR in another layout: take the repository without -hf in its name")
    if "forced_aligner" in str(thinker.get("model_type")) or "classify_num" in thinker:
        raise CheckpointError("this is the Qwen3 forced aligner, which cannot transcribe: take a Qwen3-ASR model")
    try:
        audio, text = (dict(thinker.get(f"{part}_config") or ()) for part in ("audio", "text"))
        rope = dict(text.get("rope_scaling") or ())
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            raise ValueError("its positions are of another kind")
        encoder, decoder = EncoderConfig.read(audio), DecoderConfig.read(text)
        if encoder.output_dim != decoder.hidden_size:
            raise ValueError("encoder and decoder are of different widths")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json does not describe a network that this program has: {error}") from error
    return encoder, decoder


def _tokenizer(root: _Dir, config: Mapping[str, Any]) -> Tokenizer:
    """From tokenizer.json where there is one, else from the files of the official repositories."""

    def optional(name: str) -> dict[str, Any]:
        return _json(root, name) if (root / name).is_file() else {}

    try:
        tokens = optional("tokenizer_config.json").get("added_tokens_decoder") or {}
        added = {name: int(i) for name, i in optional("added_tokens.json").items()}
        added |= {str(token["content"]): int(i) for i, token in tokens.items()}
        ends: list[int] = []
        for value in (optional("generation_config.json").get("eos_token_id"), config.get("eos_token_id")):
            ends += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if (root / "tokenizer.json").is_file():
            return Tokenizer.from_json((root / "tokenizer.json").read_text(encoding="utf-8"), added, ends)
        vocab = _json(root, "vocab.json")
        if not (root / "merges.txt").is_file():
            raise CheckpointError("merges.txt is missing: this is not a whole Qwen3-ASR model")
        return Tokenizer.from_vocab(vocab, (root / "merges.txt").read_text(encoding="utf-8"), added, ends)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of the model is broken: {error}") from error


def _verify(root: _Dir, shapes: Shapes) -> None:
    """Compare the headers of the weights with what the network needs, and their length with the files."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in _shards(root):
        found |= {name.removeprefix(_PREFIX): entry for name, entry in _header(root / shard).items()}
    for name, wanted in shapes.items():
        if name not in found:
            raise CheckpointError(f"the weights of the model are incomplete: {name} is missing")
        shape, dtype = found[name]
        if shape != wanted:
            raise CheckpointError(f"the weights do not fit config.json: {name} has the shape {shape}, not {wanted}")
        if dtype not in _DTYPES:
            raise CheckpointError(f"weights of type {dtype} are not supported: take the bf16 model")


def _tensors(file: _Dir, wanted: Container[str]) -> "Iterator[tuple[str, torch.Tensor]]":
    """Names, as in `Checkpoint.weights`, and tensors of one file."""
    from safetensors import safe_open
    from safetensors.torch import load

    if isinstance(file, zipfile.Path):
        for name, tensor in load(file.read_bytes()).items():
            if (short := name.removeprefix(_PREFIX)) in wanted:
                yield short, tensor
        return
    with safe_open(file, framework="pt") as mapped:
        for name in mapped.keys():  # noqa: SIM118 - it is no mapping
            if (short := name.removeprefix(_PREFIX)) in wanted:
                yield short, mapped.get_tensor(name)


def _shards(root: _Dir) -> list[str]:
    """Names of the files with the weights."""
    if (root / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not (root / _INDEX).is_file():
        raise CheckpointError(f"{_WEIGHTS} is missing: this is not a whole Qwen3-ASR model")
    files = _json(root, _INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"{_INDEX} is broken: it names no files")
    names = sorted({str(name) for name in files.values()})
    for name in names:
        if not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise CheckpointError(f"{_INDEX} is broken: it names a file that holds no weights")
        if not (root / name).is_file():
            raise CheckpointError(f"{name} is missing: this is not a whole Qwen3-ASR model")
    return names


def _header(file: _Dir) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor of a safetensors file: 8 bytes of length, JSON of that length, then the data."""
    size = file.root.getinfo(file.at).file_size if isinstance(file, zipfile.Path) else file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        text = stream.read(length) if length <= _HEADER_LIMIT else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = max(int(entry["data_offsets"][1]) for entry in header.values())
        tensors = {name: (tuple(entry["shape"]), str(entry["dtype"])) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file.name} is broken or was not downloaded to its end") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{file.name} was not downloaded to its end: {size} of {8 + length + end} bytes")
    return tensors


@contextmanager
def _reading(path: Path) -> Iterator[_Dir]:
    """The folder that holds config.json; what goes wrong while reading it becomes a CheckpointError."""
    try:
        if path.is_dir():
            yield path
        elif path.is_file():
            with zipfile.ZipFile(path) as archive:
                yield _top(zipfile.Path(archive))
        else:
            raise CheckpointError("there is no model at the given place")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError("the model is neither a folder nor a whole .zip file") from error
    except OSError as error:
        raise CheckpointError(f"the model cannot be read: {error.strerror or type(error).__name__}") from error


def _top(root: zipfile.Path) -> zipfile.Path:
    """Archives made from a folder hold that folder."""
    folders = [root, *(entry for entry in root.iterdir() if entry.is_dir())]
    return next((folder for folder in folders if (folder / "config.json").is_file()), root)


def _json(root: _Dir, name: str) -> dict[str, Any]:
    file = root / name
    if not file.is_file():
        raise CheckpointError(f"{name} is missing: this is not a whole Qwen3-ASR model")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{name} is broken: it is not JSON") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{name} is broken: it is not a JSON object")
    return data
