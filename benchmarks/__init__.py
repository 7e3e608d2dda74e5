"""One module per question, each comparing two things in one run: `script/bench NAME`."""

from wyoming_qwen_asr.model.hardware import spin_briefly

spin_briefly()  # as in the model process, and before any of them imports torch
