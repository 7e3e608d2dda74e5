"""What the benchmarks share: a server, percentiles, a table."""

import io
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, redirect_stdout

from tests.conftest import Server, serving


@asynccontextmanager
async def measured(*flags: str, module: str = "wyoming_qwen_asr") -> AsyncIterator[Server]:
    """The tests' server, without the log that it prints for them."""
    with redirect_stdout(io.StringIO()):
        async with serving(*flags, module=module) as server:
            yield server


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * percent // 100) - 1)]


median = statistics.median


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their heads, names to the left, numbers to the right."""
    lines = [list(heads), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *numbers]))


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
