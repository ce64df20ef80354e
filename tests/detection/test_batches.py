"""Keyed batches: one orientation and size per step, whatever the processes; images and their objects resized, flipped and padded together."""

import numpy as np
import pytest
import torch
from PIL import Image

from detection import batches, coco
from detection.batches import TrainingSet, build_plan, build_train_loader, build_val_loader, finished, fitted, load_target, padded
from loading import decoding
from loading.steps import StepSampler
from run.errors import InputError
from tests.detection import made
from tests.loading.alone import parts_of, share_of
from utils import Rank

MAX_SIZE = (120, 80)
CPU = torch.device("cpu")
IN_PROCESS = {"num_workers": 0, "collate_fn": lambda batch: batch}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> coco.CocoData:
    folder = tmp_path_factory.mktemp("made")
    return coco.read(made.write(folder), folder, has_masks=True)


def plan_of(data: coco.CocoData, batch_size: int = 2, **settings) -> batches.StepPlan:
    return build_plan(data, batch_size=batch_size, max_size=MAX_SIZE, **settings)


def loader_of(plan: batches.StepPlan, *, index: int = 0, world_size: int = 1, accum_steps: int = 1, settings: dict = IN_PROCESS):
    return build_train_loader(plan, Rank(index, world_size, 0, 1, CPU), has_masks=True, settings=settings, accum_steps=accum_steps)


def test_sizes_by_hand():
    assert fitted(480, 640, (1333, 800)) == (800, 1067)  # 1066.67 rounds up
    assert fitted(640, 480, (1333, 800)) == (1067, 800)
    assert fitted(400, 1000, (1333, 800)) == (533, 1333)  # the long side is the limit: 400 * 1.333 = 533.2
    assert fitted(3, 900, (1333, 800)) == (4, 1333)
    assert padded([(800, 1067), (533, 1333)]) == (800, 1344)
    assert padded([(64, 96)]) == (64, 96)


def test_an_epochs_steps_have_one_orientation_and_show_every_image(data):
    """Four wide and two tall images, in steps of three: two wide ones are shown twice, and one tall one."""
    plan = plan_of(data, 3)
    steps = plan.steps(0)
    assert steps.shape == (plan.num_steps, 3) == (3, 3)
    is_tall = data.sizes[steps, 0] >= data.sizes[steps, 1]
    assert (is_tall.all(1) | ~is_tall.any(1)).all()
    assert np.bincount(steps.flatten(), minlength=8).tolist()[6:] == [0, 0]
    counts = np.bincount(steps.flatten())
    assert sorted(counts[[0, 1, 3, 4]]) == [1, 1, 2, 2]
    assert sorted(counts[[2, 5]]) == [1, 2]
    assert not np.array_equal(steps, plan.steps(1))
    assert not np.array_equal(steps, plan_of(data, 3, data_seed=1).steps(0))


def equal(a: batches.Batch, b: batches.Batch) -> bool:
    same_targets = all(torch.equal(one[name], two[name]) for one, two in zip(a.targets, b.targets, strict=True) for name in one)
    return torch.equal(a.images, b.images) and a.sizes == b.sizes and a.indices == b.indices and a.words == b.words and same_targets


def joined(parts: list[batches.Batch]) -> batches.Batch:
    """A step's parts as one batch."""
    whole = {name: [value for part in parts for value in getattr(part, name)] for name in batches.Batch._fields if name != "images"}
    return batches.Batch(torch.cat([part.images for part in parts]), **whole)


def test_a_step_is_the_same_for_any_processes_accumulation_workers_and_start(data):
    plan = plan_of(data, 4)
    alone = list(loader_of(plan).batches(3))
    assert [len(batch.indices) for batch in alone] == [4] * plan.num_steps
    torch.manual_seed(5)
    by_process = [parts_of(loader_of(plan, index=i, world_size=2), 3) for i in range(2)]
    by_accumulation = list(loader_of(plan, accum_steps=2).batches(3))
    in_workers = list(loader_of(plan, settings={**IN_PROCESS, "num_workers": 2, "multiprocessing_context": "fork"}).batches(3, first_step=1))
    for step, batch in enumerate(alone):
        assert equal(batch, joined([parts[step] for parts in by_process]))
        assert equal(batch, joined(by_accumulation[2 * step : 2 * step + 2]))
    assert all(equal(one, two) for one, two in zip(alone[1:], in_workers, strict=True))


