"""The README says what is: its settings and its map are compared with the code."""

import re

import msgspec

from gateway.settings import Settings
from tests.support.serving import ROOT

README = (ROOT / "README.md").read_text()


def test_every_setting_that_the_readme_names_exists() -> None:
    """All of them are described by `gateway settings`."""
    named = set(re.findall(r"`GATEWAY_([A-Z_]+)`", README))
    assert named - {field.name.upper() for field in msgspec.structs.fields(Settings)} == set()


def test_every_file_of_the_map_exists() -> None:
    named = re.findall(r"`((?:gateway|persistence|tests)/[\w/.]*)`", README)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_field_of_a_session_hash_is_explained() -> None:
    prelude = (ROOT / "persistence/lua/prelude.lua").read_text()
    lists = re.findall(r"local (?:HEADER|STATE) = \{(.*?)\}", prelude, re.DOTALL)
    fields = set(re.findall(r"'(\w+)'", " ".join(lists)))
    assert len(fields) > 25
    assert fields - set(re.findall(r"`(\w+)`", README)) == set()
