"""Backbone weights from classifiers' checkpoints, and what weight decay spares."""

import pytest
import torch

import model
from detection import networks
from features import weights
from run.errors import InputError
from tests.nets import randomise


def test_weight_decay_spares_attention_biases_alone():
    with torch.device("meta"):
        spared = weights.no_weight_decay(networks.build("retinanet", "lsnet_t", 3))
        assert weights.no_weight_decay(networks.build("retinanet", "recnext_m0", 3)) == set()
    assert len(spared) == 5
    assert all(name.startswith("backbone.body.") and name.endswith("attention_biases") for name in spared)


@pytest.mark.parametrize(("name", "options"), [("recnext_m0", {"distillation": True}), ("lsnet_t", {"distillation": True}), ("convnext_atto", {})])
def test_backbone_weights_load_but_for_their_heads(name, options, tmp_path):
    source = randomise(model.create_model(name, **options))
    torch.save({"model": source.state_dict()}, tmp_path / f"{name}_distill_300e.pth")
    net = networks.build("faster_rcnn", name, 3, channels=8)
    dropped = weights.load_backbone(net, name, str(tmp_path / f"{name}_distill_300e.pth"))
    state, loaded = source.state_dict(), net.backbone.body.model.state_dict()
    assert set(dropped) == set(state) - set(loaded) != set()
    assert all(key.startswith(("head", "fc")) for key in dropped)
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_backbone_weights_that_lack_or_exceed_anything_else_are_refused(tmp_path):
    state = model.create_model("recnext_m0").state_dict()
    net = networks.build("faster_rcnn", "recnext_m0", 3, channels=8)
    first = next(iter(state))
    for wrong in ({key: value for key, value in state.items() if key != first}, state | {"stages.9.weight": torch.zeros(1)}):
        torch.save({"model": wrong}, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match="does not fit"):
            weights.load_backbone(net, "recnext_m0", str(tmp_path / "wrong.pth"))
