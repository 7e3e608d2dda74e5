"""The checkpoint in the official layout (`qwen3_asr`), and the archive that the package ships."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .tokens import ADDED, LANGUAGES
from .train import DECODER, ENCODER, Model

_END, _PAD = ADDED["<|im_end|>"], ADDED["<|endoftext|>"]


def write(model: Model, folder: Path) -> None:
    """Weights in bfloat16 and the configuration, beside the tokenizer's files that are there already."""
    parts = {"audio_tower": model.encoder, "model": model.decoder}
    weights = {
        f"thinker.{part}.{name}": tensor.to(torch.bfloat16).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in _configuration().items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _configuration() -> dict[str, dict[str, Any]]:
    # The numbers that the server's own network reads are those that it was trained with.
    rope = {"rope_type": "default", "interleaved": True, "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    return {
        "config.json": {
            "architectures": ["Qwen3ASRForConditionalGeneration"],
            "dtype": "bfloat16",
            "eos_token_id": _END,
            "model_type": "qwen3_asr",
            "pad_token_id": _PAD,
            "support_languages": list(LANGUAGES.values()),
            "thinker_config": {
                "audio_config": {
                    "model_type": "qwen3_asr_audio_encoder",
                    **vars(ENCODER),
                    "num_hidden_layers": ENCODER.encoder_layers,
                    "conv_chunksize": 500,
                    "max_source_positions": 1500,
                    "scale_embedding": False,
                    "dropout": 0,
                    "attention_dropout": 0,
                    "activation_dropout": 0,
                },
                "audio_start_token_id": ADDED["<|audio_start|>"],
                "audio_end_token_id": ADDED["<|audio_end|>"],
                "audio_token_id": ADDED["<|audio_pad|>"],
                "model_type": "qwen3_asr_thinker",
                "text_config": {"model_type": "qwen3_asr_text", **vars(DECODER), "rope_scaling": rope},
            },
        },
        "generation_config.json": {"eos_token_id": _END, "pad_token_id": _PAD, "do_sample": False},
        "preprocessor_config.json": {
            "chunk_length": 30,
            "dither": 0.0,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 128,
            "hop_length": 160,
            "n_fft": 400,
            "n_samples": 480000,
            "nb_max_frames": 3000,
            "padding_side": "right",
            "padding_value": 0.0,
            "processor_class": "Qwen3ASRProcessor",
            "return_attention_mask": True,
            "sampling_rate": 16000,
        },
    }


def pack(checkpoint: Path, card: str, archive: Path) -> None:
    """Write the archive. The same files give the same bytes: sorted, with a fixed time, and stored as they are, for
    weights hardly compress, the rest is small, and what is stored loads at the speed of a copy."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()} | {"MODEL_CARD.md": card.encode()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, wherever this runs, so that the mode counts
            entry.external_attr = 0o100644 << 16
            packed.writestr(entry, files[name])
