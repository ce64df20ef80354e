"""Benchmarks run as written from the root and print a ratio."""

import re

import pytest
import torch

from benchmarks import models
from model.layers import ConvNorm
from tests.conftest import run_command


def test_models_benchmark_prints_a_ratio_and_its_spread():
    result = run_command("benchmarks/models.py", "-m", "repnext_m0", "--batch-size", "2", "--input-size", "64", "--rounds", "2")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"repnext_m0 +\d+ ms +\d+ ms +\d\.\d\d  \(\d\.\d\d to \d\.\d\d\)", result.stdout.splitlines()[-1])


def test_models_benchmark_refuses_to_compare_different_results(monkeypatch):
    monkeypatch.setitem(models.PLAIN_METHODS, ConvNorm, ("forward", lambda self, x: 2 * self[1](self[0](x))))
    with pytest.raises(AssertionError, match="not close"):
        models.compare("recnext_m0", batch_size=2, input_size=64, num_rounds=1, memory_format=torch.contiguous_format)
