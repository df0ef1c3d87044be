"""What `--quick` leaves out is named as it is called: a test that was renamed would be in it again, unnoticed."""

import re

from tests.support.selection import TESTS
from tests.support.serving import ROOT


def test_every_test_that_takes_long_exists() -> None:
    texts = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert set(TESTS) - set(re.findall(r"def (test_\w+)\(", texts)) == set()
