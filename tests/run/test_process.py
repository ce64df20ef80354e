"""What a run's processes do before anything else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FILL = "import torch; from run.process import prepare_memory; prepare_memory(torch.device({!r})); x = torch.ones(2**24); "


def huge_mib(device: str) -> float:
    """MiB of huge pages in a process that is prepared for `device` and holds 64 MiB of ones."""
    tell = "print(open('/proc/self/smaps_rollup').read())"
    text = subprocess.run([sys.executable, "-c", FILL.format(device) + tell], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"AnonHugePages: *(\d+) kB", text)[1]) / 2**10


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="huge pages are not given on request here")
def test_memory_of_a_run_on_a_cpu_is_in_huge_pages():
    assert huge_mib("cpu") > 16 and huge_mib("cuda") < 10  # of 64; fragmented memory has fewer


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's addresses")
def test_a_limit_on_addresses_leaves_it_in_small_ones():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
    code = limit + FILL.format("cpu") + "print(int(x.sum()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == [str(2**24)]
