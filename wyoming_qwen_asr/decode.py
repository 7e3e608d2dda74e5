"""`python -m wyoming_qwen_asr.decode FILE`: an audio file of any kind libsndfile reads → PCM, in a process to lose.

Files come from strangers and parsers have bugs, so neither the gateway nor the process with the weights reads them.
Says `SessionAudio` events with 16 kHz mono 16-bit PCM, at the end `SessionEnd`, or else `Failed`.
"""

import argparse
import os
import resource
import sys
from collections.abc import Iterator

from setproctitle import setproctitle

from .audio import SAMPLE_RATE
from .errors import AsrError, BadAudio, ModelUnavailable
from .events import Failed, SessionAudio, SessionEnd
from .process import adopt, say

CPU_SECONDS = 60
"""An hour of MP3 takes a few; more is an attack, or a bug."""

MEMORY_BYTES = 2 * 1024**3
"""Of address space, most of it libraries: audio passes through in blocks."""

SAMPLE_RATES = range(4_000, 384_001)
"""From a telephone's half to the highest of converters. A file that claims 1 Hz would grow 16,000 times."""

BLOCK_FRAMES = 1 << 16

CHUNK_BYTES = 1 << 16


def main() -> int:
    out = adopt()
    setproctitle("wyoming-qwen-asr: decode")
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's; it would reserve 41 MB of addresses for each CPU
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    try:
        for pcm in _decode(parser.parse_args().file):
            for at in range(0, len(pcm), CHUNK_BYTES):
                say(out, SessionAudio(), pcm[at : at + CHUNK_BYTES])
        say(out, SessionEnd())
    except AsrError as error:
        say(out, Failed(error.code, str(error)))
    return 0


def _decode(path: str) -> Iterator[bytes]:
    """PCM blocks. Raises BadAudio, ModelUnavailable."""
    try:
        import numpy as np
        import soundfile
        import soxr
    except ImportError as error:
        raise ModelUnavailable(f"{error}: install the [local] extra") from None

    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate not in SAMPLE_RATES:
                raise BadAudio("the file's sample rate is none that sound has")
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
            while True:
                block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
                mono = resampler.resample_chunk(block.mean(axis=1), last=not len(block))
                yield (np.clip(mono, -1, 1) * 32767).astype("<i2").tobytes()
                if not len(block):
                    return
    except (soundfile.LibsndfileError, ValueError, RuntimeError):
        raise BadAudio("the file is not audio that can be read: WAV, FLAC, OGG or MP3") from None
    except MemoryError:
        raise BadAudio("the file needs more memory to be read than audio does") from None


if __name__ == "__main__":
    sys.exit(main())
