"""What the benchmarks of the network share: the 0.6B's shape with random weights, and answers of a given length.

Random weights say nothing and would go on for ever. So what the decoder computes is thrown away, and the tokens that it
is taken to have found come from a script: a number of them per second of audio, of which a share of the draft is right.
"""

import json
import math
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from tests.conftest import DEMO
from tests.network_fixtures import DECODER, ENCODER
from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.model import network as network_module
from wyoming_qwen_asr.model.answer import Answer, Guess
from wyoming_qwen_asr.model.architecture import DecoderConfig, EncoderConfig

T = TypeVar("T")

ENCODER_06B = EncoderConfig(
    encoder_layers=18,
    encoder_attention_heads=14,
    encoder_ffn_dim=3584,
    d_model=896,
    output_dim=1024,
    n_window=50,
    n_window_infer=800,
)
DECODER_06B = DecoderConfig(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
    max_position_embeddings=65_536,
)
"""And the defaults, which are those of every size."""

COMPUTE = ThreadPoolExecutor(1)
"""The one thread that computes, on all sides, as in the model process: see hardware.spin_briefly."""

TOKENS_PER_SECOND = 4
REJECTED = 5
"""Tokens at the end of a draft that are always wrong: what the official streaming rolls back."""


def computed(call: Callable[..., T], *args: Any) -> T:
    """What the call returns, in that thread."""
    return COMPUTE.submit(call, *args).result()


@contextmanager
def checkpoint(tiny: bool = False) -> Iterator[Path]:
    """A directory in the official layout: that shape, random weights in bfloat16, the demo model's tokenizer."""
    encoder, decoder = (ENCODER, DECODER) if tiny else (ENCODER_06B, DECODER_06B)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(DEMO) as archive:
            archive.extractall(folder)
        config = json.loads((folder / "config.json").read_text())
        sections = config["thinker_config"]
        sections["audio_config"] = {"model_type": "qwen3_asr_audio_encoder", **asdict(encoder)}
        pairs = decoder.head_dim // 2
        rope = {"rope_type": "default", "mrope_interleaved": True, "interleaved": True}
        rope["mrope_section"] = [pairs - 2 * (pairs * 5 // 16), pairs * 5 // 16, pairs * 5 // 16]
        sections["text_config"] = {"model_type": "qwen3_asr_text", "rope_scaling": rope, **asdict(decoder)}
        (folder / "config.json").write_text(json.dumps(config))
        shapes = {f"audio_tower.{key}": shape for key, shape in encoder.shapes().items()} | decoder.shapes()
        dice = torch.Generator().manual_seed(1)

        def draw(key: str, shape: tuple[int, ...]) -> torch.Tensor:
            if len(shape) == 1:
                return torch.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype=torch.bfloat16)
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=dice)

        weights = {f"thinker.{key}": draw(key, shape) for key, shape in shapes.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        yield folder


class Scripted(Answer):
    """An answer whose text has TOKENS_PER_SECOND, and takes `acceptance` of the draft but for its last tokens."""

    acceptance = 1.0
    seconds = 0.0
    _salt = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Scripted._salt += 1
        tag = len(self._tag)
        right = int(self.acceptance * max(0, len(self._draft) - tag - REJECTED))
        length = max(right, round(TOKENS_PER_SECOND * self.seconds))
        fresh = random.Random(self._salt).choices(range(20, 520), k=length)
        kept = self._draft[tag : tag + right]
        # What is rejected must differ from the draft.
        wrong = [new + (old == new) for new, old in zip(fresh[right:], self._draft[tag + right :], strict=False)]
        self._script = [*self._tag, *kept, *wrong, *fresh[right + len(wrong) :], self._tokenizer.im_end]

    def verify(self, guesses: Sequence[Guess]) -> None:
        begin = len(self.ids)
        script = [(token, math.inf) for token in self._script[begin : begin + len(guesses)]]
        super().verify([*script, *guesses[len(script) :]])


@contextmanager
def scripted(acceptance: float) -> Iterator[None]:
    """The network's answers are Scripted; a tag has to be forced."""

    class Here(Scripted):
        pass

    Here.acceptance = acceptance

    def answer(tokenizer: Any, limit: int, *args: Any) -> Answer:
        Here.seconds = (limit - 32) / 25  # see network.budget
        return Here(tokenizer, limit, *args)

    names = vars(network_module)
    plain = names["Answer"]
    names["Answer"] = answer
    try:
        yield
    finally:
        names["Answer"] = plain


def tokens(seconds: float) -> int:
    return round(TOKENS_PER_SECOND * seconds)


def samples(seconds: float) -> int:
    return round(SAMPLE_RATE * seconds)
