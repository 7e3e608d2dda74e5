"""What is said: sentences of the domain, and which of them are kept for testing."""

import hashlib
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

_DOMAIN = Path(__file__).with_name("domain.yaml")
# A choice without anything left to fill in inside it, or a slot.
_PLACEHOLDER = re.compile(r"\[([^\[\]{}]*)\]|\{(\w+)\}")
_WORD = re.compile(r"[^\W\d_]+")

T = TypeVar("T")


class Draw:
    """Random choices that stay the same in every version of Python: only `random()` is promised to."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed).random  # noqa: S311

    def chance(self, share: float) -> bool:
        return self.random() < share

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + self.random() * (high - low)

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.between(0, len(options) - 1)]


@cache
def domain() -> dict[str, Any]:
    """The content of domain.yaml."""
    content: dict[str, Any] = yaml.safe_load(_DOMAIN.read_text(encoding="utf-8"))
    return content


def written(words: Sequence[str], language: str) -> str:
    """Words as a sentence: "what is it" becomes "What is it?"."""
    text = " ".join(words)
    return text[0].upper() + text[1:] + ("?" if words[0] in domain()["languages"][language]["question_words"] else ".")


def fill(template: str, language: str, draw: Draw) -> list[str]:
    """The words of one filling of a template."""
    slots = domain()["languages"][language]["slots"]
    while match := _PLACEHOLDER.search(template):
        choice, slot = match.groups()
        options = slots[slot] if slot else choice.split("|")
        template = template[: match.start()] + draw.one_of(options) + template[match.end() :]
    return template.split()


def sentence(language: str, draw: Draw) -> list[str]:
    """The words of any sentence of the domain."""
    return fill(draw.one_of(domain()["languages"][language]["sentences"]), language, draw)


def kept_for_testing(words: Sequence[str]) -> bool:
    """Whether a sentence with a slot must not be trained on."""
    return hashlib.sha256(" ".join(words).encode()).digest()[0] % 10 == 0


def training_sentence(language: str, draw: Draw) -> list[str]:
    """A sentence that is not kept for testing."""
    template = draw.one_of(domain()["languages"][language]["sentences"])
    while True:
        words = fill(template, language, draw)
        if "{" not in template or not kept_for_testing(words):
            return words


def test_sentence(language: str, draw: Draw) -> list[str]:
    """A sentence that was not trained on, wherever its template has a slot and enough fillings to keep some back."""
    while True:
        template = draw.one_of(domain()["languages"][language]["sentences"])
        for _ in range(200):
            words = fill(template, language, draw)
            if "{" not in template or kept_for_testing(words):
                return words


@cache
def vocabulary(language: str) -> tuple[str, ...]:
    """Every word of a language's domain, sorted, in lower case unless it is a noun of German or a name."""
    spoken = domain()["languages"][language]
    texts = [*spoken["sentences"], *(entry for slot in spoken["slots"].values() for entry in slot)]
    return tuple(sorted({word for text in texts for word in _WORD.findall(re.sub(r"\{\w+\}", " ", text))}))


def random_words(language: str, draw: Draw) -> list[str]:
    """Words without sense: what keeps a decoder listening instead of guessing."""
    while True:
        words = [draw.one_of(vocabulary(language)) for _ in range(draw.between(2, 7))]
        if not kept_for_testing(words):
            return words
