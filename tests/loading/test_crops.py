"""Crops, views and schedules beside the published recipe's, against timm's own given the same draws."""

import dataclasses
import itertools

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from timm.data import AugMixDataset, Mixup, create_transform
from torch.utils.data import DataLoader

import datasets
import losses
from loading import augment, kernels, keys
from loading.batches import TrainingSet
from loading.images import Images
from loading.loaders import _to_device
from run import config
from run.errors import InputError
from sources.sets import load_digits
from utils import Rank

PLAIN = ["--data-path=x", "--distillation-type=none", "--mixup=0", "--cutmix=0", "--reprob=0", "--input-size=96"]
PHOTOS = [Image.fromarray(array) for array in (skimage.data.coffee()[:, :400], skimage.data.chelsea())]
THIN = Image.fromarray(skimage.data.coffee()[:, 100:103])


def parse(*flags: str) -> config.Config:
    return config.parse([*PLAIN, *flags])[0]


def seeded(transform, image, seed: int):
    """What a transform makes of the image, and a number that tells where it leaves the three generators."""
    with keys.restored_generators():
        keys.seed_generators((seed, seed, seed))
        made = transform(image)
        return made, (torch.rand(1).item(), np.random.rand(), keys.random.random())


TRAINING = {
    "rkrc": (["--train-crop-mode=rkrc"], {"train_crop_mode": "rkrc"}),
    "rkrr": (["--train-crop-mode=rkrr", "--train-interpolation=random"], {"train_crop_mode": "rkrr", "interpolation": "random"}),
    "zoomed out": (
        ["--train-crop-mode=rkrr", "--scale", "0.3", "9", "--ratio", "0.5", "2"],
        {"train_crop_mode": "rkrr", "scale": (0.3, 9.0), "ratio": (0.5, 2.0)},
    ),
    "ranges": (["--scale", "0.5", "0.7", "--ratio", "1", "2", "--vflip=0.5"], {"scale": (0.5, 0.7), "ratio": (1.0, 2.0), "vflip": 0.5}),
    "mean": (["--mean=0.5", "--std", "0.2", "0.3", "0.4"], {"mean": (0.5,) * 3, "std": (0.2, 0.3, 0.4)}),
    "augmix": (["--aa=augmix-m5-w4-d2"], {"auto_augment": "augmix-m5-w4-d2"}),
    "augmix of any depth": (["--aa=augmix-m9"], {"auto_augment": "augmix-m9"}),
    "blended": (["--aa=augmix-m5-b1"], {"auto_augment": "augmix-m5-b1"}),
    "small": (["--input-size=32", "--train-crop-mode=rrc"], {"input_size": 32}),
}


@pytest.mark.parametrize(("flags", "timms"), TRAINING.values(), ids=TRAINING)
def test_training_is_timms_draw_for_draw(flags, timms, monkeypatch):
    """The reference loader's pixels are timm's; the fast one's differ as resampling does, and leave the generators where timm does."""
    no_ops = [] if any("--aa" in flag for flag in flags) else ["--aa=none", "--color-jitter=0"]
    settings = {"input_size": 96, "is_training": True, "hflip": 0.5, "color_jitter": 0, "interpolation": "bicubic", **timms}
    theirs = create_transform(**settings)
    augment._guard_posterize(theirs)
    ours = {loader: augment.train_transform(parse(*no_ops, *flags, f"--loader={loader}")) for loader in ("reference", "fast")}
    assert ours["fast"].is_fast and not any(isinstance(part, kernels.ThroughPil) for part in ours["fast"].parts.transforms)
    differences, seen = [], set()
    for seed in range(24):
        image = PHOTOS[seed % 2]
        expected, place = seeded(theirs, image, seed)
        for loader, transform in ours.items():
            made, end = seeded(transform, image, seed)
            assert made.shape == expected.shape and end == place, (loader, seed)
            if loader == "reference":
                assert (made - expected).abs().max() < 1e-5
            else:
                differences.append((made - expected).abs().mean().item() * 255 * settings.get("std", augment.STD)[0])
        seen.add(round(expected.mean().item(), 3))
    assert len(seen) >= 12 and np.median(differences) < 0.3 and max(differences) < 3, differences


