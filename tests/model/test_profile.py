"""Comparison of attention forms: the three published figures, as a script run from the root."""

import re

import pytest

from model import profile
from tests.conftest import run_forked

FLAGS = ["--seed", "42", "--resolution", "8,8", "--batch-size", "16", "--runs", "1"]


def similarity(text: str) -> float:
    return float(re.search(r"^linear against softmax: .*cosine similarity (\S+)", text, re.MULTILINE)[1])


@pytest.mark.parametrize(("kernel", "published"), [("softplus", 0.996633), ("elu", 0.995214), ("relu", 0.994809)])
def test_similarities_are_the_published_ones(kernel, published, capsys):
    profile.main([*FLAGS, "--kernel", kernel])
    text = capsys.readouterr().out
    assert abs(similarity(text) - published) < 5e-6
    assert re.search(r"^linear, values first against linear, scores first: .*cosine similarity 1\.000000  largest difference \S+e-0[67]", text, re.MULTILINE)
    assert len(re.findall(r"^(softmax|linear, \w+ first) +\d+\.\d+ ms", text, re.MULTILINE)) == 3


def test_script_runs_from_the_root_although_its_name_hides_a_standard_module():
    result = run_forked("model/profile.py", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert abs(similarity(result.stdout) - 0.996633) < 5e-6


def test_a_bad_resolution_is_explained(capsys):
    with pytest.raises(SystemExit):
        profile.main(["--resolution", "8x8"])
    assert "'8x8' is not of the form height,width" in capsys.readouterr().err
