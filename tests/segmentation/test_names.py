"""Published checkpoint names: what is loaded is the file's bits, what is written loads again."""

import re

import pytest
import torch

from run import checkpoint
from run.errors import InputError
from segmentation import names, networks

PAIRS = [  # (name here, name there)
    ("backbone.body.model.stem.stem.0.conv.weight", "backbone.stem.stem.0.conv.weight"),
    ("backbone.fpn.inner_blocks.3.0.bias", "neck.lateral_convs.3.conv.bias"),
    ("backbone.fpn.layer_blocks.0.0.weight", "neck.fpn_convs.0.conv.weight"),
    ("head.scale_heads.0.0.conv.weight", "decode_head.scale_heads.0.0.conv.weight"),
    ("head.scale_heads.3.4.bn.running_var", "decode_head.scale_heads.3.4.bn.running_var"),
    ("head.conv_seg.weight", "decode_head.conv_seg.weight"),
]


@pytest.mark.parametrize("backbone", ["recnext_m0", "lsnet_t"])
def test_a_published_file_loads_bit_equal_and_is_written_back(backbone, tmp_path):
    """The file is made of names and shapes alone, as somebody else would have written it."""
    net = networks.build(backbone, 3, channels=8).eval()
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value for name, value in names.to_published(net).items()}
    torch.save({"meta": {"iter": 80000}, "state_dict": made}, tmp_path / "published.pth")
    saved = checkpoint.read(str(tmp_path / "published.pth"))
    assert names.num_classes(saved, where="published.pth") == 3
    names.load(net, saved, where="published.pth")
    own, again = net.state_dict(), names.to_published(net)
    assert list(again) == list(made)
    assert all(torch.equal(value, made[name]) for name, value in again.items())
    for here, there in PAIRS if backbone == "recnext_m0" else PAIRS[1:]:
        assert torch.equal(own[here], made[there]), there


def test_names_are_those_that_are_published():
    with torch.device("meta"):
        made = names.to_published(networks.build("recnext_m3", 150))
    heads = {tuple(map(int, match.groups())) for name in made if (match := re.match(r"decode_head\.scale_heads\.(\d)\.(\d)\.conv\.weight", name))}
    assert heads == {(0, 0), (1, 0), (2, 0), (2, 2), (3, 0), (3, 2), (3, 4)}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {name for name in made if ".2.0.bn." in name and name.startswith("decode")} == {f"decode_head.scale_heads.2.0.bn.{kind}" for kind in kinds}
    assert {name.partition(".")[0] for name in made} == {"backbone", "neck", "decode_head"}


def test_our_own_names_load_and_what_does_not_fit_is_explained():
    net, other = (networks.build("recnext_m0", 3, channels=8) for _ in range(2))
    names.load(other, {"model": net.state_dict()}, where="own.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    assert names.num_classes({"model": net.state_dict()}, where="own.pth") == 3
    assert names.num_classes({"state_dict": {"fc.weight": torch.zeros(1)}}, where="other.pth") is None
    there = names.to_published(net)
    del there["decode_head.conv_seg.bias"]
    with pytest.raises(InputError, match="half.pth does not fit SemanticFPN.*conv_seg.bias is missing"):
        names.load(net, {"state_dict": there}, where="half.pth")
