"""Scripts are linked with what they use of the library, and no more; what does not fit is refused before Redis runs it."""

import re
from importlib.resources import files

import pytest

from persistence.model.fields import HEADER, SESSION_FIELDS, STATE, Field, SessionFields
from persistence.model.kinds import TEXT
from persistence.model.session import Session
from persistence.redis.linking import LinkError, field_tables, free_names, link, link_scripts

LUA = files("persistence") / "lua"

SCRIPT = """#!lua
-- Doubles.
--
-- KEYS none
-- ARGV session_id, nonce, number (what is doubled, below
--      1000)
-- replies (session_id and nonce follow the word)
--   doubled  twice the number
return reply('doubled', double(args.number))
"""

LIBRARY = {
    "double": "-- Twice a number.\nlocal function double(number)\n  return twice * number\nend\n",
    "twice": "-- How often.\nlocal twice = 2\n",
    "reply": "-- A reply.\nlocal function reply(word, ...)\n  return {word, args.session_id, args.nonce, ...}\nend\n",
}


def test_a_script_gets_what_it_uses_behind_its_first_line_in_order() -> None:
    scripts = {"doubling": SCRIPT}
    linked = link(scripts, LIBRARY, {"HEADER": "local HEADER = {}\n"})["doubling"]
    assert linked.arguments == ("number",)
    assert linked.text.startswith("#!lua\n")
    assert linked.text.endswith(SCRIPT.split("\n", 1)[1])
    assert re.findall(r"^local (?:function )?(\w+)", linked.text, re.MULTILINE) == ["args", "twice", "double", "reply"]
    assert "local args = {session_id = ARGV[1], nonce = ARGV[2], number = ARGV[3]}\n" in linked.text


@pytest.mark.parametrize(
    ("script", "library", "what"),
    [
        (SCRIPT.replace("double(", "treble("), LIBRARY, "doubling.lua of doubling.lua uses treble, which nothing defines"),
        (SCRIPT, {**LIBRARY, "half": "local half = 1\n"}, "no script uses lib/half.lua"),
        (SCRIPT, {**LIBRARY, "double": "local function dubble() end\n"}, "lib/double.lua does not define double"),
        (SCRIPT, {**LIBRARY, "twice": "local twice = double(1)\n"}, "uses itself"),
        (SCRIPT, {**LIBRARY, "twice": "local twice = 1 + missing\n"}, "twice.lua of doubling.lua uses missing"),
        (SCRIPT.replace("number (", "number, other ("), LIBRARY, "other is not used and in its ARGV list"),
        (SCRIPT.replace("args.number", "args.numbre"), LIBRARY, "(number|numbre) is"),
        (SCRIPT.replace("number (", "number per turn ("), LIBRARY, "'number per turn' in its ARGV list is no name"),
        (SCRIPT.replace("session_id, nonce", "nonce, session_id", 1), LIBRARY, "begin with session_id and nonce"),
        (SCRIPT.replace("-- ARGV", "-- Arguments"), LIBRARY, "no ARGV list"),
    ],
)
def test_what_does_not_fit_is_refused(script: str, library: dict[str, str], what: str) -> None:
    with pytest.raises(LinkError, match=what):
        link({"doubling": script}, library, {})


def test_names_that_are_not_used_as_variables_are_not_linked() -> None:
    text = """
    -- load(key) in a comment
    local record, other = {load = 1, store = 'emit'}, "x"
    for name, value in pairs(record.damage) do record[name] = value end
    local function own(text) return text:header() .. tostring(record) end
    return own(other) == pick
    """
    assert free_names(text) == {"pick"}


def test_every_script_is_linked_with_all_that_it_uses_and_nothing_else() -> None:
    library = [file.name.removesuffix(".lua") for file in (LUA / "lib").iterdir()]
    for name, (text, _) in link_scripts().items():
        assert text.split("\n", 1)[0] in ("#!lua", "#!lua flags=allow-oom"), name
        own = (LUA / f"{name}.lua").read_text().split("\n", 1)[1]
        assert text.endswith(own), name
        assert free_names(text) == set(), name
        before = text.removesuffix(own)
        for part in [*library, *field_tables(SESSION_FIELDS)]:
            if re.search(rf"^local (function )?{part}\b", before, re.MULTILINE):
                assert len(re.findall(rf"\b{part}\b", re.sub("--.*", "", text))) > 1, f"{name} does not use {part}"


def test_every_library_file_has_a_header() -> None:
    for file in (LUA / "lib").iterdir():
        assert file.read_text().startswith("-- "), file.name


def test_a_default_of_any_text_is_a_string_of_lua() -> None:
    field = Field("mood", TEXT, "a test", default="it's \\ \n Grüße")
    table = field_tables(SessionFields(HEADER, (*STATE, field), Session))["DEFAULTS"]
    assert table == "local DEFAULTS = {lease_ms = '0', epoch = '0', mood = 'it\\039s \\092 \\010 Gr\\195\\188\\195\\159e'}\n"
