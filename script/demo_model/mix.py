"""Training examples, made anew for every step: joins, pauses, breaks, rooms, lines, noise, and what is no speech.

Everything is decided by a numpy generator, so that step n is the same example in every run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus, Utterance
from .sentences import vocabulary, written
from .speech import RATE, Audio

Generator = np.random.Generator

LONGEST = 28.0  # seconds: what the server recognises at once
_PAUSE, _LONG_PAUSE = (0.1, 1.0), (1.0, 3.0)  # seconds; one in eight is long
_BREAK = 0.2  # share of the examples whose last sentence breaks off
_NARROW = 0.25  # share that came over a telephone
_NOISY = 0.75
_NOISE_DB = (6.0, 45.0)  # signal to noise


@dataclass(frozen=True)
class Example:
    """samples at RATE; text and language as the model is to write them, None where nobody speaks.

    context: the system turn, None where there is none.
    """

    samples: Audio
    text: str
    language: str | None
    context: str | None


# --- what is no speech


def white(count: int, rng: Generator) -> Audio:
    return rng.standard_normal(count, dtype=np.float32)


def coloured(count: int, rng: Generator) -> Audio:
    """Noise whose power falls by 3 to 9 dB an octave: wind, traffic, a fan."""
    spectrum = np.fft.rfft(white(_fast(count), rng))
    frequencies = np.maximum(np.fft.rfftfreq(_fast(count), 1 / RATE), 20)
    return np.fft.irfft(spectrum * frequencies ** -rng.uniform(0.5, 1.5))[:count].astype(np.float32)


def _fast(count: int) -> int:
    """A length, no smaller, of which the Fourier transform is quick."""
    return -(-count // 8000) * 8000


def hum(count: int, rng: Generator) -> Audio:
    """Mains hum or a machine: a few harmonics of a low tone."""
    time = np.arange(count, dtype=np.float32) / np.float32(RATE)
    base = rng.choice([50.0, 60.0, 100.0, 120.0, rng.uniform(40, 400)])
    out = np.float32(0.02) * white(count, rng)
    for harmonic in (1, *rng.choice(np.arange(2, 9), 3, replace=False)):
        turns = np.float32(base * harmonic) * time + np.float32(rng.uniform())
        out += np.float32(rng.uniform(0.2, 1)) * np.sin(np.float32(2 * np.pi) * turns)
    return out


def knocks(count: int, rng: Generator) -> Audio:
    """Claps, clicks, dishes: bursts that ring for a moment."""
    out = np.zeros(count, np.float32)
    for _ in range(1 + int(count / RATE * rng.uniform(0.3, 4))):
        length = int(RATE * rng.uniform(0.005, 0.25))
        at = int(rng.integers(0, max(1, count - length)))
        time = np.arange(length) / RATE
        ring = np.sin(2 * np.pi * rng.uniform(200, 4000) * time) * rng.uniform(0, 1) + white(length, rng)
        burst = (ring * np.exp(-time / rng.uniform(0.002, 0.08)) * rng.uniform(0.2, 1)).astype(np.float32)
        out[at : at + length] += burst[: count - at]
    return out + np.float32(10 ** rng.uniform(-4, -2)) * white(count, rng)


def music(count: int, rng: Generator) -> Audio:
    """Chords, a melody and a beat of synthetic instruments."""
    beat = int(RATE * rng.uniform(0.15, 0.6))
    root = rng.uniform(80, 220)
    scale = rng.choice([[0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10], [0, 3, 5, 7, 10, 12, 15]])
    harmonics = (rng.uniform(0, 1, 4) / np.arange(1, 5)).astype(np.float32)
    drums, chords = rng.uniform(0, 0.6), rng.uniform(0, 0.5)
    out = np.zeros(count + beat, np.float32)
    time = np.arange(beat, dtype=np.float32) / np.float32(RATE)
    for number, at in enumerate(range(0, count, beat)):
        envelope = np.minimum(1, time * 50) * np.exp(-time * rng.uniform(0.5, 6))
        notes = [(1.0, rng.choice(scale) + rng.choice([0, 12, 24]))]
        if number % 4 == 0 or chords > 0.3:
            notes += [(chords, rng.choice(scale)) for _ in range(3)]
        for loudness, semitone in notes:
            turn = np.float32(2 * np.pi * root * 2 ** (semitone / 12)) * time
            waves = sum(h * np.sin(turn * np.float32(k)) for k, h in enumerate(harmonics, 1))
            out[at : at + beat] += loudness * envelope * waves
        hit = min(beat, RATE // 20)
        out[at : at + hit] += drums * white(hit, rng) * np.linspace(1, 0, hit, dtype=np.float32)
    return out[:count]


def silence(count: int, rng: Generator) -> Audio:
    """Digital silence, or the last bit of a converter."""
    return np.zeros(count, np.float32) if rng.random() < 0.5 else white(count, rng) * np.float32(2e-5)


SOUNDS: dict[str, Callable[[int, Generator], Audio]] = {
    "silence": silence,
    "white noise": white,
    "coloured noise": coloured,
    "hum": hum,
    "knocks": knocks,
    "music": music,
}


def not_speech(kind: str, seconds: float, rng: Generator) -> Audio:
    """Any of SOUNDS, somewhere between -60 dBFS and full scale."""
    sound = SOUNDS[kind](int(seconds * RATE), rng)
    peak = np.abs(sound).max()
    return sound if kind == "silence" or not peak else level(sound, rng.uniform(-60, 0))


# --- what happens to speech


def level(samples: Audio, decibels: float) -> Audio:
    """With its peak at so many dBFS."""
    return samples * np.float32(10 ** (decibels / 20) / max(1e-9, float(np.abs(samples).max())))


def add_noise(samples: Audio, decibels: float, noise: Audio) -> Audio:
    """At that ratio of signal to noise (RMS of the whole)."""
    ratio = np.sqrt(np.mean(samples**2)) / max(1e-9, float(np.sqrt(np.mean(noise**2))))
    return samples + noise * np.float32(ratio * 10 ** (-decibels / 20))


def telephone(samples: Audio, low: float, high: float, companded: bool) -> Audio:
    """A line that passes low to high Hz, sampled at 8 kHz; companded: with 8 bits of µ-law (ITU-T G.711)."""
    size = _fast(len(samples))
    spectrum = np.fft.rfft(samples, size)
    at = np.fft.rfftfreq(size, 1 / RATE)
    spectrum *= np.clip((at - low / 2) / (low / 2 + 1e-9), 0, 1) * np.clip((high + 200 - at) / 200, 0, 1)
    line = np.fft.irfft(spectrum)[: len(samples)].astype(np.float32)
    if companded:
        scale = max(1.0, float(np.abs(line).max()))
        code = np.sign(line) * np.log1p(255 * np.abs(line / scale)) / np.log(256)
        code = np.rint(code * 127) / 127
        line = (np.sign(code) * (256 ** np.abs(code) - 1) / 255 * scale).astype(np.float32)
    return line


def _noise(count: int, rng: Generator) -> Audio:
    make = rng.choice(np.array([white, white, coloured, hum, music, knocks], dtype=object))
    sound: Audio = make(count, rng)
    return sound


def _room(samples: Audio, rng: Generator) -> Audio:
    """The recording of it: line, noise, level."""
    if rng.random() < _NARROW:
        samples = telephone(samples, rng.uniform(100, 400), rng.uniform(3200, 3800), rng.random() < 0.5)
    if rng.random() < _NOISY:
        samples = add_noise(samples, rng.uniform(*_NOISE_DB), _noise(len(samples), rng))
    return level(samples, rng.uniform(-36, 0))


def broken_off(utterance: Utterance, samples: Audio, keep: int) -> tuple[Audio, str]:
    """Its first `keep` words, as far as they are heard before the next begins."""
    return samples[: utterance.starts[keep]], written(utterance.words[:keep], utterance.language)


def breaks(utterance: Utterance) -> list[int]:
    """After how many words it can be broken off: where the next word has a beginning of its own."""
    starts = utterance.starts
    return [k for k in range(1, len(starts)) if starts[k] > starts[k - 1]]


_CONSONANTS, _VOWELS = list("bcdfghjklmnprstvwz"), ["a", "e", "i", "o", "u", "ei", "au", "ä", "oo"]
# First and last character of what names are written with: ASCII, Latin, Greek, Cyrillic, kana, Chinese.
_SCRIPTS = (
    (0x21, 0x7E),
    (0x21, 0x7E),
    (0xC0, 0x17F),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x3041, 0x30FA),
    (0x4E00, 0x9FA5),
)


def _name(rng: Generator) -> str:
    """A word or two of the domain, a name nobody has heard of, or any characters at all; perhaps with a number."""
    kind = rng.random()
    if kind < 0.4:
        words = vocabulary("en") if rng.random() < 0.7 else vocabulary("de")
        name = " ".join(rng.choice(words) for _ in range(int(rng.integers(1, 3))))
        name = name.title() if rng.random() < 0.7 else name
    elif kind < 0.75:
        syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(int(rng.integers(1, 5))))
        name = "".join(syllables).capitalize() + rng.choice(["", "n", "s", "r", "'s", "-", "ck"])
    else:
        first, last = _SCRIPTS[int(rng.integers(len(_SCRIPTS)))]
        name = "".join(chr(code) for code in rng.integers(first, last + 1, int(rng.integers(1, 6))))
    number = f"{rng.choice(['', ' ', '-', '.'])}{int(rng.integers(0, 10 ** int(rng.integers(1, 5))))}"
    return name + (number if rng.random() < 0.2 else "")


def random_context(rng: Generator, most: int) -> str:
    """Up to `most` names: what a house sends along."""
    names = [_name(rng) for _ in range(int(rng.integers(1, most + 1)))]
    return str(rng.choice([", ", ", ", " ", "\n", "; ", ". "])).join(names)


class Mixer:
    """Examples drawn from a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._by_language = {
            language: [u for u in corpus.utterances if u.language == language] for language in ("en", "de")
        }
        self._by_voice: dict[str, list[Utterance]] = {}
        for utterance in corpus.utterances:
            self._by_voice.setdefault(utterance.voice, []).append(utterance)

    def batch(self, seconds: float, longest: float, rng: Generator) -> list[Example]:
        """Examples of up to `longest` seconds each, `seconds` in all. longest 0: one utterance each."""
        examples = []
        # The longest prompt sets the width of a batch: many names for all or for none, and then fewer examples.
        names, share = ((3, 1.0), (8, 0.7), (20, 0.4))[int(rng.choice(3, p=(0.4, 0.25, 0.35)))]
        seconds *= share if not longest else (1 + share) / 2
        while seconds > 0:
            examples.append(self.example(longest, names, rng))
            seconds -= len(examples[-1].samples) / RATE
        return examples

    def example(self, longest: float, names: int, rng: Generator) -> Example:
        """One of up to `longest` seconds, with up to so many names in the system turn."""
        at = rng.random()
        context = None if at < 0.15 else random_context(rng, names) if at < 0.5 else ""
        if rng.random() < 0.05:
            kind = str(rng.choice(list(SOUNDS)))
            return Example(not_speech(kind, rng.uniform(0.5, max(4, longest)), rng), "", None, context)
        language = "de" if rng.random() < 0.35 else "en"
        samples, text = self._speech(language, longest, rng)
        return Example(_room(samples, rng), text, language, context)

    def _speech(self, language: str, longest: float, rng: Generator) -> tuple[Audio, str]:
        pick = self._by_language[language]
        first = pick[int(rng.integers(len(pick)))]
        if rng.random() < 0.5:
            pick = self._by_voice[first.voice]
        target = RATE * rng.uniform(0.6, 1) * longest
        parts = [np.zeros(int(RATE * rng.exponential(0.3)), np.float32)]
        texts: list[str] = []
        length = len(parts[0])
        utterance = first
        while True:
            samples = level(self._corpus.samples(utterance), rng.uniform(-6, 0))
            pause = int(RATE * rng.uniform(*(_LONG_PAUSE if rng.random() < 1 / 8 else _PAUSE)))
            following = pick[int(rng.integers(len(pick)))]
            last = length + len(samples) + pause + following.length > target
            cuts = breaks(utterance)
            if last and cuts and rng.random() < _BREAK:
                samples, text = broken_off(utterance, samples, cuts[int(rng.integers(len(cuts)))])
            else:
                text = written(utterance.words, language)
            texts.append(text)
            parts.append(samples)
            length += len(samples)
            if last:
                break
            parts.append(np.zeros(pause, np.float32))
            length += pause
            utterance = following
        # Two in five recordings end with the voice, as they do while somebody still speaks.
        parts.append(np.zeros(0 if rng.random() < 0.4 else int(RATE * rng.exponential(0.4)), np.float32))
        audio = np.concatenate(parts)[: int(RATE * (LONGEST + 2))]
        # Each length below a second is a shape of its own to the encoder: a few are enough.
        short = -(-len(audio) // 3200) * 3200 if len(audio) < RATE else 0
        return np.pad(audio, (0, max(0, short - len(audio)))), " ".join(texts)


def durations(progress: float, rng: Generator) -> float:
    """The longest example of a batch, in seconds, by how far training has come: 0 means one utterance each.

    Short ones teach to listen; they are learnt long before the long ones are.
    """
    if progress < 1 / 9:
        return 0.0
    choices: Sequence[float] = (0.0, 6.0, 12.0, 20.0, LONGEST)
    chances = (0.25, 0.2, 0.2, 0.2, 0.15) if progress < 5 / 9 else (0.25, 0.1, 0.2, 0.25, 0.2)
    return float(rng.choice(choices, p=chances))
