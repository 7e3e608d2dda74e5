"""What is shown of a text that is still being heard (RollbackStream), and drafts (Answer): ids alone."""

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wyoming_qwen_asr.model.answer import AHEAD, Answer
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.stream import SURE_NATS, RollbackStream
from wyoming_qwen_asr.model.tokenizer import Tokenizer
from wyoming_qwen_asr.text import echoes, words_end

from .conftest import DEMO

property_test = settings(deadline=None, derandomize=True)

WORDS = [" one", " two", " thr", "ee", ".", ",", " 好", "好", " "]
"""Tokens: some begin a word, some go on with it."""


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def ids_of(text: str) -> list[int]:
    """By the longest token."""
    found = []
    text = " " + text
    while text:
        token = max((word for word in WORDS if text.startswith(word)), key=len)
        found.append(WORDS.index(token))
        text = text[len(token) :]
    return found


def stable_after(
    *hypotheses: str, chunks: int = 0, tokens: int = 0, margins: Callable[[int], float] = lambda _: math.inf
) -> list[str]:
    stream = RollbackStream(decode, chunks, tokens)
    shown = []
    for text in hypotheses:
        ids = ids_of(text)
        before = stream.stable
        delta, tail = stream.step(ids, [margins(i) for i in range(len(ids))])
        assert stream.stable == before + delta
        assert tail in ("", text.strip()[len(stream.stable) :])
        shown.append(stream.stable)
    return shown


def test_what_two_hypotheses_agree_on() -> None:
    shown = stable_after("one two", "one two one", "one two two", "one two two one")
    assert shown == ["", "one two", "one two", "one two two"]


def test_nothing_in_the_first_steps() -> None:
    same = ["one two one two"] * 5
    assert stable_after(*same, chunks=2) == ["", "", *["one two one"] * 3]
    assert stable_after(*same, chunks=9) == [""] * 5


def test_the_last_tokens_are_held_back() -> None:
    same = ["one two one two one two one"] * 2
    assert [stable_after(*same, tokens=k)[1] for k in (0, 1, 5, 6, 7, 20)] == [
        *("one two one two one two", "one two one two one two", "one two", "one", "", ""),
    ]


def test_words_are_whole() -> None:
    assert stable_after("one three", "one three") == ["", "one"], "a word may go on behind the text"
    assert stable_after("one three.", "one three.") == ["", "one"], "and so may 3.14"
    assert stable_after("one three. one", "one three. one") == ["", "one three."]
    assert stable_after("one thr", "one three two") == ["", "one"]
    assert stable_after("好好好", "好好好", tokens=1) == ["", "好好"], "a script without blanks"


def test_a_hesitation_holds_back_what_is_behind_it() -> None:
    same = ["one two one two one"] * 2
    for place, expected in ((0, ""), (2, "one two"), (4, "one two one two")):
        margins = [SURE_NATS] * 5
        margins[place] -= 0.1
        assert stable_after(*same, margins=margins.__getitem__)[1] == expected


def test_a_hesitation_in_either_hypothesis_counts() -> None:
    stream = RollbackStream(decode, 0, 0)
    ids = ids_of("one two one")
    for margins, expected in (([9, 0, 9], ""), ([9, 9, 9], "one"), ([9, 9, 9], "one two")):
        stream.step(ids, margins)
        assert stream.stable == expected


def test_frozen() -> None:
    stream = RollbackStream(decode, 0, 0)
    ids = ids_of("one two one")
    sure = [math.inf] * len(ids)
    stream.step(ids, sure)
    assert stream.step(ids, sure, frozen=True) == ("", "one two one")
    assert stream.step(ids, sure) == ("one two", " one")


def test_a_contradiction_adds_nothing() -> None:
    """Until a hypothesis says again what was shown."""
    shown = stable_after("one two one", "one two one", "two one", "two one", "one two one two", "one two one two")
    assert shown == ["", "one two", "one two", "one two", "one two", "one two one"]


def test_silence() -> None:
    assert stable_after("", "", "one one", "") == ["", "", "", ""]


@property_test
@given(st.lists(st.lists(st.integers(0, 8), max_size=12), max_size=12), st.integers(0, 3), st.integers(0, 6))
def test_stable_text_only_grows(hypotheses: list[list[int]], chunks: int, tokens: int) -> None:
    """Whatever the hypotheses are: never taken back, always what two of them in a row began with."""
    stream = RollbackStream(decode, chunks, tokens)
    shown, previous = "", ""
    for number, ids in enumerate(hypotheses, 1):
        delta, tail = stream.step(ids, [math.inf] * len(ids))
        text = decode(ids).strip()
        shown += delta
        assert stream.stable == shown
        assert tail in ("", text[len(shown) :])
        if delta:
            assert number > chunks
            assert text.startswith(shown)
            assert previous.startswith(shown)
        previous = text


