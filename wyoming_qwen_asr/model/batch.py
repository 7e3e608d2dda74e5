"""The decoder's side of recordings under way: they share its cache, and its forwards."""

from collections.abc import Collection, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .answer import TAG_TOKENS, Guess
from .decoder import MAX_CACHE_ROWS, Cache
from .job import Job

if TYPE_CHECKING:
    from .network import Network

PREFILL_ROWS = 160
"""Of a prompt, read by the decoder at once: a window of 8 s, what is around it, and a draft of as much text. With 128,
most ends of an utterance took two forwards, and the second one, of a few rows, as long as a token."""


class Batch:
    """Jobs that share a cache, `jobs[i]` in slot i. They come with their first `prefill`, stay between their steps,
    and go when not retained, or when there is no room and they rest: then the decoder reads them anew in their next
    step.

    The memory of the cache follows what they need, and goes with the last of them.
    """

    def __init__(self, network: "Network", slots: int | None = None) -> None:
        self._network = network
        self._slots = slots
        self._clock = 0
        self.jobs: list[Job] = []
        self.cache = self._no_cache()

    @torch.inference_mode()
    def retain(self, jobs: Collection[Job]) -> None:
        """The slots of all other jobs are free. Those in use stay side by side: the last one moves into a gap."""
        for slot in reversed(range(len(self.jobs))):
            if self.jobs[slot] in jobs:
                continue
            self.jobs[slot].forget(0)
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
        """The decoder reads up to PREFILL_ROWS rows of a job whose windows are encoded: what is new, the unfinished
        window, the end of the prompt, the draft. With the last of them comes the first token that is not the draft's.
        Raises Abandoned."""
        if job.to_read is None:
            job.to_read = self._begin(job)
        answer, slot = job.answer, self.jobs.index(job)
        assert answer
        self.cache.crop(slot, job.base + job.read)
        rows = job.to_read[job.read : job.read + PREFILL_ROWS]
        read = job.read + len(rows)
        # Behind the last row before the draft, and behind each row of that, something is likeliest.
        guesses = min(len(rows), max(0, read + 1 + len(answer.ahead) - len(job.to_read)))
        logits = self._network.decoder(rows, [len(rows)], [slot], self.cache, keep=[guesses])
        job.guesses += _guesses(logits)
        job.read = read
        job.hold(job.base + read, self._network.encoder.window_tokens)
        if job.decoding:
            answer.verify(job.guesses)
        self._network.wait()

    def _begin(self, job: Job) -> Tensor:
        """The rows that the decoder is to read behind those that the job's slot holds; the slot has room for them."""
        answer = job.answer
        assert answer
        self._make_room(job)
        job.read, job.base = 0, job.held
        job.recount()
        behind = self._network.embed([*answer.pending, *answer.ahead])
        windows = [rows for rows in job.encoded if rows is not None]
        return torch.cat([job.head, *windows, job.partial, job.suffix, behind])[job.base :]

    def _make_room(self, job: Job) -> None:
        """A slot with room for the job's step. Those who rest longest give theirs up, if need be."""
        while True:
            others = [each for each in self.jobs if each is not job]
            resting = [each for each in others if each.resting]
            full = len(others) == self._slots or not fit_together([*others, job])
            if not (full and resting):
                break
            longest = min(resting, key=lambda each: each.used)
            self.retain([each for each in self.jobs if each is not longest])
        if job not in self.jobs:
            self.jobs.append(job)
        answer = job.answer
        assert answer
        rows = job.prompt_rows + len(answer.pending) + len(answer.ahead) + TAG_TOKENS
        self.cache.fit(len(self.jobs), max(rows, *self.cache.lengths, 1))
        self._clock += 1
        job.used = self._clock

    @torch.inference_mode()
    def decode(self, jobs: Collection[Job]) -> None:
        """One token more, and what is right of a draft, for each of these jobs that are in the batch and not done. A
        step that failed may be repeated, with other jobs too."""
        slots = [slot for slot, job in enumerate(self.jobs) if job in jobs and job.decoding and not job.resting]
        if not slots:
            return
        answers = [answer for slot in slots if (answer := self.jobs[slot].answer)]
        read = [[*answer.pending, *answer.ahead] for answer in answers]
        for slot, answer in zip(slots, answers, strict=True):
            self.cache.crop(slot, self.jobs[slot].prompt_rows + answer.kept)
        rows = max(self.cache.lengths[slot] + len(ids) for slot, ids in zip(slots, read, strict=True))
        self.cache.fit(len(self.jobs), max(rows, *self.cache.lengths))
        embedded = self._network.embed([token for ids in read for token in ids])
        keep = [1 + len(answer.ahead) for answer in answers]
        logits = self._network.decoder(embedded, [len(ids) for ids in read], slots, self.cache, keep)
        guesses = iter(_guesses(logits))
        for answer, count in zip(answers, keep, strict=True):
            answer.verify(list(islice(guesses, count)))

    def _no_cache(self) -> Cache:
        return Cache(self._network.decoder.config, 0, 0, self._network.device, self._network.dtype)


def _guesses(logits: Tensor) -> list[Guess]:
    """One for each of the logits [n, vocab_size]."""
    margins = logits.float().topk(2).values.diff(dim=-1).neg().flatten()
    # Not the index of topk: among equals it may name another one than argmax, which the reference takes.
    return list(zip(logits.argmax(-1).tolist(), margins.tolist(), strict=True))


def fit_together(jobs: Sequence[Job]) -> bool:
    """Whether jobs may share a cache, whatever they write, within MAX_CACHE_ROWS. A job alone always may."""
    slots, rows = Cache.size(len(jobs), max(job.room for job in jobs))
    return len(jobs) == 1 or slots * rows <= MAX_CACHE_ROWS
