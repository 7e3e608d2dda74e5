"""8 bits for decoding: against a plain way of the same arithmetic, against float32, and in the real server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from wyoming_qwen_asr.model import int8
from wyoming_qwen_asr.model.answer import AHEAD
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.decoder import Cache, Decoder
from wyoming_qwen_asr.model.features import log_mel
from wyoming_qwen_asr.model.int8 import MAX_ROWS, Int8Linear, quantise, weight_levels
from wyoming_qwen_asr.model.network import Network, Piece
from wyoming_qwen_asr.settings import Settings

from .conftest import Recording, StartServer, transcribe
from .network_fixtures import DEMO, random_checkpoint, recording, recordings, unpack_demo

CPU = torch.device("cpu")
ENGINE = torch.backends.quantized.engine
LEVELS = weight_levels()
BOTH = [127, 63] if LEVELS == 127 else [63]
"""Levels of weights that can be tried here: those of a CPU without VNNI also on one with it."""

needs_kernel = pytest.mark.skipif(not LEVELS, reason="PyTorch has no kernel for 8 bits on this machine")

# The relative errors (of the norm) that one layer of 1024 inputs and Gaussian weights may have, per row.
GAUSSIAN_ERROR = {127: 0.015, 63: 0.022}
OUTLIER_ERROR = 0.08
"""With a value 60 times as large as the others, for which half their size is one step then."""

LOGITS_ERROR, WORST_LOGITS_ERROR = 0.03, 0.15
"""Of the demo model, against float32, on average and at most; in bfloat16 they are 0.006 and 0.03."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from more, and on a busy machine these wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def reference(weight: Tensor, x: Tensor, levels: int) -> Tensor:
    """The same arithmetic the plain way: whole numbers, multiplied and summed as such."""

    def whole(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
        scale = rows.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
        return torch.round(rows.float() / scale).long(), scale.double()

    (w, w_scale), (a, a_scale) = whole(weight, levels), whole(x, 127)
    return (a @ w.T).double() * a_scale * w_scale.T


def error(got: Tensor, exact: Tensor) -> float:
    """The largest relative error of a row."""
    return float(((got.double() - exact.double()).norm(dim=1) / exact.double().norm(dim=1)).max())


# --- one layer ---


@needs_kernel
@pytest.mark.parametrize("levels", BOTH)
@pytest.mark.parametrize("shape", [(1024, 1024), (48, 3072), (1, 7), (130, 100), (5000, 16)])
def test_the_kernel_equals_the_plain_way(shape: tuple[int, int], levels: int) -> None:
    weight = gaussian(*shape) * torch.logspace(-3, 3, shape[0])[:, None]  # channels of very different sizes
    layer = Int8Linear(linear(weight), levels)
    for rows in range(1, MAX_ROWS + 1):
        x = gaussian(rows, shape[1], seed=rows) * torch.logspace(-4, 4, rows)[:, None]
        torch.testing.assert_close(layer(x).double(), reference(weight, x, levels), rtol=1e-6, atol=1e-30)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_goes_in_comes_out_in_the_same_dtype(dtype: torch.dtype) -> None:
    weight, x = gaussian(64, 128).to(dtype), gaussian(5, 128, seed=2).to(dtype)
    got = Int8Linear(linear(weight), 63)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), reference(weight, x, 63), rtol=torch.finfo(dtype).eps, atol=0)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=12, max_size=12), min_size=1, max_size=MAX_ROWS),
    seed=st.integers(0, 99),
)
def test_rounding_bounds_the_error_and_rows_are_on_their_own(rows: list[list[float]], seed: int) -> None:
    """Half a step of each factor is all that is lost; company changes nothing, to the last bit."""
    weight, x = gaussian(9, 12, seed=seed), torch.tensor(rows)
    layer = Int8Linear(linear(weight), LEVELS)
    got = layer(x)
    assert torch.equal(got, torch.cat([layer(row[None]) for row in x]))
    w, a = weight.double(), x.double()
    w_half, a_half = w.abs().amax(1) / LEVELS / 2, a.abs().amax(1) / 127 / 2
    lost = a_half[:, None] * w.abs().sum(1) + a.abs().sum(1)[:, None] * w_half
    lost += 12 * a_half[:, None] * w_half
    assert bool(((got.double() - a @ w.T).abs() <= lost * (1 + 1e-4) + 1e-30).all())


