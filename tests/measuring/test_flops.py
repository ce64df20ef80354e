"""Counted parameters and MACs against the published figures."""

import pytest
import torch
from torch import nn

import flops
from measuring import operations
from tests.conftest import run_forked


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
    result = run_forked("flops.py", "-m", "recnext_m0")
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


def test_feature_maps_and_segmenters_are_counted_at_images_that_are_not_square():
    """Convolutions grow with the image's area: 128 x 192 has one and a half times that of 128 x 128. Heads are not counted."""
    square, wide = (flops.measure_named("features_recnext_m0", size) for size in (128, (128, 192)))
    assert square[:2] == wide[:2] and square[1] < operations.measure("recnext_m0", None)[1]
    assert wide[2] == 1.5 * square[2]
    _, fpn_params, fpn_macs = flops.measure_named("fpn_recnext_m0", (128, 192))
    laterals = sum(chs * 256 + 256 for chs in (40, 80, 160, 320))
    outputs = 4 * (256 * 256 * 9 + 256)
    head = 3 * 128 * 128 * 9 + 4 * 256 * 128 * 9 + 7 * 256 + 128 * 150 + 150  # 1, 1, 2 and 3 convolutions, each with its norm
    assert fpn_params == square[1] + laterals + outputs + head
    assert fpn_macs > wide[2]


def test_sizes_and_prefixed_names_on_the_command_line(capsys):
    assert flops.main(["-m", "features_recnext_m0", "--input-size", "64x96"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "features_recnext_m0"
    assert flops.main(["-m", "fpn_recnext_m9"]) == 1
    assert "recnext_m9 is no model" in capsys.readouterr().err
    for size in ("64x", "0", "1x2x3", "-4"):
        with pytest.raises(SystemExit):
            flops.main(["-m", "recnext_m0", f"--input-size={size}"])
    assert "give a side, as 512, or height and width, as 800x1333" in capsys.readouterr().err