@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_thin_images_are_padded_by_reflection_alike(mode):
    flags = [f"--train-crop-mode={mode}", "--aa=none", "--color-jitter=0", "--scale", "4", "4"]
    transforms = [augment.train_transform(parse(*flags, f"--loader={loader}")) for loader in ("reference", "fast")]
    views = [seeded(transform.draw, THIN, 3)[0][0].astype(int) for transform in transforms]
    assert views[0].shape == (96, 96, 3) and np.abs(views[0] - views[1]).mean() < 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_is_timms(mode, interpolation):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    flags = [f"--crop-mode={mode}", f"--interpolation={interpolation}", "--crop-pct=0.9", "--mean", *map(str, mean), "--std", *map(str, std)]
    theirs = create_transform(96, crop_pct=0.9, crop_mode=mode, interpolation=interpolation, mean=mean, std=std)
    for image in (*PHOTOS, PHOTOS[0].resize((500, 80)), PHOTOS[1].resize((60, 61))):
        expected = theirs(image)
        assert (augment.recipe_eval_transform(parse(*flags, "--loader=reference"))(image) - expected).abs().max() < 1e-5
        if interpolation in ("bicubic", "bilinear"):
            off = (augment.recipe_eval_transform(parse(*flags))(image) - expected).abs() * 255 * torch.tensor(std).view(3, 1, 1)
            assert off.max() < 3 and off.mean() < 0.1, image.size
    if interpolation in ("bicubic", "bilinear"):
        views = [augment.recipe_eval_transform(parse(*flags, f"--loader={loader}")).draw(THIN)[0].astype(int) for loader in ("reference", "fast")]
        assert views[0].shape == (96, 96, 3) and np.abs(views[0] - views[1]).max() <= 3
    else:
        with pytest.raises(InputError, match=f"--interpolation {interpolation}: .* add --loader reference"):
            parse(*flags)


@pytest.mark.parametrize("resplit", [False, True])
def test_splits_are_timms_draw_for_draw(resplit):
    """timm erases all views; with --resplit the first is left alone, and draws nothing."""
    flags = ["--aa=augmix-m5-w4-d2", "--aug-splits=3", "--reprob=1", "--remode=pixel", *(["--resplit"] if resplit else [])]
    parts = create_transform(96, is_training=True, auto_augment="augmix-m5-w4-d2", interpolation="bicubic", re_prob=1, re_mode="pixel", separate=True)
    augment._guard_posterize(parts[1])
    ours = augment.train_transform(parse(*flags, "--loader=reference"))
    if resplit:
        erasing, calls = parts[2].transforms[-1], itertools.count()
        parts[2].transforms[-1] = lambda image: erasing(image) if next(calls) % 3 else image
    theirs = AugMixDataset(One(), num_splits=3)
    theirs.transform = parts

    def their_views(image):
        One.image = image
        return theirs[0][0]

    for seed in range(6):
        expected, place = seeded(their_views, PHOTOS[seed % 2], seed)
        made, end = seeded(lambda image: [augment.finish_one(*view) for view in ours.draw_splits(image)], PHOTOS[seed % 2], seed)
        assert end == place and len(made) == len(expected) == 3
        assert max((one - other).abs().max().item() for one, other in zip(made, expected, strict=True)) < 1e-5
        assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


class One:
    """A data set of one image, as timm takes it."""

    transform = None

    def __getitem__(self, index: int) -> tuple:
        return self.transform(self.image), 0


def training_set(cfg: config.Config, **more) -> tuple[TrainingSet, keys.Plan]:
    images = load_digits()[0].part(np.arange(64))
    plan = keys.build_plan(64, repeated_aug=False, group_size=16, lanes=2, data_seed=1)
    return TrainingSet(images, augment.train_transform(cfg), plan, **more), plan


@pytest.mark.parametrize("loader", ["fast", "reference"])
def test_a_batch_holds_first_views_then_second_ones(loader):
    cfg = parse("--aug-splits=3", "--aa=augmix-m5-w4-d2", "--resplit", "--reprob=1", "--remode=const", "--input-size=48", f"--loader={loader}")
    dataset, plan = training_set(cfg)
    wanted = plan.keys(2, np.arange(8), plan.permutation(2).numpy())
    batch = dataset.__getitems__(wanted)
    assert batch.images.shape == (24, 3, 48, 48) and batch.targets.tolist() == 3 * batch.targets[:8].tolist() and batch.positions.tolist() == list(range(8))
    for i, key in enumerate(wanted):
        assert torch.equal(dataset[key][0], batch.images[i]) and key.sample in range(64)
        is_erased = [(view == 0).all(dim=0).any().item() for view in batch.images[i::8]]
        assert is_erased == [False, True, True]
    later = dataclasses.replace(cfg, aug_splits=0, aa=None, color_jitter=0.0, reprob=0.0)
    assert torch.equal(training_set(later)[0].__getitems__(wanted).images, batch.images[:8])  # the first views: crop and flip alone
    on_device = training_set(cfg, is_finished_here=False)[0].__getitems__(wanted)
    assert on_device.images.dtype == torch.uint8 and torch.equal(_to_device(on_device, torch.device("cpu")).images, batch.images)


