"""Keyed batches: the same whatever the processes, the workers and the start; padding; what evaluation sees."""

import numpy as np
import pytest
import torch

from run.errors import DamagedImage, DamagedImages, InputError
from segmentation import batches, data
from segmentation.batches import build_plan, build_train_loader, build_val_loader
from segmentation.classes import numbered
from segmentation.networks import IGNORED
from tests.loading.alone import parts_of, share_of
from tests.segmentation import made
from utils import Rank

CPU = torch.device("cpu")
IN_PROCESS = {"num_workers": 0, "collate_fn": lambda batch: batch}
MAX_SIZE = (160, 80)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> data.SegData:
    return data.read(*made.folders(made.write(tmp_path_factory.mktemp("made"))), numbered(3), skips_zero=False)


def plan_of(split: data.SegData, batch_size: int = 2, num_steps: int = 3, **settings) -> batches.IterationPlan:
    return build_plan(split, batch_size=batch_size, num_steps=num_steps, crop_size=64, max_size=MAX_SIZE, **settings)


def loader_of(plan: batches.IterationPlan, *, index: int = 0, world_size: int = 1, accum_steps: int = 1, settings: dict = IN_PROCESS):
    return build_train_loader(plan, Rank(index, world_size, 0, 1, CPU), settings=settings, accum_steps=accum_steps)


def test_every_pass_shows_each_picture_once_in_an_order_of_its_own(split):
    """Four pictures, two per iteration, three iterations per epoch: passes go on over the ends of epochs."""
    plan = plan_of(split)
    images = np.concatenate([plan.steps(epoch) for epoch in range(4)]).reshape(-1, 4)
    assert [sorted(one) for one in images.tolist()] == [[0, 1, 2, 3]] * 6
    assert len({tuple(one) for one in images.tolist()}) > 1
    assert not np.array_equal(plan.steps(0), plan_of(split, data_seed=1).steps(0))


def test_an_iteration_is_the_same_however_iterations_are_cut_into_epochs(split):
    by_three, by_two = plan_of(split), plan_of(split, num_steps=2)
    assert np.array_equal(np.concatenate([by_three.steps(e) for e in range(2)]), np.concatenate([by_two.steps(e) for e in range(3)]))
    assert by_three.draws(1, 2)[1] == by_two.draws(2, 0)[1]  # position 8


def equal(a: batches.Batch, b: batches.Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a[2:] == b[2:]


def joined(parts: list[batches.Batch]) -> batches.Batch:
    """An iteration's parts as one batch."""
    rest = [[value for part in parts for value in getattr(part, name)] for name in ("sizes", "indices", "words")]
    return batches.Batch(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]), *rest)


def test_an_iteration_is_the_same_for_any_processes_accumulation_workers_and_start(split):
    plan = plan_of(split, 4)
    alone = list(loader_of(plan).batches(2))
    assert [len(batch.indices) for batch in alone] == [4] * 3
    torch.manual_seed(5)
    np.random.seed(6)
    by_process = [parts_of(loader_of(plan, index=i, world_size=2), 2) for i in range(2)]
    by_accumulation = list(loader_of(plan, accum_steps=2).batches(2))
    in_workers = list(loader_of(plan, settings={**IN_PROCESS, "num_workers": 2, "multiprocessing_context": "fork"}).batches(2, first_step=1))
    for step, batch in enumerate(alone):
        assert equal(batch, joined([parts[step] for parts in by_process]))
        assert equal(batch, joined(by_accumulation[2 * step : 2 * step + 2]))
    assert all(equal(one, two) for one, two in zip(alone[1:], in_workers, strict=True))
    assert len(in_workers) == 2


def test_small_pictures_are_padded_with_zeros_and_ignored_labels(split):
    padded = 0
    for batch in (one for epoch in range(3) for one in loader_of(plan_of(split)).batches(epoch)):
        assert batch.images.shape == (2, 3, 64, 64)
        assert batch.labels.dtype == torch.int32
        for image, labels, (height, width) in zip(batch.images, batch.labels, batch.sizes, strict=True):
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()
            assert (labels[height:] == IGNORED).all()
            assert (labels[:, width:] == IGNORED).all()
            assert (labels[:height, :width] != IGNORED).all()
            padded += (height, width) != (64, 64)
    assert padded > 0


