import random

import numpy as np
import pytest
import torch

from loading import keys
from run.errors import InputError


def plan_of(num_images, repeated_aug=True, group_size=256, lanes=8, data_seed=0):
    return keys.build_plan(num_images, repeated_aug=repeated_aug, group_size=group_size, lanes=lanes, data_seed=data_seed)


def sampler_of(plan, batch_size, accum_steps=1, rank=0, world_size=1):
    return keys.KeyedBatchSampler(plan, batch_size=batch_size, accum_steps=accum_steps, rank=rank, world_size=world_size)


@pytest.mark.parametrize(
    ("num_images", "repeated", "expected"),  # repeats, group size, lanes, positions
    [
        (1281167, True, (3, 256, 8, 1280000)),
        (1281167, False, (1, 256, 8, 1280000)),
        (50000, False, (1, 256, 8, 49152)),
        (1437, True, (3, 256, 5, 1280)),
        (255, True, (3, 254, 1, 254)),
        (7, False, (1, 6, 1, 6)),
        (2, True, (3, 2, 1, 2)),
    ],
)
def test_plan_of_data_sets_of_any_size(num_images, repeated, expected):
    plan = plan_of(num_images, repeated)
    assert (plan.repeats, plan.group_size, plan.lanes, plan.num_positions) == expected


def test_one_image_is_too_few():
    with pytest.raises(InputError, match="at least two"):
        plan_of(1)


def test_order_is_the_published_samplers():
    """Entry j of rank r of repeated augmentation is position r + world * j; every image stands three times in a row."""
    plan = plan_of(600)
    permutation = plan.permutation(4)
    repeated = permutation.repeat_interleave(3)[: plan.num_positions]
    seen = {}
    for batch in iter_epoch(sampler_of(plan, 64), 4):
        seen.update({key.position: (key.sample, key.repeat) for key in batch})
    assert [seen[p][0] for p in range(plan.num_positions)] == repeated.tolist()
    assert [seen[p][1] for p in range(6)] == [0, 1, 2, 0, 1, 2]
    assert not torch.equal(permutation, plan.permutation(5))


def iter_epoch(sampler, epoch, step=0):
    sampler.start(epoch=epoch, step=step)
    return list(sampler)


@pytest.mark.parametrize("batch_size", [2, 8, 32, 64, 128])
def test_every_batch_is_closed_under_mirroring_and_in_mirror_order(batch_size):
    plan = plan_of(512, group_size=64, lanes=4)
    for batch in iter_epoch(sampler_of(plan, batch_size), 0):
        groups, members = plan.groups_and_members(np.array([key.position for key in batch]))
        for group in np.unique(groups):
            mine = members[groups == group]
            assert (mine + mine[::-1] == plan.group_size - 1).all()


def test_a_group_is_one_lane_of_a_block():
    plan = plan_of(2048 * 2)
    groups, members = plan.groups_and_members(np.arange(plan.num_positions))
    first = np.flatnonzero(groups == 3)
    assert first.tolist() == [3 + 8 * i for i in range(256)]
    assert members[first].tolist() == list(range(256))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_hold_the_same_images_for_any_number_of_processes(world_size):
    plan = plan_of(1024, group_size=32, lanes=4)
    expected = [sorted(key.position for key in batch) for batch in iter_epoch(sampler_of(plan, 128), 2)]
    parts = [iter_epoch(sampler_of(plan, 32, accum_steps=4 // world_size, rank=rank, world_size=world_size), 2) for rank in range(world_size)]
    for step, positions in enumerate(expected):
        accum = 4 // world_size
        found = [key.position for part in parts for batch in part[step * accum : (step + 1) * accum] for key in batch]
        assert sorted(found) == positions


def test_starting_at_a_step_gives_the_rest_of_the_epoch():
    sampler = sampler_of(plan_of(600), 64, accum_steps=2)
    whole = iter_epoch(sampler, 1)
    rest = iter_epoch(sampler, 1, step=2)
    assert rest == whole[4:] and len(sampler) == len(rest)


def test_generators_are_seeded_inside_and_restored_outside():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    keys.seed_generators((1, 2, 3))
    ambient = draw()
    with keys.seeded(keys.draw_words("sample", 7)):
        first = draw()
    keys.seed_generators((1, 2, 3))
    with keys.seeded(keys.draw_words("sample", 7)):
        assert draw() == first
    assert draw() == ambient


def test_words_depend_on_every_part_of_the_key():
    base = keys.draw_words("sample", 0, 1, 2)
    assert len({base, keys.draw_words("mix", 0, 1, 2), keys.draw_words("sample", 1, 1, 2), keys.draw_words("sample", 0, 1, 3)}) == 4
    assert base == keys.draw_words("sample", 0, 1, 2)


def test_batch_that_splits_groups_is_refused_with_those_that_fit():
    fit = {"num_shares": 1, "group_size": 256}
    with pytest.raises(InputError, match=r"--batch-size 96.*64, 128, 256 or a multiple of 256"):
        keys.fit_batch_size(plan_of(4096), 96, is_mixing=True, **fit)
    assert [keys.fit_batch_size(plan_of(4096), size, is_mixing=True, **fit) for size in (64, 256, 512)] == [64, 256, 512]
    assert keys.fit_batch_size(plan_of(4096), 96, is_mixing=False, **fit) == 96


def test_data_sets_smaller_than_a_batch_shrink_it():
    assert keys.fit_batch_size(plan_of(61), 256, num_shares=1, group_size=256, is_mixing=True) == 60
    assert keys.fit_batch_size(plan_of(61), 256, num_shares=4, group_size=256, is_mixing=True) == 14
    with pytest.raises(InputError, match="use fewer"):
        keys.fit_batch_size(plan_of(4), 256, num_shares=4, group_size=256, is_mixing=True)
