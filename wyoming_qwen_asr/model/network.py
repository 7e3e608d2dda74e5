"""The `network` backend: recordings in, text out, by greedy decoding, in small units.

A recording may still be growing. Each step recognises all of it that has come, but computes only what is new: features,
seconds of convolution, windows of the encoder, the decoder's rows of head and finished windows stay. They are exact;
only the floor of the features, which follows the loudest moment, can make them stale. A recording that is given at
once is one step of the same code.

Several recordings of unequal length share the forwards of the decoder; they join and leave between two of them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from ..audio import SAMPLE_RATE
from ..errors import BadRequest
from .answer import Answer
from .architecture import CHUNK_FRAMES, CHUNK_TOKENS
from .batch import Batch
from .checkpoint import Checkpoint
from .decoder import Decoder
from .encoder import Encoder, audio_tokens
from .features import RANGE, scaled
from .job import NOTHING, Job, Recognition, Second
from .packed import pack
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Piece:
    """A recording to recognise, at most about 30 s, and what is known about it.

    samples [n]: float32 mono at 16 kHz in [-1, 1]. context: words that may occur; None leaves the system turn out.
    language: Qwen's name of the language that is expected. hint: what to do with it. "prefer" lets the model say first
    whether there is speech at all, then takes the language; "force" takes it at once, and silence may then become
    words; "ignore" leaves the choice to the model.
    """

    samples: "Tensor | NDArray[np.float32]"
    context: str | None = ""
    language: str | None = None
    hint: Literal["prefer", "force", "ignore"] = "prefer"


def budget(samples: int) -> int:
    """The most tokens of text for so many samples: some 12 a second is the fastest speech, this is twice that."""
    return 32 + 25 * samples // SAMPLE_RATE


def _go_on() -> None: ...


def _never(_: int) -> bool:
    return False


FLOOR_TOLERANCE = 0.3
"""By so much, in decades, the floor of the features may be off in a step that is not the last one, as long as it moves.
The loudest moment of real speech seldom grows by more once some seconds are heard. In the first step in which it does
not grow, everything is made exact: the last step may have to, and somebody waits for that."""


class Abandoned(Exception):
    """A forward was stopped between two layers; nothing came of it, and what was there before it is intact."""


class Network:
    """A loaded model. Not for several threads at once."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, decoder: Decoder) -> None:
        self.tokenizer, self.encoder, self.decoder = tokenizer, encoder, decoder
        self.device, self.dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype
        self.check: Callable[[], None] = _go_on
        """Asked between two layers; what it raises, as Abandoned, ends the forward."""
        encoder.check = decoder.check = self._check

    def _check(self) -> None:
        self.check()

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Self:
        """Build the network around the checkpoint's weights. Raises CheckpointError when they cannot be read."""
        weights = checkpoint.weights(device, dtype)
        with torch.device("meta"):  # so that nothing is allocated twice or initialised in vain
            encoder, decoder = Encoder(checkpoint.encoder), Decoder(checkpoint.decoder)
        tower = "audio_tower."
        _fill(encoder, {name.removeprefix(tower): w for name, w in weights.items() if name.startswith(tower)})
        _fill(decoder, {name.removeprefix("model."): w for name, w in weights.items() if not name.startswith(tower)})
        return cls(checkpoint.tokenizer, encoder.to(device), decoder.to(device))

    def pack(self) -> None:
        """Have the weights in the order that suits the machine; nothing else may be done to them after that."""
        pack(self.encoder)
        pack(self.decoder)

    def recognise(self, pieces: Sequence[Piece], cancelled: Callable[[int], bool] = _never) -> list[Recognition]:
        """Recognise pieces together; the results are in their order.

        cancelled(i) is asked once a token for each piece under way; after True the piece costs nothing more, and its
        result is empty. NaN and infinite samples count as 0, a piece without samples as one without speech.
        Raises BadRequest when a context leaves no room for the answer.
        """
        results = [NOTHING] * len(pieces)
        jobs: dict[int, Job] = {}
        batch = Batch(self)
        for index, piece in enumerate(pieces):
            if not len(piece.samples):
                continue
            job = jobs[index] = self.open(piece.context)
            self.hear(job, piece.samples, len(piece.samples), piece.language, piece.hint)
            while job.encoding:
                self.encode(job)
            while not job.decoding:
                batch.prefill(job)
        while jobs:
            for index, job in list(jobs.items()):
                if job.resting or cancelled(index):
                    if job.resting:
                        results[index] = job.result
                    del jobs[index]
            batch.retain(jobs.values())
            batch.decode(jobs.values())
        return results

    def open(self, context: str | None) -> Job:
        """A recording that is going to be heard."""
        prompt = self.tokenizer.prompt(1, context)
        place = prompt.index(self.tokenizer.audio_pad)
        return Job(context, self.embed(prompt[:place]), self.embed(prompt[place + 1 :]), self.device)

    # --- units: each is short, so that something more urgent can come in between ------------------------------------
    @torch.inference_mode()
    def hear(
        self,
        job: Job,
        samples: "Tensor | NDArray[np.float32]",
        end: int,
        language: str | None = None,
        hint: Literal["prefer", "force", "ignore"] = "prefer",
        exact: bool = True,
    ) -> None:
        """Begin a step: features. `samples` have come since the last one, and the first `end` of all count, one at
        least. See Piece for language and hint. Without `exact` the floor may be a little off, for a step that is not
        the last one. Raises BadRequest when the context leaves no room.
        """
        expected = language if hint != "ignore" else None
        forced = expected is not None and hint == "force"
        job.abandon()
        job.answer = Answer(self.tokenizer, budget(end), expected, forced, job.draft, job.context)
        job.guesses = []
        job.to_read = None
        job.log_mel.feed(self._samples(samples))
        log, final = job.log_mel.frames(end)
        job.prompt_rows = len(job.head) + audio_tokens(log.shape[1]) + len(job.suffix)
        if job.room > self.decoder.config.max_position_embeddings:
            around = len(job.head) + len(job.suffix)
            raise BadRequest(f"a context of {around} tokens is too long for this model")
        loudest = log if exact or not final else log[:, :final]
        floor = float(loudest.max()) - RANGE
        exact = exact or floor == job.floor
        job.floor = floor
        job.mel = scaled(log, job.floor)
        self._discard(job, log, final // CHUNK_FRAMES, 0.0 if exact else FLOOR_TOLERANCE)
        windows = -(-log.shape[1] // (self.encoder.window_seconds * CHUNK_FRAMES))
        unknown = [window for window, rows in enumerate(job.encoded) if rows is None]
        job.to_encode = deque([*unknown, *range(len(job.encoded), windows)])
        job.partial = job.head[:0]

    def _discard(self, job: Job, log: Tensor, finished: int, tolerance: float) -> None:
        """Forget what the step may not use of the seconds and windows that are known, and make place for those that
        are finished."""
        size = self.encoder.window_seconds
        power = log[:, : finished * CHUNK_FRAMES].reshape(len(log), finished, CHUNK_FRAMES)
        job.softest = power.amin((0, 2)).tolist()
        known = [None if each is None or each.stale(job.floor, tolerance) else each for each in job.seconds[:finished]]
        job.seconds = [*known, *[None] * (finished - len(known))]
        for window in range(min(len(job.encoded), finished // size)):
            if None in job.seconds[window * size : (window + 1) * size] and job.encoded[window] is not None:
                job.encoded[window] = None
                job.windows += 1
        job.encoded = [*job.encoded[: finished // size], *[None] * (finished // size - len(job.encoded))]
        intact = job.encoded.index(None) if None in job.encoded else len(job.encoded)
        job.forget(len(job.head) + intact * self.encoder.window_tokens)

    @torch.inference_mode()
    def encode(self, job: Job) -> None:
        """Encode the step's next window, 8 s at most. Raises Abandoned."""
        window, size = job.to_encode[0], self.encoder.window_seconds
        end = min((window + 1) * size * CHUNK_FRAMES, job.mel.shape[1])
        seconds = range(window * size, -(-end // CHUNK_FRAMES))
        rows: list[Tensor] = []
        for known, group in groupby(seconds, lambda k: k < len(job.seconds) and job.seconds[k] is not None):
            if known:
                rows += [second.rows for k in group if (second := job.seconds[k])]
            else:
                rows += self._convolve(job, list(group))
        (encoded,) = self.encoder.attend([torch.cat(rows)])
        if window < len(job.encoded):
            job.encoded[window] = encoded
        else:
            job.partial = encoded
        job.to_encode.popleft()
        self.wait()

    def _convolve(self, job: Job, seconds: list[int]) -> list[Tensor]:
        """Rows of consecutive seconds, the last of which may be unfinished."""
        mel = job.mel[:, seconds[0] * CHUNK_FRAMES : (seconds[-1] + 1) * CHUNK_FRAMES]
        rows = list(torch.split(self.encoder.convolve(mel, inner=seconds[0] > 0), CHUNK_TOKENS))
        for k, convolved in zip(seconds, rows, strict=True):
            if k < len(job.seconds):
                job.seconds[k] = Second(convolved, job.floor, job.softest[k])
        return rows

    def wait(self) -> None:
        """Until a GPU has done what it was told: a unit that is merely queued would delay those after it, and its
        error would be theirs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _samples(self, samples: "Tensor | NDArray[np.float32]") -> Tensor:
        """Samples on the device, finite, and not beyond full scale: what a resampler overshoots is cut off. (qwen-asr
        divides the recording by its peak then, which nobody knows while it lasts.)"""
        given = samples if isinstance(samples, Tensor) else torch.tensor(samples)
        return given.to(self.device, torch.float32).nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)

    def embed(self, ids: list[int]) -> Tensor:
        """Rows [len(ids), hidden] of ids."""
        rows: Tensor = self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        return rows


def _fill(module: nn.Module, weights: dict[str, Any]) -> None:
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval()
