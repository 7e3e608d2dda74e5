"""The text decoder: Qwen3 over a cache of slots.

Architecture: Qwen3 technical report (2025), as qwen-asr 0.0.6 uses it: grouped-query attention with RMSNorm on every
query and key head, rotary positions, SwiGLU, no biases. Its three "mrope" position rows are equal for audio and
text, which makes them ordinary rotary positions.

Rows of several slots are computed *packed*, one behind the other without padding; only attention sees a padded batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import DecoderConfig
from .encoder import bounded

MAX_CACHE_ROWS = 8 * 1280
"""Of a cache that several sequences share, over all slots: 8 pieces of 28 s that write as much as they may. 1.1 GiB for
either size of Qwen3-ASR, in 16 bits."""

_ROW_STEP = 256  # rows are added in such steps: growing copies everything


class Cache:
    """Keys and values of several independent sequences, each in a slot of at most `rows` rows.

    `lengths[slot]` is how many rows of the slot count: those behind are never seen and written over.
    """

    def __init__(self, config: DecoderConfig, slots: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        # Zeros, not empty: a masked row has weight 0, and 0 times a stray NaN is NaN.
        shape = (config.num_hidden_layers, slots, rows, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = rows
        self.lengths = [0] * slots

    @staticmethod
    def size(slots: int, rows: int) -> tuple[int, int]:
        """How many slots and rows `fit` makes for so many."""
        return 1 << (slots - 1).bit_length(), -(-rows // _ROW_STEP) * _ROW_STEP

    def fit(self, slots: int, rows: int) -> None:
        """Have at least so many slots, 1 or more, of at least so many rows. Sequences in the first `slots` slots, of
        at most `rows` rows each, stay; room beyond that may be given up. Nothing has changed when memory runs out."""
        if slots <= len(self.lengths) and rows <= self.rows:
            return
        slots, rows = self.size(slots, rows)
        most = max(slots, len(self.lengths)), max(rows, self.rows)
        if most[0] * most[1] <= MAX_CACHE_ROWS:
            slots, rows = most
        used, filled = min(slots, len(self.lengths)), min(rows, self.rows)
        layers, _, _, heads, width = self.keys.shape
        grown = []
        for store in (self.keys, self.values):
            new = store.new_zeros(layers, slots, rows, heads, width)
            new[:, :used, :filled] = store[:, :used, :filled]
            grown.append(new)
        self.keys, self.values = grown
        self.rows = rows
        self.lengths = self.lengths[:used] + [0] * (slots - used)

    def clear(self, slot: int) -> None:
        """Empty a slot for another sequence, which must not meet a NaN of this one."""
        for store in (self.keys, self.values):
            store[:, slot] = 0
        self.lengths[slot] = 0

    def crop(self, slot: int, length: int) -> None:
        """Forget the rows of a slot from `length` on. Raises ValueError if it has fewer."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"slot {slot} has {self.lengths[slot]} rows, it cannot be cropped to {length}")
        self.lengths[slot] = length

    def move(self, source: int, target: int) -> None:
        """Put a slot's rows in the place of another's; the source is empty then."""
        for store in (self.keys, self.values):
            store[:, target] = store[:, source]
        self.lengths[target] = self.lengths[source]
        self.clear(source)


@dataclass(frozen=True)
class _Plan:
    """Where the packed rows of one forward go: worked out once, used by every layer."""

    places: Tensor  # [R] row of the cache, counted over all slots
    slots: slice | Tensor  # the slots that are read
    end: int  # rows of each slot that are read
    packing: Tensor | None  # [R] places in the padded batch of queries [B * Q]; None when nothing is padded
    batch: int
    queries: int  # the most rows of any slot
    mask: Tensor | None  # [B, 1, groups * Q, end], true where a query may look; None when it may everywhere
    cos: Tensor  # [R, 1, head_dim]
    sin: Tensor


