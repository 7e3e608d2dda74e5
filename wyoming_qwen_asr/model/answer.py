"""One answer of the model while it is written: language tag, text, and when to stop. Plain token ids, no torch.

The model answers "language English<asr_text>Hello.<|im_end|>"; where nobody speaks the language is None
(qwen-asr 0.0.6, `parse_asr_output`).
"""

from .loops import cut_loop, loop_period
from .tokenizer import Tokenizer

TAG_TOKENS = 16  # a language tag is shorter, even where the tokenizer splits the name


class Answer:
    """Takes the decoder's tokens one by one and says what the decoder is to read next.

    ids: the answer so far, without end token. pending: its last ids, which the decoder has yet to read; anything
    it read beyond the others is to be forgotten (see `kept`). done: nothing more is wanted. language: None until a tag
    is read, and when nobody speaks. looped, truncated: why it was stopped, if not by an end token.

    limit: the most tokens of text. expected: Qwen's name of a language. With `force` its tag is put in the model's
    mouth at once; otherwise the model's own tag is read first, and replaced if it names another language.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, expected: str | None = None, force: bool = False) -> None:
        self._tokenizer, self._limit, self._expected = tokenizer, limit, expected
        self._tag = tokenizer.language_tag(expected) if expected else []
        self._text_at: int | None = None  # where the text begins in ids; None while the tag is being read
        self.ids: list[int] = []
        self.pending: list[int] = []
        self.language: str | None = None
        self.done = self.looped = self.truncated = False
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
    def room(self) -> int:
        """The most ids that the answer can grow to."""
        return max(TAG_TOKENS, len(self._tag)) + self._limit

    @property
    def text(self) -> str:
        """The text so far, "" before the tag is read: no blanks around it, no half character at its end."""
        return "" if self._text_at is None else self._tokenizer.decode(self.ids[self._text_at :]).strip()

    def take(self, token: int) -> None:
        """Go on with the token that the decoder finds likeliest. Must not be called once done."""
        if token in self._tokenizer.end_ids:
            self.done, self.pending = True, []
            if self._text_at is None:
                self._text_at = 0  # no tag came: the SDK, too, takes such an answer for text
            return
        self.ids.append(token)
        self.pending = [token]
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
        self.language, self._text_at = self._expected, len(self._tag)

    def _watch(self, text_at: int) -> None:
        """Stop what no speaker says: the same words round and round, or too many of them."""
        text = self.ids[text_at:]
        if period := loop_period(text):
            self.ids[text_at:] = cut_loop(text, period)
            self.done = self.looped = True
        elif len(text) >= self._limit:
            self.done = self.truncated = True
