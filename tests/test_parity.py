"""The network against qwen-asr 0.0.6, the official package, on the same checkpoints in fp32."""

import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.decoder import Cache
from wyoming_qwen_asr.model.encoder import audio_tokens
from wyoming_qwen_asr.model.features import log_mel
from wyoming_qwen_asr.model.network import Network, Piece
from wyoming_qwen_asr.model.tokenizer import Tokenizer

from .network_fixtures import random_checkpoint, recording, recordings, sound, unpack_demo

# Less than a second, whole seconds, a rest, one window, several windows; also lengths that are no whole frames.
LENGTHS = (0.5, 0.73, 0.99, 1.0, 1.3, 3.7001, 8.0, 8.43, 17.2)

TEXTS = (
    "Turn on the kitchen light, please!",
    "Schließe die Rollläden um 18:30 Uhr – sofort.",
    "  two  blanks\n\nand\tmore \r\n lines   ",
    "it's we've I'LL 'Twas don’t",
    "打开厨房的灯。現在何時ですか?불을 켜 줘",
    "Включи свет на кухне؛ أطفئ الضوء वह बत्ती जलाओ",
    "ไฟในครัว Ελληνικά שלום àéîõü a\u0301 ﬁ",
    "👩‍👩‍👧‍👦🇩🇪 ☕️ 🤖x3.14% $5,000.00",
    "\u00a0\u2003\u200b\ufeff \x00\x7f",
    "",
    " ",
    "\n",
)


class Reference:
    """The official model and processor; everything it warns about while it works is its own affair."""

    def __init__(self, sdk: Any, path: Path) -> None:
        self.model = sdk.Qwen3ASRModel.from_pretrained(str(path), dtype=torch.float32)
        self.processor = self.model.processor
        self.thinker = self.model.model.thinker

    def inputs(self, samples: Tensor, context: str = "", language: str | None = None) -> Any:
        text = self.model._build_text_prompt(context=context, force_language=language)
        return self.processor(text=[text], audio=[samples.numpy()], return_tensors="pt", padding=True)

    def mel(self, samples: Tensor) -> Tensor:
        features = self.inputs(samples)
        mel: Tensor = features["input_features"][0, :, : int(features["feature_attention_mask"].sum())]
        return mel

    def encode(self, mel: Tensor) -> Tensor:
        rows: Tensor = self.thinker.audio_tower(mel, feature_lens=torch.tensor([mel.shape[1]])).last_hidden_state
        return rows

    @contextmanager
    def windows(self) -> Iterator[None]:
        """Hand every layer of the encoder the window mask that the package computes and then leaves out."""
        with pytest.MonkeyPatch.context() as patch:
            for layer in self.thinker.audio_tower.layers:
                patch.setattr(layer.self_attn, "forward", partial(self._masked, layer.self_attn.forward))
            yield

    def _masked(self, plain: Any, hidden_states: Tensor, cu_seqlens: Tensor, attention_mask: None) -> Any:
        mask = self.thinker.audio_tower._prepare_attention_mask(hidden_states, cu_seqlens)
        return plain(hidden_states=hidden_states, cu_seqlens=cu_seqlens, attention_mask=mask)

    def generate(self, inputs: Any, tokens: int, ends: list[int]) -> list[int]:
        out = self.model.model.generate(**inputs, max_new_tokens=tokens, eos_token_id=ends, do_sample=False)
        ids: list[int] = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return ids[:-1] if ids and ids[-1] in ends else ids


