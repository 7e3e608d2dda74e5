"""Checkpoints and sounds for the tests of the network: everything is made from fixed seeds."""

import json
import math
import shutil
import wave
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wyoming_qwen_asr.model.architecture import DecoderConfig, EncoderConfig

ROOT = Path(__file__).parent
DEMO = ROOT.parent / "wyoming_qwen_asr" / "demo_model.zip"

# The proportions of the 0.6B model, scaled down; with odd head counts, as there.
ENCODER = EncoderConfig(
    encoder_layers=3,
    encoder_attention_heads=7,
    encoder_ffn_dim=448,
    d_model=112,
    downsample_hidden_size=20,
    n_window=50,
    n_window_infer=800,
    output_dim=128,
)
DECODER = DecoderConfig(
    vocab_size=768,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    max_position_embeddings=4096,
    rope_theta=1_000_000.0,
)


def unpack_demo(folder: Path) -> Path:
    """The demo checkpoint as a directory."""
    with zipfile.ZipFile(DEMO) as archive:
        archive.extractall(folder)
    inside = [entry for entry in folder.iterdir() if entry.is_dir()]
    return inside[0] if inside else folder


def random_checkpoint(folder: Path, tokenizer: Path, tied: bool = True) -> Path:
    """A checkpoint in the official layout with random weights and the tokenizer of another; returns its folder."""
    folder.mkdir()
    for name in ("chat_template.json", "generation_config.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder)
    for name in ("preprocessor_config.json", "tokenizer_config.json", "vocab.json"):
        shutil.copy(tokenizer / name, folder)
    decoder = replace(DECODER, tie_word_embeddings=tied)
    config = json.loads((tokenizer / "config.json").read_text())
    sections = config["thinker_config"]
    sections["audio_config"] = {"model_type": "qwen3_asr_audio_encoder", **asdict(ENCODER)}
    rope = {"rope_type": "default", "mrope_interleaved": True, "interleaved": True, "mrope_section": [8, 8, 8]}
    sections["text_config"] = {"model_type": "qwen3_asr_text", "rope_scaling": rope, **asdict(decoder)}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"audio_tower.{name}": shape for name, shape in ENCODER.shapes().items()} | decoder.shapes()
    dice = torch.Generator().manual_seed(7)
    weights = {f"thinker.{name}": _random(name, shape, dice) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _random(name: str, shape: tuple[int, ...], dice: torch.Generator) -> Tensor:
    """Weights that keep a signal at its size, so that differences are seen at the end."""
    noise = torch.randn(shape, generator=dice)
    if len(shape) == 1:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise
    return noise if "embed_tokens" in name else noise * 1.5 / math.sqrt(math.prod(shape[1:]))


def sound(seconds: float, seed: int = 0) -> Tensor:
    """A few chirps and hiss, [n] float32 at 16 kHz: nothing said, but every bin of the spectrum moves."""
    dice = torch.Generator().manual_seed(seed)
    t = torch.arange(round(seconds * 16_000), dtype=torch.float64) / 16_000
    start, slope, rate = torch.rand(3, 3, 1, generator=dice, dtype=torch.float64)
    chirps = torch.sin(2 * math.pi * (100 + 900 * start + 600 * slope * t) * t) * torch.sin(
        math.pi * (1 + 3 * rate) * t
    )
    hiss = torch.randn(len(t), generator=dice, dtype=torch.float64)
    return (0.2 * chirps.sum(0) + 0.01 * hiss).clamp(-1, 1).float()


def recording(name: str) -> Tensor:
    """A file of tests/recordings, [n] float32 at 16 kHz."""
    with wave.open(str(ROOT / "recordings" / name)) as file:
        data = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(data, dtype=torch.int16).float() / 32_768


def recordings() -> list[tuple[str, str, str]]:
    """Name, text and language (Qwen's name) of the files in tests/recordings."""
    names = {"en": "English", "de": "German"}
    entries = json.loads((ROOT / "recordings" / "texts.json").read_text(encoding="utf-8"))
    return [(entry["file"], entry["text"], names[entry["language"]]) for entry in entries]
