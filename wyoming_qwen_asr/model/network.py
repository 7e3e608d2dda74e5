"""The `network` backend: recordings in, text out, by plain greedy decoding.

Several recordings of unequal length share every forward of the decoder and leave as they finish.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from ..audio import SAMPLE_RATE
from ..errors import BadRequest
from .answer import Answer
from .checkpoint import Checkpoint
from .decoder import Cache, Decoder
from .encoder import Encoder
from .features import log_mel, pad_short
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


@dataclass(frozen=True)
class Recognition:
    """What was said. No speech is "" in the language None.

    ids: the model's answer, language tag (its own or the forced one) and text, without the end token.
    looped: it ran in circles and was cut. truncated: it wrote more than anybody can say in that time.
    """

    text: str
    language: str | None
    ids: tuple[int, ...] = ()
    looped: bool = False
    truncated: bool = False


_NOTHING = Recognition("", None)


def budget(samples: int) -> int:
    """The most tokens of text for so many samples: some 12 a second is the fastest speech, this is twice that."""
    return 32 + 25 * samples // SAMPLE_RATE


def _never(_: int) -> bool:
    return False


@dataclass
class _Job:
    """A piece under way; jobs[i] lives in slot i of the cache."""

    index: int
    answer: Answer
    prompt_rows: int


class Network:
    """A loaded model. Not for several threads at once."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, decoder: Decoder) -> None:
        self.tokenizer, self.encoder, self.decoder = tokenizer, encoder, decoder
        self.device, self.dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype

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

    @torch.inference_mode()
    def recognise(self, pieces: Sequence[Piece], cancelled: Callable[[int], bool] = _never) -> list[Recognition]:
        """Recognise pieces together; the results are in their order.

        cancelled(i) is asked once a token for each piece under way; after True the piece costs nothing more, and its
        result is empty. NaN and infinite samples count as 0, a piece without samples as one without speech.
        Raises BadRequest when a context leaves no room for the answer.
        """
        results = [_NOTHING] * len(pieces)
        heard = [index for index, piece in enumerate(pieces) if len(piece.samples)]
        if not heard:
            return results
        jobs, rows, counts = self._prompts(heard, [pieces[index] for index in heard])
        room = max(job.prompt_rows + job.answer.room for job in jobs)
        cache = Cache(self.decoder.config, len(jobs), room, self.device, self.dtype)
        while jobs:
            tokens = self.decoder(rows, counts, range(len(jobs)), cache).argmax(-1).tolist()
            for job, token in zip(jobs, tokens, strict=True):
                job.answer.take(token)
            for slot in reversed(range(len(jobs))):
                job = jobs[slot]
                if job.answer.done or cancelled(job.index):
                    if job.answer.done:
                        results[job.index] = _result(job.answer)
                    last = jobs.pop()  # the slots in use stay side by side
                    if last is not job:
                        jobs[slot] = last
                        cache.move(len(jobs), slot)
            for slot, job in enumerate(jobs):
                cache.crop(slot, job.prompt_rows + job.answer.kept)
            if jobs:
                counts = [len(job.answer.pending) for job in jobs]
                rows = self._embed([i for job in jobs for i in job.answer.pending])
        return results

    def _prompts(self, heard: Sequence[int], pieces: Sequence[Piece]) -> tuple[list[_Job], Tensor, list[int]]:
        """What the decoder reads first: jobs, packed rows [R, hidden], and how many of them are each job's."""
        audio = [self._samples(piece) for piece in pieces]
        encoded = self.encoder([log_mel(samples) for samples in audio])
        jobs: list[_Job] = []
        ids: list[int] = []
        counts: list[int] = []
        places: list[int] = []
        for index, piece, samples, sound in zip(heard, pieces, audio, encoded, strict=True):
            expected = piece.language if piece.hint != "ignore" else None
            force = expected is not None and piece.hint == "force"
            answer = Answer(self.tokenizer, budget(len(samples)), expected, force)
            prompt = self.tokenizer.prompt(len(sound), piece.context)
            if len(prompt) + answer.room > self.decoder.config.max_position_embeddings:
                raise BadRequest(f"a context of {len(prompt) - len(sound)} tokens is too long for this model")
            jobs.append(_Job(index, answer, len(prompt)))
            places.append(len(ids) + prompt.index(self.tokenizer.audio_pad))
            counts.append(len(prompt) + len(answer.pending))
            ids += prompt + answer.pending
        rows = self._embed(ids)
        for place, sound in zip(places, encoded, strict=True):
            rows[place : place + len(sound)] = sound
        return jobs, rows, counts

    def _samples(self, piece: Piece) -> Tensor:
        """The piece on the device, finite, at least half a second, and not beyond full scale (as qwen-asr does it)."""
        given = piece.samples if isinstance(piece.samples, Tensor) else torch.tensor(piece.samples)
        samples = given.to(self.device, torch.float32).nan_to_num(0.0, 0.0, 0.0)
        return pad_short(samples / samples.abs().max().clamp(min=1.0))

    def _embed(self, ids: list[int]) -> Tensor:
        """Rows [len(ids), hidden] of ids."""
        rows: Tensor = self.decoder.embed_tokens(torch.tensor(ids, device=self.device))
        return rows


def _result(answer: Answer) -> Recognition:
    return Recognition(answer.text, answer.language, tuple(answer.ids), answer.looped, answer.truncated)


def _fill(module: nn.Module, weights: dict[str, Any]) -> None:
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval()
