"""The tokenizer and the prompt of Qwen3-ASR.

Byte-level BPE with the pre-tokenizer of Qwen2 (`Qwen2Tokenizer` in transformers 4.57). The official repositories
ship vocab.json, merges.txt and tokenizer_config.json but no tokenizer.json; re-saved ones have both. Either is read.

The special tokens are kept out of the BPE altogether: text from a user can never become one, and a
transcript can never show one. They are looked up by name, because their ids differ between checkpoints.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers  # type: ignore[import-untyped]
from tokenizers import Tokenizer as Backend

_AUDIO = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
_END = ("<|im_end|>", "<|endoftext|>")

# How Qwen2 cuts text before BPE (a published constant of the format): contractions, a word with the one sign before it,
# single digits, signs with the line breaks after them, line breaks, trailing blanks.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNFINISHED = "\ufffd"  # what the byte-level decoder puts for bytes that are not (yet) a character


def byte_level(bpe: models.BPE) -> Backend:
    """The BPE behind Qwen2's normaliser and pre-tokenizer."""
    backend = Backend(bpe)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


class Tokenizer:
    """Text to ids and back, and the prompt around a recording.

    backend: the BPE, without any added token. added: name to id of every special and added token.
    end_ids: ids that end an answer besides `<|im_end|>` and `<|endoftext|>`.
    Raises ValueError when a token that the prompt needs is missing.
    """

    def __init__(self, backend: Backend, added: Mapping[str, int], end_ids: Iterable[int] = ()) -> None:
        self._backend = backend
        self._added = frozenset(added.values())
        missing = [name for name in ("<|im_start|>", *_END, *_AUDIO, "<asr_text>") if name not in added]
        if missing:
            raise ValueError(f"the tokenizer has no token {missing[0]}")
        self.im_start = added["<|im_start|>"]
        self.im_end = added["<|im_end|>"]
        self.audio_start, self.audio_pad, self.audio_end = (added[name] for name in _AUDIO)
        self.asr_text = added["<asr_text>"]
        self.end_ids = frozenset(end_ids) | {added[name] for name in _END}
        self.size = 1 + max(*added.values(), max(backend.get_vocab().values(), default=0))

    @classmethod
    def from_json(cls, text: str, added: Mapping[str, int], end_ids: Iterable[int] = ()) -> "Tokenizer":
        """From the content of tokenizer.json; `added` completes its own added tokens. Raises ValueError."""
        try:
            data: dict[str, Any] = json.loads(text)
            own = {str(token["content"]): int(token["id"]) for token in data.get("added_tokens") or ()}
            data["added_tokens"] = []
            backend = Backend.from_str(json.dumps(data))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError("tokenizer.json cannot be read") from error
        return cls(backend, {**added, **own}, end_ids)

    @classmethod
    def from_vocab(
        cls, vocab: Mapping[str, int], merges: str, added: Mapping[str, int], end_ids: Iterable[int] = ()
    ) -> "Tokenizer":
        """From vocab.json and the content of merges.txt. Raises ValueError."""
        # The byte alphabet of the BPE holds no line break, so lines are exactly what "\n" divides.
        lines = [line.rstrip("\r") for line in merges.split("\n")]
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if not pairs:
            raise ValueError("merges.txt is empty")
        try:
            bpe = models.BPE(
                dict(vocab),
                [(left, right) for left, right in pairs],
                continuing_subword_prefix="",
                end_of_word_suffix="",
            )
        except Exception as error:
            raise ValueError("vocab.json and merges.txt do not belong together") from error
        return cls(byte_level(bpe), added, end_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what looks like a special token in it stays text. Lone surrogates become "?"."""
        text = text.encode("utf-8", "replace").decode()
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens, and without a character whose last bytes have not come yet."""
        plain = [i for i in ids if i not in self._added]
        text: str = self._backend.decode(plain, skip_special_tokens=False)
        return text.rstrip(_UNFINISHED)

    def language_tag(self, language: str) -> list[int]:
        """Ids of "language X<asr_text>", what the model writes before the text; X is Qwen's name, as "English"."""
        return [*self.encode(f"language {language}"), self.asr_text]

    def prompt(self, audio_tokens: int, context: str | None = "", language: str | None = None) -> list[int]:
        """Ids of the chat up to the model's answer, with `audio_tokens` places for the encoder's rows.

        The turns are those of the chat template that qwen-asr 0.0.6 fills: the context is the system turn, which
        is there even when empty, and the recording is the user turn. The context None leaves the system turn out, as
        other servers do (vLLM's transcription endpoint). A `language` (Qwen's name) is forced:
        its tag is put in the model's mouth.
        """
        system = (self.im_start, *self.encode(f"system\n{context}"), self.im_end, *self.encode("\n"))
        return [
            *(system if context is not None else ()),
            *(self.im_start, *self.encode("user\n")),
            *(self.audio_start, *[self.audio_pad] * audio_tokens, self.audio_end),
            *(self.im_end, *self.encode("\n")),
            *(self.im_start, *self.encode("assistant\n")),
            *(self.language_tag(language) if language else ()),
        ]
