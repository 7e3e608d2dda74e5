"""Training: the project's own encoder, and its decoder's layers over whole sentences instead of a cache."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wyoming_qwen_asr.model.architecture import CHUNK_TOKENS, DecoderConfig, EncoderConfig
from wyoming_qwen_asr.model.decoder import Attention, Decoder
from wyoming_qwen_asr.model.encoder import Encoder, audio_tokens
from wyoming_qwen_asr.model.features import log_mel, pad_short
from wyoming_qwen_asr.model.tokenizer import Tokenizer

from . import tokens
from .corpus import Corpus
from .mix import Mixer, durations

ENCODER = EncoderConfig(
    encoder_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=384,
    d_model=128,
    downsample_hidden_size=24,
    n_window=50,
    n_window_infer=800,
    output_dim=128,
)
DECODER = DecoderConfig(
    vocab_size=tokens.SIZE,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
)

BATCH_SECONDS = 96.0
WARM_UP = 200
RATE_MATRICES, RATE_OTHERS, DECAY = 3e-3, 2e-3, 0.01
CTC = (0.5, 0.2)  # weight at the beginning and at the end
SAVE_EVERY, SHOW_EVERY = 500, 50  # steps
AHEAD = 6  # batches prepared in advance
# Seconds that the encoder looks at, in turn: the served windows of 8 s, shorter ones, and none at all, which is what
# the packaged implementation does on a CPU.
WINDOWS = (8, 4, 8, 8, 1000, 1, 8, 1000, 2, 8)


@dataclass(frozen=True)
class Batch:
    """mels [128, F_i]; ids of prompts, of whole answers and of their texts alone; scored: how many ids of an answer's
    end count in the loss."""

    mels: list[Tensor]
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[list[int]]
    scored: list[int]


class Model(nn.Module):
    """Encoder and decoder as they are served, and a CTC head that teaches the encoder and is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(ENCODER), Decoder(DECODER)
        self.ctc = nn.Linear(ENCODER.output_dim, tokens.SIZE)
        self.decoder.embed_tokens.weight.requires_grad_(True)
        nn.init.normal_(self.decoder.embed_tokens.weight, std=0.05)

    def forward(self, batch: Batch, ctc_weight: float) -> Tensor:
        """The loss, a scalar."""
        sounds = self.encoder(batch.mels)
        sequences = [p + a for p, a in zip(batch.prompts, batch.answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
        x = self.decoder.embed_tokens(ids)
        x[ids == tokens.ADDED["<|audio_pad|>"]] = torch.cat(sounds).to(x.dtype)
        # What predicts the scored ids: the row before each.
        rows: list[int] = []
        columns: list[int] = []
        for row, (sequence, scored) in enumerate(zip(sequences, batch.scored, strict=True)):
            rows += [row] * scored
            columns += range(len(sequence) - scored - 1, len(sequence) - 1)
        x = self._decode(x)[rows, columns]
        wanted = ids[rows, [column + 1 for column in columns]]
        loss = F.cross_entropy(F.linear(x, self.decoder.embed_tokens.weight).float(), wanted)
        if ctc_weight:
            loss = loss + ctc_weight * self._ctc(sounds, batch.texts)
        return loss

    def _decode(self, x: Tensor) -> Tensor:
        """Rows [B, T, hidden], padded behind, through the decoder's layers and final norm."""
        config = self.decoder.config
        angles = torch.arange(x.shape[1])[:, None] * torch.cat([self.decoder.frequencies] * 2)
        cos, sin = angles.cos(), angles.sin()
        sin[:, : config.head_dim // 2].neg_()

        later = torch.full((x.shape[1], x.shape[1]), -1e4, dtype=torch.bfloat16).triu(1)

        def rotate(y: Tensor) -> Tensor:
            return y * cos + y.roll(config.head_dim // 2, -1) * sin

        def attend(attention: Attention, y: Tensor) -> Tensor:
            q, k, v = (
                projection(y).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = rotate(attention.q_norm(q)), rotate(attention.k_norm(k))
            groups = config.num_attention_heads // config.num_key_value_heads
            k, v = (z.repeat_interleave(groups, 1) for z in (k, v))
            # Spelt out: on a CPU the fused kernel takes twice as long backwards.
            scores = (q * config.head_dim**-0.5) @ k.transpose(-1, -2) + later
            y = scores.softmax(-1).to(v.dtype) @ v
            out: Tensor = attention.o_proj(y.transpose(1, 2).flatten(2))
            return out

        layer: Any
        for layer in self.decoder.layers:
            x = x + attend(layer.self_attn, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out: Tensor = self.decoder.norm(x)
        return out

    def _ctc(self, sounds: Sequence[Tensor], texts: Sequence[list[int]]) -> Tensor:
        """Graves et al. 2006, over the same tokens; the blank is the audio placeholder, which no text holds."""
        lengths = [len(sound) for sound in sounds]
        ends = np.cumsum(lengths)
        places = [torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        rows = F.embedding(nn.utils.rnn.pad_sequence(places), torch.cat(list(sounds)))  # [T, B, hidden]
        scores = self.ctc(rows).float().log_softmax(-1)
        return F.ctc_loss(
            scores,
            torch.tensor([i for text in texts for i in text]),
            torch.tensor(lengths),
            torch.tensor([len(text) for text in texts]),
            blank=tokens.ADDED["<|audio_pad|>"],
            zero_infinity=True,
        )


# --- batches, in a process of their own

_mixer: Mixer
_tokenizer: Tokenizer


def _open(corpus: Path, checkpoint: Path) -> None:
    global _mixer, _tokenizer  # the state of the worker process
    torch.set_num_threads(1)
    _mixer, _tokenizer = Mixer(Corpus(corpus)), tokens.load(checkpoint)


def _batch(step: int, progress: float, seed: int, seconds: float) -> Batch:
    rng = np.random.default_rng([seed, step])
    longest = durations(progress, rng)
    batch = Batch([], [], [], [], [])
    for example in _mixer.batch(seconds, longest, rng):
        mel = log_mel(pad_short(torch.from_numpy(example.samples)))
        count = audio_tokens(mel.shape[1])
        prompt = _tokenizer.prompt(count, example.context)
        text = _tokenizer.encode(example.text)
        name = tokens.LANGUAGES[example.language] if example.language else "None"
        tag = _tokenizer.language_tag(name)
        scored = len(tag) + len(text) + 1
        if example.language is None and rng.random() < 0.3:
            # A language is forced, and still nobody speaks.
            tag, scored = _tokenizer.language_tag(str(rng.choice(list(tokens.LANGUAGES.values())))), 1
        batch.mels.append(_masked(mel, rng))
        batch.prompts.append(prompt)
        batch.answers.append([*tag, *text, _tokenizer.im_end])
        batch.texts.append(text)
        batch.scored.append(scored)
    return batch


def _masked(mel: Tensor, rng: np.random.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019) on half of the examples."""
    if rng.random() < 0.5:
        return mel
    mel = mel.clone()
    rest = mel.mean()
    for _ in range(2):
        low = int(rng.integers(0, 128))
        mel[low : low + int(rng.integers(0, 18))] = rest
    for at in range(0, mel.shape[1], 150):
        begin = at + int(rng.integers(0, 140))
        mel[:, begin : begin + int(rng.integers(0, 10))] = rest
    return mel


def _batches(pool: ProcessPoolExecutor, first: int, steps: int, seed: int) -> Iterator[Batch]:
    waiting: list[Future[Batch]] = []
    for step in range(first, steps):
        while len(waiting) < AHEAD and step + len(waiting) < steps:
            at = step + len(waiting)
            waiting.append(pool.submit(_batch, at, at / steps, seed, BATCH_SECONDS))
        yield waiting.pop(0).result()


# --- the loop


def _optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the rest: half the steps of AdamW alone."""
    layers = [*model.encoder.layers.parameters(), *model.decoder.layers.parameters()]
    matrices = [p for p in layers if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=RATE_MATRICES, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE_OTHERS, weight_decay=DECAY, betas=(0.9, 0.98)),
    ]


def train(folder: Path, steps: int, seed: int) -> Model:
    """Train with the corpus and tokenizer in `folder`, going on from the last state that was saved there."""
    torch.manual_seed(seed)
    model = Model()
    optimizers = _optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    state_file = folder / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    shown = time.monotonic()
    losses: list[float] = []
    with ProcessPoolExecutor(1, get_context("spawn"), _open, (folder / "corpus", folder / "checkpoint")) as pool:
        for step, batch in enumerate(_batches(pool, first, steps, seed), first):
            factor = min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            model.encoder.window_tokens = CHUNK_TOKENS * WINDOWS[step % len(WINDOWS)]
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = model(batch, CTC[0] + (CTC[1] - CTC[0]) * step / steps)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if (step + 1) % SHOW_EVERY == 0:
                each = (time.monotonic() - shown) / len(losses)
                print(
                    f"step {step + 1} of {steps}: loss {sum(losses) / len(losses):.4f}, {each:.2f} s each", flush=True
                )
                losses, shown = [], time.monotonic()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                _save(state_file, model, optimizers, step + 1)
    return model


def _save(file: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    state: dict[str, Any] = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    fresh = file.with_suffix(".new")
    torch.save(state, fresh)
    fresh.replace(file)
