"""Counted parameters and MACs against the published figures."""

import pytest
import torch
from torch import nn

import flops
from measuring import operations
from tests.conftest import run_command


@pytest.mark.parametrize("name", operations.PUBLISHED)
def test_counts_agree_with_the_published_ones(name):
    params, macs = operations.PUBLISHED[name]
    _, num_fused, num_macs = operations.measure(name, None)
    last_digit = 0.1 if "." in params else 1
    assert abs(num_fused / 1e6 - float(params)) <= last_digit
    assert abs(num_macs / 1e9 - float(macs)) <= max(0.1, 0.05 * float(macs))


def test_macs_of_one_convolution_by_hand():
    conv = nn.Conv2d(3, 8, 3, padding=1).to("meta")
    assert operations.count_macs(conv, (3, 10, 20)) == 10 * 20 * 8 * 3 * 9
    assert operations.count_parameters(conv) == 8 * 27 + 8


def test_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(*(x.flatten(2).transpose(1, 2).unsqueeze(1),) * 3)

    assert operations.count_macs(Attention(), (8, 4, 4)) == 2 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("value", "published", "tolerance", "expected"),
    [(5.151, "5.2", 0, True), (5.05, "5.2", 0, False), (34.64, "34", 0, True), (1.24, "1.3", 0.1, True), (1.15, "1.3", 0.1, False)],
)
def test_agreement_is_to_the_last_printed_digit(value, published, tolerance, expected):
    assert operations.agrees(value, published, tolerance=tolerance) == expected


def test_a_disagreement_is_marked(monkeypatch):
    monkeypatch.setitem(operations.PUBLISHED, "recnext_m0", ("2.9", "0.9"))
    assert "!" not in operations.format_row("recnext_a0", None)
    row = operations.format_row("recnext_m0", None)
    assert "2.9M!" in row
    assert row.endswith("0.9G!")


def test_command_runs_from_the_root():
    result = run_command("flops.py", "-m", "recnext_m0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == ["recnext_m0", "2,832,420", "2,497,280", "0.404", "2.5M", "0.4G"]


def test_all_means_every_model_of_ours():
    names = operations.choose_models("all")
    assert {*operations.PUBLISHED} < {*names}
    assert operations.choose_models("resnet50") == ["resnet50"]


def test_unknown_names_and_refused_sizes_are_explained(capsys):
    assert flops.main(["-m", "recnext_mm1"]) == 1
    assert "did you mean recnext_m1" in capsys.readouterr().err
    assert flops.main(["-m", "lsnet_t", "--input-size", "128"]) == 1
    assert "maps of 4x4, not 2x2" in capsys.readouterr().err


def test_other_sizes_are_not_compared():
    assert operations.format_row("recnext_m0", 128).split() == ["recnext_m0", "2,832,420", "2,497,280", "0.132"]
