"""The shape of the network, as a checkpoint's config.json states it. No torch: a checkpoint is verified without."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

CHUNK_FRAMES = 100  # frames (10 ms) that the encoder convolves at once ...
CHUNK_TOKENS = 13  # ... and the rows that come out

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Config:
    """One section of config.json: numbers are positive, unknown keys are ignored."""

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> Self:
        """From the JSON object; missing or null keys take the default. Raises ValueError naming the first bad key."""
        values = {field.name: section[field.name] for field in fields(cls) if section.get(field.name) is not None}
        for field in fields(cls):
            value = values.setdefault(field.name, field.default)
            kinds = (int, float) if isinstance(field.default, float) else (type(field.default),)
            limit = 1000 if field.name.endswith("_layers") else 2**31  # a name is made for every layer
            if type(value) not in kinds or (type(value) in (int, float) and not 0 < value < limit):
                raise ValueError(f"{field.name} is {value!r}")
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Raises ValueError when no network of ours has these numbers."""


@dataclass(frozen=True)
class EncoderConfig(_Config):
    """`thinker_config.audio_config`; defaults are those of the official configuration class."""

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    downsample_hidden_size: int = 480
    n_window: int = 100
    n_window_infer: int = 400
    output_dim: int = 3584
    activation_function: str = "gelu"

    def check(self) -> None:
        if (self.num_mel_bins, 2 * self.n_window, self.activation_function) != (128, CHUNK_FRAMES, "gelu"):
            raise ValueError("its audio encoder is of another kind")
        if self.n_window_infer % CHUNK_FRAMES or self.d_model % (2 * self.encoder_attention_heads):
            raise ValueError("the sizes of its audio encoder do not fit together")

    def shapes(self) -> Shapes:
        """Names and shapes of the tensors behind `audio_tower.`."""
        width, channels, ffn = self.d_model, self.downsample_hidden_size, self.encoder_ffn_dim
        shapes: Shapes = {
            **_linear("conv2d1", channels, 1, 3, 3),
            **_linear("conv2d2", channels, channels, 3, 3),
            **_linear("conv2d3", channels, channels, 3, 3),
            "conv_out.weight": (width, channels * self.num_mel_bins // 8),
            **_linear("ln_post", width),
            **_linear("proj1", width, width),
            **_linear("proj2", self.output_dim, width),
        }
        for layer in range(self.encoder_layers):
            at = f"layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _linear(f"{at}self_attn.{name}", width, width)
            shapes |= _linear(f"{at}self_attn_layer_norm", width) | _linear(f"{at}final_layer_norm", width)
            shapes |= _linear(f"{at}fc1", ffn, width) | _linear(f"{at}fc2", width, ffn)
        return shapes


@dataclass(frozen=True)
class DecoderConfig(_Config):
    """`thinker_config.text_config`; defaults are those of the official configuration class."""

    vocab_size: int = 151_936
    hidden_size: int = 4096
    intermediate_size: int = 22_016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 128_000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"

    def check(self) -> None:
        if self.attention_bias or self.hidden_act != "silu":
            raise ValueError("its text decoder is of another kind")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("the sizes of its text decoder do not fit together")

    def shapes(self) -> Shapes:
        """Names and shapes of the tensors behind `model.`, and `lm_head.weight` when it is one of its own."""
        width, ffn, head = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab_size, width), "model.norm.weight": (width,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            for name, shape in {
                "input_layernorm": (width,),
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, queries),
                "self_attn.q_norm": (head,),
                "self_attn.k_norm": (head,),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (ffn, width),
                "mlp.up_proj": (ffn, width),
                "mlp.down_proj": (width, ffn),
            }.items():
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
        return shapes


def _linear(name: str, *weight: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