@property_test
@given(st.text(max_size=40), st.integers(0, 8), st.integers(1, 5))
def test_half_a_character_is_never_shown(text: str, tokens: int, step: int) -> None:
    """Any text, over the real tokenizer, as it grows: what is shown is a beginning of it."""
    ids = tokenizer().encode(text)
    stream = RollbackStream(tokenizer().decode, 0, tokens)
    whole = tokenizer().decode(ids).strip()
    for end in [*range(0, len(ids), step), len(ids), len(ids)]:
        stream.step(ids[:end], [math.inf] * end)
        assert whole.startswith(stream.stable)


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        *(("one two", most, "one" if most >= 3 else "") for most in range(8)),
        ("one  two", 5, "one"),
        ("你好吗", 2, "你好"),
        ("你好吗", 3, "你好吗"),
        ("ok 你好", 4, "ok 你"),
        ("ok你好", 2, "ok"),
        ("กำลัง", 2, "ก"),  # THAI SARA AM is no mark, but the next ones are
        ("が\u3099", 1, ""),  # a mark that belongs to the character before it
        ("3.14", 3, ""),
        ("", 0, ""),
    ],
)
def test_words_end(text: str, most: int, expected: str) -> None:
    if text.startswith("ก"):
        expected = text[: words_end(text, most)]
        assert expected in ("ก", "กำ")
    assert text[: words_end(text, most)] == expected


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ("Kitchen light, living room.", "kitchen light, Living Room", True),
        ("Kitchen light living room", "kitchen light, living room", True),
        ("Kitchen light.", "kitchen light, living room", False),
        ("Kitchen light.", "kitchen light", False),  # somebody may just have said it
        ("Turn on the kitchen light.", "turn on the kitchen light", True),
        ("客厅灯，卧室灯。", "客厅灯、卧室灯", True),
        ("客厅灯。", "客厅灯", False),
        ("", "kitchen light, living room", False),
        ("", "", False),
        ("Hello.", "", False),
        (".", ",,;", False),
    ],
)
def test_echoes(text: str, context: str, expected: bool) -> None:
    assert echoes(text, context) == expected


# --- drafts ---

_tokenizers: list[Tokenizer] = []


def tokenizer() -> Tokenizer:
    if not _tokenizers:
        _tokenizers.append(open_checkpoint(DEMO).tokenizer)
    return _tokenizers[0]


def said(text: str, language: str = "English") -> list[int]:
    return [*tokenizer().language_tag(language), *tokenizer().encode(text), tokenizer().im_end]


def decoder(ids: Sequence[int], forced: Sequence[int] = ()) -> Callable[[Sequence[int]], int]:
    """What a decoder would find likeliest that says `ids`, or behind a forced tag the text of them."""
    text = list(ids)[ids.index(tokenizer().asr_text) + 1 :]

    def likeliest(read: Sequence[int]) -> int:
        for whole in (list(ids), [*forced, *text]):
            if list(read) == whole[: len(read)] and len(read) < len(whole):
                return whole[len(read)]
        return 0  # it was led astray

    return likeliest


def play(answer: Answer, likeliest: Callable[[Sequence[int]], int]) -> int:
    """How many forwards the answer takes."""
    forwards = 0
    while not answer.done:
        kept, read = answer.ids[: answer.kept], [*answer.pending, *answer.ahead]
        first = len(kept) + len(answer.pending)
        guesses = [(likeliest([*kept, *read][:end]), 9.0) for end in range(first, len(kept) + len(read) + 1)]
        answer.verify(guesses)
        forwards += 1
    return forwards


@pytest.mark.parametrize(
    ("draft", "drafted", "accepted", "forwards"),
    [
        ([], 0, 0, 10),
        (said("Turn on the kitchen light.")[:-1], 9, 9, 1),
        (said("Turn on the")[:-1], 6, 6, 4),
        (said("Schalte das", "German")[:-1], 5 + 2, 1, 9),  # the tag's end is the same again, what follows is not
        (said("Turn on the kitchen light. Now.")[:-1], 12, 9, 1),
        # It is left, and taken up again: another word, one more, one less, one more at its start.
        (said("Turn off the kitchen light.")[:-1], 9 + 3, 4 + 3, 3),
        (said("Turn on the old kitchen light.")[:-1], 12 + 2, 6 + 2, 2),
        (said("Turn on the light.")[:-1], 8 + 1, 6 + 1, 3),
        (said("on the kitchen light.")[:-1], 9 + 3, 3 + 3, 4),
    ],
)
def test_a_draft_costs_one_forward_where_it_is_right(
    draft: list[int], drafted: int, accepted: int, forwards: int
) -> None:
    ids = said("Turn on the kitchen light.")
    answer = Answer(tokenizer(), 100, draft=draft)
    taken = play(answer, decoder(ids))
    assert answer.ids == ids[:-1]
    assert (answer.drafted, answer.accepted, taken) == (drafted, accepted, forwards)
    assert taken == len(ids) - answer.accepted


