"""Speech by espeak-ng: its library in this process, which is a hundred times faster than a process per sentence.

The interface is `speak_lib.h` of espeak-ng 1.51 (ESPEAK API revision 12). The library has global state: one thread.
"""

import ctypes
import ctypes.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

RATE = 16_000
SILENT = 0.005  # of the peak: what is quieter at either end is trimmed

_SYNCHRONOUS, _UTF8, _BY_CHARACTER = 2, 1, 1
_SPEED, _PITCH = 1, 3  # espeak_PARAMETER
_END_OF_LIST, _WORD = 0, 1  # espeak_EVENT_TYPE

Audio = npt.NDArray[np.float32]  # mono samples at RATE, full scale 1.0


class SynthesiserMissing(Exception):
    """espeak-ng is not installed."""


@dataclass(frozen=True)
class Speech:
    """One sentence, without silence at its ends. starts[i]: the sample at which words[i] begins."""

    samples: Audio
    starts: tuple[int, ...]


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("numbers", ctypes.c_ubyte * 4),  # gender, age, variant, unused
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # of the word's first character, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Synthesiser:
    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise SynthesiserMissing("espeak-ng is needed: apt-get install espeak-ng")
        self.library: Any = ctypes.CDLL(name)
        self.rate: int = self.library.espeak_Initialize(_SYNCHRONOUS, 500, None, 0)
        self.library.espeak_Info.restype = ctypes.c_char_p
        self._pcm = bytearray()
        self._words: list[tuple[int, int]] = []
        self._callback = _Callback(self._take)  # kept: the library holds only the address
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples:
            self._pcm += ctypes.string_at(samples, 2 * count)
            index = 0
            while (event := events[index]).type != _END_OF_LIST:
                if event.type == _WORD:
                    self._words.append((event.text_position - 1, event.sample))
                index += 1
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> tuple[npt.NDArray[np.int16], list[tuple[int, int]]]:
        """Samples at the library's rate, and (character, sample) of each word's beginning."""
        name = voice.encode()
        if self.library.espeak_SetVoiceByName(name) != 0 and self.library.espeak_SetVoiceByProperties(
            ctypes.byref(_Voice(languages=name))  # some accents are known by their language code only
        ):
            raise ValueError(f"espeak-ng has no voice {voice}")
        self.library.espeak_SetParameter(_SPEED, speed, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        self._pcm, self._words = bytearray(), []
        encoded = text.encode() + b"\0"
        self.library.espeak_Synth(encoded, len(encoded), 0, _BY_CHARACTER, 0, _UTF8, None, None)
        return np.frombuffer(bytes(self._pcm), np.int16), self._words


@cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()


def version() -> str:
    """The synthesiser's version, as it states it. Raises SynthesiserMissing."""
    stated: bytes = _synthesiser().library.espeak_Info(None)
    return f"espeak-ng {stated.decode()}"


def speak(text: str, voice: str, speed: int, pitch: int) -> Speech:
    """Let espeak-ng say it. voice: VOICE+VARIANT; speed in words per minute; pitch on espeak-ng's scale, 0 to 99.

    Raises SynthesiserMissing, and ValueError for a voice that it does not have.
    """
    pcm, heard = _synthesiser().say(text, voice, speed, pitch)
    rate = _synthesiser().rate
    samples: npt.NDArray[np.float64] = soxr.resample(pcm / 32768.0, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > SILENT * np.abs(samples).max())
    begin, end = int(loud[0]), int(loud[-1]) + 1
    starts = {at: min(max(0, sample * RATE // rate - begin), end - begin) for at, sample in heard}
    words: list[int] = []
    at = 0
    for word in text.split():
        # Words that run into each other ("in the") are reported as one: the second has no beginning of its own.
        words.append(starts.get(at, words[-1] if words else 0))
        at += len(word) + 1
    return Speech(samples[begin:end].astype(np.float32), tuple(words))
