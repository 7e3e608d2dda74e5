"""The server with _scripted_model for a model process."""

import sys

from wyoming_qwen_asr.__main__ import main
from wyoming_qwen_asr.engine.engine import Engine

if __name__ == "__main__":
    Engine.module = "benchmarks._scripted_model"
    sys.exit(main())
