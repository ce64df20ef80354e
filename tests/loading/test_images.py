"""What lies around in folders, and odd pixels."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import datasets
import utils
from loading import images
from loading.images import Joined, Names, Paths, Selected
from run.errors import DamagedImage
from tests.sources.test_runs import settings


@pytest.fixture
def cluttered(digits_folder, tmp_path):
    """The small folder with what file managers, cameras and other tools leave in one."""
    shutil.copytree(digits_folder, tmp_path / "data")
    folder = tmp_path / "data" / "train" / "1"
    (folder / ".thumbnails").mkdir()
    for name in ("._0001.jpg", ".DS_Store", "a.gif", "b.gif", "c.HEIC", "d.jxl", "notes", ".thumbnails/x.jpg"):
        (folder / name).write_bytes(b"none of ours")
    return tmp_path / "data"


def test_hidden_files_are_left_out_and_other_kinds_counted_in_one_line(cluttered, digits_folder, monkeypatch, caplog):
    monkeypatch.setattr(utils.log, "propagate", True)
    ours, theirs = datasets.open_images(settings(cluttered)), datasets.open_images(settings(digits_folder))
    assert [len(part) for part in ours] == [len(part) for part in theirs] == [96, 40]
    (line,) = {message for message in caplog.messages if "left out" in message}
    assert line.startswith(f"{cluttered / 'train'}: 7 files are left out") and line.endswith("2 .gif, 2 hidden, 1 .heic, 1 .jxl, 1 without an ending")


def test_tars_leave_out_what_folders_leave_out(cluttered, monkeypatch, caplog):
    folder, _ = datasets.open_images(settings(cluttered))
    for split in ("train", "val"):
        with tarfile.open(cluttered / f"{split}.tar", "w") as tar:
            tar.add(cluttered / split, arcname=f"./{split}")
    monkeypatch.setattr(utils.log, "propagate", True)
    tar, _ = datasets.open_images(settings(cluttered, "--data-format=tar"))
    assert [os.path.basename(str(sample)) for sample in tar.samples] == [os.path.basename(sample) for sample in folder.samples]
    assert any("8 files are left out" in message and "3 hidden" in message for message in caplog.messages)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read_where_pillow_reads_it(cluttered):
    Image.new("RGB", (20, 10), (200, 10, 10)).save(cluttered / "train" / "1" / "z.avif")
    train, _ = datasets.open_images(settings(cluttered))
    assert len(train) == 97
    image = train[[str(sample).endswith(".avif") for sample in train.samples].index(True)][0]
    assert image.size == (20, 10) and image.getpixel((5, 5))[0] > 150


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize(("mode", "dtype", "kind"), [("I", np.int32, "32-bit integers"), ("F", np.float32, "floating-point numbers")])
def test_pixels_of_unknown_range_are_refused_by_name(digits_folder, tmp_path, mode, dtype, kind, is_fast):
    path = shutil.copytree(digits_folder, tmp_path / "data") / "train" / "0" / "a.tif"
    Image.fromarray(np.full((8, 8), 40000, dtype)).save(path)
    train, _ = datasets.open_images(settings(tmp_path / "data"))
    i = list(train.samples).index(str(path))
    with pytest.raises(DamagedImage, match=rf"a\.tif cannot be read as an image \(its pixels are {kind}, of a range that it does not tell"):
        image = train.open(i, is_fast=is_fast)
        image.top(8)


@pytest.mark.parametrize(("ending", "maximum"), [("pgm", 65535), ("png", 65535), ("tif", 65535), ("pgm", 1023)])
def test_16_bits_keep_their_brightness_in_every_format(tmp_path, ending, maximum):
    values = np.linspace(0, maximum, 32 * 32).reshape(32, 32).astype(np.uint16)
    if maximum == 65535:
        Image.fromarray(values).save(tmp_path / f"x.{ending}")
    else:
        (tmp_path / f"x.{ending}").write_bytes(f"P5 32 32 {maximum}\n".encode() + values.astype(">u2").tobytes())
    pixels = np.asarray(images.open_file(str(tmp_path / f"x.{ending}")))[..., 0]
    assert np.abs(pixels.astype(int) - values.astype(int) * 255 // maximum).max() <= 1


def test_selections_and_joints_keep_sizes_and_storage_order(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(bytes(i))
    first, second = (Paths(str(tmp_path / f"{i}.jpg") for i in numbers) for numbers in ([0, 1, 2, 3], [4, 5]))
    joined = Joined([first, second])
    assert [Path(joined[i]).stem for i in range(6)] == list("012345") and joined[-1] == joined[5]
    with pytest.raises(IndexError):
        joined[6]
    chosen = Selected(joined, [5, 0, 3])
    assert chosen.sizes().tolist() == [5, 0, 3] and [Path(chosen[i]).stem for i in chosen.storage_order()] == ["0", "3", "5"]
    assert list(Names.of_columns(Names(["a", "ü"]).columns("x"), "x")) == ["a", "ü"]
