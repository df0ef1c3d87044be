"""The README says what is: its settings and its map are compared with the code."""

import re

import msgspec

from gateway.settings import Settings
from persistence.model.fields import SESSION_FIELDS
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


def test_every_field_of_a_session_hash_that_is_named_exists_and_is_explained() -> None:
    """The list of fields explains each; the README's table says the same in fewer words."""
    assert all(field.meaning for field in SESSION_FIELDS)
    table = README.split("| field of a session | meaning |", 1)[1].split("\n\n", 1)[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))))
    assert len(named) > 25
    assert named <= {"format", "dead", *(field.name for field in SESSION_FIELDS)}
