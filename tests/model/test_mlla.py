"""MLLA: the rotary tables and the sizes they serve."""

import pytest
import torch

import model
from model.mlla import RotaryEmbedding, rotary_table


def test_rotary_table_by_hand():
    table = rotary_table(2, 3, 8)  # pairs 0 and 1 turn with the row, 2 and 3 with the column, at frequencies 1 and 0.01
    assert table.shape == (2, 3, 4, 2)
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02])
    torch.testing.assert_close(table[1, 2], torch.stack((angles.cos(), angles.sin()), dim=-1))
    torch.testing.assert_close(table[0, 0], torch.tensor([[1.0, 0.0]]).expand(4, 2))


def test_rotation_is_a_complex_product_of_channel_pairs():
    torch.manual_seed(0)
    rope = RotaryEmbedding(8, (3, 5))
    x = torch.randn(2, 8, 3, 5)
    pairs = torch.view_as_complex(x.permute(0, 2, 3, 1).reshape(2, 3, 5, 4, 2).contiguous())
    turned = torch.view_as_real(pairs * torch.view_as_complex(rope.rotations)).flatten(3).permute(0, 3, 1, 2)
    torch.testing.assert_close(rope(x), turned)


@pytest.mark.parametrize("size", [(64, 96), (320, 288)])
def test_other_sizes_take_the_tables_of_their_own_positions(size):
    torch.manual_seed(0)
    net = model.create_model("mlla_nano_recattn", num_classes=7).eval()
    other = model.create_model("mlla_nano_recattn", num_classes=7, img_size=size).eval()
    weights = {key: value for key, value in net.state_dict().items() if "rotations" not in key}
    other.load_state_dict(weights, strict=False)
    x = torch.randn(1, 3, *size)
    assert other.state_dict()["layers.0.blocks.0.agg.down.1.rope.rotations"].shape[:2] == (size[0] // 8, size[1] // 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), other(x))
