"""A Qwen3-ASR checkpoint: what is in it, whether it is whole, and its weights.

The layout is that of the official repositories (Qwen/Qwen3-ASR-0.6B and 1.7B): config.json, a tokenizer, and
safetensors in one file or in shards with an index. It may lie in a directory or in one .zip.
Opening reads the small files and the headers of the weights only, and needs no torch.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .architecture import DecoderConfig, EncoderConfig, Shapes
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "DecoderConfig", "EncoderConfig", "Tokenizer", "open_checkpoint"]

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
        from safetensors import safe_open  # brings torch, which opening must not
        from safetensors.torch import load

        wanted = self.shapes
        weights: dict[str, torch.Tensor] = {}
        with _reading(self.path) as root:
            for shard in _shards(root):
                file = root / shard
                if isinstance(file, zipfile.Path):
                    tensors = load(file.read_bytes())
                    found = {name: tensors[name] for name in tensors if name.removeprefix(_PREFIX) in wanted}
                else:
                    with safe_open(file, framework="pt") as mapped:
                        names = [name for name in mapped.keys() if name.removeprefix(_PREFIX) in wanted]  # noqa: SIM118
                        found = {name: mapped.get_tensor(name) for name in names}
                weights |= {name.removeprefix(_PREFIX): tensor.to(device, dtype) for name, tensor in found.items()}
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
        languages = config.get("support_languages") or ()
        checkpoint = Checkpoint(
            name=name or (path.name if path.is_dir() else path.stem),
            path=path,
            encoder=encoder,
            decoder=decoder,
            languages=tuple(str(language) for language in languages),
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
    added: dict[str, int] = {}
    if (root / "added_tokens.json").is_file():
        added |= {token: int(i) for token, i in _json(root, "added_tokens.json").items()}
    if (root / "tokenizer_config.json").is_file():
        tokens = _json(root, "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {token["content"]: int(i) for i, token in tokens.items()}
    ends: set[int] = set()
    generation = _json(root, "generation_config.json") if (root / "generation_config.json").is_file() else {}
    for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
        ends |= set(value if isinstance(value, list) else () if value is None else (value,))
    try:
        if (root / "tokenizer.json").is_file():
            return Tokenizer.from_json((root / "tokenizer.json").read_text(encoding="utf-8"), added, ends)
        vocab = _json(root, "vocab.json")
        if not (root / "merges.txt").is_file():
            raise CheckpointError("merges.txt is missing: this is not a whole Qwen3-ASR model")
        return Tokenizer.from_vocab(vocab, (root / "merges.txt").read_text(encoding="utf-8"), added, ends)
    except ValueError as error:
        raise CheckpointError(f"the tokenizer of the model is broken: {error}") from error


def _verify(root: _Dir, shapes: Shapes) -> None:
    """Compare the headers of the weights with what the network needs, and their length with the files."""
    found: dict[str, Any] = {}
    for shard in _shards(root):
        found |= _header(root / shard)
    found = {name.removeprefix(_PREFIX): entry for name, entry in found.items()}
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"the weights of the model are incomplete: {name} is missing")
        if tuple(found[name]["shape"]) != shape:
            raise CheckpointError(f"the weights do not fit config.json: {name} has the shape {found[name]['shape']}")
        if found[name]["dtype"] not in _DTYPES:
            raise CheckpointError(f"weights of type {found[name]['dtype']} are not supported: take the bf16 model")


def _shards(root: _Dir) -> list[str]:
    """Names of the files with the weights."""
    if (root / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not (root / _INDEX).is_file():
        raise CheckpointError(f"{_WEIGHTS} is missing: this is not a whole Qwen3-ASR model")
    names = sorted({str(name) for name in dict(_json(root, _INDEX).get("weight_map") or ()).values()})
    for name in names:
        if not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise CheckpointError(f"{_INDEX} is broken: it names a file that holds no weights")
        if not (root / name).is_file():
            raise CheckpointError(f"{name} is missing: this is not a whole Qwen3-ASR model")
    return names


def _header(file: _Dir) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, JSON of that length, and data up to the end of the file."""
    size = file.root.getinfo(file.at).file_size if isinstance(file, zipfile.Path) else file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        text = stream.read(length) if length <= _HEADER_LIMIT else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in header.values())
        assert all(isinstance(entry["shape"], list) and entry["dtype"] for entry in header.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file.name} is broken or was not downloaded to its end") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{file.name} was not downloaded to its end: {size} of {8 + length + end} bytes")
    return header


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
        raise CheckpointError(f"the model cannot be read: {error.strerror}") from error


def _top(root: zipfile.Path) -> zipfile.Path:
    """Archives made from a folder hold that folder."""
    entries = list(root.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else root


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
