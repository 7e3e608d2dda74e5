"""Weights in the order of the machine's arithmetic: the same results, and no weight twice."""

import gc
import platform
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from wyoming_qwen_asr.model import packed
from wyoming_qwen_asr.model.checkpoint import open_checkpoint
from wyoming_qwen_asr.model.int8 import quantise, weight_levels
from wyoming_qwen_asr.model.network import Network, Piece
from wyoming_qwen_asr.model.packed import PackedLinear

from .network_fixtures import DEMO, random_checkpoint, recording, recordings, unpack_demo

CPU = torch.device("cpu")

packs = pytest.mark.skipif(
    not packed._gains(torch.zeros(1, dtype=torch.bfloat16)), reason="this machine gains nothing by packing"
)


def load(path: Path = DEMO, dtype: torch.dtype = torch.bfloat16) -> Network:
    return Network.load(open_checkpoint(path), CPU, dtype)


def linears(network: Network, kind: type[nn.Module]) -> set[str]:
    both = nn.ModuleDict({"encoder": network.encoder, "decoder": network.decoder})
    return {name for name, module in both.named_modules() if isinstance(module, kind)}


@packs
@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 104, 160])
def test_the_same_results(rows: int) -> None:
    dice = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(768, 512, generator=dice).bfloat16(), torch.randn(768, generator=dice).bfloat16()
    x = torch.randn(rows, 512, generator=dice).bfloat16()
    for shape in ((rows, 512), (1, rows, 512)):
        for offset in (None, bias):
            want = nn.functional.linear(x.float(), weight.float(), None if offset is None else offset.float())
            got = PackedLinear(weight, offset)(x.view(shape))
            assert got.dtype == torch.bfloat16
            assert got.shape == (*shape[:-1], 768)
            # One rounding to 8 bits of what was summed in float32.
            assert (got.view(want.shape).float() - want).norm() < 2**-8 * want.norm()


@packs
def test_recordings_say_the_same() -> None:
    plain, network = load(), load()
    network.pack()
    pieces = [Piece(recording(name)) for name, _, _ in recordings()[:8]]
    texts = [each.text for each in network.recognise(pieces)]
    assert texts == [each.text for each in plain.recognise(pieces)]
    assert all(texts)


@packs
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("int8", [True, False])
def test_every_linear_layer_is_packed(tied: bool, int8: bool, tmp_path: Path) -> None:
    """But a head that is the embedding."""
    network = load(random_checkpoint(tmp_path / "random", unpack_demo(tmp_path / "demo"), tied))
    if int8:
        if not weight_levels():
            pytest.skip("PyTorch has no kernel for 8 bits on this machine")
        quantise(network.decoder)
    before = linears(network, nn.Linear)
    assert len(before) > 20
    stays = {"decoder.lm_head.original"} & before if tied else set()
    assert bool(stays) == (tied and int8)
    network.pack()
    assert linears(network, nn.Linear) == stays
    assert linears(network, PackedLinear) == before - stays
    assert network.recognise([Piece(recording(recordings()[0][0]))])[0].ids


@packs
def test_no_weight_stays_twice() -> None:
    network = load()
    gone = weakref.ref(network.decoder.get_submodule("layers.0.self_attn.q_proj").weight)
    network.pack()
    gc.collect()
    assert gone() is None


def test_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, and on other machines."""
    network = load(dtype=torch.float32)
    before = linears(network, nn.Linear)
    network.pack()
    assert linears(network, nn.Linear) == before
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    network = load()
    network.pack()
    assert linears(network, nn.Linear) == before