@needs_kernel
@pytest.mark.parametrize("levels", BOTH)
def test_error_against_float32(levels: int) -> None:
    weight, x = gaussian(2048, 1024), gaussian(MAX_ROWS, 1024, seed=2)
    assert error(Int8Linear(linear(weight), levels)(x), F.linear(x, weight)) < GAUSSIAN_ERROR[levels]


@needs_kernel
@pytest.mark.parametrize("levels", BOTH)
def test_an_outlier_costs_its_own_row_alone(levels: int) -> None:
    """With a scale for all rows, the quiet ones would have lost everything."""
    weight, x = gaussian(2048, 1024), gaussian(4, 1024, seed=2) * torch.tensor([1.0, 0.01, 1.0, 1.0])[:, None]
    layer = Int8Linear(linear(weight), levels)
    alone = layer(x)
    x[2, 77] = 60.0
    got = layer(x)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(got[others], alone[others])
    assert error(got[others], F.linear(x[others], weight)) < GAUSSIAN_ERROR[levels]
    assert error(got[2:3], F.linear(x[2:3], weight)) < OUTLIER_ERROR


@needs_kernel
def test_many_rows_take_the_original_weights() -> None:
    weight, x = gaussian(64, 128), gaussian(MAX_ROWS + 1, 128, seed=2)
    layer = Int8Linear(linear(weight), LEVELS)
    assert torch.equal(layer(x), F.linear(x, weight))
    assert not torch.equal(layer(x[:-1]), F.linear(x[:-1], weight))
    assert layer.original.weight.data_ptr() == weight.data_ptr(), "they are not kept twice"


@needs_kernel
def test_nothing_and_no_numbers() -> None:
    weight, x = gaussian(16, 32), gaussian(6, 32, seed=2)
    weight[3] = 0
    layer = Int8Linear(linear(weight), LEVELS)
    expected = layer(x)
    x[1], x[2, 5], x[4, 0] = 0, float("nan"), float("inf")
    got = layer(x)
    assert not got[1].any()
    assert not got[[0, 1, 3, 5], 3].any()
    assert not got[2].isfinite().any()
    assert not got[4].isfinite().any()
    assert torch.equal(got[[0, 3, 5]], expected[[0, 3, 5]])
    assert layer(x[:0]).shape == (0, 16)


def test_what_is_read_ahead_of_a_draft_fits() -> None:
    """Of one that was rejoined, behind the id before it."""
    assert AHEAD + 1 <= MAX_ROWS


# --- a decoder ---


def load(path: Path = DEMO, dtype: torch.dtype = torch.float32) -> Network:
    return Network.load(open_checkpoint(path), CPU, dtype)


@pytest.fixture(scope="module")
def plain() -> Network:
    return load()


@pytest.fixture(scope="module")
def network() -> Network:
    quantised = load()
    assert quantise(quantised.decoder) == f"int8 for up to {MAX_ROWS} rows"
    return quantised


@needs_kernel
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_and_the_head_are_quantised(tied: bool, tmp_path: Path) -> None:
    decoder = load(random_checkpoint(tmp_path / "random", unpack_demo(tmp_path / "demo"), tied)).decoder
    linears = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    embedding = decoder.embed_tokens.weight
    quantise(decoder)
    found = {name: module for name, module in decoder.named_modules() if isinstance(module, Int8Linear)}
    assert set(found) == {*linears, "lm_head"}
    assert len(found) == 7 * decoder.config.num_hidden_layers + 1
    originals = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    assert originals == {f"{name}.original" for name in found}
    assert decoder.embed_tokens.weight is embedding
    assert (found["lm_head"].original.weight.data_ptr() == embedding.data_ptr()) == tied


@torch.inference_mode()
def logits_of(network: Network, samples: Tensor, ids: list[int]) -> Tensor:
    """Of an answer that is given: the prompt at once, then the answer's ids in steps of a few rows."""
    (encoded,) = network.encoder([log_mel(samples)])
    prompt = network.tokenizer.prompt(1, "")
    place = prompt.index(network.tokenizer.audio_pad)
    rows = torch.cat([network.embed(prompt[:place]), encoded, network.embed(prompt[place + 1 :])])
    cache = Cache(network.decoder.config, 1, len(rows) + len(ids), CPU, network.dtype)
    found = [network.decoder(rows, [len(rows)], [0], cache)]
    for few in torch.split(network.embed(ids), 5):
        found.append(network.decoder(few, [len(few)], [0], cache, keep=[len(few)]))
    return torch.cat(found).float()


