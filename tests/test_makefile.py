"""The Makefile explains itself."""

import os
import re
import subprocess

from tests.conftest import ROOT


def test_bare_make_lists_every_target_with_a_line():
    of_its_own = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }  # not part of the make that runs the tests
    listed, helped = (
        subprocess.run(["make", *targets], cwd=ROOT, capture_output=True, text=True, check=True, env=of_its_own).stdout for targets in ([], ["help"])
    )
    assert listed == helped
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert re.findall(r"^make ([\w-]+) +\S.+$", listed, re.M) == targets and len(listed.splitlines()) == len(targets)
