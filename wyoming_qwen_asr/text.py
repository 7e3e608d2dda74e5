"""Languages and the joining of texts: pure functions on strings."""

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
        if joined and text and not (_stands_alone(joined[-1]) or _stands_alone(text[0])):
            joined += " "
        joined += text
    return joined


def _stands_alone(char: str) -> bool:
    """Characters of Chinese, Japanese and Thai, with their punctuation, and blanks. Korean does write spaces."""
    if char.isspace() or "\u3000" <= char <= "\u303f":  # 。、「」〜々
        return True
    return unicodedata.name(char, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "FULLWIDTH"))
