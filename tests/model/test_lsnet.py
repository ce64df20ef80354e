"""LSNet: the biases' table, the sizes it is tied to, names and heads of the distilled variants."""

import math

import pytest
import torch
from torch import nn

import model
import utils
from model.layers import ScaleShift
from model.lsnet import Attention, attention_bias_index
from tests.nets import randomise


def test_bias_index_of_a_small_map_by_hand():
    index, num_offsets = attention_bias_index((1, 3))
    assert num_offsets == 3
    assert index.tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    index, num_offsets = attention_bias_index((2, 2))  # offsets in order of appearance: none, right, down, diagonal
    assert num_offsets == 4
    assert index.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return model.create_model("lsnet_t", num_classes=7).eval()


def test_sizes_with_the_same_last_map_work_and_others_are_explained(net):
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 193, 256)).shape == (1, 7)
        with pytest.raises(ValueError, match=r"maps of 4x4, not 4x5.*img_size=\(height, width\)"):
            net(torch.zeros(1, 3, 224, 257))


def test_other_sizes_are_built_on_request():
    net = model.create_model("lsnet_t", num_classes=7, img_size=(64, 160))
    assert net(torch.zeros(2, 3, 64, 160)).shape == (2, 7)
    biases = [parameter for name, parameter in net.named_parameters() if name.endswith("attention_biases")]
    assert {tuple(parameter.shape) for parameter in biases} == {(4, 3)}


def cubic(distance: float) -> float:
    """The cubic convolution kernel with a = -0.75 that pictures are resized with."""
    a, t = -0.75, abs(distance)
    return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_features_at_other_sizes_resize_the_table_of_biases_as_a_picture():
    """Built for 1x2 positions and used on 1x4: the (2, 2) table enlarged twice, worked out by hand; gradients reach the biases."""
    torch.manual_seed(0)
    attention = randomise(Attention(16, num_heads=2, key_dim=4, resolution=(1, 2))).eval()
    enlarge = torch.zeros(4, 2)
    for i in range(4):
        centre = (i + 0.5) / 2 - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            enlarge[i, min(max(j, 0), 1)] += cubic(centre - j)  # beyond the border the last value goes on
    table = enlarge @ attention.attention_biases[:, attention.attention_bias_idxs] @ enlarge.T
    by_hand = Attention(16, num_heads=2, key_dim=4, resolution=(1, 4)).eval()
    by_hand.attention_biases = nn.Parameter(table.detach().flatten(1))
    by_hand.load_state_dict({**attention.state_dict(), "attention_biases": table.flatten(1), "attention_bias_idxs": torch.arange(16).view(4, 4)})
    x = torch.randn(1, 16, 1, 4)
    out = attention(x)
    torch.testing.assert_close(out, by_hand(x))
    out.square().sum().backward()
    assert (attention.attention_biases.grad != 0).all()


def test_features_at_the_built_size_do_not_touch_the_table(monkeypatch):
    monkeypatch.setattr(model.lsnet, "interpolate", None)
    features = model.create_model("lsnet_t", features_only=True).eval()
    assert [one.shape[2:] for one in features(torch.zeros(1, 3, 224, 193))] == [(28, 25), (14, 13), (7, 7), (4, 4)]


def test_weight_decay_spares_the_biases_alone(net):
    spared = net.no_weight_decay()
    assert len(spared) == 5
    assert all(name.endswith(".attention_biases") for name in spared)


def test_a_distilled_name_keeps_both_heads_without_distillation():
    with torch.device("meta"):
        distilled = model.create_model("lsnet_t", distillation=True).state_dict()
        named = model.create_model("lsnet_t_distill").state_dict()
        plain = model.create_model("lsnet_t").state_dict()
    assert list(distilled) == list(named)
    assert [key for key in named if key not in plain] == [key for key in named if key.startswith("head_dist.")] != []


def test_distilled_training_can_be_switched(net):
    with pytest.raises(ValueError, match="distillation=True"):
        net.set_distilled_training()
    distilled = model.create_model("lsnet_t_distill", num_classes=7, img_size=64)
    x = torch.zeros(2, 3, 64, 64)
    assert distilled(x).shape == (2, 7)
    distilled.set_distilled_training()
    assert len(distilled(x)) == 2
    assert len(distilled.get_classifier()) == 2


def test_fused_heads_are_one_layer():
    fused = utils.replace_batchnorm(model.create_model("lsnet_t_distill", num_classes=7, img_size=64).eval())
    assert fused.head_dist is None
    assert isinstance(fused.head, nn.Linear)
    assert sum(isinstance(module, ScaleShift) for module in fused.modules()) == 1 + 4  # odd blocks of stages 2 and 3
    assert fused.get_classifier() is fused.head
