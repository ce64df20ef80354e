"""Two classes told apart by one pixel's channel: what the attacks do to it is worked out by hand."""

import pytest
import torch
from torch import nn

from loading.augment import MEAN, STD
from robustness import attacks

STATISTICS = [torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)]


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - STATISTICS[0]) / STATISTICS[1]


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    return images * STATISTICS[1] + STATISTICS[0]


class RedOrGreen(nn.Module):
    """Class 0 the more, the more red, class 1 the more green; blue does not count. As steep where it is unsure as everywhere."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return pixels_of(images).mean(dim=(2, 3))[:, :2] * 10


@pytest.fixture
def images() -> torch.Tensor:
    return normalised(torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1).repeat(2, 1, 2, 2))


def test_fgsm_takes_one_step_away_from_the_class(images):
    changed = pixels_of(attacks.fgsm(RedOrGreen(), images, torch.tensor([0, 1])))
    step = 1 / 255
    expected = torch.tensor([[0.5 - step, 0.4 + step, 0.3], [0.5 + step, 0.4 - step, 0.3]]).view(2, 3, 1, 1)
    torch.testing.assert_close(changed, expected.expand_as(changed), rtol=0, atol=1e-6)


def test_changed_pixels_stay_in_range():
    black_and_white = normalised(torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]).view(2, 3, 1, 1))
    for attack in (attacks.fgsm, lambda *args: attacks.pgd(*args, torch.arange(2), seed=0)):
        changed = pixels_of(attack(RedOrGreen(), black_and_white, torch.tensor([0, 1])))
        # already as far from their classes as there are pixels
        torch.testing.assert_close(changed[:, :2].flatten(), torch.tensor([0.0, 1.0, 1.0, 0.0]), rtol=0, atol=1e-6)


def test_five_steps_of_pgd_reach_the_bound_and_no_further(images):
    changed = pixels_of(attacks.pgd(RedOrGreen(), images, torch.tensor([0, 1]), torch.arange(2), seed=0))
    away = changed - pixels_of(images)
    # 5 half steps cross the whole width of 2 / 255 from wherever the start was
    for channel, direction in ((0, (-1, 1)), (1, (1, -1))):
        for i in (0, 1):
            torch.testing.assert_close(away[i, channel], torch.full((2, 2), direction[i] / 255), rtol=0, atol=1e-6)
    start = attacks.random_start(images.shape, torch.arange(2), seed=0) / 255
    torch.testing.assert_close(away[:, 2], start[:, 2], rtol=0, atol=1e-6)  # blue has no gradient and stays where it started
    assert away.abs().max() <= 1 / 255 + 1e-6


def test_fewer_steps_are_half_as_long(images):
    start = attacks.random_start(images.shape, torch.arange(2), seed=0)[0, 0] / 255
    once = (pixels_of(attacks.pgd(RedOrGreen(), images, torch.tensor([0, 1]), torch.arange(2), seed=0, num_steps=1)) - pixels_of(images))[0, 0]
    torch.testing.assert_close(once, (start - 0.5 / 255).clamp(-1 / 255, 1 / 255), rtol=0, atol=1e-6)


def test_the_random_start_is_each_images_own_however_they_are_batched():
    whole = attacks.random_start((3, 3, 4, 4), torch.tensor([5, 6, 7]), seed=1)
    alone = attacks.random_start((1, 3, 4, 4), torch.tensor([6]), seed=1)
    assert torch.equal(whole[1:2], alone) and not torch.equal(whole[0], whole[1])
    assert not torch.equal(alone, attacks.random_start((1, 3, 4, 4), torch.tensor([6]), seed=2))
    assert -1 <= whole.min() < -0.9 and 0.9 < whole.max() <= 1