class Pair:
    """The same checkpoint in both implementations."""

    def __init__(self, sdk: Any, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        self.path = path
        self.tokenizer = checkpoint.tokenizer
        self.ours = Network.load(checkpoint, torch.device("cpu"), torch.float32)
        self.theirs = Reference(sdk, path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("parity")
    demo = unpack_demo(folder / "demo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import qwen_asr

        # One of its libraries, built with -ffast-math, makes this thread lose subnormal numbers for good.
        torch.set_flush_denormal(False)
        return {
            "demo": Pair(qwen_asr, demo),
            "tied": Pair(qwen_asr, random_checkpoint(folder / "tied", demo)),
            "untied": Pair(qwen_asr, random_checkpoint(folder / "untied", demo, tied=False)),
        }


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["demo", "tied", "untied"])
def pair(pairs: dict[str, Pair], request: pytest.FixtureRequest) -> Pair:
    return pairs[request.param]


@pytest.fixture
def demo(pairs: dict[str, Pair]) -> Pair:
    return pairs["demo"]


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def prefill(network: Network, samples: Tensor, keep: int | None = None) -> tuple[Tensor, Cache]:
    """Logits of the last `keep` rows of the prompt (default: of all), and the cache behind them."""
    sound = network.encoder([log_mel(samples)])[0]
    ids = torch.tensor(network.tokenizer.prompt(len(sound)))
    rows = network.decoder.embed_tokens(ids)
    rows[ids == network.tokenizer.audio_pad] = sound
    cache = Cache(network.decoder.config, 1, len(ids) + 100, network.device, network.dtype)
    return network.decoder(rows, [len(ids)], [0], cache, keep=[keep or len(ids)]), cache


@pytest.mark.parametrize("seconds", LENGTHS)
def test_mel(demo: Pair, seconds: float) -> None:
    samples = sound(seconds)
    mel = log_mel(samples)
    assert mel.shape == (128, len(samples) // 160)
    assert difference(mel, demo.theirs.mel(samples)) < 2e-5


def test_mel_of_silence(demo: Pair) -> None:
    assert difference(log_mel(torch.zeros(16_000)), demo.theirs.mel(torch.zeros(16_000))) < 1e-6


@pytest.mark.parametrize("seconds", [s for s in LENGTHS if s <= 8])
def test_encoder_within_one_window(pair: Pair, seconds: float) -> None:
    mel = log_mel(sound(seconds, seed=1))
    rows = pair.ours.encoder([mel])[0]
    assert len(rows) == audio_tokens(mel.shape[1])
    assert difference(rows, pair.theirs.encode(mel)) < 2e-5


@pytest.mark.parametrize("seconds", [8.43, 16.0, 17.2])
def test_encoder_over_several_windows(pair: Pair, seconds: float) -> None:
    mel = log_mel(sound(seconds, seed=2))
    rows = pair.ours.encoder([mel])[0]
    plain = pair.theirs.encode(mel)
    assert float((rows - plain).abs().max()) > 1e-3, "without its mask the reference is expected to differ"
    with pair.theirs.windows():
        assert difference(rows, pair.theirs.encode(mel)) < 2e-5


def test_encoder_clips_do_not_see_each_other(pair: Pair) -> None:
    mels = [log_mel(sound(seconds, seed=3)) for seconds in LENGTHS]
    together = pair.ours.encoder(mels)
    for mel, rows in zip(mels, together, strict=True):
        assert difference(rows, pair.ours.encoder([mel])[0]) < 1e-5


@pytest.mark.parametrize("language", [None, "English", "German", "Chinese"])
@pytest.mark.parametrize("context", ["", "kitchen, hallway", "\n Rollläden\n", "打开厨房的灯", " "])
def test_prompt(demo: Pair, context: str, language: str | None) -> None:
    samples = sound(1.3)
    expected = demo.theirs.inputs(samples, context, language)["input_ids"][0].tolist()
    assert demo.tokenizer.prompt(audio_tokens(len(samples) // 160), context, language) == expected


def without_json(path: Path, folder: Path) -> Tokenizer:
    """The tokenizer as the official repositories ship it: without tokenizer.json."""
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("tokenizer.json"))
    return open_checkpoint(folder).tokenizer


def some_texts() -> list[str]:
    dice = random.Random(5)
    planes = [(32, 127), (160, 1424), (0x600, 0xE80), (0x3040, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
    draw = [lambda: chr(dice.randint(*dice.choice(planes))), lambda: " \n\t'0s9"[dice.randrange(7)]]
    return ["".join(dice.choice(draw)() for _ in range(dice.randint(1, 40))) for _ in range(300)]


def test_tokenizer(demo: Pair, tmp_path: Path) -> None:
    assert (demo.path / "tokenizer.json").exists()
    plain = without_json(demo.path, tmp_path / "plain")
    for text in [*TEXTS, *some_texts()]:
        expected = demo.theirs.processor.tokenizer(text).input_ids
        for tokenizer in (demo.tokenizer, plain):
            assert tokenizer.encode(text) == expected, repr(text)
        theirs = demo.theirs.processor.tokenizer.decode(expected, clean_up_tokenization_spaces=False)
        assert plain.decode(expected) == demo.tokenizer.decode(expected) == theirs


@pytest.mark.parametrize("seconds", [s for s in LENGTHS if s <= 8])
def test_logits_of_the_prompt(pair: Pair, seconds: float) -> None:
    samples = sound(seconds, seed=4)
    logits, _ = prefill(pair.ours, samples)
    assert difference(logits, pair.theirs.thinker(**pair.theirs.inputs(samples)).logits[0]) < 5e-4


@pytest.mark.parametrize("seconds", [0.5, 3.7001, 8.0])
def test_generated_ids_of_random_weights(pairs: dict[str, Pair], seconds: float) -> None:
    for pair in (pairs["tied"], pairs["untied"]):
        samples = sound(seconds, seed=5)
        ends = sorted(pair.tokenizer.end_ids)
        expected = pair.theirs.generate(pair.theirs.inputs(samples), 40, ends)
        logits, cache = prefill(pair.ours, samples, keep=1)
        ids: list[int] = []
        while len(ids) < 40 and (token := int(logits.argmax())) not in ends:
            ids.append(token)
            row = pair.ours.decoder.embed_tokens(torch.tensor([token]))
            logits = pair.ours.decoder(row, [1], [0], cache)
        assert len(ids) > 5
        assert ids == expected


def test_recordings(demo: Pair) -> None:
    """Ids of real answers, one by one and all in one ragged batch; on most files the words are right, too."""
    files = recordings()[:12]
    ends = sorted(demo.tokenizer.end_ids)
    pieces = [Piece(recording(name)) for name, _, _ in files]
    together = demo.ours.recognise(pieces)
    right = 0
    for piece, batched, (_, text, _) in zip(pieces, together, files, strict=True):
        assert isinstance(piece.samples, Tensor)
        expected = demo.theirs.generate(demo.theirs.inputs(piece.samples), 100, ends)
        assert demo.ours.recognise([piece])[0] == batched
        assert list(batched.ids) == expected
        right += batched.text == text
    assert right >= 8


def test_forced_language(demo: Pair) -> None:
    samples = recording(recordings()[1][0])
    inputs = demo.theirs.inputs(samples, "", "German")
    expected = demo.theirs.generate(inputs, 100, sorted(demo.tokenizer.end_ids))
    tag = demo.tokenizer.language_tag("German")
    for hint in ("force", "prefer"):
        (result,) = demo.ours.recognise([Piece(samples, language="German", hint=hint)])
        assert list(result.ids) == tag + expected
        assert result.language == "German"


def test_long_recording_with_windows(demo: Pair) -> None:
    """Five commands in a row, over 8 s: the ids are those of the reference once it applies its mask."""
    names = [name for name, _, language in recordings() if language == "English"][:5]
    samples = torch.cat([recording(name) for name in names])
    assert len(samples) > 8 * 16_000
    with demo.theirs.windows():
        expected = demo.theirs.generate(demo.theirs.inputs(samples), 200, sorted(demo.tokenizer.end_ids))
    assert list(demo.ours.recognise([Piece(samples)])[0].ids) == expected
