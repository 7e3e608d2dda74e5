"""When a greedy decoder runs in circles, and what to keep of it. Plain lists of token ids, no torch."""

from collections.abc import Sequence

_TOKENS = 32  # a loop is at least so long: digits, number words and "very, very, very" live
_REPEATS = 6  # and goes round so often: a chorus lives


def loop_period(ids: Sequence[int]) -> int:
    """The smallest period, in tokens, with which the end of `ids` repeats itself for too long; 0 if it does not.

    Too long is at least 6 repeats and 32 tokens: one token 32 times, two tokens 16 times, a sentence of ten 6 times.
    Cheap enough to be asked for every token.
    """
    for period in range(1, len(ids) // _REPEATS + 1):
        repeats = max(_REPEATS, -(-_TOKENS // period))
        if ids[-1 - period] == ids[-1] and _run(ids, period) >= (repeats - 1) * period:
            return period
    return 0


def cut_loop(ids: Sequence[int], period: int) -> list[int]:
    """`ids` with one occurrence left of what repeats itself at the end with this period."""
    return list(ids[: len(ids) - _run(ids, period)])


def _run(ids: Sequence[int], period: int) -> int:
    """How many tokens at the end equal the token one period before them."""
    run = 0
    while run + period < len(ids) and ids[-1 - run] == ids[-1 - run - period]:
        run += 1
    return run
