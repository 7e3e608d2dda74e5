"""README, CHANGELOG and Settings say the same."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

from wyoming_qwen_asr import __version__
from wyoming_qwen_asr.settings import Settings, shown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| `([^`]+)` \|", README, re.MULTILINE))
    assert rows == {setting.name.replace("_", "-"): shown(setting) for setting in fields(Settings)}


def test_flags_in_the_documents_exist() -> None:
    flags = {setting.name.replace("_", "-") for setting in fields(Settings)} | {"no-http", "config"}
    for document in (README, (ROOT / "docs/design.md").read_text()):
        named = set(re.findall(r"(?<!\S)`?--([a-z-]+)(?=[ `,=])", document)) - {"index-url"}
        assert named <= flags


def test_every_module_has_its_place_in_the_map() -> None:
    design = (ROOT / "docs/design.md").read_text()
    for path in (ROOT / "wyoming_qwen_asr").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in design, f"docs/design.md does not say what {path.name} is for"


def test_commands_in_the_documents_exist() -> None:
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for name in re.findall(r"script/[a-z_-]+(?:\.md|\.yaml)?", document):
            assert (ROOT / name).exists(), name


def test_this_version_is_in_the_changelog() -> None:
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_gateway_needs_six_packages_and_no_gpl() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]]
    assert names == ["wyoming", "aiohttp", "zeroconf", "pyyaml", "prometheus-client", "setproctitle"]
    with_pysrt = [extra for extra, needs in project["optional-dependencies"].items() if "pysrt" in " ".join(needs)]
    assert with_pysrt == ["subtitles"]
