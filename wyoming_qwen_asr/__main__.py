"""`wyoming-qwen-asr`: flags → Settings → Gateway.run() → exit code.

0 stopped as asked · 1 cannot serve (an address is taken) · 2 a setting is wrong · 3 the model cannot be used.
"""

import asyncio
import errno
import logging
import os
import re
import sys

from .errors import EXIT_CANNOT_LOAD, CheckpointError
from .settings import Settings, SettingsError, load


def main() -> int:
    try:
        settings = load(sys.argv[1:], os.environ)
    except SettingsError as error:
        print(f"wyoming-qwen-asr: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    from .gateway import Gateway

    try:
        asyncio.run(Gateway(settings).run())
    except CheckpointError as error:
        print(f"wyoming-qwen-asr: {error}", file=sys.stderr)
        return EXIT_CANNOT_LOAD
    except OSError as error:
        print(f"wyoming-qwen-asr: cannot serve at {_places(settings)}: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _places(settings: Settings) -> str:
    return ", ".join([*settings.uri, *([f"http://{settings.http}"] if settings.http else [])])


def _reason(error: OSError) -> str:
    """What a user can do about it, where asyncio says "error while attempting to bind on address ('::1', 80)"."""
    text = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        port = re.search(r"', (\d+)", text)
        place = f"port {port[1]}" if port else "the address"
        return f"{place} is used by another program, perhaps by another wyoming-qwen-asr; stop that, or choose another"
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
