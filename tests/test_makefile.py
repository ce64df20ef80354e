"""The Makefile explains itself."""

import re
import subprocess

from tests.conftest import ROOT


def test_bare_make_lists_every_target_with_a_line():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed == subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert re.findall(r"^make (\w+) +\S.+$", listed, re.M) == targets and len(listed.splitlines()) == len(targets)
