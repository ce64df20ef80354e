"""Pairs of pictures and label images: layouts, 8 and 16 bits, ignored values, classes and their files; everything wrong by one message."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from features.pictures import made_palette
from run.errors import DamagedImage, InputError
from segmentation import classes, data
from segmentation.classes import ADE20K, Classes, numbered, read_classes
from segmentation.networks import IGNORED
from tests.segmentation import made
from utils import Rank

THREE = numbered(3)
ALONE = Rank(0, 1, 0, 1, torch.device("cpu"))


def read(root, chosen: Classes = THREE, *, skips_zero: bool = False, split: str = "training") -> data.SegData:
    return data.read(*made.folders(root, split), chosen, skips_zero=skips_zero)


def test_ade20ks_layout_its_value_0_is_ignored_and_k_is_class_k_minus_1(tmp_path):
    split = read(made.write(tmp_path, offset=1), skips_zero=True)
    assert len(split) == len(made.SIZES)
    for index, (width, height) in enumerate(made.SIZES):
        image, labels = split.read(index)
        assert image.shape == (height, width, 3)
        assert np.array_equal(labels, made.labels_of(width, height))
    values = np.array([[0, 1, 150, 255]], np.uint8)
    assert data.to_labels(values, skips_zero=True).tolist() == [[IGNORED, 0, 149, IGNORED]]
    assert data.to_labels(values, skips_zero=False).tolist() == [[0, 1, 150, IGNORED]]


def test_values_of_16_bits_of_palettes_and_of_one_bit_are_numbers_of_classes(tmp_path):
    deep = np.array([[0, 255, 300, 65535]], np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert data.to_labels(data.read_values(str(tmp_path / name)), skips_zero=False).tolist() == [[0, 255, 300, IGNORED]]
    pointed = Image.fromarray(np.array([[0, 2, 255]], np.uint8)).convert("P")
    pointed.putpalette(list(range(255, -1, -1)) * 3)
    pointed.save(tmp_path / "palette.png")
    assert data.read_values(str(tmp_path / "palette.png")).tolist() == [[0, 2, 255]]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bit.png")
    assert data.read_values(str(tmp_path / "bit.png")).tolist() == [[0, 1]]


def test_folders_within_folders_are_paired_by_their_names(tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", ".hidden/y.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    for name in ("a/x.png", "b/x.png"):
        (tmp_path / "labels" / name).parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "labels" / name)
    split = data.read(tmp_path / "images", tmp_path / "labels", THREE, skips_zero=False)
    assert [(split.image_file(i), split.label_file(i)) for i in range(len(split))] == [
        (str(tmp_path / "images" / name / "x.jpg"), str(tmp_path / "labels" / name / "x.png")) for name in "ab"
    ]


# ---- what is wrong


def swap_sides(root):
    Image.new("L", (64, 96)).save(root / "annotations/training/0.png")


def write_high(root):
    Image.fromarray(np.full((64, 96), 3, np.uint8)).save(root / "annotations/training/0.png")


def write_high_16(root):
    Image.fromarray(np.full((64, 96), 4000, np.uint16)).save(root / "annotations/training/0.png")


def write_colours(root):
    Image.new("RGB", (96, 64)).save(root / "annotations/training/0.png")


def write_floats(root):
    (root / "annotations/training/0.png").unlink()
    Image.fromarray(np.zeros((64, 96), np.float32)).save(root / "annotations/training/0.tif")


def tear_labels(root):
    whole = (root / "annotations/training/0.png").read_bytes()
    (root / "annotations/training/0.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (swap_sides, r"training/0.png is 64x96 pixels, its picture .*images/training/0.jpg 96x64: make them the same size"),
        (write_high, r"0.png has pixels of value 3, beyond the 3 classes \(values 0 to 2\): correct the file, or --classes"),
        (write_high_16, r"0.png has pixels of value 4000, beyond the 3 classes"),
        (write_colours, r"0.png is no label image, its pixels are RGB: it needs one channel of 8 or 16 bits.*convert colours"),
        (write_floats, r"0.tif is no label image, its pixels are F"),
    ],
)
def test_label_files_that_do_not_fit_are_named(tmp_path, spoil, word):
    spoil(made.write(tmp_path))
    split = read(tmp_path)
    with pytest.raises(InputError, match=word):
        split.read(0)
    split.read(1)


def test_the_range_is_told_as_the_file_has_it(tmp_path):
    split = read(made.write(tmp_path, offset=1), numbered(2), skips_zero=True)
    with pytest.raises(InputError, match=r"value 3, beyond the 2 classes \(values 1 to 2\)"):
        split.read(0)


def test_damaged_label_images_are_named(tmp_path):
    tear_labels(made.write(tmp_path))
    with pytest.raises(DamagedImage, match="annotations/training/0.png cannot be read as an image"):
        read(tmp_path).read(0)


def remove_label(root):
    (root / "annotations/training/2.png").unlink()


def remove_picture(root):
    (root / "images/training/2.jpg").unlink()


def make_twin(root):
    Image.new("RGB", (8, 8)).save(root / "images/training/2.png")


def remove_folder(root):
    (root / "annotations").rename(root / "elsewhere")


def remove_all(root):
    for path in (root / "images/training").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (remove_label, r"1 of 4 pictures in .*images/training have no label image of that name in .*annotations/training, first 2.jpg: add it, or remove"),
        (remove_picture, r"1 of 4 label images in .*annotations/training have no picture of that name in .*images/training, first 2.png"),
        (make_twin, r"images/training holds both 2.jpg and 2.png"),
        (remove_folder, r"annotations/training is no folder: it must hold the label images"),
        (remove_all, r"images/training holds none of the pictures"),
    ],
)
def test_pictures_and_label_images_that_are_no_pairs_are_named(tmp_path, spoil, word):
    spoil(made.write(tmp_path))
    with pytest.raises(InputError, match=word):
        read(tmp_path)


# ---- classes


def test_the_number_of_classes_is_found_with_a_warning_by_any_number_of_processes(tmp_path, caplog, monkeypatch):
    made.write(tmp_path)
    Image.fromarray(np.full((64, 96), 700, np.uint16)).save(tmp_path / "annotations/validation/0.png")
    splits = [made.folders(tmp_path, split) for split in ("training", "validation")]
    with caplog.at_level(logging.WARNING, logger="understudy"):
        assert data.find_num_classes(splits, ALONE, skips_zero=False) == 701
    assert "701 classes, from the highest value in 8 label images: give --num-classes or --classes" in caplog.text
    monkeypatch.setattr(data, "max_over_processes", lambda values, rank: values)
    parts = [data.find_num_classes(splits, Rank(i, 2, i, 2, torch.device("cpu")), skips_zero=True) for i in range(2)]
    assert sorted(parts) == [2, 700]  # each looked at half of the files


def test_labels_without_classes_or_with_other_numbers_are_explained(tmp_path):
    for path in (made.write(tmp_path) / "annotations/training").iterdir():
        Image.new("L", (96, 64), 255).save(path)
    with pytest.raises(InputError, match="none of the 4 label images, first .*0.png, has a pixel with a class"):
        data.find_num_classes([made.folders(tmp_path)], ALONE, skips_zero=False)
    Image.fromarray(np.full((64, 96), 60000, np.uint16)).save(tmp_path / "annotations/training/0.png")
    with pytest.raises(InputError, match="values up to 60000, and at most 4096 classes are possible"):
        data.find_num_classes([made.folders(tmp_path)], ALONE, skips_zero=False)


def test_ade20ks_classes():
    found = read_classes(ADE20K)
    assert len(found) == len(set(found.names)) == 150
    assert (found.names[0], found.names[6], found.names[44], found.names[149]) == ("wall", "road", "chest of drawers", "flag")
    assert found.palette[[0, 2, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [92, 0, 255]]


def test_a_file_of_names_may_give_colours(tmp_path):
    (tmp_path / "names.txt").write_text("back ground\nC# code #0a0bFF\nroad\n\n")
    found = read_classes(tmp_path / "names.txt")
    assert found.names == ["back ground", "C# code", "road"]
    assert found.palette.tolist() == [made_palette(3)[0].tolist(), [10, 11, 255], made_palette(3)[2].tolist()]
    assert len({tuple(colour) for colour in made_palette(255).tolist()}) == 255


@pytest.mark.parametrize(
    ("text", "word"),
    [("a\n\nb\n", "line 2 has no name"), ("a\nb\na\n", "line 3: 'a' is already class 0"), ("", "has 0 names"), (None, "cannot be read")],
)
def test_files_of_names_that_cannot_be_used_are_explained(tmp_path, text, word):
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    with pytest.raises(InputError, match=word):
        classes.read_classes(tmp_path / "names.txt")
