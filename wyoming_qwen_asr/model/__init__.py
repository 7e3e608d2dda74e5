"""The model process. Nothing outside this package imports it: it is started as a process of its own."""

import logging
import sys


def log_to_stderr(level: str) -> None:
    """The gateway's form of log lines, on the stderr that both share."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "urllib3", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.root.level))
