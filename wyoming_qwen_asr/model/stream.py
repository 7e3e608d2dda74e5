"""What may be shown of a text that is still being heard. Plain token ids, no torch.

After each step there is a new hypothesis: the plain decoder's text of the audio so far. Whole, it is the draft of the
next step; its last tokens are the least certain, for the words behind them have not been heard. What is shown follows
the official streaming (qwen-asr 0.0.6: `unfixed_chunk_num`, `unfixed_token_num`), and is stricter: only what two
hypotheses in a row agree on (LocalAgreement-2: Liu et al. 2020, "Low-Latency Sequence-to-Sequence Speech
Recognition"), and both without hesitation. Nothing that was shown is forced upon the decoder.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile

from ..text import words_end

UNFIXED_CHUNKS = 2
UNFIXED_TOKENS = 5
"""The official package's defaults."""

SURE_NATS = 2.0
"""By so much the decoder prefers a token that is shown: seven times as likely as the next one. Measured with the demo
model on concatenated recordings: without this, 5 of 63 segments took something back; with it, none did, and 72
instead of 80 % of the text was shown before the end."""


class RollbackStream:
    """Hypotheses of one segment in, text to show out.

    decode: ids to text, without a character whose last bytes are missing. unfixed_chunks: nothing is stable in so many
    first steps. unfixed_tokens: so many last tokens of a hypothesis are rolled back.

    stable: what was shown as stable.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        unfixed_chunks: int = UNFIXED_CHUNKS,
        unfixed_tokens: int = UNFIXED_TOKENS,
    ) -> None:
        self._decode = decode
        self._unfixed_chunks, self._unfixed_tokens = unfixed_chunks, unfixed_tokens
        self._previous: Sequence[int] = ()  # what the last hypothesis was sure of
        self._steps = 0
        self.stable = ""

    def step(self, ids: Sequence[int], margins: Sequence[float], frozen: bool = False) -> tuple[str, str]:
        """What a new hypothesis adds to the stable text, and the unfixed text after that.

        ids: of its text. margins: by how many nats each of them was the likeliest. A hypothesis that contradicts the
        stable text adds nothing; its unfixed text is empty then. `frozen`: it may add nothing anyway, for it may lose
        its end to the next segment.
        """
        sure = [token for token, _ in takewhile(lambda pair: pair[1] >= SURE_NATS, zip(ids, margins, strict=True))]
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._previous, sure, strict=False)))
        self._previous = sure
        self._steps += 1
        text = self._decode(ids).strip()
        if not text.startswith(self.stable):
            return "", ""
        delta = ""
        if self._steps > self._unfixed_chunks and not frozen:
            fixed = self._decode(ids[: max(0, min(agreed, len(ids) - self._unfixed_tokens))]).lstrip()
            if text.startswith(fixed):  # it may be blanks at the end that differ
                delta = fixed[len(self.stable) : words_end(text, len(fixed))]
        self.stable += delta
        return delta, text[len(self.stable) :]
