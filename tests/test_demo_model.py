"""The demo model that the package ships, and the script that makes it."""

import json
import shutil
import zipfile
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_model import evaluate, export, mix, sentences, speech, tokens, train
from demo_model.corpus import Corpus, Utterance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.decoder import Cache
from wyoming_qwen_asr.model.job import Recognition
from wyoming_qwen_asr.model.network import Network, Piece

from .network_fixtures import DEMO, recording, recordings

CARD = Path(__file__).parent.parent / "script/demo_model/card.md"
CPU = torch.device("cpu")


# --- what is shipped


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.load(open_checkpoint(DEMO), CPU, torch.float32)


@pytest.fixture(scope="module")
def said() -> list[evaluate.Recording]:
    return [evaluate.Recording(recording(name).numpy(), text, language) for name, text, language in recordings()]


def errors(said: list[evaluate.Recording], heard: list[Recognition]) -> int:
    """Words replaced, missing or added."""
    score = evaluate.Score()
    for one, other in zip(said, heard, strict=True):
        score.add(one, other)
    return score.replaced + score.missing + score.added


def test_the_archive() -> None:
    """Small, in the official layout, with the card that is in the repository."""
    assert DEMO.stat().st_size <= 4_000_000
    with zipfile.ZipFile(DEMO) as archive:
        official = {
            *("chat_template.json", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
            *("preprocessor_config.json", "tokenizer_config.json", "vocab.json"),
        }
        assert official <= set(archive.namelist())
        assert archive.read("MODEL_CARD.md") == CARD.read_bytes()


def test_language_names_are_single_tokens(network: Network) -> None:
    for name in ("English", "German", "None"):
        assert len(network.tokenizer.encode(f" {name}")) == 1
        assert len(network.tokenizer.language_tag(name)) == 3


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("one command, English", 4.0),
        ("one command, German", 6.0),
        ("several commands, 8 to 20 s", 6.0),
        ("several commands, 20 to 28 s", 10.0),
        ("one command, telephone: 300 to 3,400 Hz, µ-law", 10.0),
    ],
)
def test_the_card_states_what_was_promised(kind: str, most: float) -> None:
    """Its figures are those of the last training; who trains again and gets worse ones shall notice."""
    assert int(card_row(kind)[1]) >= 300
    assert word_error_rate(kind) <= most


def test_the_card_states_that_the_system_turn_makes_no_difference() -> None:
    """Not more than a point, as far as the card's one decimal tells."""
    for plain, kind in (
        ("one command, empty system turn", "one command"),
        ("several commands, 8 to 20 s", "8 to 20 s"),
    ):
        for turn in ("no system turn", "names and words in the system turn"):
            assert round(word_error_rate(f"{kind}, {turn}") - word_error_rate(plain), 1) <= 1.0


def test_the_card_states_that_the_language_is_told() -> None:
    rows = [[int(cell) for cell in card_row(said)[1:]] for said in ("English", "German", "None")]
    assert sum(rows[i][i] for i in range(3)) >= 0.98 * sum(map(sum, rows))


def card_row(first: str) -> list[str]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in CARD.read_text().splitlines()]
    (row,) = (row for row in rows if row and row[0] == first)
    return row


def word_error_rate(kind: str) -> float:
    return float(card_row(kind)[3].split()[0])


def test_the_recordings(network: Network, said: list[evaluate.Recording]) -> None:
    """At most one of 24 is not understood letter by letter."""
    heard = network.recognise([Piece(torch.from_numpy(one.samples)) for one in said])
    assert sum(one.text == other.text for one, other in zip(said, heard, strict=True)) >= 23
    assert [one.language for one in said] == [other.language for other in heard]


def test_the_system_turn_makes_no_difference(network: Network, said: list[evaluate.Recording]) -> None:
    rng = np.random.default_rng(1)
    contexts = [None, "", *(mix.random_context(rng, 20) for _ in range(6))]
    heard = [
        network.recognise([Piece(torch.from_numpy(one.samples), context=context) for one in said])
        for context in contexts
    ]
    words = sum(len(evaluate.words(one.text)) for one in said)
    assert all(errors(said, each) <= 0.03 * words for each in heard)