def test_steps_that_cannot_be_shared_are_explained(data):
    with pytest.raises(InputError, match="4 images cannot be shared by 3"):
        StepSampler(plan_of(data, 4), accum_steps=1, rank=0, world_size=3)


def test_flips_are_drawn_by_position_and_turn_images_boxes_and_masks_alike(data):
    """The white square of every image is where its box and its mask say, flipped or not; about half are."""
    plan = plan_of(data, 2)
    flips = []
    for epoch in range(4):
        for batch in loader_of(plan).batches(epoch):
            for image, size, target, index in zip(batch.images, batch.sizes, batch.targets, batch.indices, strict=True):
                scale = size[1] / data.sizes[index, 1]
                x1, y1, x2, y2 = (int(side) for side in target["boxes"][0].round())
                flips.append(x1 != round(4 * scale))
                left = size[1] - round(24 * scale) if flips[-1] else round(4 * scale)
                assert abs(x1 - left) <= 1
                rows, columns = torch.where(target["masks"][0])
                assert [
                    abs(int(a) - b) <= 1 for a, b in zip((columns.min(), rows.min(), columns.max(), rows.max()), (x1, y1, x2 - 1, y2 - 1), strict=True)
                ] == [True] * 4
                assert image[0, y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].min() > 2.0  # white, normalised
    assert 0.25 < np.mean(flips) < 0.75


def test_padding_is_zero_after_normalising_and_a_multiple_of_32(data):
    batch = next(iter(loader_of(plan_of(data, 4)).batches(0)))
    height, width = batch.images.shape[2:]
    assert (height % 32, width % 32) == (0, 0)
    for image, size in zip(batch.images, batch.sizes, strict=True):
        assert not image[:, size[0] :].any()
        assert not image[:, :, size[1] :].any()
        assert image[:, : size[0], : size[1]].any()


def test_pixels_are_those_of_a_bilinear_resize_normalised(data):
    part = next(iter(StepSampler(plan_of(data, 1), accum_steps=1, rank=0, world_size=1)))
    batch = finished(TrainingSet(plan_of(data, 1), has_masks=False).__getitems__(part))
    (size,), (index,), (target,) = batch.sizes, batch.indices, batch.targets
    assert set(target) == {"boxes", "labels"}
    with Image.open(data.file(index)) as image:
        expected = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = batch.images[0, :, : size[0], : size[1]].permute(1, 2, 0).numpy()
    pixels = pixels[:, ::-1] if plan_of(data, 1).words(part.epoch, part.positions[0])[2] & 1 else pixels
    assert np.abs(pixels - expected).mean() < 0.02


def test_boxes_and_masks_scale_by_each_sides_own_factor(data):
    target = load_target(data, 0, (32, 192), is_flipped=False, has_masks=True)
    assert target["boxes"].tolist() == [[8, 4, 48, 12], [20, 5, 52, 13]]
    assert target["masks"].shape == (2, 32, 192)
    assert int(target["masks"][0].sum()) == 40 * 8


def test_evaluation_sees_each_image_once_and_alone(data):
    seen = []
    for index in range(3):
        for batch in share_of(build_val_loader(data, Rank(index, 3, 0, 1, CPU), settings=IN_PROCESS, max_size=MAX_SIZE)):
            assert len(batch.indices) == 1
            assert batch.targets is None
            assert batch.images.shape[2:] == padded(batch.sizes)
            assert batch.original_sizes == [tuple(data.sizes[batch.indices[0]])]
            seen += batch.indices
    assert sorted(seen) == list(range(8))


def test_an_image_of_another_size_than_the_annotations_say_is_named(tmp_path):
    content = made.content()
    content["images"][0]["height"] = 65
    data = coco.read(made.write(tmp_path, content), tmp_path, has_masks=False)
    with pytest.raises(InputError, match="0.jpg is 96x64 pixels, .*annotations.json says 96x65"):
        batches.load_image(data, 0, MAX_SIZE)


def test_without_the_fast_decoder_pillow_reads(data, monkeypatch):
    fast = batches.load_image(data, 0, MAX_SIZE)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert np.abs(batches.load_image(data, 0, MAX_SIZE).astype(int) - fast).max() <= 2
