"""The READMEs say what is: their links lead somewhere, their maps name every module, their settings exist."""

import re
from pathlib import Path

import msgspec
import pytest

from gateway.settings import Settings
from tests.support.serving import ROOT

READMES = sorted(
    path for folder in ("gateway", "persistence", "scripts", "tests") for path in (ROOT / folder).rglob("README.md")
)
ALL = [ROOT / "README.md", *READMES]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_readme_is_short_and_the_others_are_there() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    folders = (
        "gateway",
        "gateway/api",
        "gateway/widget",
        "persistence",
        "scripts/benchmarks",
        "tests/attacks",
        "tests/chaos",
    )
    assert {f"{folder}/README.md" for folder in folders} <= set(map(name_of, READMES))


@pytest.mark.parametrize("readme", ALL, ids=name_of)
def test_every_link_leads_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme.read_text())
    assert [link for link in links if "//" not in link and not (readme.parent / link).exists()] == []


@pytest.mark.parametrize("readme", ALL, ids=name_of)
def test_every_setting_that_is_named_exists(readme: Path) -> None:
    """All of them are described by `gateway settings`."""
    named = set(re.findall(r"`GATEWAY_([A-Z_]+)`", readme.read_text()))
    assert named - {field.name.upper() for field in msgspec.structs.fields(Settings)} == set()


def test_the_map_of_the_gateway_names_every_module() -> None:
    room = ROOT / "gateway"
    linked = {(room / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", (room / "README.md").read_text())}
    modules = {path for path in room.rglob("*.py") if path.name != "__init__.py" and path.parts[len(room.parts)] != "api"}
    assert {name_of(path) for path in modules - linked} == set()
