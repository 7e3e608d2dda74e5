"""The server with tests.fake_model for a model process, and less patience with it."""

import sys
from dataclasses import replace

from wyoming_qwen_asr.__main__ import main
from wyoming_qwen_asr.engine.engine import Engine
from wyoming_qwen_asr.engine.faults import Patience

PATIENCE = replace(Patience(), load=10.0, hang=1.5, dump=0.3, alone=5.0, trial=3.0)

if __name__ == "__main__":
    Engine.module = "tests.fake_model"
    Engine.patience = PATIENCE
    sys.exit(main())