def test_the_divergence_between_views_is_timms_by_hand():
    cfg = parse("--aug-splits=3", "--jsd-loss", "--smoothing=0.1")
    logits, targets = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])
    clean, *others = (logits[start : start + 2].log_softmax(1) for start in (0, 2, 4))
    expected = -(0.9 * clean[[0, 1], targets] + 0.1 * clean.mean(1)).mean()
    mean = torch.stack([one.exp() for one in (clean, *others)]).mean(0).log()
    for one in (clean, *others):
        expected += 12 * (one.exp() * (one - mean)).sum(1).mean() / 3
    found = losses.build_criterion(cfg)(logits, targets.repeat(3), None)
    torch.testing.assert_close(found, expected)
    without = losses.build_criterion(dataclasses.replace(cfg, jsd_loss=False))(logits, targets.repeat(3), None)
    torch.testing.assert_close(without, torch.nn.functional.cross_entropy(logits, targets.repeat(3), label_smoothing=0.1))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_ends_as_timms_does(mode):
    cfg = config.parse(["--data-path=x", "--mixup-off-epoch=2", f"--mixup-mode={mode}", "--mix-group-size=16", "--mix-lanes=2"])[0]
    _, plan = training_set(parse())
    mix, images, targets = augment.build_mixing(cfg, plan, 10), torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    positions = torch.from_numpy(plan.positions(0, 16))
    theirs = Mixup(0.8, 1.0, None, 1.0, 0.5, mode, True, 0.1, 10)
    theirs.mixup_enabled = False
    expected_images, expected_targets = theirs(images.clone(), targets)
    for epoch in (2, 3):
        mixed_images, mixed_targets = mix(images, targets, epoch, positions)
        assert torch.equal(mixed_images, expected_images)
        torch.testing.assert_close(mixed_targets, expected_targets.float(), rtol=0, atol=1e-7)
    assert not torch.equal(mix(images.clone(), targets, 1, positions)[1], expected_targets.float())


def test_sizes_of_a_schedule_by_epoch():
    cfg = parse("--image-size-schedule=160:0,192:0.4,224:0.8", "--epochs=300")
    assert cfg.size_starts == {0: 160, 120: 192, 240: 224} and cfg.train_sizes == [160, 192, 224]
    assert parse("--image-size-schedule=160:0,192:0.4,224:0.8", "--epochs=2").size_starts == {0: 160, 1: 192}
    assert parse("--image-size-schedule=160:0,192:0.5", "--epochs=2", "--lr-cycle-limit=3").size_starts == {0: 160, 3: 192}  # of the whole run
    assert parse().size_starts == {0: 96}
    sizes = {epoch: part.parts.transforms[0].size for epoch, part in augment.train_transforms(cfg).items()}
    assert sizes == {0: (160, 160), 120: (192, 192), 240: (224, 224)}


def scheduled(num_workers: int, world_size: int, first_step: int = 0) -> list[torch.Tensor]:
    """Each step's images of epochs 1 and 2 of 4, which have another size each, as so many processes load them."""
    cfg = parse("--image-size-schedule=40:0,48:0.5", "--epochs=4", "--reprob=0.5")
    transforms = augment.train_transforms(cfg)
    dataset, plan = training_set(cfg, later=transforms, reuses_memory=True)
    found = []
    samplers = [keys.KeyedBatchSampler(plan, batch_size=16 // world_size, accum_steps=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    workers = {"persistent_workers": num_workers > 0, "multiprocessing_context": "fork" if num_workers else None}
    loaders = [DataLoader(dataset, batch_sampler=one, num_workers=num_workers, collate_fn=lambda batch: batch, **workers) for one in samplers]
    for epoch in (1, 2):
        for one in samplers:
            one.start(epoch=epoch, step=first_step if epoch == 1 else 0)
        for parts in zip(*loaders, strict=True):
            images = torch.cat([part.images for part in parts])
            found.append(images[torch.cat([part.positions for part in parts]).argsort()].clone())
    return found


def test_a_schedule_depends_on_the_epoch_alone():
    """Not on workers, on processes, or on where the loader began; memory of batches grows with the images."""
    whole = scheduled(0, 1)
    assert [tuple(images.shape) for images in whole] == 4 * [(16, 3, 40, 40)] + 4 * [(16, 3, 48, 48)]
    for found in (scheduled(2, 1), scheduled(0, 2)):
        assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(scheduled(1, 1, first_step=3), whole[3:], strict=True))


@pytest.mark.parametrize("loader", ["fast", "reference"])
@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
def test_description_of_other_crops_is_what_the_pixels_show(mode, loader):
    cfg = parse(f"--train-crop-mode={mode}", "--vflip=0.5", "--aa=none", "--color-jitter=0", "--scale", "0.3", "2", f"--loader={loader}")
    plan, transform, flips, pads = training_set(cfg)[1], augment.train_transform(cfg), 0, 0
    for sample in range(16):
        key, image = keys.Key(1, 0, sample, 0), PHOTOS[sample % 2]
        drawn = augment.describe(key, plan=plan, transform=transform, image=image)
        with keys.seeded(plan.sample_words(1, sample, 0)):
            view = transform.draw(image)[0].astype(float)
        (height, width), (top, left, *_) = drawn["resized"], drawn["box"]
        whole = np.pad(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), ((96, 96), (96, 96), (0, 0)), mode="reflect")
        expected = whole[96 + top : 192 + top, 96 + left : 192 + left]
        expected = expected[:, ::-1] if drawn["flip"] else expected
        expected = expected[::-1] if drawn["vflip"] else expected
        assert np.abs(view - expected).mean() < 0.5, (sample, drawn)
        flips, pads = flips + drawn["vflip"], pads + (min(top, left) < 0)
    assert 2 < flips < 14 and pads > 1


