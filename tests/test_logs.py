"""The tables of README.md and logs/README.md are what compare_logs.py makes of logs/."""

import json

import pytest

from tests.conftest import ROOT, run_command


@pytest.mark.parametrize("name", ["README.md", "logs/README.md"])
def test_tables_are_made_from_the_logs(name):
    done = run_command("compare_logs.py", "logs", "--format", "markdown")
    assert done.returncode == 0, done.stderr
    text = (ROOT / name).read_text()
    start, end = "<!-- runs: python compare_logs.py logs --format markdown -->\n", "<!-- end of runs -->"
    assert text[text.index(start) + len(start) : text.index(end)].strip() == done.stdout.strip()


def test_every_log_is_described_and_complete():
    described = (ROOT / "logs" / "README.md").read_text()
    for path in (ROOT / "logs").glob("*.txt"):
        assert f"`{path.name}`" in described
        epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        assert epochs == list(range(len(epochs)))
