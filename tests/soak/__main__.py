"""`python -m tests.soak [--ci] [--seed N] [SCENARIO...]`; exit code 1 when something broke."""

import argparse
import asyncio
import io
import random
import sys
import time
import traceback
from contextlib import redirect_stdout

from .call import call
from .evict import evict
from .hostile_http import hostile_http
from .hostile_wyoming import hostile_wyoming
from .kills import kills
from .long_audio import long_audio
from .service import left_running
from .stop import stop
from .streams import streams
from .tally import CI, FULL, Scenario, Size, Tally
from .vanish import vanish

SCENARIOS: dict[str, Scenario] = {
    "kills": kills,
    "wyoming": hostile_wyoming,
    "streams": streams,
    "http": hostile_http,
    "long": long_audio,
    "call": call,
    "vanish": vanish,
    "evict": evict,
    "stop": stop,
}


async def scenario(name: str, size: Size, seed: str) -> Tally:
    """Run one of them and print its line."""
    tally = Tally()
    began = time.monotonic()
    line = "broken off"
    try:
        with redirect_stdout(io.StringIO()):  # servers print their logs for pytest
            async with asyncio.timeout(size.round_seconds):
                line = await SCENARIOS[name](size, random.Random(seed), tally)
    except Exception:
        tally.failures.insert(0, traceback.format_exc()[-6000:])
    mark = "✗" if tally.failures else "✓"
    print(f"{mark} {name:8} {line} ({time.monotonic() - began:.0f} s)", flush=True)
    for failure in tally.failures:
        print(f"    {failure}".replace("\n", "\n      "), flush=True)
    if tally.suppressed:
        print(f"    … and {tally.suppressed} more failures")
    return tally


async def main() -> int:
    parser = argparse.ArgumentParser(prog="script/soak", description=__doc__)
    parser.add_argument("--ci", action="store_true", help="a few minutes; without it, hours")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; all if none")
    args = parser.parse_args()
    if unknown := set(args.scenarios) - SCENARIOS.keys():
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    size = CI if args.ci else FULL
    print(f"soak, {'reduced' if args.ci else 'full'}, --seed {args.seed}", flush=True)
    total = Tally()
    for round_ in range(size.rounds):
        for name in args.scenarios or SCENARIOS:
            total.add(await scenario(name, size, f"{args.seed} {round_} {name}"))
    for process in left_running():
        total.failures.append(f"left running: {process}")
        print(total.failures[-1])
        process.kill()
    print(total)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
