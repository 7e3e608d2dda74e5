"""Audio as bytes in the client's format: what is accepted, and bytes ↔ seconds. No numpy: the gateway uses it."""

from dataclasses import dataclass

from .errors import BadAudio

SAMPLE_RATE = 16_000
"""What the model hears; the model process resamples to it."""

RATES = (8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""The rates that microphones, phones and browsers use. A list, because a "rate" of 1 Hz turns kilobytes into
hundreds of megabytes."""

WIDTHS = (1, 2, 4)
"""Bytes per sample: unsigned 8 bit, signed 16 and 32 bit, little-endian, as in WAV."""


@dataclass(frozen=True)
class AudioFormat:
    """Interleaved PCM. Raises BadAudio for what is not accepted."""

    rate: int = SAMPLE_RATE
    width: int = 2
    channels: int = 1

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("rate", self.rate, RATES),
            ("width", self.width, WIDTHS),
            ("channels", self.channels, (1, 2)),
        ):
            if type(value) is not int or value not in accepted:
                raise BadAudio(f"audio {name} must be one of {', '.join(map(str, accepted))}")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of every channel."""
        return self.width * self.channels

    @property
    def bytes_per_second(self) -> int:
        return self.rate * self.frame_bytes
