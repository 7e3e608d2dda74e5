"""Checkpoints that are fine in any shape, and the one clear line for those that are not."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wyoming_qwen_asr.errors import CheckpointError
from wyoming_qwen_asr.model.checkpoint import Checkpoint, open_checkpoint

from .network_fixtures import DEMO, random_checkpoint, unpack_demo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """In the type of the file, which is mapped and not copied, as well as in another."""
    for dtype in (torch.bfloat16, torch.float32):
        left, right = a.weights(CPU, dtype), b.weights(CPU, dtype)
        if left.keys() != right.keys() or not all(torch.equal(left[name], right[name]) for name in left):
            return False
    return True


def test_what_is_in_it(whole: Path) -> None:
    checkpoint = open_checkpoint(whole, name="Demo")
    assert (checkpoint.name, checkpoint.languages) == ("Demo", ("English", "German"))
    assert (checkpoint.encoder.d_model, checkpoint.decoder.vocab_size) == (128, 768)
    weights = checkpoint.weights(CPU, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == checkpoint.shapes
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_names(whole: Path, tmp_path: Path) -> None:
    assert open_checkpoint(DEMO).name == "demo_model"
    assert open_checkpoint(Path(shutil.copytree(whole, tmp_path / "Qwen3-ASR-0.6B"))).name == "Qwen3-ASR-0.6B"


@pytest.mark.parametrize("folder", ["", "some-folder/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_equals_directory(whole: Path, tmp_path: Path, folder: str, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w", method) as archive:
        for file in whole.iterdir():
            archive.write(file, folder + file.name)
    assert same(open_checkpoint(tmp_path / "m.zip"), open_checkpoint(whole))


def shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards(whole: Path, copy: Path) -> None:
    shard(copy)
    assert same(open_checkpoint(copy), open_checkpoint(whole))
    next(copy.glob("model-00002*")).unlink()
    refuses(copy, "model-00002-of-00003.safetensors is missing")


def test_tied_and_untied(whole: Path, tmp_path: Path) -> None:
    tied = random_checkpoint(tmp_path / "tied", whole)
    untied = random_checkpoint(tmp_path / "untied", whole, tied=False)
    assert "lm_head.weight" in open_checkpoint(untied).weights(CPU, torch.float32)
    weights = load_file(tied / "model.safetensors")
    save_file({**weights, "thinker.lm_head.weight": torch.zeros(768, 128)}, tied / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(tied).weights(CPU, torch.float32)


def test_ids_are_found_by_name(whole: Path, copy: Path) -> None:
    edit(copy / "generation_config.json", lambda data: data.update(eos_token_id=[12, 700]))
    edit(copy / "config.json", lambda data: data.update(eos_token_id=13))
    assert open_checkpoint(whole).tokenizer.end_ids == {700, 701}
    assert open_checkpoint(copy).tokenizer.end_ids == {12, 13, 700, 701}


def test_opening_needs_no_torch() -> None:
    """A child that only fetches a checkpoint verifies it without the seconds and megabytes of torch."""
    code = (
        "import sys; from pathlib import Path; from wyoming_qwen_asr.model.checkpoint import open_checkpoint\n"
        f"open_checkpoint(Path({str(DEMO)!r}))\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_opening_does_not_read_the_weights(copy: Path) -> None:
    """A multi-gigabyte file is judged by its header: the rest of this one is a hole."""
    file = copy / "model.safetensors"
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.truncate(header)
        stream.truncate(size)
    open_checkpoint(copy)


# --- what is not a checkpoint ---


def refuses(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 160
    assert str(path) not in message


def test_nothing_there(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "no model")
    refuses(tmp_path, "config.json is missing")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
        ("vocab.json", "vocab.json is missing"),
        ("merges.txt", "merges.txt is missing"),
    ],
)
def test_missing_files(copy: Path, missing: str, words: str) -> None:
    (copy / "tokenizer.json").unlink()  # as in the official repositories
    open_checkpoint(copy)
    (copy / missing).unlink()
    refuses(copy, words)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_broken_json(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    refuses(copy, f"{name} is broken")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"{", b'{"a": "b"}', b"a b c\n", b"zz\n"])
def test_broken_tokenizer(copy: Path, name: str, content: bytes) -> None:
    if name != "tokenizer.json":
        (copy / "tokenizer.json").unlink()
    (copy / name).write_bytes(content)
    refuses(copy, "")


@pytest.mark.parametrize("name", ["<|im_end|>", "<asr_text>", "<|audio_pad|>"])
def test_a_tokenizer_of_another_model(copy: Path, name: str) -> None:
    (copy / "tokenizer.json").unlink()

    def drop(data: dict[str, Any]) -> None:
        tokens = data["added_tokens_decoder"].items()
        data["added_tokens_decoder"] = {i: token for i, token in tokens if token["content"] != name}

    edit(copy / "tokenizer_config.json", drop)
    refuses(copy, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "whisper"}, "not a Qwen3-ASR model: config.json says 'whisper'"),
        ({"model_type": None}, "not a Qwen3-ASR model"),
        ({"thinker_config": None}, "without -hf"),
        ({"thinker_config": {"model_type": "qwen3_asr_forced_aligner"}}, "forced aligner"),
        ({"thinker_config": {"classify_num": 5000}}, "forced aligner"),
        ({"thinker_config": {}}, "audio encoder is of another kind"),
    ],
)
def test_foreign_models(copy: Path, change: dict[str, Any], words: str) -> None:
    edit(copy / "config.json", lambda data: data.update(change))
    refuses(copy, words)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("text_config", "hidden_size", 0, "hidden_size is 0"),
        ("text_config", "hidden_size", "128", "hidden_size is '128'"),
        ("text_config", "hidden_size", True, "hidden_size is True"),
        ("text_config", "hidden_size", 10**30, "hidden_size is 1"),
        ("text_config", "hidden_size", 64, "different widths"),
        ("text_config", "rope_theta", float("nan"), "rope_theta is nan"),
        ("text_config", "num_key_value_heads", 3, "do not fit together"),
        ("text_config", "attention_bias", True, "another kind"),
        ("text_config", "rope_scaling", {"rope_type": "yarn"}, "positions"),
        ("text_config", "rope_scaling", 7, "config.json"),
        ("text_config", "num_hidden_layers", 4, "model.layers.3"),
        ("text_config", "num_hidden_layers", 2_000_000_000, "num_hidden_layers"),
        ("text_config", "intermediate_size", 385, "mlp.gate_proj"),
        ("text_config", "tie_word_embeddings", False, "lm_head.weight is missing"),
        ("text_config", "vocab_size", 700, "more tokens than the network"),
        ("audio_config", "encoder_attention_heads", 3, "do not fit together"),
        ("audio_config", "activation_function", "relu", "another kind"),
        ("audio_config", "encoder_ffn_dim", 383, "fc1.weight has the shape"),
    ],
)
def test_numbers_that_do_not_fit(copy: Path, section: str, key: str, value: object, words: str) -> None:
    edit(copy / "config.json", lambda data: data["thinker_config"][section].update({key: value}))
    refuses(copy, words)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 50_000, -1])
def test_truncated_weights(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuses(copy, "downloaded to its end")


@pytest.mark.parametrize(
    "content", [b"<html>Not found</html>", b"\xff" * 100, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]"]
)
def test_weights_that_are_none(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    refuses(copy, "model")


def test_weights_of_another_type(copy: Path) -> None:
    file = copy / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "thinker.model.norm.weight": torch.zeros(128, dtype=torch.int8)}, file)
    refuses(copy, "I8 are not supported")
    del weights["thinker.audio_tower.proj1.bias"]
    save_file(weights, file)
    refuses(copy, "audio_tower.proj1.bias is missing")


def test_an_index_that_points_elsewhere(copy: Path) -> None:
    shard(copy)
    index = copy / "model.safetensors.index.json"
    for name in ("../secret.safetensors", "/etc/passwd", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refuses(copy, "names a file that holds no weights")
    for content in ({}, {"weight_map": 7}, {"weight_map": "ab"}):
        index.write_text(json.dumps(content))
        refuses(copy, "names no files")
    index.write_text(json.dumps({"weight_map": {}}))
    refuses(copy, "is missing")


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_broken_archives(tmp_path: Path, size: int) -> None:
    (tmp_path / "m.zip").write_bytes(DEMO.read_bytes()[:size])
    refuses(tmp_path / "m.zip", "whole .zip")


def test_weights_exchanged_after_opening(copy: Path) -> None:
    checkpoint = open_checkpoint(copy)
    file = copy / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "thinker.model.norm.weight": torch.zeros(64)}, file)
    with pytest.raises(CheckpointError, match="exchanged"):
        checkpoint.weights(CPU, torch.float32)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="broken"):
        checkpoint.weights(CPU, torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.weights(CPU, torch.float32)


def test_a_damaged_archive(whole: Path, tmp_path: Path) -> None:
    """The table of contents is there, the content is not what it says."""
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(whole.iterdir(), key=lambda file: file.name != "config.json"):
            archive.write(file, file.name)
    data = bytearray((tmp_path / "m.zip").read_bytes())
    data[60:400] = bytes(340)
    (tmp_path / "m.zip").write_bytes(data)
    refuses(tmp_path / "m.zip", "whole .zip")
