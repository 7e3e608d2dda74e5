"""`wyoming-qwen-asr`: flags → Settings → Gateway.run() → exit code.

0 stopped as asked · 1 cannot serve (an address is taken) · 2 a setting is wrong · 3 the model cannot be used.
"""

import asyncio
import logging
import os
import sys

from .errors import CheckpointError
from .settings import SettingsError, load


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
        return 3
    except OSError as error:
        print(f"wyoming-qwen-asr: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
