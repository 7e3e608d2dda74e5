"""PCM bytes in a client's format → what the network hears: float32, mono, 16 kHz. Keeps state between chunks."""

import numpy as np
import soxr
from numpy.typing import NDArray

from ..audio import SAMPLE_RATE, AudioFormat

Samples = NDArray[np.float32]


class Resampler:
    """One stream's converter. Chunks may be cut anywhere, in the middle of a sample too."""

    def __init__(self, form: AudioFormat) -> None:
        self._form = form
        self._rest = b""  # of a frame cut by the last chunk
        self._soxr: soxr.ResampleStream | None = None
        if form.rate != SAMPLE_RATE:
            self._soxr = soxr.ResampleStream(form.rate, SAMPLE_RATE, 1, dtype="float32")

    def feed(self, pcm: bytes) -> Samples:
        """The samples [n] that these bytes complete, in -1 … 1. n lags behind while the resampler looks ahead."""
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % self._form.frame_bytes
        self._rest = pcm[whole:]
        return self._convert(_mono(pcm[:whole], self._form), last=False)

    def flush(self) -> Samples:
        """What was held back. An incomplete frame at the end is dropped."""
        return self._convert(np.zeros(0, np.float32), last=True)

    def _convert(self, samples: Samples, *, last: bool) -> Samples:
        if self._soxr is None:
            return samples
        return np.asarray(self._soxr.resample_chunk(samples, last=last), np.float32)


def _mono(pcm: bytes, form: AudioFormat) -> Samples:
    """Samples as WAV has them: 8 bit unsigned, 16 and 32 bit signed, little-endian; channels averaged."""
    dtype, zero = ("u1", 128) if form.width == 1 else (f"<i{form.width}", 0)
    full_scale = 2.0 ** (8 * form.width - 1)
    samples = (np.frombuffer(pcm, dtype).astype(np.float32) - zero) / full_scale
    return np.asarray(samples.reshape(-1, form.channels).mean(axis=1), np.float32)
