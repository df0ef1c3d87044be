"""The README of the API says what is: its modules, codes, settings and calls are compared with the code."""

import re

import httpx
import msgspec

from gateway.api.docs.problem_responses import problem_codes
from gateway.settings import Settings
from tests.support.serving import ROOT

ROOM = ROOT / "gateway/api"
README = (ROOM / "README.md").read_text()


def test_the_map_names_every_module_and_no_other() -> None:
    table = README.partition("| module |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([\w/]+\.\w+)`", table))
    there = {str(path.relative_to(ROOM)) for suffix in ("py", "css", "js") for path in ROOM.rglob(f"*.{suffix}")}
    assert named == {path for path in there if not path.endswith("__init__.py")}


def test_its_codes_and_settings_exist() -> None:
    fields = {f"GATEWAY_{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
    assert set(re.findall(r"`(GATEWAY_\w+)`", README)) <= fields
    codes = set(re.findall(r"\b[45]\d\d\s+`(\w+)`", README))
    assert len(codes) >= 8
    assert codes <= problem_codes()


async def test_it_names_every_call_and_no_other(client: httpx.AsyncClient) -> None:
    table = README.partition("| call |")[2].partition("\n\n")[0]
    paths = (await client.get("/openapi.json")).json()["paths"]
    named = set(re.findall(r"[ `](/[\w/{}.]+)", table))
    assert named <= set(paths)
    assert {path for path in paths if not path.startswith("/widget/") and not path.endswith("/messages")} <= named
