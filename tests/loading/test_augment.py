import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from torchvision import transforms

from loading import augment, keys
from loading.batches import TrainingSet
from run import config
from run.errors import InputError
from sources.sets import load_digits

DIGITS = ["--data-set", "DIGITS", "--distillation-type", "none"]
MIXES = {  # mixup, cutmix, minmax, probability, switch probability
    "both": (0.8, 1.0, None, 1.0, 0.5),
    "mixup": (0.8, 0.0, None, 0.7, 0.5),
    "cutmix": (0.0, 1.0, None, 1.0, 0.5),
    "minmax": (0.8, 0.0, (0.2, 0.8), 0.9, 0.3),
}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_mixing_is_timms_draw_by_draw(mode, mix):
    theirs = Mixup(*mix, mode, True, 0.1, 10)
    ours = augment.Mixer(*mix, mode, 0.1, 10)
    images, targets = torch.randn(8, 3, 24, 40), torch.arange(8)
    for seed in range(100):
        np.random.seed(seed)
        expected_images, expected_targets = theirs(images.clone(), targets)
        rng = np.random.RandomState(seed)
        mixed_images, mixed_targets = ours(images.clone(), targets, rng)
        assert torch.equal(mixed_images, expected_images)
        torch.testing.assert_close(mixed_targets, expected_targets.float(), rtol=0, atol=1e-7)
        assert rng.rand() == np.random.rand()  # both generators stand at the same place


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU, where a batch is mixed as a whole."""

    device = torch.device("cuda")


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_batch_mixed_as_a_whole_is_the_one_mixed_in_pairs(mix):
    mixer = augment.Mixer(*mix, "batch", 0.1, 10)
    for seed in range(30):
        images = torch.randn(7, 3, 24, 40)
        whole = images.clone().as_subclass(Elsewhere)
        draw = mixer.draw(np.random.RandomState(seed), 7, 24, 40)
        mixer.mix_images(whole, draw)
        mixer.mix_images(images, draw)
        assert torch.equal(whole.as_subclass(torch.Tensor), images)


def keyed_mixing(plan):
    cfg, _ = config.parse(DIGITS)
    return augment.build_mixing(cfg, plan, num_classes=10)


@pytest.mark.parametrize("batch_size", [4, 16, 32, 64])
def test_parts_of_a_group_are_mixed_like_the_whole(batch_size):
    plan = keys.build_plan(128, repeated_aug=False, group_size=32, lanes=2, data_seed=3)
    mix = keyed_mixing(plan)
    images, targets = torch.randn(128, 3, 16, 16), torch.randint(0, 10, (128,))
    whole = plan.positions(0, 128)
    expected = dict(zip(whole.tolist(), zip(*mix(images[whole], targets[whole], 5, torch.as_tensor(whole)), strict=True), strict=True))
    for start in range(0, 128, batch_size):
        part = plan.positions(start, start + batch_size)
        mixed_images, mixed_targets = mix(images[part], targets[part], 5, torch.as_tensor(part))
        for position, image, target in zip(part.tolist(), mixed_images, mixed_targets, strict=True):
            assert torch.equal(image, expected[position][0]) and torch.equal(target, expected[position][1])


def test_groups_and_epochs_draw_differently():
    plan = keys.build_plan(128, repeated_aug=False, group_size=32, lanes=2, data_seed=3)
    draws = {plan.group_generator(epoch, group).rand() for epoch in range(3) for group in range(4)}
    assert len(draws) == 12


def test_posterize_to_no_bits_is_black_instead_of_an_error():
    cfg, _ = config.parse([*DIGITS, "--aa", "rand-m9-mstd0.5-inc1", "--loader", "reference"])
    ops = [op for op in augment._augment_ops(augment.train_transform(cfg).parts.transforms) if op.name.startswith("Posterize")]
    assert ops
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for op in ops:
        assert op.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
        assert op.aug_fn(image, 1).getextrema() == ((128, 128), (0, 0), (0, 0))


def test_rand_augment_survives_a_thousand_strong_posterizes():
    cfg, _ = config.parse([*DIGITS, "--aa", "rand-m10-n4-mstd2-inc1", "--input-size", "32"])
    transform = augment.train_transform(cfg)
    image = load_digits()[0][0][0]
    for seed in range(1000):
        keys.seed_generators((seed, seed, seed))
        transform(image)


VARIANTS = [
    [], ["--ThreeAugment"], ["--aa", "none", "--remode", "rand", "--train-interpolation", "random"], ["--input-size", "32"], ["--loader", "reference"],
    ["--loader", "reference", "--ThreeAugment"], ["--aa", "augmix-m5"], ["--aa", "v0", "--recount", "3"],
]  # fmt: skip


@pytest.mark.parametrize("flags", VARIANTS)
def test_pixels_depend_on_the_key_alone(flags):
    cfg, _ = config.parse([*DIGITS, "--input-size", "48", *flags])
    images = load_digits()[0]
    plan = keys.build_plan(len(images), repeated_aug=True, group_size=256, lanes=8, data_seed=0)
    dataset = TrainingSet(images, augment.train_transform(cfg), plan)
    wanted = [keys.Key(epoch, 0, sample, repeat) for epoch in (0, 9) for sample in range(8) for repeat in (0, 1)]
    first = [dataset[key][0] for key in wanted]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    for key, pixels in reversed(list(zip(wanted, first, strict=True))):
        dataset[keys.Key(3, 0, 11, 2)]
        assert torch.equal(dataset[key][0], pixels)
    assert sum(torch.equal(a, b) for a, b in zip(first[::2], first[1::2], strict=True)) == 0  # another repeat, another view


@pytest.mark.parametrize("size", [33, 64, 160, 192, 224, 256, 288, 384])
def test_evaluation_resizes_the_short_side_and_crops_the_centre(size):
    cfg, _ = config.parse([*DIGITS, "--input-size", str(size)])
    transform = augment.eval_transform(size, augment.crop_pct(cfg), "reference")
    assert transform.parts.transforms[0].size == int(256 / 224 * size)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (90, 120, 3), dtype=np.uint8))
    short = int(256 / 224 * size)
    resized = image.resize((short * 120 // 90, short), Image.Resampling.BICUBIC)
    expected = transforms.functional.center_crop(resized, size)
    pixels = transform(image) * torch.tensor(augment.STD).view(3, 1, 1) + torch.tensor(augment.MEAN).view(3, 1, 1)
    assert torch.allclose(pixels, transforms.functional.to_tensor(expected), atol=1e-5)


def test_small_inputs_are_cropped_with_padding_and_not_enlarged():
    cfg, _ = config.parse([*DIGITS, "--input-size", "32", "--aa", "none", "--hflip", "0", "--reprob", "0", "--color-jitter", "0"])
    image = load_digits()[1][0][0]
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(augment.MEAN, augment.STD)])
    assert torch.equal(augment.eval_transform(32, augment.crop_pct(cfg))(image), normalise(image))
    padded = transforms.functional.pad(image, 4)
    crops = [normalise(padded.crop((x, y, x + 32, y + 32))) for x in range(9) for y in range(9)]
    view = augment.train_transform(cfg)(image)
    assert any(torch.equal(view, crop) for crop in crops)


def test_crop_pct_is_followed():
    cfg, _ = config.parse([*DIGITS, "--input-size", "224", "--crop-pct", "0.9"])
    assert [augment.eval_transform(224, augment.crop_pct(cfg), loader).parts.transforms[0].size for loader in ("fast", "reference")] == [248, 248]


def test_three_augment_draws_one_of_three_and_jitters():
    cfg, _ = config.parse([*DIGITS, "--ThreeAugment", "--input-size", "64"])
    transform = augment.train_transform(cfg)
    assert [type(part).__name__ for part in transform.parts.transforms] == ["RandomResizedCrop", "RandomHorizontalFlip", "AutoAugment", "ColorJitter"]
    assert transform.erasing is None
    assert {op.name for op in augment._augment_ops(augment.train_transform(cfg).parts.transforms)} == {"Solarize", "Desaturate", "GaussianBlurRand"}


def test_unknown_policy_is_refused():
    cfg, _ = config.parse([*DIGITS, "--aa", "nonsense"])
    with pytest.raises(InputError, match="--aa nonsense"):
        augment.train_transform(cfg)


@pytest.mark.parametrize("loader", ["fast", "reference"])
@pytest.mark.parametrize("flags", [["--input-size", "64"], ["--input-size", "32"], ["--input-size", "64", "--ThreeAugment"]])
def test_description_of_a_key_is_what_the_pixels_show(flags, loader):
    """The box, flip, ops and erased boxes alone, applied by hand, give the transform's pixels."""
    cfg, _ = config.parse([*DIGITS, "--reprob", "0.5", "--remode", "const", "--color-jitter", "0", "--loader", loader, *flags])
    images, transform = load_digits()[0], augment.train_transform(cfg)
    plan = keys.build_plan(len(images), repeated_aug=True, group_size=256, lanes=8, data_seed=0)
    names, flips, erased = set(), 0, 0
    for sample in range(60):
        key = keys.Key(1, 0, sample, 2)
        image = images[sample][0].resize((90, 70)) if cfg.input_size > 32 else images[sample][0]
        drawn = augment.describe(key, plan=plan, transform=transform, image=image)
        with keys.seeded(plan.sample_words(1, sample, 2)):
            pixels = transform(image)
        top, left, height, width = drawn["box"]
        source = image if cfg.input_size > 32 else transforms.functional.pad(image, 4)
        view = source.resize((cfg.input_size, cfg.input_size), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn["flip"] else view
        names |= {name for name, _ in drawn["ops"]}
        if not drawn["ops"] or drawn["ops"] == [("Desaturate", (0.0,))]:
            view = view.convert("L").convert("RGB") if drawn["ops"] else view
            expected = transforms.functional.normalize(transforms.functional.to_tensor(view), augment.MEAN, augment.STD)
            for top, left, height, width in drawn["erased"]:
                expected[:, top : top + height, left : left + width] = 0
            assert (pixels - expected).abs().mean() < 0.02
        for top, left, height, width in drawn["erased"]:
            assert (pixels[:, top : top + height, left : left + width] == 0).all()
        flips, erased = flips + drawn["flip"], erased + bool(drawn["erased"])
        assert augment.describe(key, plan=plan, transform=transform, image=image) == drawn
    assert 10 < flips < 50 and len(names) >= 3 and (erased > 10 or cfg.three_augment)


def test_erased_boxes_lie_within_images_of_any_shape():
    erasing = augment.RandomErasing(1.0, mode="pixel", max_count=3, device="cpu")
    for height, width in ((24, 90), (90, 24)):
        for words in range(50):
            with keys.seeded((words, 0, 0)):
                erased = augment._draw_erased(erasing, np.zeros((height, width, 3), np.uint8))
            assert erased and all(top + rows <= height and left + columns <= width for (top, left, rows, columns), _ in erased)