def test_what_is_left_of_a_draft() -> None:
    """An answer that is not finished is followed by what the draft has behind the place where it was left, not in the
    place of it; one that is finished, by nothing. One that was left is read ahead in small parts."""
    draft = said("Turn off the kitchen light, and then tell me how long it is going to rain in the north today.")[:-1]
    answer = Answer(tokenizer(), 100, draft=draft)
    assert answer.likely == answer.ahead == draft
    written = said("Turn on the kitchen light, and then tell me how long it is going to rain in the north today.")
    for count, token in enumerate(written[:-1], 1):
        answer.take(token)
        assert answer.likely == [*written[:count], *draft[count:]]
        left = len(draft) - count
        assert len(answer.ahead) == (left if count < 5 else 0 if count == 5 else min(AHEAD, left))
    assert len(draft) - 6 > AHEAD
    answer.take(written[-1])
    assert answer.likely == written[:-1]
    short = Answer(tokenizer(), 4, draft=draft)
    assert len(short.ahead) == short.room < len(draft), "no more than it may become"


def test_a_draft_behind_a_tag_that_is_changed() -> None:
    """The model says English, German is expected: the draft is read behind the German tag."""
    tag = tokenizer().language_tag("German")
    draft = said("Turn on the light.", "German")[:-1]
    ids = said("Turn on the light.", "English")
    answer = Answer(tokenizer(), 100, expected="German", draft=draft)
    forwards = play(answer, decoder(ids, tag))
    assert answer.ids == draft
    assert answer.language == "German"
    assert forwards == 3, "language, English + end of the tag, the text"


SENTENCES = ["Turn on the light.", "Turn off the light.", "", "5 5 5 5 1 2 3 4", "very very very very good", "好好好"]


@property_test
@given(
    st.sampled_from(SENTENCES),
    st.sampled_from(["English", "German", "None"]),
    st.sampled_from([None, "English", "German"]),
    st.booleans(),
    st.lists(st.integers(0, 600), max_size=20),
    st.integers(0, 30),
    st.integers(1, 40),
)
def test_a_draft_changes_nothing(
    text: str, spoken: str, expected: str | None, force: bool, noise: list[int], keep: int, limit: int
) -> None:
    ids = said(text, spoken)
    tag = tokenizer().language_tag(expected) if expected else []
    plain = Answer(tokenizer(), limit, expected, force and expected is not None)
    play(plain, decoder(ids, tag))
    for draft in (plain.ids, [*plain.ids[:keep], *noise], noise):
        drafted = Answer(tokenizer(), limit, expected, force and expected is not None, draft)
        play(drafted, decoder(ids, tag))
        assert (drafted.ids, drafted.language, drafted.text) == (plain.ids, plain.language, plain.text)
        assert (drafted.looped, drafted.truncated) == (plain.looped, plain.truncated)
        assert drafted.accepted <= drafted.drafted
        assert len(drafted.margins) == len(drafted.ids)


def test_a_text_that_is_its_context_is_silence() -> None:
    for text, expected in (("Kitchen light, hall.", ""), ("Kitchen light.", "Kitchen light.")):
        answer = Answer(tokenizer(), 100, context="kitchen light, hall")
        play(answer, decoder(said(text)))
        assert answer.text == expected


# The case table: what a repetition fixer must and must not touch, through the decoder's stop.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 5 5 5 1 2 3 4", None),
        ("very very very very good", None),
        ("好好好", None),
        ("no no no no no", None),
        ("eins eins zwei zwei drei drei", None),
        ("first line\nsecond line", None),
        # Loops; the first round of some begins without a blank, which is another token, and does not count.
        ("I think. " * 2000, "I think."),
        ("像" * 119, "像"),
        ("我们一起去吧" * 15, "我们一起去吧"),
        ("The window in the living room is still open and the heating is running now. " * 7, "The window in"),
        (" ".join(f"word{i}" for i in range(32)) + (" " + " ".join(f"word{i}" for i in range(32))) * 39, "word0 word1"),
    ],
)
def test_loops_and_natural_repeats(text: str, expected: str | None) -> None:
    answer = Answer(tokenizer(), 5000)
    ids = said(text)
    play(answer, decoder(ids))
    assert answer.looped == (expected is not None)
    if expected is None:
        assert answer.text == text
    else:
        assert answer.text.startswith(expected)
        assert answer.text.count(expected) == 1
        assert len(answer.ids) < 0.5 * len(ids)