@pytest.fixture(scope="module")
def answers(plain: Network) -> list[tuple[Tensor, list[int], str]]:
    """All recordings, and what float32 writes."""
    pieces = [recording(name) for name, _, _ in recordings()]
    results = [plain.recognise([Piece(samples)])[0] for samples in pieces]
    return [(samples, list(each.ids), each.text) for samples, each in zip(pieces, results, strict=True)]


@needs_kernel
@pytest.mark.parametrize("levels", BOTH)
def test_logits_against_float32(
    plain: Network, answers: list[tuple[Tensor, list[int], str]], levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "weight_levels", lambda: levels)
    network = load()
    quantise(network.decoder)
    agreed: list[Tensor] = []
    errors: list[Tensor] = []
    for samples, ids, _ in answers:
        exact, got = logits_of(plain, samples, ids), logits_of(network, samples, ids)
        assert exact.argmax(1)[:-1].tolist() == ids
        agreed.append((exact.argmax(1) == got.argmax(1)).double())
        errors.append((got - exact).norm(dim=1) / exact.norm(dim=1))
    assert torch.cat(agreed).mean() >= 0.99
    assert torch.cat(errors).mean() < LOGITS_ERROR
    assert torch.cat(errors).max() < WORST_LOGITS_ERROR


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_those_of_float32(answers: list[tuple[Tensor, list[int], str]], dtype: torch.dtype) -> None:
    network = load(dtype=dtype)
    quantise(network.decoder)
    same = [network.recognise([Piece(samples)])[0].text == text for samples, _, text in answers]
    assert sum(same) >= len(same) - 1


@needs_kernel
def test_a_batch_equals_singles(network: Network, answers: list[tuple[Tensor, list[int], str]]) -> None:
    pieces = [Piece(samples) for samples, _, _ in answers[:8]]
    assert network.recognise(pieces) == [network.recognise([piece])[0] for piece in pieces]


@needs_kernel
def test_float16_stays_within_its_range(tmp_path: Path) -> None:
    """A head that overflows must not give logits that are infinite."""
    network = load(random_checkpoint(tmp_path / "random", unpack_demo(tmp_path / "demo")), torch.float16)
    network.decoder.embed_tokens.weight.mul_(10_000)
    decoder: Decoder = network.decoder
    quantise(decoder)
    rows = gaussian(3, decoder.config.hidden_size).half()
    logits = decoder(rows, [3], [0], Cache(decoder.config, 1, 8, CPU, torch.float16), keep=[3])
    assert logits.dtype == torch.float16
    assert float(logits.abs().max()) == 64_000


# --- where it is taken ---


@pytest.fixture
def engine() -> Iterator[None]:
    yield
    torch.backends.quantized.engine = ENGINE


def test_no_kernel_leaves_the_decoder_as_it_is(engine: None) -> None:
    """Arm's engine has no such operator, but is in PyTorch for x86 as well."""
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no QNNPACK")
    torch.backends.quantized.engine = "qnnpack"
    network = load()
    assert quantise(network.decoder).startswith("not int8: PyTorch has no kernel")
    assert not any(isinstance(module, Int8Linear) for module in network.decoder.modules())


@pytest.mark.parametrize(("most", "levels"), [(2**15 - 1, 63), (2**14, 0)])
def test_sums_that_saturate_are_noticed(most: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without VNNI, where the sums of two unsigned by signed bytes have 16 bits."""

    def saturating(x: Tensor, weight: Tensor) -> Tensor:
        pairs = (x.round()[:, None] + 128) * weight
        sums = (pairs[..., ::2] + pairs[..., 1::2]).clamp(-most, most).sum(-1)
        return torch.sub(sums, 128 * weight.sum(1))

    monkeypatch.setattr(int8, "_pack", lambda values, scales: values.float())
    monkeypatch.setattr(int8, "_multiply", saturating)
    assert weight_levels() == levels


def test_a_torch_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    assert weight_levels() == 0


def test_it_is_not_the_default() -> None:
    assert Settings().dtype == "auto"


@pytest.mark.parametrize(("flag", "says"), [("--dtype=int8", True), ("--dtype=auto", False)])
async def test_the_server_in_8_bits(flag: str, says: bool, start_server: StartServer, clear: list[Recording]) -> None:
    server = await start_server(flag)
    assert (await transcribe(server, clear[0].pcm)).text == clear[0].text
    assert ("int8" in server.log) == says, "auto never picks it"
