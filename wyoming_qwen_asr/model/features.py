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


def log_mel(samples: Tensor) -> Tensor:
    """Features [128, n // 160] float32 of samples [n], float32 mono at 16 kHz, on the samples' device.

    Raises ValueError for less than MIN_SAMPLES (see `pad_short`).
    """
    if samples.ndim != 1 or samples.shape[0] < MIN_SAMPLES:
        raise ValueError(f"at least {MIN_SAMPLES} samples of one channel are needed, got {tuple(samples.shape)}")
    window, filters = _tables(samples.device)
    spectrum = torch.stft(
        samples.float(), _FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    # The frame centred on the very end is left out, so that frames and hops agree.
    power = spectrum[:, :-1].abs().square()
    log = (filters @ power).clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


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
