"""The made data set: what is marked is what is drawn, in every form that COCO's format has."""

import json

import numpy as np
import pytest
from PIL import Image

from detection import coco
from tools import make_shapes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes.make(folder, num_train=60, num_val=4, is_semantic=True)
    return folder


def test_marks_fit_the_masks_and_all_kinds_are_there(made):
    content = json.loads((made / "annotations" / "instances_train2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    kinds = set()
    for one in content["annotations"]:
        mask = coco.decode_mask(one["segmentation"], *sizes[one["image_id"]])
        rows, columns = np.where(mask)
        x, y, width, height = one["bbox"]
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.subtract(found, [x, y, x + width, y + height])).max() <= 1  # polygons are filled by another rule
        assert int(mask.sum()) == pytest.approx(one["area"], rel=0.15, abs=8)
        is_cut = x == 0 or y == 0 or x + width == sizes[one["image_id"]][1] or y + height == sizes[one["image_id"]][0]
        facts = {"crowd": one["iscrowd"], "tiny": one["area"] < 150, "cut": is_cut, type(one["segmentation"]).__name__: True}
        kinds |= {name for name, holds in facts.items() if holds}
    assert kinds == {"crowd", "list", "dict", "tiny", "cut"}
    assert {height > width for height, width in sizes.values()} == {True, False}
    assert {one["category_id"] for one in content["annotations"]} == {1, 2, 3}


def test_label_images_are_those_of_the_objects(made):
    data = coco.read(made / "annotations" / "instances_val2017.json", made / "val2017", has_masks=True)
    for i in range(len(data)):
        labels = np.asarray(Image.open(made / "annotations" / "validation" / f"{i + 1:06d}.png"))
        assert labels.shape == tuple(data.sizes[i]) and (labels == make_shapes.GROUND).any()
        target = data.target(i, has_masks=True)
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            assert (labels[mask.numpy().astype(bool)] == make_shapes.FIRST_SHAPE + label.item()).mean() > 0.9
        assert (made / "images" / "validation" / f"{i + 1:06d}.jpg").read_bytes() == (made / "val2017" / f"{i + 1:06d}.jpg").read_bytes()


def test_run_lengths_by_hand():
    mask = np.array([[0, 1], [1, 1]], bool)
    assert make_shapes.run_lengths(mask) == {"size": [2, 2], "counts": [1, 3]}
    assert make_shapes.run_lengths(~mask) == {"size": [2, 2], "counts": [0, 1, 3]}


def test_the_same_seed_makes_the_same_images():
    from sklearn.datasets import load_sample_images

    images = [make_shapes.make_image(np.random.RandomState([seed, 0, 0]), load_sample_images().images)[0] for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1]) and not (images[0].shape == images[2].shape and np.array_equal(images[0], images[2]))