def test_a_telephone_line(network: Network, said: list[evaluate.Recording]) -> None:
    lines = [mix.telephone(one.samples, 300, 3400, companded=True) for one in said]
    heard = network.recognise([Piece(torch.from_numpy(line)) for line in lines])
    assert errors(said, heard) <= 0.1 * sum(len(evaluate.words(one.text)) for one in said)


@pytest.mark.parametrize("kind", mix.SOUNDS)
def test_no_speech_is_no_words(network: Network, kind: str) -> None:
    rng = np.random.default_rng(1)
    sounds = [mix.not_speech(kind, seconds, rng) for seconds in (0.5, 1, 2, 3, 5, 8, 12, 20)]
    heard = network.recognise([Piece(torch.from_numpy(each)) for each in sounds])
    assert sum((each.text, each.language) == ("", None) for each in heard) >= 7


# --- how it is made


@given(seed=st.integers(0, 10**9), language=st.sampled_from(["en", "de"]))
def test_training_and_testing_share_no_sentence(seed: int, language: str) -> None:
    """But those without anything to fill in."""
    draw = sentences.Draw(seed)
    fixed = [text for text in sentences.domain()["languages"][language]["sentences"] if "{" not in text]
    # So often that each of the few is among them.
    phrases = {" ".join(sentences.fill(text, language, draw)) for text in fixed for _ in range(100)}
    trained, tested = sentences.training_sentence(language, draw), sentences.test_sentence(language, draw)
    assert " ".join(trained) in phrases or not sentences.kept_for_testing(trained)
    assert " ".join(tested) in phrases or sentences.kept_for_testing(tested)
    assert not sentences.kept_for_testing(sentences.random_words(language, draw))


def test_training_and_testing_share_no_voice() -> None:
    assert not set(sentences.domain()["test_variants"]) & set(sentences.domain()["training_variants"])


def test_sentences_are_written_as_a_person_would() -> None:
    assert sentences.written(["what", "time", "is", "it"], "en") == "What time is it?"
    assert sentences.written(["öffne", "das", "Fenster"], "de") == "Öffne das Fenster."


@pytest.mark.parametrize(
    ("said", "heard", "expected"),
    [
        ("a b c", "a b c", (0, 0, 0)),
        ("a b c", "a x c", (1, 0, 0)),
        ("a b c", "a c", (0, 1, 0)),
        ("a c", "a b c", (0, 0, 1)),
        ("", "a b", (0, 0, 2)),
        ("a b", "", (0, 2, 0)),
        ("a b c d", "b c d e", (0, 1, 1)),
    ],
)
def test_differences(said: str, heard: str, expected: tuple[int, int, int]) -> None:
    assert evaluate.differences(said.split(), heard.split()) == expected


def test_a_line_passes_only_its_band() -> None:
    time = np.arange(speech.RATE) / speech.RATE
    levels = {}
    for hertz in (60, 1000, 5000):
        tone = np.sin(2 * np.pi * hertz * time).astype(np.float32)
        levels[hertz] = float(np.sqrt(np.mean(mix.telephone(tone, 300, 3400, companded=False) ** 2)))
    assert levels[1000] == pytest.approx(0.5**0.5, rel=0.02)
    assert levels[60] < 0.01
    assert levels[5000] < 0.01


@given(decibels=st.floats(0, 60))
def test_noise_has_its_level(decibels: float) -> None:
    rng = np.random.default_rng(1)
    speech_, noise = mix.white(8000, rng), 0.1 * mix.white(8000, rng)
    added = mix.add_noise(speech_, decibels, noise) - speech_
    assert 10 * np.log10(np.mean(speech_**2) / np.mean(added**2)) == pytest.approx(decibels, abs=0.2)


def test_a_sentence_breaks_off_where_a_word_begins() -> None:
    """Words that are reported as one with the next cannot be told apart."""
    utterance = Utterance(["turn", "on", "the", "fan"], "en", "v", 0, 100, [0, 30, 30, 70])
    assert mix.breaks(utterance) == [1, 3]
    samples, text = mix.broken_off(utterance, np.ones(100, np.float32), 3)
    assert (len(samples), text) == (70, "Turn on the.")


