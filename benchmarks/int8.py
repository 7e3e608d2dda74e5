"""Is decoding faster in 8 bits? The 0.6B's decoder with random weights, against what `auto` picks on this CPU."""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tests.network_fixtures import DECODER
from wyoming_qwen_asr.model.architecture import DecoderConfig
from wyoming_qwen_asr.model.decoder import Cache, Decoder
from wyoming_qwen_asr.model.hardware import pick_dtype, pick_threads
from wyoming_qwen_asr.model.int8 import quantise
from wyoming_qwen_asr.model.packed import pack

from ._measure import median, table
from ._network import DECODER_06B

CPU = torch.device("cpu")
ROWS = (1, 5, 16)
"""A token of one speaker, its draft, and the most that 8 bits are for."""

CONTEXT = 100  # rows that are there before: some 6 s of audio and a few words


def build(config: DecoderConfig, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """Two decoders on the same weights: one to leave, one to quantise."""
    dice = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in config.shapes().items():
        empty = torch.empty(shape, dtype=dtype)
        weights[name.removeprefix("model.")] = (
            empty.fill_(1.0) if len(shape) == 1 else empty.normal_(0.0, 0.02, generator=dice)
        )
    decoders = []
    for _ in range(2):
        with torch.device("meta"):
            decoder = Decoder(config)
        decoder.load_state_dict(weights, assign=True)
        decoders.append(decoder.requires_grad_(False).eval())
    return decoders[0], decoders[1]


def step(decoder: Decoder, rows: Tensor) -> Callable[[], Tensor]:
    """A step of one slot with a context, to be repeated."""
    cache = Cache(decoder.config, 1, 256, CPU, rows.dtype)
    cache.lengths[0] = CONTEXT

    def run() -> Tensor:
        cache.crop(0, CONTEXT)
        logits: Tensor = decoder(rows, [len(rows)], [0], cache, keep=[len(rows)])
        return logits

    return run


def seconds(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench int8", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of each kind, the two sides in turns")
    parser.add_argument("--threads", type=int, default=0, help="0: what auto picks")
    parser.add_argument("--tiny", action="store_true", help="a network of no interest, to try this out")
    args = parser.parse_args()
    dtype, _ = pick_dtype("auto", CPU)
    threads, _ = pick_threads(args.threads)
    torch.set_num_threads(threads)
    plain, other = build(DECODER if args.tiny else DECODER_06B, dtype)
    began = time.perf_counter()
    print(f"{quantise(other)}; made in {time.perf_counter() - began:.1f} s")
    pack(plain)
    pack(other)
    name = str(dtype).removeprefix("torch.")
    lines = []
    for count in ROWS:
        rows = torch.randn(count, plain.config.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
        sides = step(plain, rows), step(other, rows)
        for side in sides:  # warms up
            side()
        taken = [[seconds(side) for side in sides] for _ in range(args.steps)]
        before, after = (1000 * median(column) for column in zip(*taken, strict=True))
        lines.append((f"{count} row{'s'[: count > 1]}", before, after, before / after))
    table((f"a step on {threads} threads, ms, p50", name, "int8", f"{name} ÷ int8"), lines)


if __name__ == "__main__":
    main()
