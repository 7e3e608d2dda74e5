"""One answer of the model while it is written: language tag, text, and when to stop. Plain token ids, no torch.

A draft is an answer that is likely to come out again. Its ids are read ahead of their turn: where the decoder would
have written them too they cost one forward together, and the first one it disagrees with is where it goes on by
itself, until it writes again what the draft has next. So the answer is the same without a draft.

The model answers "language English<asr_text>Hello.<|im_end|>"; where nobody speaks the language is None
(qwen-asr 0.0.6, `parse_asr_output`).
"""

import math
from collections.abc import Sequence

from ..text import echoes
from .loops import cut_loop, loop_period
from .tokenizer import Tokenizer

Guess = tuple[int, float]
"""The likeliest token, and how many nats it is ahead of the next one."""

NEAR = 4
"""An id that is not the draft's next one rejoins it among so many: a word was changed, put in or left out."""

AHEAD = 15
"""Ids of a draft that was rejoined that are read ahead at once: two words may meet by chance. With the one before them
as many rows as int8.py takes."""

TAG_TOKENS = 16  # a language tag is shorter, even where the tokenizer splits the name


class Answer:
    """Takes the decoder's tokens and says what the decoder is to read next.

    ids: the answer so far, without end token. pending: its last ids, which the decoder has yet to read; anything
    it read beyond the others is to be forgotten (see `kept`). done: nothing more is wanted. language: None until a tag
    is read, and when nobody speaks. looped, truncated: why it was stopped, if not by an end token.

    drafted, accepted: how many ids of the draft were read ahead, and how many of them were right.

    limit: the most tokens of text. draft: ids of an answer, without end token. context: what the model was told; a text
    that only repeats it counts as silence. expected: Qwen's name of a language. With `force` its tag is put in the
    model's mouth at once; otherwise the model's own tag is read first, and replaced if it names another language.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limit: int,
        expected: str | None = None,
        force: bool = False,
        draft: Sequence[int] = (),
        context: str | None = None,
    ) -> None:
        self._tokenizer, self._limit, self._expected = tokenizer, limit, expected
        self._context = context
        self._tag = tokenizer.language_tag(expected) if expected else []
        self._text_at: int | None = None  # where the text begins in ids; None while the tag is being read
        self._draft = list(draft[: self.room])
        self._at = 0  # where the draft goes on, as far as it is followed,
        self._strayed = 0  # and how many ids ago the answer has left it
        self._rejoined = False  # after it had left it
        self.ids: list[int] = []
        self.margins: list[float] = []
        self.pending: list[int] = []
        self.language: str | None = None
        self.done = self.looped = self.truncated = False
        self.drafted = self.accepted = 0
        if force:
            self._write_tag()

    @property
    def tagged(self) -> bool:
        """Whether `language` is settled."""
        return self._text_at is not None

    @property
    def kept(self) -> int:
        """How many ids of the answer the decoder has read and is to keep."""
        return len(self.ids) - len(self.pending)

    @property
    def ahead(self) -> list[int]:
        """What the decoder may read behind `pending`: the draft from here on, unless the answer has left it."""
        if self._strayed:
            return []
        most = AHEAD if self._rejoined else len(self._draft)
        return self._draft[self._at : self._at + most]

    @property
    def likely(self) -> list[int]:
        """The answer so far, and what the draft says of the rest."""
        return self.ids if self.done else self.ids + self._draft[self._at + self._strayed :]

    @property
    def room(self) -> int:
        """The most ids that the answer can grow to."""
        return max(TAG_TOKENS, len(self._tag)) + self._limit

    @property
    def text_ids(self) -> list[int]:
        """The ids of the text so far; none before the tag is read."""
        return [] if self._text_at is None else self.ids[self._text_at :]

    @property
    def text_margins(self) -> list[float]:
        """By how much each of them was the likeliest, in nats."""
        return [] if self._text_at is None else self.margins[self._text_at :]

    @property
    def text(self) -> str:
        """The text so far, "" before the tag is read: no blanks around it, no half character at its end."""
        text = self._tokenizer.decode(self.text_ids).strip()
        return "" if self._context and echoes(text, self._context) else text

    def verify(self, guesses: Sequence[Guess]) -> None:
        """Go on with what the decoder finds likeliest behind `pending`, and behind each id of `ahead` that it has read.
        Must not be called once done."""
        ahead = self.ahead
        self.drafted += len(ahead)
        for (token, margin), drafted in zip(guesses, [*ahead, None], strict=True):
            right = token == drafted
            self.accepted += right
            self.take(token, margin)
            if self.done or not right or self.pending != [token]:
                return  # what comes behind was read for nothing

    def take(self, token: int, margin: float = math.inf) -> None:
        """Go on with the token that the decoder finds likeliest, and by how much. Must not be called once done."""
        if token in self._tokenizer.end_ids:
            self.done, self.pending = True, []
            if self._text_at is None:
                self._text_at = 0  # no tag came: the SDK, too, takes such an answer for text
            return
        self.ids.append(token)
        self.margins.append(margin)
        self.pending = [token]
        self._follow(token)
        if self._text_at is not None:
            self._watch(self._text_at)
        elif token == self._tokenizer.asr_text:
            self._read_tag()
        elif len(self.ids) == TAG_TOKENS:
            self._text_at = 0

    def _read_tag(self) -> None:
        before, _, name = self._tokenizer.decode(self.ids).partition("language")
        name = "" if before.strip() else name.strip()  # something else than a language says nothing about it
        self._text_at = len(self.ids)
        if name.casefold() == "none":
            self.done = True
        elif self._expected and name.casefold() != self._expected.casefold():
            self._write_tag()
        else:
            self.language = name or None

    def _write_tag(self) -> None:
        self.ids, self.pending = list(self._tag), list(self._tag)
        self._at, self._strayed, self._rejoined = 0, 0, False
        for token in self._tag:
            self._follow(token)
        self.margins = [math.inf] * len(self._tag)
        self.language, self._text_at = self._expected, len(self._tag)

    def _follow(self, token: int) -> None:
        """Find the place in the draft behind this token."""
        near = self._draft[self._at : self._at + NEAR + self._strayed]
        if token in near:
            skipped = near.index(token)
            self._rejoined = self._rejoined or bool(skipped or self._strayed)
            self._at += skipped + 1
            self._strayed = 0
        else:
            self._strayed += 1

    def _watch(self, text_at: int) -> None:
        """Stop what no speaker says: the same words round and round, or too many of them."""
        text = self.ids[text_at:]
        if period := loop_period(text):
            self.ids[text_at:] = cut_loop(text, period)
            del self.margins[len(self.ids) :]
            self.done = self.looped = True
        elif len(text) >= self._limit:
            self.done = self.truncated = True
