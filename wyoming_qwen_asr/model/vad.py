"""Where long audio may be cut. Pure functions on samples."""

import numpy as np

from ..audio import SAMPLE_RATE
from .resample import Samples

EARLIEST_CUT = 16 * SAMPLE_RATE
"""No cut before: each piece starts without context, so few long pieces read better than many short ones."""

LATEST_CUT = 28 * SAMPLE_RATE
"""A cut by here: past 30 s the model's accuracy falls, and its memory is reserved for pieces of that length."""

_FRAME = SAMPLE_RATE // 10


def cut_point(samples: Samples) -> int | None:
    """Where to cut off the next piece of a stream: the middle of the quietest 100 ms from 16 to 28 s.
    None while there is too little audio to need one. samples: [n] at 16 kHz."""
    if len(samples) < LATEST_CUT:
        return None
    frames = samples[EARLIEST_CUT:LATEST_CUT].reshape(-1, _FRAME)
    quietest = int(np.argmin(np.square(frames).mean(axis=1)))
    return EARLIEST_CUT + quietest * _FRAME + _FRAME // 2