def test_evaluation_resizes_up_to_multiples_of_32_and_keeps_the_labels_size(split):
    assert batches.tested_size(512, 683, (2048, 512)) == (512, 704)
    assert batches.tested_size(683, 512, (2048, 512)) == (704, 512)
    assert batches.tested_size(300, 400, (2048, 512)) == (512, 704)  # enlarged to 512 x 683 first
    assert batches.tested_size(100, 1000, (2048, 512)) == (224, 2048)  # 205 rows
    seen = []
    for index in range(3):
        loader = build_val_loader(split, Rank(index, 3, 0, 1, CPU), settings=IN_PROCESS, max_size=MAX_SIZE)
        for batch in share_of(loader):
            (place,) = batch.indices
            seen.append(place)
            width, height = made.SIZES[place]
            assert batch.labels.shape == (1, height, width)
            assert batch.images.shape[2:] == batches.tested_size(height, width, MAX_SIZE)
            assert batch.images[0].flatten(1).any(0).all()  # nothing is padding
            # the dark stripe of class 2 is at the bottom, whatever the size
            assert batch.images[0, 0, -2:].max() < batch.images[0, 0, : batch.images.shape[2] // 2].min()
    assert sorted(seen) == list(range(4))


def test_plans_that_cannot_be_are_explained(split):
    with pytest.raises(InputError, match="--crop-size 100 is no multiple of 32: use 96"):
        build_plan(split, batch_size=2, num_steps=1, crop_size=100)
    with pytest.raises(InputError, match="4 images cannot be shared by 3"):
        loader_of(plan_of(split, 4), world_size=3)


# ---- damaged files


@pytest.fixture
def torn(tmp_path) -> data.SegData:
    """Of four pictures the second is damaged, and of the fourth its label image."""
    root = made.write(tmp_path)
    (root / "images/training/1.jpg").write_bytes(b"nothing")
    (root / "annotations/training/3.png").write_bytes(b"nothing")
    return data.read(*made.folders(root), numbered(3), skips_zero=False)


def test_others_stand_in_for_damaged_pictures_and_label_images(torn):
    loaders = [build_train_loader(plan_of(torn, 4), Rank(0, 1, 0, 1, CPU), settings=IN_PROCESS, max_bad_images=limit) for limit in (2, 2, 1)]
    first, again = (list(loader.batches(0)) for loader in loaders[:2])
    assert all(equal(one, two) for one, two in zip(first, again, strict=True))
    order = plan_of(torn, 4).steps(0)
    for batch, planned in zip(first, order.tolist(), strict=True):
        assert {planned[place] for place in batch.replaced} == {1, 3}
        assert set(batch.indices) <= {0, 2}
        assert [own for place, own in enumerate(batch.indices) if place not in batch.replaced] == [one for one in planned if one in (0, 2)]
    assert [name.rpartition("/")[2] for name in sorted(loaders[0].damage.reasons, key=lambda name: name.rpartition("/")[2])] == ["1.jpg", "3.png"]
    with pytest.raises(DamagedImages, match="2 training images are damaged, more than --max-bad-images 1"):
        list(loaders[2].batches(0))


def test_where_none_may_stand_in_or_is_left_the_first_damaged_file_ends_the_run(torn):
    with pytest.raises(DamagedImage, match="1.jpg|3.png"):
        list(loader_of(plan_of(torn, 4)).batches(0))
    for name in ("0", "2"):
        (torn.image_folder / f"{name}.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no image can stand in for .*, which is damaged"):
        list(build_train_loader(plan_of(torn, 4), Rank(0, 1, 0, 1, CPU), settings=IN_PROCESS, max_bad_images=9).batches(0))


def test_evaluation_without_damaged_files_or_not_at_all(torn):
    alone = Rank(0, 1, 0, 1, CPU)
    loader = build_val_loader(torn, alone, settings=IN_PROCESS, max_size=MAX_SIZE, skips_damaged=True)
    assert [batch.indices for batch in loader] == [[0], [2]]
    assert loader.damage.num_skipped == 2
    with pytest.raises(DamagedImages, match="2 of 4 validation images are damaged"):
        list(build_val_loader(torn, alone, settings=IN_PROCESS, max_size=MAX_SIZE))
