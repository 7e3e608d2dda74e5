"""What the server says about itself: the answer to `describe`, and the facts in it.

Home Assistant uses the first program's installed models alone, and compares their languages with its own codes
letter by letter: plain codes (`en`, `zh`, `yue`), no regions, nothing like "auto".
"""

from wyoming.info import AsrModel, AsrProgram, Attribution, Info

from .. import __version__
from ..events import Located
from ..text import LANGUAGES, language_code

_QWEN = Attribution("Qwen team, Alibaba Cloud", "https://github.com/QwenLM/Qwen3-ASR")
_DEMO = Attribution("wyoming-qwen-asr", "https://github.com/QwenLM/Qwen3-ASR")


def languages(located: Located | None) -> list[str]:
    """Codes of what the model understands; all of Qwen3-ASR's until its checkpoint is found."""
    names = located.languages if located else LANGUAGES.values()
    return [code for code in map(language_code, names) if code]


def info(model: str, located: Located | None) -> Info:
    """The `info` event. `model` is the setting, for the time before the checkpoint is found."""
    name = located.name if located else model
    demo = name == "demo"
    return Info(
        asr=[
            AsrProgram(
                name="Qwen3-ASR",
                description="Speech-to-text with Qwen3-ASR",
                attribution=_QWEN,
                installed=True,
                version=__version__,
                supports_transcript_streaming=True,
                models=[
                    AsrModel(
                        name=name,
                        description="Tiny demo: some 200 words of home commands" if demo else f"Qwen3-ASR, {name}",
                        attribution=_DEMO if demo else _QWEN,
                        installed=True,
                        version=None,
                        languages=languages(located),
                    )
                ],
            )
        ]
    )
