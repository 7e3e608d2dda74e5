"""What the model card says: recordings of voices and sentences that training never saw, and how they are recognised."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.job import Recognition
from wyoming_qwen_asr.model.network import Network, Piece

from .corpus import Utterance, drawn_voice
from .mix import LONGEST, SOUNDS, add_noise, breaks, broken_off, level, not_speech, telephone, white
from .sentences import Draw, test_sentence, vocabulary, written
from .speech import RATE, Audio, speak
from .tokens import LANGUAGES

COUNT = 300  # recordings of a kind of speech
COUNT_SOUNDS = 60  # of a kind of sound
SEED = 2
_BATCH = 8
_LEAD_IN, _TRAILING = 0.3, 0.5  # seconds of quiet around the speech
_FAINT_DB = 45.0  # signal to noise where nothing is said about noise

# What a house may send along: none of it comes from the generator that training used.
_HOUSE = (
    *(
        "Philips Hue Play",
        "IKEA Trådfri",
        "Sonos Arc",
        "Shelly 2.5",
        "Zigbee2MQTT",
        "Fritz!Box 7590",
        "LG OLED55C3",
        "Roborock S8",
    ),
    *(
        "Grandma's lamp",
        "Ground floor",
        "Upstairs",
        "Kids' room",
        "Utility room",
        "Porch light",
        "Bedside left",
        "3D printer",
    ),
    *(
        "Stehlampe",
        "Gästezimmer",
        "Wärmepumpe",
        "Rollo Südseite",
        "Weihnachtsbaum",
        "Büro 2. OG",
        "Waschküche",
        "Spülmaschine",
    ),
    *(
        "Jonathan",
        "Friederike",
        "Xochitl",
        "Nguyễn",
        "Zoë",
        "Łukasz",
        "Mohammed",
        "Siobhan",
        "O'Connor",
        "Müller-Lüdenscheidt",
    ),
)

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Recording:
    """samples at RATE; what is said and in which language (Qwen's name), "" and None where nobody speaks."""

    samples: Audio
    text: str
    language: str | None


@dataclass
class Score:
    """Of one kind of recording. Words count without regard to case and punctuation."""

    count: int = 0
    exact: int = 0
    words: int = 0
    replaced: int = 0
    missing: int = 0
    added: int = 0
    language: int = 0

    @property
    def wer(self) -> float:
        return (self.replaced + self.missing + self.added) / max(1, self.words)

    def add(self, said: Recording, heard: Recognition) -> None:
        replaced, missing, added = differences(words(said.text), words(heard.text))
        self.count += 1
        self.exact += said.text == heard.text
        self.words += len(words(said.text))
        self.replaced, self.missing, self.added = self.replaced + replaced, self.missing + missing, self.added + added
        self.language += heard.language == said.language


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def differences(said: Sequence[str], heard: Sequence[str]) -> tuple[int, int, int]:
    """Words replaced, missing and added: the least that turns one into the other (Levenshtein 1966)."""
    # (cost, replaced, missing, added) for every prefix of `heard`, row by row of `said`.
    row = [(j, 0, 0, j) for j in range(len(heard) + 1)]
    for i, word in enumerate(said, 1):
        above, row = row, [(i, 0, i, 0)]
        for j, other in enumerate(heard, 1):
            cost, a, b, c = above[j - 1]
            same = word == other
            up, left = above[j], row[j - 1]
            row.append(
                min(
                    (cost + (not same), a + (not same), b, c),
                    (up[0] + 1, up[1], up[2] + 1, up[3]),
                    (left[0] + 1, left[1], left[2], left[3] + 1),
                )
            )
    _, replaced, missing, added = row[-1]
    return replaced, missing, added


# --- the recordings


def _utterance(language: str, draw: Draw) -> tuple[Utterance, Audio]:
    said = test_sentence(language, draw)
    voice, speed, pitch = drawn_voice(language, "test_variants", draw)
    speech = speak(written(said, language), voice, speed, pitch)
    whole = Utterance(said, language, voice, 0, len(speech.samples), list(speech.starts))
    return whole, level(speech.samples, -6)


def _recorded(parts: Sequence[Audio], text: str, language: str, rng: np.random.Generator) -> Recording:
    quiet = np.zeros(int(_LEAD_IN * RATE), np.float32), np.zeros(int(_TRAILING * RATE), np.float32)
    samples = np.concatenate([quiet[0], *parts, quiet[1]])
    return Recording(add_noise(samples, _FAINT_DB, white(len(samples), rng)), text, LANGUAGES[language])


def _single(language: str) -> list[Recording]:
    draw, rng = Draw(f"{SEED}/single/{language}"), np.random.default_rng([SEED, 1])
    recordings = []
    for _ in range(COUNT):
        utterance, samples = _utterance(language, draw)
        recordings.append(_recorded([samples], written(utterance.words, language), language, rng))
    return recordings


def _broken() -> list[Recording]:
    """A sentence of which only the beginning is heard, with nothing behind it."""
    draw, rng = Draw(f"{SEED}/broken"), np.random.default_rng([SEED, 2])
    recordings: list[Recording] = []
    while len(recordings) < COUNT:
        utterance, samples = _utterance("de" if draw.chance(0.2) else "en", draw)
        if at := breaks(utterance):
            part, text = broken_off(utterance, samples, draw.one_of(at))
            whole = _recorded([part], text, utterance.language, rng)
            recordings.append(replace(whole, samples=whole.samples[: -int(_TRAILING * RATE)]))
    return recordings


def _several(shortest: float, longest: float) -> list[Recording]:
    """Commands one after the other until so many seconds are full, 15 % of them German throughout."""
    draw, rng = Draw(f"{SEED}/several/{longest}"), np.random.default_rng([SEED, 3])
    recordings = []
    for _ in range(COUNT):
        language = "de" if draw.chance(0.15) else "en"
        target = RATE * draw.uniform(shortest, longest)
        parts: list[Audio] = []
        texts: list[str] = []
        length = (_LEAD_IN + _TRAILING) * RATE
        while True:
            utterance, samples = _utterance(language, draw)
            pause = np.zeros(int(RATE * draw.uniform(0.2, 0.8)) if parts else 0, np.float32)
            length += len(pause) + len(samples)
            if length > target:
                break
            parts += [pause, samples]
            texts.append(written(utterance.words, language))
        recordings.append(_recorded(parts, " ".join(texts), language, rng))
    return recordings


def _changed(recordings: Sequence[Recording], change: Callable[[Audio], Audio]) -> list[Recording]:
    return [replace(recording, samples=change(recording.samples)) for recording in recordings]


def _sounds(kind: str) -> list[Recording]:
    rng = np.random.default_rng([SEED, 4, list(SOUNDS).index(kind)])
    return [Recording(not_speech(kind, rng.uniform(0.5, 15), rng), "", None) for _ in range(COUNT_SOUNDS)]


# --- the figures


def _house(draw: Draw) -> str:
    """A system turn: two to twenty of these names, and a word of the domain for every second one."""
    names = [draw.one_of(_HOUSE) for _ in range(draw.between(2, 20))]
    known = [draw.one_of(vocabulary("de" if draw.chance(0.3) else "en")).capitalize() for _ in names[::2]]
    return ", ".join([*names, *known])


class _Judge:
    def __init__(self, checkpoint: Path) -> None:
        self._network = Network.load(open_checkpoint(checkpoint), torch.device("cpu"), torch.float32)
        self.confused: Counter[tuple[str | None, str | None]] = Counter()

    def hear(self, recordings: Sequence[Recording], **how: object) -> list[Recognition]:
        """how: fields of Piece; `context` may be a function that makes one."""
        heard: list[Recognition] = []
        for at in range(0, len(recordings), _BATCH):
            part = recordings[at : at + _BATCH]
            pieces = []
            for recording in part:
                context = how.get("context", "")
                piece = Piece(torch.from_numpy(recording.samples), context() if callable(context) else context)  # type: ignore[arg-type]
                if how.get("force"):
                    piece = replace(piece, language=recording.language, hint="force")
                pieces.append(piece)
            heard += self._network.recognise(pieces)
        return heard

    def score(self, recordings: Sequence[Recording], **how: object) -> Score:
        score = Score()
        for said, heard in zip(recordings, self.hear(recordings, **how), strict=True):
            score.add(said, heard)
            if not how.get("force"):
                self.confused[said.language, heard.language] += 1
        return score

    def unlimited(self, recordings: Sequence[Recording]) -> Score:
        """With an encoder whose rows see the whole recording."""
        limit, self._network.encoder.window_tokens = self._network.encoder.window_tokens, 10_000
        try:
            return self.score(recordings)
        finally:
            self._network.encoder.window_tokens = limit


def figures(checkpoint: Path) -> str:
    """The tables of the card, in Markdown."""
    judge = _Judge(checkpoint)
    rng = np.random.default_rng([SEED, 5])
    house = Draw(f"{SEED}/house")
    english, german = _single("en"), _single("de")
    mixed = english[: COUNT // 2] + german[: COUNT // 2]
    to_20, to_28 = _several(8, 20), _several(20, LONGEST)
    judged = {
        "one command, English": judge.score(english),
        "one command, German": judge.score(german),
        "several commands, 8 to 20 s": judge.score(to_20),
        "several commands, 20 to 28 s": judge.score(to_28),
        "a sentence that breaks off": judge.score(_broken()),
        "one command, telephone: 300 to 3,400 Hz, µ-law": judge.score(
            _changed(mixed, lambda s: telephone(s, 300, 3400, True))
        ),
        "one command, white noise at 15 dB": judge.score(
            _changed(mixed, lambda s: add_noise(s, 15, white(len(s), rng)))
        ),
        "one command, no system turn": judge.score(mixed, context=None),
        "one command, empty system turn": judge.score(mixed),
        "one command, names and words in the system turn": judge.score(mixed, context=lambda: _house(house)),
        "8 to 20 s, no system turn": judge.score(to_20, context=None),
        "8 to 20 s, names and words in the system turn": judge.score(to_20, context=lambda: _house(house)),
        "one command, language forced": judge.score(mixed, force=True),
        "8 to 20 s, encoder without windows": judge.unlimited(to_20),
        "20 to 28 s, encoder without windows": judge.unlimited(to_28),
    }
    lines = [
        "| speech | N | words | word error rate | replaced, missing, added | exact | language right |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, score in judged.items():
        errors = f"{score.replaced}, {score.missing}, {score.added}"
        exact, language = (100 * part / score.count for part in (score.exact, score.language))
        rates = f"{100 * score.wer:.1f} % | {errors} | {exact:.0f} % | {language:.1f} %"
        lines.append(f"| {kind} | {score.count} | {score.words} | {rates} |")
    lines += ["", "| no speech | N | empty | else, for example |", "|---|---|---|---|"]
    for kind in SOUNDS:
        recordings = _sounds(kind)
        heard = judge.hear(recordings)
        judge.confused.update((None, each.language) for each in heard)
        wrong = Counter(each.text for each in heard if each.text)
        shown = ", ".join(f"“{text}”" for text, _ in wrong.most_common(3))
        lines.append(f"| {kind} | {len(heard)} | {len(heard) - wrong.total()} | {shown} |")
    names = [*LANGUAGES.values(), None]
    lines += ["", f"| language said ↓, heard → | {' | '.join(map(str, names))} |", "|---|---|---|---|"]
    lines += [f"| {said} | {' | '.join(str(judge.confused[said, heard]) for heard in names)} |" for said in names]
    return "\n".join(lines)
