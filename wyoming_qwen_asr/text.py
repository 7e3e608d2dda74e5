"""Languages and the joining of texts: pure functions on strings."""

import re
import unicodedata
from collections.abc import Iterable

LANGUAGES = {
    "zh": "Chinese",
    "en": "English",
    "yue": "Cantonese",
    "ar": "Arabic",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "pt": "Portuguese",
    "id": "Indonesian",
    "it": "Italian",
    "ko": "Korean",
    "ru": "Russian",
    "th": "Thai",
    "vi": "Vietnamese",
    "ja": "Japanese",
    "tr": "Turkish",
    "hi": "Hindi",
    "ms": "Malay",
    "nl": "Dutch",
    "sv": "Swedish",
    "da": "Danish",
    "fi": "Finnish",
    "pl": "Polish",
    "cs": "Czech",
    "fil": "Filipino",
    "fa": "Persian",
    "el": "Greek",
    "hu": "Hungarian",
    "mk": "Macedonian",
    "ro": "Romanian",
}
"""Code as Home Assistant matches it → the name in Qwen3-ASR's prompt and output. The 30 languages of its model
card; its 22 Chinese dialects all answer as Chinese or Cantonese."""

_ALIASES = {"tl": "fil", "in": "id", "cmn": "zh", "zh-hk": "yue", "zh-yue": "yue"}
"""Other codes for the same: ISO 639-1 Tagalog, Java's Indonesian, ISO 639-3 Mandarin, spoken Hong Kong Chinese."""

_NAME_WORDS = 3
"""A name may have so many words: "living room light"."""

_CODES = {name: code for code, name in LANGUAGES.items()}


def language_name(hint: str | None) -> str | None:
    """Qwen's name for "en", "en-GB", "pt_BR" or "English"; None for what it has no name for, "auto" included."""
    tag = (hint or "").strip().lower().replace("_", "-")
    for code in (tag, tag.split("-")[0]):
        if name := LANGUAGES.get(_ALIASES.get(code, code)):
            return name
    name = tag.capitalize()
    return name if name in _CODES else None


def language_code(name: str | None) -> str | None:
    """The plain code of a language by its Qwen name."""
    return _CODES.get(name or "")


def join(texts: Iterable[str]) -> str:
    """One text of several that follow each other: a space between them, unless the script writes none, or there is
    one already."""
    joined = ""
    for text in texts:
        joined += separator(joined, text) + text
    return joined


def separator(before: str, after: str) -> str:
    """What `join` puts between two texts: a space or nothing."""
    return " " if before and after and not (_stands_alone(before[-1]) or _stands_alone(after[0])) else ""


def agreement(one: str, other: str) -> int:
    """How many characters both begin with."""
    if other.startswith(one):
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def words_end(text: str, most: int) -> int:
    """How many of the first `most` characters of a text are whole words, whatever may follow the text: a word ends
    before a blank, and around each character of a script without blanks."""
    for end in range(min(most, len(text)), 0, -1):
        before, after = text[end - 1], text[end : end + 1]
        if before.isspace() or (after and unicodedata.category(after).startswith("M")):
            continue  # a mark belongs to the character before it
        if _stands_alone(before) or (after and _stands_alone(after)):
            return end
    return 0


def echoes(text: str, context: str, so_far: bool = False) -> bool:
    """Whether a text is its context read aloud, or the beginning of that, which models do where nobody speaks. A single
    name is no such context: somebody may just have said it."""
    names = [name for name in re.split(r"[,;、，；\n]", context) if _words(name)]
    told, said = _words(context), _words(text)
    if len(names) < 2 and len(told) <= _NAME_WORDS:
        return False
    return said == (told[: len(said)] if so_far else told)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _stands_alone(char: str) -> bool:
    """Characters of Chinese, Japanese and Thai, with their punctuation, and blanks. Korean does write spaces."""
    if char.isspace() or "\u3000" <= char <= "\u303f":  # 。、「」〜々
        return True
    return unicodedata.name(char, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "FULLWIDTH"))
