"""Languages by code and name, and texts joined as their scripts write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wyoming_qwen_asr.text import LANGUAGES, agreement, join, language_code, language_name, separator


def test_the_thirty_languages() -> None:
    assert len(LANGUAGES) == len(set(LANGUAGES.values())) == 30


@pytest.mark.parametrize(("code", "name"), LANGUAGES.items())
def test_every_language_both_ways(code: str, name: str) -> None:
    """By code or name, in any case, with any region, surrounded by blanks."""
    assert language_code(name) == code
    for hint in (code, code.upper(), f"{code}-XX", f"{code}_Latn_XX", f" {code}\n", name, name.lower(), name.upper()):
        assert language_name(hint) == name


@pytest.mark.parametrize(
    ("hint", "name"),
    [
        ("en-GB", "English"),
        ("pt_BR", "Portuguese"),
        ("zh-Hans-CN", "Chinese"),
        ("zh-TW", "Chinese"),
        ("zh-HK", "Cantonese"),
        ("zh_hk", "Cantonese"),
        ("zh-yue", "Cantonese"),
        ("yue-Hant-HK", "Cantonese"),
        ("cmn", "Chinese"),
        ("cmn-Hans-CN", "Chinese"),
        ("tl", "Filipino"),
        ("tl-PH", "Filipino"),
        ("in", "Indonesian"),
        ("in_ID", "Indonesian"),
        *(
            (unknown, None)
            for unknown in (None, "", " ", "auto", "AUTO", "None", "xx", "e", "engl", "-", "-en", "en us")
        ),
        *((unknown, None) for unknown in ("nb", "uk", "he", "Klingon", "English (US)", "Mandarin", "İ", "\0", "*")),
    ],
)
def test_hints(hint: str | None, name: str | None) -> None:
    """Regions and other codes for the same; None for what the model does not know."""
    assert language_name(hint) == name


@pytest.mark.parametrize("name", [None, "", "english", "en", "Klingon"])
def test_names_without_a_code(name: str | None) -> None:
    assert language_code(name) is None


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_any_hint_is_a_language_or_none(hint: str) -> None:
    assert language_name(hint) in {None, *LANGUAGES.values()}


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        ([], ""),
        ([""], ""),
        (["", "", ""], ""),
        (["One.", "Two."], "One. Two."),
        (["", "One.", "", "Two.", ""], "One. Two."),
        (["Привет.", "Γειά", "مرحبا"], "Привет. Γειά مرحبا"),
        (["नमस्ते।", "ठीक"], "नमस्ते। ठीक"),
        (["打开灯。", "关上门。"], "打开灯。关上门。"),
        (["打开", "灯"], "打开灯"),
        (["好！", "吗？", "好，", "的"], "好！吗？好，的"),
        (["电気を", "つけて", "カーテン", "々"], "电気をつけてカーテン々"),
        (["「はい」", "「いいえ」", "『一』", "〈二〉", "〜", "（三）"], "「はい」「いいえ」『一』〈二〉〜（三）"),
        (["เปิดไฟ", "ในครัว"], "เปิดไฟในครัว"),
        (["불 켜 줘.", "고마워"], "불 켜 줘. 고마워"),
        (["가", "ㅋㅋ"], "가 ㅋㅋ"),
        (["打开 TV", "Netflix"], "打开 TV Netflix"),
        (["Play", "周杰伦"], "Play周杰伦"),
        (["播放", "Hello"], "播放Hello"),
        (["음악", "音楽"], "음악音楽"),
        (["One. ", "Two."], "One. Two."),
        (["One.", " Two."], "One. Two."),
        (["\0", "a"], "\0 a"),
    ],
)
def test_join(texts: list[str], joined: str) -> None:
    """A blank between texts, unless a script without blanks is on either side, or a blank is there already."""
    assert join(texts) == joined
    assert join(iter(texts)) == joined


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text()))
def test_join_loses_nothing(texts: list[str]) -> None:
    """All characters in their order, and at most one blank at each seam."""
    assert join(texts).replace(" ", "") == "".join(texts).replace(" ", "")
    assert len(join(texts)) < len("".join(texts)) + max(1, len(texts))
    assert join([join(texts[:2]), *texts[2:]]) == join(texts)


@settings(derandomize=True, deadline=None)
@given(st.text("aあ .", max_size=4), st.text("aあ .", max_size=4), st.text("aあ .", max_size=4))
def test_joining_bit_by_bit(one: str, two: str, three: str) -> None:
    before = join([one, two])
    assert join([before, three]) == before + separator(before, three) + three == join([one, two, three])


@settings(derandomize=True, deadline=None)
@given(st.text("ab", max_size=5), st.text("ab", max_size=5))
def test_agreement(one: str, other: str) -> None:
    same = agreement(one, other)
    assert one[:same] == other[:same]
    assert same == min(len(one), len(other)) or one[same] != other[same]
