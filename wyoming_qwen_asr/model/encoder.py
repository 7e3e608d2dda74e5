"""The audio encoder: log-mel features to rows that the decoder reads like tokens.

The audio tower of Qwen3-ASR (technical report 2026; `modeling_qwen3_asr.py` of qwen-asr 0.0.6). Each second of features
passes a small convolution on its own and becomes 13 rows; a pre-norm transformer then looks at windows of 8 seconds,
104 rows, and never across them. That is how the model was trained. The packaged implementation applies these windows
only under FlashAttention; here they are simply the batch dimension.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import CHUNK_FRAMES, CHUNK_TOKENS, EncoderConfig

# Chunks convolved at once. The first layer of the 0.6B model needs 6 MB (fp32) for each: a CPU is faster with few,
# which stay in its caches, a GPU with many.
_CONV_BATCH, _CONV_BATCH_CPU = 32, 4


def audio_tokens(frames: int) -> int:
    """How many rows the encoder gives for so many frames: 13 a second, 1 per 8 frames or part of them in the rest."""
    full, rest = divmod(frames, CHUNK_FRAMES)
    return CHUNK_TOKENS * full + -(-rest // 8)


def bounded(x: Tensor) -> Tensor:
    """x, kept inside the range of float16 if it is that: a sum that overflowed must not become NaN later."""
    return x.clamp(-64_000, 64_000) if x.dtype == torch.float16 else x


class Encoder(nn.Module):
    """State-dict names are those of the checkpoint behind `audio_tower.`."""

    positions: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, channels = config.d_model, config.downsample_hidden_size
        self.set_window(config.n_window_infer // CHUNK_FRAMES)
        self.check: Callable[[], None] = lambda: None  # asked before each layer; it may raise
        self.conv2d1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2d2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv2d3 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_out = nn.Linear(channels * config.num_mel_bins // 8, width, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj1 = nn.Linear(width, width)
        self.proj2 = nn.Linear(width, config.output_dim)
        # On the CPU even under torch.device("meta"): a table is computed, not loaded.
        self.register_buffer("positions", _sinusoids(CHUNK_TOKENS, width), persistent=False)

    def forward(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Features [128, F_i] of several clips to rows [audio_tokens(F_i), output_dim], in the weights' dtype.

        The clips do not influence each other. Every F_i must be at least 1.
        """
        lengths = [audio_tokens(mel.shape[1]) for mel in mels]
        windows = [w for clip in self._stem(mels, inner=False) for w in torch.split(clip, self.window_tokens)]
        return list(torch.split(torch.cat(self.attend(windows)), lengths))

    def set_window(self, seconds: int) -> None:
        """How far rows see each other. The model was trained with windows of 1 to 8 s (technical report)."""
        self.window_seconds, self.window_tokens = seconds, seconds * CHUNK_TOKENS

    def convolve(self, mel: Tensor, inner: bool) -> Tensor:
        """Features [128, F] of consecutive seconds of a clip, the last of which may be shorter, to rows
        [audio_tokens(F), width] that `attend` takes. `inner`: there are seconds before these."""
        (rows,) = self._stem([mel], inner)
        return rows

    def attend(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Windows [T_i of at most window_tokens, width] of convolved rows to rows [T_i, output_dim] of the decoder."""
        x = nn.utils.rnn.pad_sequence(list(windows), batch_first=True)  # [W, T, width]
        sizes = [w.shape[0] for w in windows]
        keys = None
        if min(sizes) < x.shape[1]:
            filled = torch.tensor(sizes, device=x.device)[:, None]
            keys = (torch.arange(x.shape[1], device=x.device) < filled)[:, None, None]  # [W, 1, 1, T]
        for layer in self.layers:
            self.check()
            x = layer(x, keys)
        rows = torch.cat([window[:size] for window, size in zip(x, sizes, strict=True)])
        rows = self.proj2(F.gelu(self.proj1(self.ln_post(rows))))
        return list(torch.split(rows, sizes))

    def _stem(self, mels: Sequence[Tensor], inner: bool) -> list[Tensor]:
        """Convolve each second of each clip on its own: rows [audio_tokens(F_i), width] with their positions."""
        # A rest behind full seconds is filled up with zeros, as in training; a clip of less than a second is not.
        batches: dict[int, list[Tensor]] = {}
        homes: list[list[tuple[int, int]]] = []
        for mel in mels:
            chunks = torch.split(mel.to(self.conv2d1.weight.dtype), CHUNK_FRAMES, dim=1)
            width = CHUNK_FRAMES if inner else chunks[0].shape[1]
            home = []
            for chunk in chunks:
                batch = batches.setdefault(width, [])
                home.append((width, len(batch)))
                batch.append(F.pad(chunk, (0, width - chunk.shape[1])))
            homes.append(home)
        size = _CONV_BATCH_CPU if mels[0].is_cpu else _CONV_BATCH
        # unbind: in training, each index into a tensor would cost a gradient of all of it.
        rows = {
            width: torch.cat([self._convolve(torch.stack(part)) for part in _slices(batch, size)]).unbind()
            for width, batch in batches.items()
        }
        return [
            torch.cat([rows[width][index] for width, index in home])[: audio_tokens(mel.shape[1])]
            for mel, home in zip(mels, homes, strict=True)
        ]

    def _convolve(self, chunks: Tensor) -> Tensor:
        """[B, 128, width of at most 100] to [B, rows of at most 13, d_model]."""
        x = F.gelu(self.conv2d1(chunks[:, None]))
        x = F.gelu(self.conv2d2(x))
        x = F.gelu(self.conv2d3(x))  # [B, channels, 16, rows]
        # contiguous: rows that are strided would be multiplied one chunk at a time, with a copy of the weight for each
        x = self.conv_out(x.permute(0, 3, 1, 2).flatten(2).contiguous())
        return bounded(x + self.positions[: x.shape[1]].to(x.dtype))


class Layer(nn.Module):
    """A pre-norm transformer layer over windows."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, config.encoder_attention_heads)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [W, T, width]; keys [W, 1, 1, T] is true where a window has a row, None when all are full."""
        x = bounded(x + self.self_attn(self.self_attn_layer_norm(x), keys))
        return bounded(x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))


class Attention(nn.Module):
    """Every row of a window sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [W, T, width] to the same shape. Rows that pad are computed and thrown away, but never looked at."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        out: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))
        return out


def _slices(items: list[Tensor], size: int) -> list[list[Tensor]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _sinusoids(length: int, channels: int) -> Tensor:
    """Positions [length, channels]: those of "Attention Is All You Need" in Whisper's order, sines, then cosines."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10_000) / (half - 1))
    angles = torch.arange(length, dtype=torch.float32, device="cpu")[:, None] * steps.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)
