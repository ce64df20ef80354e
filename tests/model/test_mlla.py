"""MLLA: the rotary tables and the sizes they serve; the rows of the published table that have no golden."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, elu, gelu, layer_norm, linear, silu

import model
from measuring.operations import agrees, count_macs, count_parameters
from model.mlla import RotaryEmbedding, rotary_table
from tests.golden.golden import load_golden_weights
from tests.nets import relative_error


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


# ---- the baseline, of which there are no recorded numbers: MLLA's published sizes, and its definition on sequences of positions


def test_baseline_at_a_size_of_its_paper_has_the_papers_cost():
    with torch.device("meta"):  # MLLA-S at 224 pixels
        net = model.create_model("mlla_nano_baseline", dim=64, depths=(3, 6, 21, 6), img_size=224).eval()
    assert agrees(count_parameters(net) / 1e6, "43")
    assert agrees(count_macs(net, (3, 224, 224)) / 1e9, "7.3")


def rotate(x: Tensor, height: int, width: int) -> Tensor:
    """x (B, N, C) with its channel pairs turned, as complex numbers, by angles of the position's row and then of its column."""
    frequencies = 10000.0 ** (-torch.arange(x.shape[2] // 4, dtype=torch.float64) / (x.shape[2] // 4))
    angles = [torch.cat((row * frequencies, column * frequencies)) for row in range(height) for column in range(width)]
    angles = torch.stack(angles)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2)) * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def plain_block(x: Tensor, weights: dict[str, Tensor], num_heads: int) -> Tensor:
    """MLLA's block of a map (B, C, H, W), on its positions in a row, head by head."""
    batch, chs, height, width = x.shape

    def depthwise(tokens: Tensor, name: str) -> Tensor:
        x = tokens.transpose(1, 2).reshape(batch, chs, height, width)
        return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1, groups=chs).flatten(2).transpose(1, 2)

    def project(tokens: Tensor, name: str) -> Tensor:
        return linear(tokens, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(tokens: Tensor, name: str) -> Tensor:
        return layer_norm(tokens, (chs,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    tokens = x.flatten(2).transpose(1, 2)
    tokens = tokens + depthwise(tokens, "cpe1")
    normed = norm(tokens, "norm1")
    v = silu(depthwise(project(normed, "in_proj"), "dwc"))
    q, k = (elu(part) + 1 for part in project(v, "attn.qk").chunk(2, dim=2))
    heads = []
    for own in torch.arange(chs).chunk(num_heads):
        scores = rotate(q, height, width)[..., own] @ rotate(k, height, width)[..., own].transpose(1, 2) / (height * width)
        total = q[..., own] @ k[..., own].mean(1, keepdim=True).transpose(1, 2) + 1e-6
        heads.append(scores @ v[..., own] / total)
    mixed = torch.cat(heads, dim=2) + depthwise(v, "attn.lepe")
    tokens = tokens + project(mixed * silu(project(normed, "act_proj")), "out_proj")
    tokens = tokens + depthwise(tokens, "cpe2")
    tokens = tokens + project(gelu(project(norm(tokens, "norm2"), "mlp.fc1")), "mlp.fc2")
    return tokens.transpose(1, 2).reshape(x.shape)


def plain_merging(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    for name, stride in (("conv.0.conv", 1), ("conv.1.conv", 2), ("conv.2.conv", 1)):
        weight = weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = conv2d(x if name == "conv.0.conv" else x.relu(), weight, weights[f"{name}.bias"], stride, weight.shape[-1] // 2, 1, groups)
    return batch_norm(x, *(weights[f"conv.2.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def test_baseline_with_golden_weights_is_what_its_definition_says():
    net = load_golden_weights(model.create_model("mlla_nano_baseline", depths=(1, 2), img_size=32, num_classes=7).double(), skip=("rotations",)).eval()
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        maps = net.patch_embed(x)
        for i, layer in enumerate(net.layers):
            for block in layer.blocks:
                maps = plain_block(maps, block.state_dict(), num_heads=2 ** (i + 1))
            if i == 0:
                maps = plain_merging(maps, layer.downsample.state_dict())
        reference = net.head(net.norm(maps.flatten(2).transpose(1, 2)).mean(1))
        assert relative_error(net(x), reference) < 1e-6  # tables of rotations are in float32


# ---- recursive convolutions with transposed ones, whose mixer is tested by itself


def test_transposed_rows_are_the_recursive_ones_with_a_doubling_convolution():
    net, other = (model.create_model(f"mlla_nano_{mixer}", num_classes=7, depths=(1, 1, 1, 1)) for mixer in ("recconv_convtrans", "recconv"))
    assert {key for key in net.state_dict() if key not in other.state_dict()} == {key for key in net.state_dict() if key.endswith("agg.up.weight")}
    assert net.state_dict().keys() >= other.state_dict().keys()
    net.eval()(torch.zeros(1, 3, 64, 128))
    with pytest.raises(ValueError, match="multiples of 64"):
        net(torch.zeros(1, 3, 96, 64))


def test_all_rows_of_the_published_table_are_models_and_other_mixers_are_refused():
    rows = {f"mlla_{size}_{mixer}" for size in ("nano", "mini") for mixer in ("baseline", "recconv_convtrans", "recconv", "recattn", "recattn_simple")}
    assert rows == {name for name in model.list_models() if name.startswith("mlla")}
    with pytest.raises(ValueError, match="mixer is 'recatn': it can be baseline, recconv_convtrans"):
        model.create_model("mlla_nano_recattn", mixer="recatn")