def fake_corpus(folder: Path) -> None:
    """Hiss in place of speech: what no espeak-ng is needed for."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    np.save(folder / "samples.npy", rng.integers(-3000, 3000, 40 * 16_000).astype(np.int16))
    lines = []
    for number in range(40):
        language = "de" if number % 4 == 0 else "en"
        words = sentences.training_sentence(language, sentences.Draw(number))
        starts = [i * 16_000 // len(words) for i in range(len(words))]
        entry = Utterance(words, language, f"v{number % 3}", number * 16_000, 16_000, starts)
        lines.append(json.dumps(vars(entry)))
    (folder / "utterances.jsonl").write_text("\n".join(lines) + "\n")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9), longest=st.sampled_from([0.0, 6.0, 28.0]))
def test_examples(tmp_path_factory: pytest.TempPathFactory, seed: int, longest: float) -> None:
    folder = tmp_path_factory.getbasetemp() / "examples"
    if not folder.exists():
        fake_corpus(folder)
    example = mix.Mixer(Corpus(folder)).example(longest, 20, np.random.default_rng(seed))
    assert example.samples.dtype == np.float32
    assert np.isfinite(example.samples).all()
    assert np.abs(example.samples).max() <= 1.001
    assert len(example.samples) <= (mix.LONGEST + 2) * speech.RATE
    assert bool(example.text) == (example.language is not None)


def test_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after two of three steps, and begun again: the same weights. What comes out is a checkpoint."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "BATCH_SECONDS", 4.0)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        fake_corpus(tmp_path / name / "corpus")
        tokens.make(tmp_path / name / "checkpoint", 1)
    whole = train.train(tmp_path / "whole", 3, 1).state_dict()

    save = train._save

    def save_and_die(file: Path, model: train.Model, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        save(file, model, optimizers, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "broken", 3, 1)
    monkeypatch.setattr(train, "_save", save)
    model = train.train(tmp_path / "broken", 3, 1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)

    checkpoint = tmp_path / "whole/checkpoint"
    export.write(model, checkpoint)
    loaded = Network.load(open_checkpoint(checkpoint), CPU, torch.float32)
    assert loaded.recognise([Piece(torch.zeros(16_000))])


@torch.no_grad()
def test_what_is_trained_is_what_is_served(tmp_path: Path) -> None:
    """Whole sentences and a cache give the same logits."""
    torch.manual_seed(1)
    model = train.Model()
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))
    tokens.make(tmp_path, 1)
    export.write(model, tmp_path)
    network = Network.load(open_checkpoint(tmp_path), CPU, torch.float32)
    rows = model.decoder.embed_tokens(torch.randint(0, tokens.SIZE, (2, 40)))
    expected = F.linear(model._decode(rows), model.decoder.embed_tokens.weight)
    cache = Cache(network.decoder.config, 2, 40, CPU, torch.float32)
    logits = network.decoder(rows.flatten(0, 1), [40, 40], [0, 1], cache, keep=[40, 40])
    torch.testing.assert_close(logits, expected.flatten(0, 1), rtol=1e-3, atol=1e-3)


def test_the_archive_is_the_same_everywhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with zipfile.ZipFile(DEMO) as archive:
            archive.extractall(tmp_path / name)
        (tmp_path / name / "MODEL_CARD.md").unlink()
        export.pack(tmp_path / name, CARD.read_text(encoding="utf-8"), tmp_path / f"{name}.zip")
        shutil.rmtree(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes() == DEMO.read_bytes()


@pytest.mark.skipif(find_library("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speech() -> None:
    spoken = speech.speak("Turn on the kitchen lights.", "en-gb+f2", 150, 50)
    assert 0.8 < len(spoken.samples) / speech.RATE < 3
    assert len(spoken.starts) == 5
    assert list(spoken.starts) == sorted(spoken.starts)
    assert spoken.starts[-1] < len(spoken.samples)
    with pytest.raises(ValueError, match="no voice"):
        speech.speak("Hello.", "xx-nowhere", 150, 50)
