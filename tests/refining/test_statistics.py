"""BatchNorm's statistics: the mean over batches of each batch's own, and nothing else changes."""

import copy

import pytest
import timm
import torch
from torch import nn

import datasets
from refining.statistics import recalibrate, training_batches
from run import config
from run.errors import InputError
from tests.conftest import TINY_RUN
from tests.nets import randomise
from utils import Rank

ALONE = Rank(0, 1, 0, 1, torch.device("cpu"), None)
BATCHES = [2 * torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(4)]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("resnet18", num_classes=4, channels=[4, 8, 8, 8], layers=[1, 1, 1, 1], drop_rate=0.5, drop_path_rate=0.0))


def statistics_of(net: nn.Module) -> dict:
    return {name: value for name, value in net.state_dict().items() if name.endswith(("running_mean", "running_var"))}


def test_statistics_are_the_mean_of_the_batches_own():
    net, reference = small_net(), small_net().train()
    reference.global_pool, reference.fc = nn.Identity(), nn.Identity()  # where dropout is
    of_batches = []
    for norm in [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 1.0  # of each batch alone
    with torch.no_grad():
        for images in BATCHES:
            reference.forward_features(images)
            of_batches.append({name: value.clone() for name, value in statistics_of(reference).items()})
    before = copy.deepcopy(net.state_dict())
    momenta = {module.momentum for module in net.modules() if isinstance(module, nn.BatchNorm2d)}
    assert recalibrate(net.train(), BATCHES) == 24
    found = statistics_of(net)
    assert len(found) > 10
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in of_batches]).mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(value, before[name]), name
    others = [name for name in before if name not in found and not name.endswith("num_batches_tracked")]
    assert len(others) > 20 and all(torch.equal(before[name], net.state_dict()[name]) for name in others)
    assert {module.momentum for module in net.modules() if isinstance(module, nn.BatchNorm2d)} == momenta
    assert not any(module.training for module in net.modules())


def test_dropout_has_no_part_in_it():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    images = torch.arange(12.0).view(4, 3)
    recalibrate(net, [images])
    torch.testing.assert_close(net[1].running_mean, images.mean(0))
    torch.testing.assert_close(net[1].running_var, images.var(0))


def test_a_network_without_statistics_is_refused():
    with pytest.raises(InputError, match="Sequential has no BatchNorm.*fused"):
        recalibrate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), BATCHES)


def test_images_are_the_recipes_of_epochs_that_no_training_has(digits_folder):
    def batches(*flags: str, num_images: int = 90) -> list:
        cfg, _ = config.parse([*TINY_RUN, f"--data-path={digits_folder}", *flags])
        return list(training_batches(cfg, datasets.open_images(cfg)[0], ALONE, num_images))

    usual = batches()
    assert [tuple(one.shape) for one in usual] == [(16, 3, 32, 32)] * 6
    assert all(torch.equal(one, other) for one, other in zip(usual, batches("--num_workers=2"), strict=True))
    assert not torch.equal(usual[0], batches("--data-seed=1")[0]) and not torch.equal(usual[0], batches("--mixup=0", "--cutmix=0")[0])
    assert torch.equal(batches("--epochs=3", num_images=1)[0], batches("--epochs=2", num_images=7 * 16)[6])  # epochs of six batches: the first of epoch 3
