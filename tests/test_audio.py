"""Audio on its way to the network: accepted formats, conversion that no cutting of the bytes changes, and cuts."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wyoming_qwen_asr.audio import RATES, SAMPLE_RATE, WIDTHS, AudioFormat
from wyoming_qwen_asr.errors import BadAudio
from wyoming_qwen_asr.model.resample import Resampler, Samples

property_test = settings(deadline=None, derandomize=True)

FORMATS = [AudioFormat(*form) for form in product(RATES, WIDTHS, (1, 2))]


# --- formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_sizes(form: AudioFormat) -> None:
    assert form.frame_bytes == form.width * form.channels
    assert form.bytes_per_second == form.rate * form.width * form.channels


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        *(
            ((rate, 2, 1), "rate")
            for rate in (0, 1, -16000, 16001, 96000, 10**9, 16000.0, "16000", True, None, [16000])
        ),
        *(((16000, width, 1), "width") for width in (0, 3, 8, -2, 2.0, True, "2", None)),
        *(((16000, 2, channels), "channels") for channels in (0, 3, -1, 1.0, True, "1", None)),
    ],
)
def test_formats_that_are_refused(form: tuple[Any, Any, Any], wrong: str) -> None:
    with pytest.raises(BadAudio, match=f"^audio {wrong} must be one of "):
        AudioFormat(*form)


# --- conversion ----------------------------------------------------------------------------------------------


def as_pcm(samples: NDArray[np.float64], form: AudioFormat) -> bytes:
    """Samples [n, channels], in -1 … 1, as a client would send them."""
    if form.width == 1:
        return bytes(np.round(samples * 127 + 128).astype("u1"))
    return bytes(np.round(samples * (2 ** (8 * form.width - 1) - 1)).astype(f"<i{form.width}"))


def convert(form: AudioFormat, *chunks: bytes) -> Samples:
    resampler = Resampler(form)
    return np.concatenate([*map(resampler.feed, chunks), resampler.flush()])


def tone(rate: int, seconds: float, hertz: float) -> NDArray[np.float64]:
    return np.asarray(np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_tone_stays_the_tone(form: AudioFormat) -> None:
    """Of every format: as long, as loud, as high as before; the second channel is averaged into it."""
    left = 0.6 * tone(form.rate, 1.0, 1000)
    samples = left[:, None] if form.channels == 1 else np.stack([left, np.zeros_like(left)], 1)
    heard = convert(form, as_pcm(samples, form))
    assert heard.dtype == np.float32
    assert abs(len(heard) - SAMPLE_RATE) <= 3
    middle = slice(2000, 14000)  # without the edges, where the resampler's filter rings
    expected = 0.6 / form.channels * tone(SAMPLE_RATE, 1.0, 1000)
    assert np.abs(heard[middle] - expected[middle]).max() < (0.01 if form.width == 1 else 0.001)


@pytest.mark.parametrize(
    ("width", "pcm", "expected"),
    [
        (1, bytes([0, 128, 255, 64]), [-1, 0, 127 / 128, -0.5]),
        (2, b"\x00\x80\x00\x00\xff\x7f\x00\x40", [-1, 0, 32767 / 32768, 0.5]),
        (4, b"\x00\x00\x00\x80\x00\x00\x00\x00\xff\xff\xff\x7f\x00\x00\x00\x40", [-1, 0, 1, 0.5]),
    ],
)
def test_sample_values(width: int, pcm: bytes, expected: list[float]) -> None:
    """As in WAV: 8 bit unsigned, 16 and 32 bit signed and little-endian. Stereo is the mean."""
    assert convert(AudioFormat(SAMPLE_RATE, width, 1), pcm).tolist() == expected
    stereo = convert(AudioFormat(SAMPLE_RATE, width, 2), pcm).tolist()
    assert stereo == [(expected[0] + expected[1]) / 2, (expected[2] + expected[3]) / 2]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_incomplete_frame_is_dropped(form: AudioFormat) -> None:
    pcm = as_pcm(np.repeat(tone(form.rate, 0.05, 300)[:, None], form.channels, 1), form)
    for extra in range(form.frame_bytes):
        assert np.array_equal(convert(form, pcm + b"\x55" * extra), convert(form, pcm))
    assert len(convert(form)) == len(convert(form, b"")) == 0
    assert len(convert(form, b"\x55" * (form.frame_bytes - 1))) == 0


@property_test
@given(st.sampled_from(FORMATS), st.binary(min_size=1, max_size=400), st.integers(1, 40), st.data())
def test_cutting_changes_nothing(form: AudioFormat, noise: bytes, repeats: int, data: st.DataObject) -> None:
    """Wherever the bytes are cut, in the middle of samples too, and however often, the samples are the same."""
    pcm = noise * repeats
    cuts = sorted(data.draw(st.lists(st.integers(0, len(pcm)), max_size=12)))
    chunks = [pcm[a:b] for a, b in zip([0, *cuts], [*cuts, len(pcm)], strict=True)]
    assert np.array_equal(convert(form, *chunks), convert(form, pcm))


@pytest.mark.parametrize("rate", RATES)
def test_many_small_chunks(rate: int) -> None:
    """A second in chunks of 10 ms, of 3 bytes, and byte by byte."""
    form = AudioFormat(rate, 2, 1)
    pcm = as_pcm(np.random.default_rng(0).uniform(-1, 1, (rate // 4, 1)), form)
    whole = convert(form, pcm)
    for size in (rate // 100 * 2, 3, 1):
        assert np.array_equal(convert(form, *(pcm[at : at + size] for at in range(0, len(pcm), size))), whole)
