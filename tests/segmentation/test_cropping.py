"""The augmentation by hand: sizes, nearest labels, the rule of three quarters, every photometric step against plain arithmetic."""

import colorsys

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from segmentation import cropping
from segmentation.cropping import augmented, distort, draw_crop, is_varied, nearest, scaled_size
from segmentation.networks import IGNORED


def test_sizes_by_hand():
    assert scaled_size(512, 683, (2048, 512), 1.0) == (512, 683)
    assert scaled_size(512, 683, (2048, 512), 0.5) == (256, 342)  # 341.5 rounds up
    assert scaled_size(683, 512, (2048, 512), 2.0) == (1366, 1024)
    assert scaled_size(100, 1000, (2048, 512), 1.0) == (205, 2048)  # the long side is the limit: 204.8
    assert scaled_size(512, 512, (2048, 512), 0.7501) == (384, 384)  # limits are whole pixels: 1536 and 384


@pytest.mark.parametrize("size", [(7, 13), (3, 4), (10, 5), (5, 10)])
def test_labels_take_the_nearest_pixel(size):
    labels = np.arange(50, dtype=np.int32).reshape(5, 10)
    assert nearest(labels, size).tolist() == interpolate(torch.from_numpy(labels)[None, None].double(), size=size, mode="nearest-exact")[0, 0].tolist()


def test_three_quarters_of_the_labelled_pixels_are_the_limit():
    labels = np.zeros((10, 10), np.int32)
    labels[:, :2] = 1
    assert not is_varied(labels)  # 80 of 100
    labels[:, 2] = IGNORED
    labels[:5, 3] = 1
    labels[5:, 3] = 2  # 60 of 90 are 0
    assert is_varied(labels)
    labels[:] = [0, 0, 0, 1, IGNORED] * 2  # 60 of 80: exactly three quarters
    assert is_varied(labels)
    assert not is_varied(np.full((4, 4), 3))
    assert not is_varied(np.full((4, 4), IGNORED))


class Draws:
    """Stands for a generator: gives what it is told to, and notes the bounds that it was asked for."""

    def __init__(self, *values: float):
        self.values, self.bounds = list(values), []

    def randint(self, low: int, high: int | None = None) -> int:
        self.bounds.append((0, low) if high is None else (low, high))
        return self.values.pop(0)

    uniform = randint


def test_crops_are_tried_until_one_is_varied():
    """6 x 20 pixels, one class but for columns 10 to 13: of crops of 4, the third draw is the first that sees both."""
    labels = np.zeros((6, 20), np.int32)
    labels[:, 12:14] = 1
    rng = Draws(0, 0, 2, 5, 1, 10, 0, 0)
    assert draw_crop(labels, 4, rng) == (slice(1, 5), slice(10, 14))
    assert rng.bounds == [(0, 3), (0, 17)] * 3
    assert rng.values == [0, 0]


def test_the_tenth_crop_is_taken_as_it_is_and_small_pictures_are_taken_whole():
    rng = Draws(*range(20))
    assert draw_crop(np.zeros((30, 30), np.int32), 4, rng) == (slice(18, 22), slice(19, 23))
    assert rng.values == []
    assert draw_crop(np.eye(3, dtype=np.int32), 512, Draws(0, 0)) == (slice(0, 3), slice(0, 3))


IMAGE = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)


def clipped(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def test_brightness_and_contrast_by_hand():
    """Draws: coin and shift, contrast last or not, coin and factor, coins of saturation and hue."""
    assert np.array_equal(distort(IMAGE, Draws(0, 0, 0, 0, 0)), IMAGE)
    assert np.array_equal(distort(IMAGE, Draws(1, 20.5, 0, 0, 0, 0)), clipped(IMAGE + 20.5))
    assert np.array_equal(distort(IMAGE, Draws(1, -32, 0, 0, 0, 0)), clipped(IMAGE - 32.0))
    assert np.array_equal(distort(IMAGE, Draws(0, 0, 1, 1.5, 0, 0)), clipped(IMAGE * 1.5))
    both = clipped(clipped(IMAGE + 20.0) * 0.5)
    assert np.array_equal(distort(IMAGE, Draws(1, 20.0, 0, 1, 0.5, 0, 0)), both)
    assert np.array_equal(distort(IMAGE, Draws(1, 20.0, 1, 1, 0.5, 0, 0)), both)  # last of all, but nothing lies between


def toned(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Saturation and hue (a fraction of the circle) changed by Python's colorsys."""
    out = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255))
        out[place] = colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)
    return out * 255


