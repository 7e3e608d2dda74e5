"""The corpus: utterances of the training voices as one file of samples, and a list of what is said where."""

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .sentences import Draw, domain, random_words, training_sentence, written
from .speech import Audio, speak

SPEED = (120, 200)  # words per minute
PITCH = (20, 80)  # espeak-ng's scale, 0 to 99
GERMAN = 0.22  # share of the utterances; the rest is English
RANDOM_WORDS = 0.2

_PART = 500  # utterances that one process makes: the synthesiser's state runs on from sentence to sentence


@dataclass(frozen=True)
class Utterance:
    """What is said, and where: samples begin .. begin + length of the file; starts[i] counts from begin."""

    words: list[str]
    language: str  # "en" or "de"
    voice: str
    begin: int
    length: int
    starts: list[int]


class Corpus:
    """A corpus on disk, opened for reading."""

    def __init__(self, folder: Path) -> None:
        self._samples: npt.NDArray[np.int16] = np.load(folder / "samples.npy", mmap_mode="r")
        lines = (folder / "utterances.jsonl").read_text(encoding="utf-8").splitlines()
        self.utterances = [Utterance(**json.loads(line)) for line in lines]

    def samples(self, utterance: Utterance) -> Audio:
        """At full scale 1.0."""
        part = self._samples[utterance.begin : utterance.begin + utterance.length]
        return part.astype(np.float32) / np.float32(32768)


def drawn_voice(language: str, variants: str, draw: Draw) -> tuple[str, int, int]:
    """VOICE+VARIANT, speed and pitch. variants: the key of the domain that lists them."""
    voice = f"{draw.one_of(domain()['languages'][language]['voices'])}+{draw.one_of(domain()[variants])}"
    return voice, draw.between(*SPEED), draw.between(*PITCH)


def _part(seed: str) -> tuple[list[Utterance], npt.NDArray[np.int16]]:
    draw = Draw(seed)
    utterances: list[Utterance] = []
    audio: list[npt.NDArray[np.int16]] = []
    at = 0
    for _ in range(_PART):
        language = "de" if draw.chance(GERMAN) else "en"
        words = (random_words if draw.chance(RANDOM_WORDS) else training_sentence)(language, draw)
        voice, speed, pitch = drawn_voice(language, "training_variants", draw)
        speech = speak(written(words, language), voice, speed, pitch)
        pcm = np.rint(speech.samples * (0.9 * 32767 / np.abs(speech.samples).max())).astype(np.int16)
        utterances.append(Utterance(words, language, voice, at, len(pcm), list(speech.starts)))
        audio.append(pcm)
        at += len(pcm)
    return utterances, np.concatenate(audio)


def make(folder: Path, count: int, seed: int) -> None:
    """Write a corpus of `count` utterances (rounded up to whole parts) unless it is there."""
    if (folder / "utterances.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    audio: list[npt.NDArray[np.int16]] = []
    at = 0
    for utterances, samples in _parts(count, seed):
        for utterance in utterances:
            entry = asdict(utterance) | {"begin": at + utterance.begin}
            lines.append(json.dumps(entry, ensure_ascii=False))
        audio.append(samples)
        at += len(samples)
    np.save(folder / "samples.npy", np.concatenate(audio))
    # Last, because its presence says that the corpus is whole.
    (folder / "utterances.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parts(count: int, seed: int) -> Iterator[tuple[list[Utterance], npt.NDArray[np.int16]]]:
    seeds = [f"{seed}/{number}" for number in range(-(-count // _PART))]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        yield from pool.imap(_part, seeds)
