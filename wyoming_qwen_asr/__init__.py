"""Qwen3-ASR behind the Wyoming protocol, with an OpenAI-compatible API on the same model."""

__version__ = "0.1.0"
