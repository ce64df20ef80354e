"""Annotation files in COCO's format: what is read of a sound one, and one message for each thing that is wrong."""

import json
import sys

import numpy as np
import pytest
import torch

from detection import coco
from run.errors import InputError
from tests.detection import made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> coco.CocoData:
    folder = tmp_path_factory.mktemp("made")
    return coco.read(made.write(folder), folder, has_masks=True)


def test_labels_follow_the_order_of_category_ids_and_names_come_from_the_file(data):
    assert (data.category_ids, data.class_names) == ([3, 7], ["square", "triangle"])
    target = data.target(0, has_masks=True)
    assert target["labels"].tolist() == [0, 1]
    assert target["boxes"].tolist() == [[4, 8, 24, 24], [10, 10, 26, 26]]
    assert target["masks"].shape == (2, 64, 96)
    square = torch.zeros(64, 96, dtype=torch.uint8)
    square[8:24, 4:24] = 1
    assert torch.equal(target["masks"][0], square)


def test_crowds_are_no_targets_and_images_without_objects_or_too_small_are_left_out(data):
    assert len(data) == 8
    assert data.training_images().tolist() == [0, 1, 2, 3, 4, 5]  # the seventh is 31 pixels high, the eighth has a crowd alone
    target = data.target(7, has_masks=True)
    assert (target["boxes"].shape, target["labels"].shape, target["masks"].shape) == ((0, 4), (0,), (0, 64, 64))


def test_boxes_under_a_pixel_and_without_area_are_dropped_and_rounding_is_clipped(tmp_path):
    content = made.content()
    first = content["annotations"][0]
    content["annotations"] += [
        first | {"id": 90, "bbox": [4, 8, 0.9, 16]},
        first | {"id": 91, "bbox": [4, 8, 20, 0]},
        first | {"id": 92, "area": 0},
        first | {"id": 93, "bbox": [86, -0.5, 10.6, 20]},
        first | {"id": 94, "bbox": [-1, 8, 1, 16]},  # nothing of it is left
    ]
    data = coco.read(made.write(tmp_path, content), tmp_path, has_masks=False)
    boxes = data.target(0, has_masks=False)["boxes"]
    torch.testing.assert_close(boxes, torch.tensor([[4.0, 8, 24, 24], [10, 10, 26, 26], [86, 0, 96, 19.5]]))


def test_masks_of_polygons_and_both_run_length_encodings():
    """Two rectangles of one object; columns come one below the other in a run-length encoding."""
    polygons = made.rectangle(0, 0, 2, 3) + made.rectangle(4, 1, 1, 1)
    mask = np.zeros((3, 6), np.uint8)
    mask[:, :2], mask[1, 4] = 1, 1
    runs = {"size": [3, 6], "counts": [0, 6, 7, 1, 4]}
    compressed = coco.mask_api().frPyObjects(runs, 3, 6)
    compressed = compressed | {"counts": compressed["counts"].decode() if isinstance(compressed["counts"], bytes) else compressed["counts"]}
    for segmentation in (polygons, runs, compressed):
        assert np.array_equal(coco.decode_mask(segmentation, 3, 6), mask)


def change(**changes):
    def to(content: dict) -> dict:
        for name, value in changes.items():
            content["annotations"][1][name] = value
        return content

    return to


def test_each_hostile_file_gets_one_clear_message(tmp_path):
    sound = made.write(tmp_path)
    hostile = [
        (lambda content: content | {"annotations": []}, "no objects at all"),
        (lambda content: content | {"images": content["images"] + [{"id": 99, "file_name": "gone.jpg", "width": 9, "height": 9}]}, "1 of 9 images.*gone.jpg"),
        (lambda content: content | {"images": content["images"] + content["images"][:1]}, "1 images with the id of another"),
        (lambda content: content | {"images": [one | {"width": None} for one in content["images"]]}, "image 10: 'width' is null"),
        (lambda content: {"images": content["images"]}, "no list 'annotations'"),
        (lambda content: content | {"categories": []}, "0 categories"),
        (change(category_id=4), r"1 of 15 annotations.*id 2: category_id 4 is not among the categories \(3, 7\)"),
        (change(image_id=1), "id 2: image_id 1 is not among the images"),
        (change(bbox=[90, 10, 16, 16]), r"id 2: bbox \[90, 10, 16, 16\] lies outside its image 0.jpg, 96x64"),
        (change(bbox=[10, 10, -16, 16]), "lies outside its image"),
        (change(bbox=[10, 10, 16]), r"bbox is \[10, 10, 16\]"),
        (change(segmentation=[[1, 2, 3, 4]]), "three points"),
        (change(segmentation=None), "no segmentation"),
        (change(segmentation={"size": [96, 64], "counts": [0, 6144]}), r"size \[96, 64\], its image \[64, 96\]"),
    ]
    for make, message in hostile:
        path = tmp_path / "hostile.json"
        path.write_text(json.dumps(make(made.content())))
        with pytest.raises(InputError, match=message):
            coco.read(path, tmp_path, has_masks=True)
    path.write_text(sound.read_text()[:-9])
    with pytest.raises(InputError, match="no valid JSON"):
        coco.read(path, tmp_path, has_masks=True)
    with pytest.raises(InputError, match="absent.json: the annotation file cannot be read"):
        coco.read(tmp_path / "absent.json", tmp_path, has_masks=True)
    with pytest.raises(InputError, match="is no folder"):
        coco.read(sound, tmp_path / "absent", has_masks=True)


def test_objects_without_masks_serve_detectors_without_masks(tmp_path):
    content = made.content()
    for one in content["annotations"]:
        del one["segmentation"], one["area"], one["iscrowd"]
    data = coco.read(made.write(tmp_path, content), tmp_path, has_masks=False)
    assert len(data.target(0, has_masks=False)["boxes"]) == 2


def test_nothing_to_learn_from_is_said(tmp_path):
    content = made.content()
    content["annotations"] = content["annotations"][-1:]
    data = coco.read(made.write(tmp_path, content), tmp_path, has_masks=True)
    with pytest.raises(InputError, match="no image to learn from"):
        data.training_images()


def test_classes_of_one_name_are_told_apart(tmp_path):
    data = coco.read(made.write(tmp_path, {**made.content(), "categories": [one | {"name": "thing"} for one in made.CATEGORIES]}), tmp_path, has_masks=False)
    assert data.class_names == ["thing (3)", "thing (7)"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(InputError, match="pip install -r requirements-detection.txt"):
        coco.mask_api()
