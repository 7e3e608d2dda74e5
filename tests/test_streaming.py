"""Bit by bit or at once, the text is the same: caches, drafts and trims change nothing."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wyoming_qwen_asr.audio import SAMPLE_RATE
from wyoming_qwen_asr.model import network as network_module
from wyoming_qwen_asr.model.batch import Batch
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.features import RANGE, LogMel, log_mel, scaled
from wyoming_qwen_asr.model.job import Job
from wyoming_qwen_asr.model.network import Abandoned, Network, Piece
from wyoming_qwen_asr.model.vad import Detector, new_detector

from .conftest import DEMO, Recording, load_recordings
from .network_fixtures import random_checkpoint, sound, unpack_demo
from .reference import Streamed, floats, offline, streamed

CPU = torch.device("cpu")
CHUNK = 3200
"""Bytes of 100 ms."""

RECORDINGS = load_recordings()
BY_LANGUAGE = {code: [each for each in RECORDINGS if each.language == code] for code in ("en", "de")}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The demo model is too small for two threads to be worth waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.load(open_checkpoint(DEMO), CPU, torch.float32)


def talk(seconds: float, seed: int, language: str = "en") -> bytes:
    """The recordings of a language in any order, with pauses between them."""
    dice = Random(seed)
    order: list[Recording] = []
    pcm = b""
    while len(pcm) < 32_000 * seconds:
        order = order or dice.sample(BY_LANGUAGE[language], len(BY_LANGUAGE[language]))
        pcm += order.pop().pcm + bytes(2 * dice.choice([3200, 4800, 8000, 12_800, 19_200]))
    return pcm


def loud() -> Detector:
    """A detector that costs nothing. The real one has its turn with every recording, and in the soak."""
    return lambda frame: float(np.abs(frame).max() > 0.01)


# --- features ---


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=12), st.data())
def test_features_of_a_recording_that_grows(sizes: list[int], data: st.DataObject) -> None:
    """However it is fed, and wherever it is taken to end: those of the recording at once."""
    samples = sound(sum(sizes) / 16_000)
    growing = LogMel(CPU)
    ends = list(accumulate(sizes))
    for begin, end in zip([0, *ends], ends, strict=False):
        growing.feed(samples[begin:end])
        taken = data.draw(st.integers(1, end))
        log, final = growing.frames(taken)
        known = samples[:taken] if taken >= 8000 else torch.cat([samples[:taken], torch.zeros(8000 - taken)])
        assert log.shape[1] == len(known) // 160
        torch.testing.assert_close(scaled(log, float(log.max()) - RANGE), log_mel(known), atol=1e-5, rtol=0)
        later, _ = growing.frames(end)
        torch.testing.assert_close(log[:, :final], later[:, :final], atol=1e-5, rtol=0)
        assert final >= log.shape[1] - 2 or taken < 8000


# --- steps of the network ---


def step(network: Network, batch: Batch, job: Job, samples: Tensor, end: int, exact: bool, **hint: str) -> None:
    network.hear(job, samples, end, exact=exact, **hint)  # type: ignore[arg-type]
    while job.encoding:
        network.encode(job)
    while not job.decoding:
        batch.prefill(job)
    while not job.resting:
        batch.decode([job])


@pytest.fixture(scope="module", params=["demo", "random"])
def any_network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, network: Network) -> Network:
    """The demo model, and one whose answers hang on every row: any small fault changes them."""
    if request.param == "demo":
        return network
    folder: Path = tmp_path_factory.mktemp("random")
    return Network.load(
        open_checkpoint(random_checkpoint(folder / "r", unpack_demo(folder / "demo"))), CPU, torch.float32
    )


@pytest.mark.parametrize("swell", [1.0, 0.03, 0.0001, 30.0])
@pytest.mark.parametrize("window", [8, 3])
def test_the_last_step_is_exact(
    any_network: Network, swell: float, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the loudest moment comes late, or very early."""
    monkeypatch.setattr(network_module, "budget", lambda _: 40)
    any_network.encoder.set_window(window)
    try:
        for seed in range(2):
            dice = Random(seed)
            whole = torch.tensor(floats(talk(13, seed))) * torch.logspace(np.log10(swell), 0, 1).new_ones(1)
            loudness = (
                torch.linspace(swell, 1.0, len(whole)) if swell <= 1 else torch.linspace(1.0, 1 / swell, len(whole))
            )
            whole = whole * loudness
            (plain,) = any_network.recognise([Piece(whole)])
            batch, job, at = Batch(any_network), any_network.open(""), 0
            while at < len(whole):
                end = min(len(whole), at + dice.randrange(8000, 40_000))
                step(any_network, batch, job, whole[at:end], end, exact=end == len(whole))
                at = end
            assert job.result == plain
            drafted, accepted, windows, rows = job.counts
            assert 0 < accepted <= drafted
            if swell == 0.0001:
                assert windows > 0
                assert rows > 0
    finally:
        any_network.encoder.set_window(8)