def test_description_tells_of_every_view():
    cfg = parse("--aug-splits=3", "--aa=augmix-m5-w2-d2", "--reprob=1", "--resplit")
    drawn = augment.describe(keys.Key(0, 0, 3, 0), plan=training_set(cfg)[1], transform=augment.train_transform(cfg), image=PHOTOS[0])
    assert drawn["ops"] == drawn["erased"] == [] and [len(split["erased"]) for split in drawn["splits"]] == [1, 1]
    names = [[name for name, _ in split["ops"]] for split in drawn["splits"]]
    assert all(1 <= len(ops) <= 4 for ops in names) and names[0] != names[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scale", "0.5"], "--scale takes two parts"),
        (["--scale", "0.9", "0.1"], "--scale takes two parts"),
        (["--scale", "0.5", "1.5"], "--scale: a crop is no larger than its image"),
        (["--ratio", "0", "1"], "--ratio takes two ratios"),
        (["--scale", "1e-9", "1", "--train-crop-mode=rkrr"], "--train-crop-mode rkrr takes --scale and --ratio from 0.01 to 100"),
        (["--mean", "123.7", "116.3", "103.5", "--std", "58.4", "57.1", "57.4"], "of pixels from 0 to 255 are to be divided by 255"),
        (["--mean", "0.5", "0.5"], "--mean takes one number, or one per channel"),
        (["--std", "0.2", "0.2", "0"], "are of pixels from 0 to 1, from 0 and 0.001 on"),
        (["--aug-splits=1"], "--aug-splits 1 is the one view"),
        (["--jsd-loss"], "--jsd-loss compares views of an image: add --aug-splits 3"),
        (["--aug-splits=3", "--mixup=0.8"], "add --mixup 0 --cutmix 0"),
        (["--aug-splits=3", "--distillation-type=hard"], "add --distillation-type none"),
        (["--mixup-off-epoch=3"], "neither is on: drop it"),
        *((["--image-size-schedule", text], f"--image-size-schedule {text}: write sizes of at least 8 pixels")
          for text in ("160", "160:0,192", "160:0.1", "160:0,192:0.5,224:0.5", "160:0,192:1", "4:0", "160:0,nan:0.5", "160:nan")),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        parse(*flags)


@pytest.mark.parametrize("is_finished_here", [True, False])
def test_loaders_normalise_and_crop_as_the_recipe_says(is_finished_here, monkeypatch):
    """Of an oblong photo the border is the mean, and of a square one a crop with all of the area is all there is."""
    whole = ["--scale", "1", "1", "--ratio", "1", "1", "--hflip=0", "--aa=none", "--color-jitter=0", "--mix-group-size=2", "--no-repeated-aug"]
    cfg = parse("--crop-mode=border", "--crop-pct=1", "--mean=0.5", "--std=0.25", "--num_workers=0", "--batch-size=2", *whole)
    rank = Rank(0, 1, 0, 1, torch.device("cpu"))
    if not is_finished_here:  # as for a GPU
        for name in ("TrainingSet", "ValidationSet"):
            made = getattr(datasets, name)
            monkeypatch.setattr(datasets, name, lambda *args, made=made, **settings: made(*args, **{**settings, "is_finished_here": False}))
    square, oblong = (Images([image] * 2, [0, 0], ["cat"], lambda image: image) for image in (PHOTOS[0], PHOTOS[1].resize((180, 120))))
    ((seen, _),) = datasets.build_val_loader(cfg, oblong, rank)
    theirs = create_transform(96, crop_pct=1.0, crop_mode="border", interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (seen - theirs(oblong[0][0])).abs().max() < 0.05 and (seen[:, :, :16] - (128 / 255 - 0.5) / 0.25).abs().max() < 1e-6
    (batch,) = datasets.build_train_loader(cfg, square, rank).batches(0)
    assert (batch.images - theirs(square[0][0])).abs().max() < 0.05
