"""Log-mel features: what the audio encoder hears.

The features of Whisper (Radford et al. 2022, `WhisperFeatureExtractor`) with 128 bins: 25 ms Hann windows every 10 ms,
power spectrum, Slaney's mel filters, log10 with a floor 8 below the clip's maximum, scaled to about [-1, 1].
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..audio import SAMPLE_RATE

MEL_BINS = 128
HOP = 160  # samples per frame: 100 frames a second
MIN_SAMPLES = SAMPLE_RATE // 2  # the model was not trained on less; shorter clips come back empty or invented
_FFT = 400
_REACH = _FFT // 2


RANGE = 8.0
"""Decades of power below a clip's loudest bin that are told apart; what is softer counts as that soft."""


def log_mel(samples: Tensor) -> Tensor:
    """Features [128, n // 160] float32 of samples [n], float32 mono at 16 kHz, on the samples' device.

    Raises ValueError for less than MIN_SAMPLES (see `pad_short`).
    """
    if samples.ndim != 1 or samples.shape[0] < MIN_SAMPLES:
        raise ValueError(f"at least {MIN_SAMPLES} samples of one channel are needed, got {tuple(samples.shape)}")
    whole = LogMel(samples.device)
    whole.feed(samples.float())
    log, _ = whole.frames(len(samples))
    return scaled(log, float(log.max()) - RANGE)


def scaled(log: Tensor, floor: float) -> Tensor:
    """Log10 power, of any shape, to features: not below the floor, and about [-1, 1]."""
    return (log.clamp(min=floor) + 4.0) / 4.0


class LogMel:
    """Log10 power, without floor, of a recording that grows; each frame is computed once.

    Frame i is made of the samples from 160 i - 200 to 160 i + 200. Beyond the ends of a recording it sees them
    mirrored, so the last one or two frames are provisional as long as more may come. The frame centred on the very
    end is left out, so that frames and hops agree.
    """

    def __init__(self, device: torch.device) -> None:
        self._samples = torch.zeros(0, device=device)
        self._log = torch.zeros(MEL_BINS, 0, device=device)  # frames that more samples do not change

    def feed(self, samples: Tensor) -> None:
        """More samples [n], float32 mono at 16 kHz."""
        self._samples = torch.cat([self._samples, samples])

    def frames(self, end: int) -> tuple[Tensor, int]:
        """Log10 power [128, end // 160] of the first `end` samples as if no more had come, of MIN_SAMPLES at least; and
        how many of these frames more samples would not change."""
        if end < MIN_SAMPLES:
            return _log_power(_mirrored(pad_short(self._samples[:end])))[:, :-1], 0
        count, final = end // HOP, (end - _REACH) // HOP + 1
        known = self._log.shape[1]
        if known < final:
            self._log = torch.cat([self._log, self._compute(known, final, len(self._samples))], dim=1)
        tail = self._compute(final, count, end)
        return torch.cat([self._log[:, :final], tail], dim=1), min(final, count)

    def _compute(self, first: int, last: int, end: int) -> Tensor:
        """Frames first to last of a recording that ends at `end`."""
        if first >= last:
            return self._log[:, :0]
        begin, stop = first * HOP - _REACH, (last - 1) * HOP + _REACH
        excerpt = self._samples[max(0, begin) : min(stop, end)]
        before, after = max(0, -begin), max(0, stop - end)
        return _log_power(_mirrored(excerpt, before, after))


def _mirrored(samples: Tensor, before: int = _REACH, after: int = _REACH) -> Tensor:
    return F.pad(samples[None], (before, after), mode="reflect")[0]


def _log_power(samples: Tensor) -> Tensor:
    """Log10 of the mel bins' power [128, (n - 400) // 160 + 1]."""
    window, filters = _tables(samples.device)
    spectrum = torch.stft(samples, _FFT, HOP, window=window, center=False, return_complex=True)
    return (filters @ spectrum.abs().square()).clamp(min=1e-10).log10()


def pad_short(samples: Tensor) -> Tensor:
    """Samples [n], with silence behind them up to MIN_SAMPLES. Raises ValueError for no samples at all."""
    if samples.shape[0] == 0:
        raise ValueError("there is no audio")
    return F.pad(samples, (0, max(0, MIN_SAMPLES - samples.shape[0])))


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The window [400] and the mel filters [128, 201]."""
    return torch.hann_window(_FFT, device=device), _mel_filters().to(device)


def _mel_filters() -> Tensor:
    """Triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8 kHz (Auditory Toolbox, 1998)."""
    nyquist = SAMPLE_RATE / 2
    # Slaney's scale: 3 mel per 200 Hz up to 1 kHz (15 mel), then 27 mel per factor 6.4.
    top = 15 + 27 * math.log(nyquist / 1000) / math.log(6.4)
    mel = torch.linspace(0, top, MEL_BINS + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = torch.linspace(0, nyquist, _FFT // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float()
