"""The server with _scripted_model for a model process."""

import os
import sys
from pathlib import Path

from wyoming_qwen_asr.__main__ import main
from wyoming_qwen_asr.engine.engine import Engine

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # model processes do not look into their directory
    Engine.module = "benchmarks._scripted_model"
    sys.exit(main())
