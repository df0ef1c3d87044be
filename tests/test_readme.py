"""The README says what is: its settings and its map are compared with the code."""

import re

import msgspec

from gateway.settings import Settings
from persistence.model.fields import SESSION_FIELDS
from tests.support.serving import ROOT

README = (ROOT / "README.md").read_text()


def test_every_setting_is_in_the_readme_and_no_other() -> None:
    named = set(re.findall(r"`GATEWAY_([A-Z_]+)`", README))
    assert named == {field.name.upper() for field in msgspec.structs.fields(Settings)}


def test_every_file_of_the_map_exists() -> None:
    named = re.findall(r"`((?:gateway|persistence|tests)/[\w/.]*)`", README)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_field_of_a_session_hash_is_explained() -> None:
    fields = {"format", *(field.name for field in SESSION_FIELDS)}
    assert fields - set(re.findall(r"`(\w+)`", README)) == set()
