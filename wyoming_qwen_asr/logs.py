"""The log: lines on stderr, for stdout may carry events."""

import logging
import sys


def log_to_stderr(level: str) -> None:
    """The same form of lines for the gateway and its children, which share its stderr."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "urllib3", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.root.level))