def test_a_step_may_end_before_the_last_one(any_network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut gives the end of what was heard to the next segment."""
    monkeypatch.setattr(network_module, "budget", lambda _: 40)
    whole = torch.tensor(floats(talk(20, 4)))
    for cut in (4000, 100_000, 128_000, 128_040, 200_000, 256_100):
        batch, job = Batch(any_network), any_network.open("")
        step(any_network, batch, job, whole[:150_000], 150_000, exact=False)
        step(any_network, batch, job, whole[150_000:], len(whole), exact=False)
        step(any_network, batch, job, whole[:0], cut, exact=True)
        assert job.result == any_network.recognise([Piece(whole[:cut])])[0]


def test_only_what_is_new_is_computed(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    convolved: list[int] = []
    attended: list[int] = []
    read: list[int] = []
    convolve, attend, forward = network.encoder.convolve, network.encoder.attend, network.decoder.forward

    def counting_convolve(mel: Tensor, inner: bool) -> Tensor:
        convolved.append(mel.shape[1])
        return convolve(mel, inner)

    def counting_attend(windows: Sequence[Tensor]) -> list[Tensor]:
        attended.extend(len(window) for window in windows)
        return attend(windows)

    def counting_forward(rows: Tensor, *more: object, **options: object) -> Tensor:
        read.append(len(rows))
        return forward(rows, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(network.encoder, "convolve", counting_convolve)
    monkeypatch.setattr(network.encoder, "attend", counting_attend)
    monkeypatch.setattr(network.decoder, "forward", counting_forward)
    whole = torch.tensor(floats(talk(28, 1)))[: 28 * 16_000]
    batch, job = Batch(network), network.open("")
    dear = 0
    for end in range(16_000, len(whole) + 1, 16_000):
        for counts in (convolved, attended, read):
            counts.clear()
        step(network, batch, job, whole[end - 16_000 : end], end, exact=False)
        new = sum(convolved) <= 200  # this second, and the last one, whose end was provisional
        new &= sum(attended) <= 104 + 13  # a window, and the beginning of the next one
        new &= sum(read) <= 104 + 104 + 60 + len(job.result.ids)  # the window, the suffix, the draft, and what is new
        dear += not new
    assert dear <= 3, "the first loud moments make more stale"


def test_a_louder_moment_is_caught_up_with_before_the_end(network: Network) -> None:
    """The floor of the features rises by 0.16 decades: the next step that finds it unchanged computes anew what lies
    below it, so the last one need not."""
    whole = torch.tensor(floats(talk(14, 1)))[: 14 * SAMPLE_RATE]
    whole *= 0.5 / whole.abs().max()
    whole[:SAMPLE_RATE] = 0.0  # below any floor
    tone = torch.sin(torch.arange(1600) * 0.3)  # the loudest moments of all
    whole[2 * SAMPLE_RATE : 2 * SAMPLE_RATE + 1600] = 0.8 * tone
    whole[9 * SAMPLE_RATE : 9 * SAMPLE_RATE + 1600] = 0.96 * tone
    batch, job = Batch(network), network.open("")
    anew = []
    for second in range(1, 15):
        end = second * SAMPLE_RATE
        step(network, batch, job, whole[end - SAMPLE_RATE : end], end, exact=second == 14)
        anew.append(job.windows)
    assert anew == [0] * 10 + [1] * 4


@pytest.mark.parametrize("language", [None, "English", "German"])
@pytest.mark.parametrize("hint", ["prefer", "force", "ignore"])
def test_hints(network: Network, language: str | None, hint: str) -> None:
    """Also where the model says another language, and the draft stands behind a tag that is put in its place."""
    for number in (2, 0, 14):
        whole = torch.tensor(floats(RECORDINGS[number].pcm))
        piece = Piece(whole, "", language, hint)  # type: ignore[arg-type]
        batch, job = Batch(network), network.open("")
        for at in range(0, len(whole), 8000):
            end = min(len(whole), at + 8000)
            options = {"language": language, "hint": hint}
            step(network, batch, job, whole[at:end], end, exact=end == len(whole), **options)  # type: ignore[arg-type]
        assert job.result == network.recognise([piece])[0]


class Stop:
    """At the layer of this number."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Abandoned


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_a_forward_may_be_stopped_at_any_layer(network: Network, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing has happened then."""
    whole = torch.tensor(floats(talk(17, 2)))
    (plain,) = network.recognise([Piece(whole)])
    layers = {"encoder": len(network.encoder.layers), "decoder": len(network.decoder.layers)}[where]
    for number in range(layers):
        batch, job = Batch(network), network.open("")
        step(network, batch, job, whole[:100_000], 100_000, exact=False)
        network.hear(job, whole[100_000:], len(whole), exact=False)
        while where == "decoder" and job.encoding:
            network.encode(job)
        with monkeypatch.context() as patch:
            patch.setattr(network, "check", Stop(number))
            with pytest.raises(Abandoned):
                network.encode(job) if where == "encoder" else batch.prefill(job)
        job.abandon()
        step(network, batch, job, whole[:0], len(whole), exact=True)
        assert job.result == plain


def test_a_slot_that_is_lost_is_read_anew(network: Network) -> None:
    """More recordings than slots: whoever rests longest gives way."""
    said = [torch.tensor(floats(talk(18, seed))) for seed in range(4)]
    plain = network.recognise([Piece(whole) for whole in said])
    batch, jobs = Batch(network, 2), [network.open("") for _ in said]
    for at in range(0, max(map(len, said)), 48_000):
        for job, whole in zip(jobs, said, strict=True):
            if at < len(whole):
                end = min(len(whole), at + 48_000)
                step(network, batch, job, whole[at:end], end, exact=end == len(whole))
        assert len(batch.jobs) <= 2
        assert len(batch.cache.lengths) <= 2
    assert [job.result for job in jobs] == plain
    assert all(job.counts[3] > 0 for job in jobs)


# --- whole sessions ---


def check(
    network: Network,
    pcm: bytes,
    chunks: Sequence[int],
    detector: Callable[[], Detector] = loud,
    language: str | None = None,
) -> Streamed:
    """The session's texts are those of `offline()`."""
    expected = offline(network, floats(pcm), language, detector=detector)
    heard = streamed(network, pcm, cycle(chunks), detector=detector, language=language)
    assert heard.final
    assert (heard.final.text, heard.final.language) == (expected.text, expected.language)
    assert heard.ids == [segment.ids for segment in expected.segments]
    assert [segment.text for segment in heard.segments] == [segment.text for segment in expected.segments]
    assert heard.segments[-1].end == pytest.approx(len(pcm) / 32_000)
    return heard


def test_every_recording(network: Network) -> None:
    for recording in RECORDINGS:
        assert check(network, recording.pcm + bytes(22_400), [320], new_detector).retracted == 0


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize("seconds", [12, 20, 45])
def test_half_of_a_longer_text_is_there_before_its_end(network: Network, language: str, seconds: int) -> None:
    heard = check(network, talk(seconds, seconds, language), [CHUNK])
    assert heard.final
    assert heard.retracted == 0
    assert heard.early >= 0.5 * len(heard.final.text)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 50),
    st.sampled_from(["en", "de"]),
    st.floats(1, 40),
    st.lists(st.sampled_from([2, 318, 320, 3200, 3200, 16_000, 160_000]), min_size=1, max_size=9),
)
def test_any_chunks(network: Network, seed: int, language: str, seconds: float, chunks: list[int]) -> None:
    """From a sample to five seconds."""
    if max(chunks) < 320:
        chunks = [*chunks, 3200]  # a minute in single samples takes its time, and shows no more
    assert check(network, talk(seconds, seed, language), chunks).retracted == 0


@pytest.mark.parametrize("language", ["English", "German"])
def test_a_hint_over_several_segments(network: Network, language: str) -> None:
    """The wrong one makes nonsense, which is taken back now and then."""
    check(network, talk(34, 3), [CHUNK], language=language)


def test_silence_before_between_and_behind(network: Network) -> None:
    """Much of it: none is recognised, and nothing is lost around it."""
    pcm = bytes(32_000 * 23) + RECORDINGS[3].pcm + bytes(32_000 * 31) + RECORDINGS[5].pcm + bytes(32_000 * 12)
    heard = check(network, pcm, [CHUNK])
    assert heard.final
    assert heard.final.text == f"{RECORDINGS[3].text} {RECORDINGS[5].text}"


def test_all_of_the_text_is_stable_or_delivered_in_order(network: Network) -> None:
    heard = streamed(network, talk(60, 8), cycle([CHUNK]), detector=loud)
    assert len(heard.segments) >= 3
    for before, after in zip(heard.segments, heard.segments[1:], strict=False):
        assert before.end == after.start
    assert sum(segment.steps for segment in heard.segments) > 30
