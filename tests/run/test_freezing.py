"""Frozen modules: what does not learn stays to the last bit, and the rest learns."""

import pytest
import timm
import torch

from run.errors import InputError
from run.freezing import freeze, set_train_mode
from tests.conftest import TINY, read_log

SMALL = {"channels": [4, 8, 8, 8], "layers": [1, 1, 1, 1]}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=4, **SMALL)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["layr1"], "resnet18 has no such module|did you mean layer1"),
        (["layer1.0.conv3"], "did you mean .*layer1.0.conv2"),
        (["zzz"], "it has conv1, bn1, act1, maxpool, layer1"),
        (["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"], "leaves nothing that learns"),
    ],
)
def test_unknown_names_and_nothing_to_learn_are_refused(net, names, words):
    with pytest.raises(InputError, match=words):
        freeze(net, names)


def test_modules_and_parameters_are_frozen_by_name(net):
    freeze(net, ["layer1.0", "fc.bias"])
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in net.named_parameters() if name.startswith("layer1.0.")} | {"fc.bias"}
    set_train_mode(net, keeps_statistics=("layer1.0", "fc.bias"))
    assert [name for name, module in net.named_modules() if not module.training] == ["layer1.0.bn1", "layer1.0.bn2", "layer1.0.downsample.1"]
    set_train_mode(net, keeps_statistics=("",))
    assert {type(module).__name__ for module in net.modules() if not module.training} == {"BatchNorm2d"}


def test_a_run_leaves_frozen_modules_as_they_were(net, short_run, tmp_path):
    """Weights, BatchNorm's statistics, counters and their EMA, in spite of weight decay."""
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.add_(1) if buffer.dtype == torch.int64 else buffer.mul_(0.9).add_(0.05)
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth")
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.0.bn1.")
    flags = [*TINY, "--weight-decay=0.5", "--warmup-epochs=0", "--freeze", *(name[:-1] for name in frozen), "--epochs=1", f"--output_dir={tmp_path / 'run'}"]
    out = short_run(*flags, f"--finetune={tmp_path / 'w.pth'}")
    before, after = net.state_dict(), torch.load(tmp_path / "run" / "checkpoint_last.pth", weights_only=True)
    for weights in (after["model"], after["model_ema"]):
        assert {name for name in before if torch.equal(before[name], weights[name])} == {name for name in before if name.startswith(frozen)}
    learning = sum(parameter.numel() for name, parameter in net.named_parameters() if not name.startswith(frozen))
    assert read_log(tmp_path / "run")[0]["n_parameters"] == learning
    assert f"{learning} of {sum(map(torch.numel, net.parameters()))} parameters learn" in out
    assert sum(len(group["params"]) for group in after["optimizer"]["param_groups"]) == sum(not n.startswith(frozen) for n, _ in net.named_parameters())