@pytest.mark.parametrize(("draws", "saturation", "hue"), [((1, 0.5, 0), 0.5, 0), ((1, 1.5, 0), 1.5, 0), ((0, 1, 18), 1, 0.1), ((0, 1, -18), 1, -0.1)])
def test_saturation_and_hue_turn_colours_as_colorsys_does(draws, saturation, hue):
    """18 of 180 are a tenth of the circle; hues are rounded to 2 degrees and saturations to 1/255, so colours are off by a few levels."""
    found = distort(IMAGE, Draws(0, 0, 0, *draws)).astype(float)
    assert np.abs(found - toned(IMAGE, saturation, hue)).max() < 8
    assert np.abs(found - IMAGE).max() > 20


def test_contrast_comes_before_saturation_or_last():
    grey = np.full((1, 1, 3), [200, 100, 100], np.uint8)
    first, last = (distort(grey, Draws(0, is_last, 1, 1.5, 1, 0.5, 0))[0, 0].tolist() for is_last in (0, 1))
    assert first == [255, 203, 203]  # of 255, 150, 150 the saturation, 105, is halved to 52
    assert last == [255, 226, 226]  # of 200, 100, 100 the saturation, 127, to 63: 200, 151, 151, times 1.5


def test_draws_have_the_published_bounds():
    rng = Draws(1, 0, 1, 1, 1.0, 1, 1.0, 1, 0)
    distort(IMAGE, rng)
    assert rng.bounds == [(0, 2), (-32, 32), (0, 2), (0, 2), (0.5, 1.5), (0, 2), (0.5, 1.5), (0, 2), (-18, 19)]


def test_picture_and_labels_stay_together():
    """A picture whose red tells its label: after scale, crop and flip it still does, wherever a pixel is not on an edge."""
    labels = np.zeros((60, 90), np.int32)
    labels[10:40, 20:50], labels[45:, 60:] = 1, 2
    picture = np.repeat((labels * 100)[..., None].astype(np.uint8), 3, axis=2)
    for seed in range(12):
        rng = np.random.RandomState(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cropping, "distort", lambda image, rng: image)
            view, own = augmented(picture, labels, rng, crop_size=32, max_size=(120, 40))
        assert view.shape[:2] == own.shape
        assert max(own.shape) <= 32
        assert (np.abs(view[..., 0] - own * 100.0) < 30).mean() > 0.85
    again = [augmented(picture, labels, np.random.RandomState(3), crop_size=32, max_size=(120, 40)) for _ in range(2)]
    assert all(np.array_equal(one, two) for one, two in zip(*again, strict=True))


def test_the_flip_turns_both():
    labels = np.arange(12, dtype=np.int32).reshape(3, 4)
    picture = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    for flip in (0, 1):
        view, own = augmented(picture, labels, Draws(1.0, 0, 0, flip, 0, 0, 0, 0, 0), crop_size=32, max_size=(4, 3))
        assert np.array_equal(view, picture[:, ::-1] if flip else picture)
        assert np.array_equal(own, labels[:, ::-1] if flip else labels)


def test_scales_say_how_large_a_picture_becomes():
    labels, picture = np.zeros((30, 40), np.int32), np.zeros((30, 40, 3), np.uint8)
    for scales, size in (((1.0, 1.0), (60, 80)), ((1.5, 1.5), (90, 120))):
        view, own = augmented(picture, labels, np.random.RandomState(0), crop_size=128, max_size=(80, 60), scales=scales)
        assert view.shape[:2] == own.shape == size
    sides = [augmented(picture, labels, np.random.RandomState(seed), crop_size=128, max_size=(80, 60), scales=(0.9, 1.2))[1].shape[1] for seed in range(20)]
    assert 72 <= min(sides) < 76
    assert 92 < max(sides) <= 96