class Decoder(nn.Module):
    """State-dict names are those of the checkpoint behind `model.`, and `lm_head.weight` where it is not tied."""

    frequencies: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # from_pretrained: the plain constructor draws random numbers, which on "meta" costs a second of imports.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(table)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Module | None = None  # the embedding is the head
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # On the CPU even under torch.device("meta"): a table is computed, not loaded.
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        self.register_buffer("frequencies", config.rope_theta**-steps, persistent=False)
        self.check: Callable[[], None] = lambda: None  # asked before each layer; it may raise

    def forward(
        self, rows: Tensor, counts: Sequence[int], slots: Sequence[int], cache: Cache, keep: Sequence[int] | None = None
    ) -> Tensor:
        """Append rows to slots and predict what follows.

        rows [R, hidden]: embedded ids (`embed_tokens`) or encoder rows, counts[i] >= 1 of them for slots[i], packed in
        that order; a slot may appear once. keep[i]: for how many of a slot's last rows logits are wanted (default 1,
        0 is allowed).
        Returns logits [sum of keep, vocab_size], in the weights' dtype, in the same order.

        Slots that lie side by side in ascending order are read in place; others are copied together in every layer.
        Raises ValueError when the rows do not fit into their slot, and what `check` raises; the cache is unchanged
        then.
        """
        plan = self._plan(counts, slots, cache, rows.device, rows.dtype)
        x = rows
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            self.check()
            x = layer(x, keys, values, plan)
        for slot, count in zip(slots, counts, strict=True):
            cache.lengths[slot] += count
        wanted: list[int] = []
        end = 0
        for count, kept in zip(counts, keep or [1] * len(counts), strict=True):
            end += count
            wanted += range(end - kept, end)
        if len(wanted) < x.shape[0]:
            x = x[torch.tensor(wanted, dtype=torch.long, device=x.device)]
        x = self.norm(x)
        return bounded(self.lm_head(x) if self.lm_head is not None else F.linear(x, self.embed_tokens.weight))

    def _plan(
        self, counts: Sequence[int], slots: Sequence[int], cache: Cache, device: torch.device, dtype: torch.dtype
    ) -> _Plan:
        starts = [cache.lengths[slot] for slot in slots]
        for slot, start, count in zip(slots, starts, counts, strict=True):
            if count < 1 or start + count > cache.rows:
                raise ValueError(f"slot {slot} holds {start} of {cache.rows} rows: {count} more do not fit")
        if len(set(slots)) < len(slots):
            raise ValueError("a slot appears twice")
        most, end = max(counts), max(start + count for start, count in zip(starts, counts, strict=True))
        spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        positions = torch.tensor([position for span in spans for position in span], device=device)
        offsets = [slot * cache.rows for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
        packing = mask = None
        if min(counts) < most:
            packed = [i * most + j for i, count in enumerate(counts) for j in range(count)]
            packing = torch.tensor(packed, device=device)
        if most > 1 or min(starts) + 1 < end:
            # A padded query looks like the real one at its place; it must see something, or softmax gives NaN.
            last = torch.tensor(starts, device=device)[:, None] + torch.arange(most, device=device)  # [B, Q]
            mask = torch.arange(end, device=device) <= last[..., None]  # [B, Q, end]
            groups = self.config.num_attention_heads // self.config.num_key_value_heads
            mask = mask.repeat(1, groups, 1)[:, None]
        angles = positions[:, None] * torch.cat([self.frequencies, self.frequencies])
        half = self.config.head_dim // 2
        sin = angles.sin()
        sin[:, :half].neg_()  # the sign of the rotation, see `_rotate`
        side_by_side = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        return _Plan(
            places=positions + torch.tensor(offsets, device=device),
            slots=slice(slots[0], slots[0] + len(slots)) if side_by_side else torch.tensor(slots, device=device),
            end=end,
            packing=packing,
            batch=len(slots),
            queries=most,
            mask=mask,
            cos=angles.cos().to(dtype)[:, None],
            sin=sin.to(dtype)[:, None],
        )


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, plan: _Plan) -> Tensor:
        x = bounded(x + self.self_attn(self.input_layernorm(x), keys, values, plan))
        return bounded(x + self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    """Causal attention; several query heads share a key and value head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, head
        self.q_proj = nn.Linear(width, self.heads * head, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(self.heads * head, width, bias=False)
        self.q_norm = RMSNorm(head, config.rms_norm_eps)
        self.k_norm = RMSNorm(head, config.rms_norm_eps)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, plan: _Plan) -> Tensor:
        """x [R, hidden]; keys and values [slots, rows, kv_heads, head_dim] of this layer are extended."""
        q = _rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))), plan)
        k = _rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))), plan)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        keys.flatten(0, 1).index_copy_(0, plan.places, k)
        values.flatten(0, 1).index_copy_(0, plan.places, v)
        if plan.packing is not None:
            q = q.new_zeros(plan.batch * plan.queries, *q.shape[1:]).index_copy_(0, plan.packing, q)
        # The query heads of a group stand behind one another as more queries of their key head: nothing is repeated.
        shape = (plan.batch, plan.queries, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        q = q.view(shape).permute(0, 2, 3, 1, 4)  # [B, kv_heads, groups, Q, head_dim]
        k, v = (store[plan.slots, : plan.end].transpose(1, 2) for store in (keys, values))
        y = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=plan.mask)
        y = y.view(q.shape).permute(0, 3, 1, 2, 4).reshape(plan.batch * plan.queries, -1)
        if plan.packing is not None:
            y = y[plan.packing]
        out: Tensor = self.o_proj(y)
        return out


class SwiGLU(nn.Module):
    """Shazeer 2020, "GLU variants improve transformer"."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(bounded(F.silu(self.gate_proj(x)) * self.up_proj(x)))
        return out


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def _rotate(x: Tensor, plan: _Plan) -> Tensor:
    """Rotary positions (Su et al. 2021) on x [R, heads, head_dim], whose halves hold the two parts of each pair."""
    return torch.addcmul(x * plan.cos, x.roll(x.shape[-1] // 2, -1), plan.sin)
