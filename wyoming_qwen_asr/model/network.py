"""The `network` backend: recordings in, text out, by plain greedy decoding, in small units.

Several recordings of unequal length share the forwards of the decoder; they join and leave between two of them.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from ..audio import SAMPLE_RATE
from ..errors import BadRequest
from .answer import TAG_TOKENS, Answer
from .checkpoint import Checkpoint
from .decoder import MAX_CACHE_ROWS, Cache, Decoder
from .encoder import Encoder, audio_tokens
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


PREFILL_ROWS = 128
"""Of a prompt, read by the decoder at once: some 9 s of audio, about what encoding a window costs."""

_NOTHING = Recognition("", None)


def budget(samples: int) -> int:
    """The most tokens of text for so many samples: some 12 a second is the fastest speech, this is twice that."""
    return 32 + 25 * samples // SAMPLE_RATE


def _never(_: int) -> bool:
    return False


@dataclass(eq=False)
class Job:
    """A piece under way: its windows are encoded, the decoder reads its prompt, then writes its answer.

    rows [R, hidden]: what the decoder reads first, the prompt and a forced tag; windows fill their place as they
    are encoded, the next one from row `place` on. windows: features [128, F] of those still to be encoded; inner: one
    is encoded already. prompt_rows: where in the slot the answer begins. read: how many of `rows` the decoder has read.
    """

    answer: Answer
    prompt_rows: int
    rows: Tensor
    windows: deque[Tensor]
    place: int
    inner: bool = False
    read: int = 0

    @property
    def decoding(self) -> bool:
        """Whether all of the prompt is read."""
        return self.read == len(self.rows)

    @property
    def room(self) -> int:
        """The most rows of a slot that it can come to need."""
        return self.prompt_rows + self.answer.room

    @property
    def result(self) -> Recognition:
        """What the answer says; final once it is done."""
        answer = self.answer
        return Recognition(answer.text, answer.language, tuple(answer.ids), answer.looped, answer.truncated)


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

    def recognise(self, pieces: Sequence[Piece], cancelled: Callable[[int], bool] = _never) -> list[Recognition]:
        """Recognise pieces together; the results are in their order.

        cancelled(i) is asked once a token for each piece under way; after True the piece costs nothing more, and its
        result is empty. NaN and infinite samples count as 0, a piece without samples as one without speech.
        Raises BadRequest when a context leaves no room for the answer.
        """
        results = [_NOTHING] * len(pieces)
        jobs = {index: self.hear(piece) for index, piece in enumerate(pieces) if len(piece.samples)}
        batch = Batch(self)
        for job in jobs.values():
            while job.windows:
                self.encode(job)
            while not job.decoding:
                batch.prefill(job)
        while jobs:
            for index, job in list(jobs.items()):
                if job.answer.done or cancelled(index):
                    if job.answer.done:
                        results[index] = job.result
                    del jobs[index]
            batch.retain(jobs.values())
            batch.decode(jobs.values())
        return results

    # --- units: each is short, so that something more urgent can come in between. A job goes through `hear`, `encode`
    # --- once a window, `prefill` until it is decoding, and `decode` until its answer is done. ------------------------

    @torch.inference_mode()
    def hear(self, piece: Piece) -> Job:
        """Begin with a piece that has samples: its features. Raises BadRequest when its context leaves no room."""
        samples = self._samples(piece)
        mel = log_mel(samples)
        expected = piece.language if piece.hint != "ignore" else None
        answer = Answer(self.tokenizer, budget(len(samples)), expected, expected is not None and piece.hint == "force")
        sound = audio_tokens(mel.shape[1])
        prompt = self.tokenizer.prompt(sound, piece.context)
        if len(prompt) + answer.room > self.decoder.config.max_position_embeddings:
            raise BadRequest(f"a context of {len(prompt) - sound} tokens is too long for this model")
        rows = self.embed(prompt + answer.pending)
        windows = deque(torch.split(mel, self.encoder.window_frames, dim=1))
        return Job(answer, len(prompt), rows, windows, prompt.index(self.tokenizer.audio_pad))

    @torch.inference_mode()
    def encode(self, job: Job) -> None:
        """Encode the job's next window, 8 s at most."""
        (rows,) = self.encoder([job.windows[0]], job.inner)
        job.rows[job.place : job.place + len(rows)] = rows
        job.place += len(rows)
        job.inner = True
        job.windows.popleft()
        self.wait()

    def wait(self) -> None:
        """Until a GPU has done what it was told: a unit that is merely queued would delay those after it, and its
        error would be theirs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _samples(self, piece: Piece) -> Tensor:
        """The piece on the device, finite, at least half a second, and not beyond full scale (as qwen-asr does it)."""
        given = piece.samples if isinstance(piece.samples, Tensor) else torch.tensor(piece.samples)
        samples = given.to(self.device, torch.float32).nan_to_num(0.0, 0.0, 0.0)
        return pad_short(samples / samples.abs().max().clamp(min=1.0))

    def embed(self, ids: list[int]) -> Tensor:
        """Rows [len(ids), hidden] of ids."""
        rows: Tensor = self.decoder.embed_tokens(torch.tensor(ids, device=self.device))
        return rows


class Batch:
    """Jobs that share a cache, `jobs[i]` in slot i. They come with their first `prefill` and go when not retained.

    The memory of the cache follows what they need, and goes with the last of them.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.jobs: list[Job] = []
        self.cache = self._no_cache()

    @torch.inference_mode()
    def retain(self, jobs: Collection[Job]) -> None:
        """The slots of all other jobs are free. Those in use stay side by side: the last one moves into a gap."""
        for slot in reversed(range(len(self.jobs))):
            if self.jobs[slot] in jobs:
                continue
            last = self.jobs.pop()
            if slot == len(self.jobs):
                self.cache.clear(slot)
            else:
                self.jobs[slot] = last
                self.cache.move(len(self.jobs), slot)
        if not self.jobs and self.cache.lengths:
            self.cache = self._no_cache()

    @torch.inference_mode()
    def prefill(self, job: Job) -> None:
        """The decoder reads up to PREFILL_ROWS rows of a job whose windows are encoded. With the last of them comes
        the first token of the answer."""
        if job not in self.jobs:
            self.cache.fit(len(self.jobs) + 1, len(job.rows) + TAG_TOKENS)
            self.jobs.append(job)
        slot = self.jobs.index(job)
        self.cache.crop(slot, job.read)
        rows = job.rows[job.read : job.read + PREFILL_ROWS]
        last = job.read + len(rows) == len(job.rows)
        logits = self._network.decoder(rows, [len(rows)], [slot], self.cache, keep=[int(last)])
        if last:
            job.answer.take(int(logits.argmax()))
        self._network.wait()
        job.read += len(rows)

    @torch.inference_mode()
    def decode(self, jobs: Collection[Job]) -> None:
        """One token more for each of these jobs that are in the batch and not done. A step that failed may be
        repeated, with other jobs too."""
        slots = [slot for slot, job in enumerate(self.jobs) if job in jobs and not job.answer.done]
        if not slots:
            return
        answers = [self.jobs[slot].answer for slot in slots]
        counts = [len(answer.pending) for answer in answers]
        for slot, answer in zip(slots, answers, strict=True):
            self.cache.crop(slot, self.jobs[slot].prompt_rows + answer.kept)
        self.cache.fit(len(self.jobs), max(self.cache.lengths[s] + n for s, n in zip(slots, counts, strict=True)))
        rows = self._network.embed([token for answer in answers for token in answer.pending])
        tokens = self._network.decoder(rows, counts, slots, self.cache).argmax(-1).tolist()
        for answer, token in zip(answers, tokens, strict=True):
            answer.take(token)

    def _no_cache(self) -> Cache:
        return Cache(self._network.decoder.config, 0, 0, self._network.device, self._network.dtype)


def fit_together(jobs: Sequence[Job]) -> bool:
    """Whether jobs may share a cache, whatever they write, within MAX_CACHE_ROWS. A job alone always may."""
    slots, rows = Cache.size(len(jobs), max(job.room for job in jobs))
    return len(jobs) == 1 or slots * rows <= MAX_CACHE_ROWS


def _fill(module: nn.Module, weights: dict[str, Any]) -> None:
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval()
