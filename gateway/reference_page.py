"""The page at `/docs`."""

from typing import Any

STYLE = ""
SCRIPT = ""


def reference_page(document: dict[str, Any]) -> str:
    return "<!doctype html>"
