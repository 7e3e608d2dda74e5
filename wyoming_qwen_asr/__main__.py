"""`wyoming-qwen-asr`: flags → Settings → Gateway.run() → exit code.

0 stopped as asked · 1 cannot serve (an address is taken) · 2 a setting is wrong · 3 the model cannot be used.
"""

import asyncio
import os
import sys

from setproctitle import setproctitle

from .errors import EXIT_CANNOT_LOAD, CheckpointError
from .logs import log_to_stderr
from .settings import SettingsError, load


def main() -> int:
    try:
        settings = load(sys.argv[1:], os.environ)
    except SettingsError as error:
        print(f"wyoming-qwen-asr: {error}", file=sys.stderr)
        return 2
    setproctitle("wyoming-qwen-asr")
    log_to_stderr(settings.log_level)
    from .gateway import CannotServe, Gateway

    try:
        asyncio.run(Gateway(settings).run())
    except CheckpointError as error:
        print(f"wyoming-qwen-asr: {error}", file=sys.stderr)
        return EXIT_CANNOT_LOAD
    except CannotServe as error:
        print(f"wyoming-qwen-asr: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
