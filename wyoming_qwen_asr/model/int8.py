"""The decoder's linear layers in 8 bits, on CPUs, for the few rows of a decode step.

Such a step reads every weight once, so it takes as long as its weights are large. A prompt's many rows are bound by
arithmetic, and their outliers count for more: they go through the original weights, which stay.

Weights have a scale per output channel, activations one per row, found when they come. Both are symmetric, products are
summed exactly, and a row's result depends on that row alone. Qwen3's activations have outliers; a scale for all rows
together would let one row's outlier erase the others.

The kernel is FBGEMM's, through PyTorch's operator for quantised networks. With 1 to 8 rows it takes half to two thirds
of the time of oneDNN's `qlinear_pointwise`, and half of `_int_mm`'s (PyTorch 2.13, AVX-512 VNNI, layers of the 0.6B).
PyTorch means to drop the tensors that weights are packed from; then `quantise` finds no kernel, and oneDNN's is next.
"""

import warnings

import torch
from torch import Tensor, nn

from .decoder import Decoder

MAX_ROWS = 16
"""Eight slots that decode a token each, or one that verifies a draft. Towards more, arithmetic begins to count, which
original weights do as fast where the CPU has bfloat16."""

ACTIVATION_LEVELS = 127
_ZERO = 128  # stands for 0 in the kernel's unsigned activations
_TINY = torch.finfo(torch.float32).tiny  # instead of a scale of 0
_CHUNK = 1024  # channels that are quantised at once, in float32: few enough for the CPU's cache


def quantise(decoder: Decoder) -> str:
    """Give all linear layers of a decoder on the CPU, and the embedding where it is the head, 8-bit weights next to
    those they have: a byte more for each. Returns what came of it, for the log: where PyTorch has no such kernel, as
    on Arm, the decoder stays what it was."""
    levels = weight_levels()
    if not levels:
        return "not int8: PyTorch has no kernel for it on this machine"
    if decoder.lm_head is None:  # first the largest, which takes twice its room for a moment
        table = decoder.embed_tokens.weight
        decoder.lm_head = nn.Linear(table.shape[1], table.shape[0], bias=False, device="meta")
        decoder.lm_head.weight = table
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child, levels))
    return f"int8 for up to {MAX_ROWS} rows"


def weight_levels() -> int:
    """The largest weight that the kernel can sum exactly: 127, or 63, or 0 where there is no kernel.

    On x86 CPUs without AVX-512 VNNI it adds pairs of products in 16 bits, which saturate (2 · 255 · 127 > 32767). Seven
    bits of weights are safe there; weights rather than activations, as these have the outliers. It is tried, for
    nothing tells which instructions the kernel takes.
    """
    for levels in (127, 63):
        weight = torch.full((32, 64), levels, dtype=torch.int8)
        try:
            sums = _multiply(torch.full((1, 64), float(ACTIVATION_LEVELS)), _pack(weight, torch.ones(32)))
        except (AttributeError, RuntimeError):
            return 0
        if bool((sums == 64 * ACTIVATION_LEVELS * levels).all()):
            return levels
    return 0


class Int8Linear(nn.Module):
    """A linear layer without bias, weight [out, in], in 8 bits for up to MAX_ROWS rows; more go through `original`."""

    def __init__(self, original: nn.Linear, levels: int) -> None:
        super().__init__()
        self.original = original
        parts = [quantised(part, levels) for part in torch.split(original.weight.detach(), _CHUNK)]
        values, scales = (torch.cat(column) for column in zip(*parts, strict=True))
        self._packed = _pack(values, scales[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """x [R, in] → [R, out], of its dtype. A row that is not finite stays so, alone."""
        if x.shape[0] > MAX_ROWS:
            many: Tensor = self.original(x)
            return many
        y = x.float()
        scale = row_scale(y, ACTIVATION_LEVELS)
        whole = (y / scale).round_()  # the kernel would, but it adds _ZERO first, and so rounds twice
        return (_multiply(whole, self._packed) * scale).to(x.dtype)


def row_scale(x: Tensor, levels: int) -> Tensor:
    """[R, 1]: what each row of x [R, n], float32, has to be divided by to lie within ± levels."""
    return x.abs().amax(-1, keepdim=True).clamp_min(_TINY) / levels


def quantised(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] → whole numbers [out, in] of type int8 within ± levels, and their scales [out, 1]."""
    weight = weight.float()
    scale = row_scale(weight, levels)
    return (weight / scale).round_().to(torch.int8), scale


def _pack(values: Tensor, scales: Tensor) -> torch.ScriptObject:
    """Weights in the kernel's order."""
    with warnings.catch_warnings():
        # Tensors that carry their scale are going to leave PyTorch, and this one lives for this line only.
        warnings.filterwarnings("ignore", ".*quantized tensor creation", UserWarning)
        weight = torch._make_per_channel_quantized_tensor(
            values, scales.double(), torch.zeros(len(scales), dtype=torch.long), 0
        )
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(weight, None)
    return packed


def _multiply(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    """x [R, in], whole numbers within ± 127 in float32, times packed weights: [R, out]."""
    # The operator for scales known beforehand, given 1: that for dynamic ones would take one for all rows.
    out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, _ZERO, packed)
    return out
