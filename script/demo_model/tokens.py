"""The tokenizer: byte-level BPE with Qwen2's pre-tokenizer, learnt on the domain, in the official layout's files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend  # type: ignore[import-untyped]
from tokenizers import models, pre_tokenizers, trainers

from wyoming_qwen_asr.model.tokenizer import Tokenizer, byte_level

from .sentences import Draw, random_words, training_sentence, written

SIZE = 768  # rows of the embedding: BPE, special tokens, and a few that stay unused
_BPE = 700
_SPECIAL = (
    *("<|im_end|>", "<|endoftext|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<|im_start|>"),
    "<asr_text>",  # an added token, but not a special one, as in the official checkpoints
)
ADDED = {name: _BPE + index for index, name in enumerate(_SPECIAL)}
LANGUAGES = {"en": "English", "de": "German"}

_TEMPLATE = (
    "{%- for m in messages %}{%- if m['role']=='system' %}{{- '<|im_start|>system\\n' }}"
    "{%- if m['content'] is string %}{{- m['content'] }}{%- else %}"
    "{%- for c in m['content'] %}{{- c['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- elif m['role']=='user' %}{{- '<|im_start|>user\\n' }}"
    "{%- for c in m['content'] %}{%- if c['type']=='audio' %}{{- '<|audio_start|><|audio_pad|><|audio_end|>' }}"
    "{%- elif c['type']=='text' %}{{- c['text'] }}{%- endif %}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def make(folder: Path, seed: int) -> Tokenizer:
    """Learn the BPE and write the tokenizer's files into the folder, unless they are there."""
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, _learn(seed))
    return load(folder)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `make` has written there."""
    return Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"), ADDED)


def _learn(seed: int) -> Backend:
    draw = Draw(f"{seed}/tokens")
    texts = []
    for _ in range(10_000):
        language = "de" if draw.chance(0.3) else "en"
        text = written((random_words if draw.chance(0.5) else training_sentence)(language, draw), language)
        # The real tokenizer, too, has one token for each of these names with the blank before it.
        texts += [text, "system user assistant", *(f"language {name}" for name in (*LANGUAGES.values(), "None"))]
    learnt = byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_BPE, initial_alphabet=alphabet, show_progress=False)
    learnt.train_from_iterator(texts, trainer)
    for name in (*LANGUAGES.values(), "None"):
        if len(learnt.encode(f" {name}").ids) != 1:
            raise RuntimeError(f"the tokenizer splits {name}")
    return learnt


def _write(folder: Path, learnt: Backend) -> None:
    """vocab.json and merges.txt as the official repositories have them, and tokenizer.json for those who want it."""
    learnt.model.save(str(folder))
    data: dict[str, Any] = json.loads(learnt.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = {str(i): {"content": name, **flags, "special": name != "<asr_text>"} for name, i in ADDED.items()}
    data["added_tokens"] = [{"id": int(i), **token} for i, token in tokens.items()]
    named = {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>", "audio_token": "<|audio_pad|>"}
    files: dict[str, Any] = {
        "tokenizer.json": data,
        "tokenizer_config.json": {
            "added_tokens_decoder": tokens,
            "additional_special_tokens": ["<|im_start|>"],
            **named,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": named,
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen3ASRProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "chat_template.json": {"chat_template": _TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
