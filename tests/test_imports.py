"""The gateway stays light: nothing heavy is imported by it, however it is started."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wyoming_qwen_asr

PACKAGE = Path(wyoming_qwen_asr.__file__).parent
HEAVY = {"torch", "numpy", "transformers", "av", "soundfile", "soxr", "tokenizers", "pysrt", "huggingface_hub"}
LAZY = {"aiohttp", "zeroconf", "yaml"}
"""Half of the gateway's memory; only who uses them pays."""


def imported(*modules: str) -> set[str]:
    """Top-level names in sys.modules once these modules are imported, in a process of their own."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_gateway_imports_nothing_heavy() -> None:
    found = imported("wyoming_qwen_asr.gateway", "wyoming_qwen_asr.http.server", "wyoming_qwen_asr.wyoming.discovery")
    assert {"wyoming", "aiohttp"} <= found
    assert not found & HEAVY


def test_what_is_not_used_is_not_imported() -> None:
    assert not imported("wyoming_qwen_asr.__main__", "wyoming_qwen_asr.gateway") & (HEAVY | LAZY)


def test_a_model_is_found_without_torch() -> None:
    """Downloading takes minutes: meanwhile no torch lies in memory."""
    assert "torch" not in imported("wyoming_qwen_asr.model.fetch", "wyoming_qwen_asr.model.checkpoint")


def imports(file: Path) -> set[str]:
    """Top-level names of all imports in a file, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_of_every_file(file: Path) -> None:
    """pysrt (GPL) belongs to the subtitle tool alone; what is heavy belongs to the processes that are children."""
    assert "pysrt" not in imports(file)
    if file.parent.name != "model" and file.name != "decode.py":
        assert not imports(file) & HEAVY
