"""The fifteen corruptions, made with imagecorruptions-imaug of a few photographs and digits."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from robustness import corrupting
from robustness.corrupting import corrupted, words_of
from robustness.scores import CORRUPTIONS, SEVERITIES
from run.errors import InputError
from tools import corrupt_images

SMALL = ["--size=32", "--crop-pct=1", "--num_workers=1"]


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return np.array(Image.fromarray(load_sample_image("flower.jpg")).resize((96, 96)))


@pytest.fixture
def folder(tmp_path, photograph):
    """Three images of two classes, one of them no JPEG."""
    for name, size in (("lily/a.jpg", 96), ("lily/b.png", 80), ("rose/a.jpg", 64)):
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[:size, :size]).save(path)
    return tmp_path / "val"


def files_in(root) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_is_decided_by_the_files_name_alone(corruption, photograph):
    image = photograph[:48, :64]
    words = words_of("lily/a.jpg", corruption, 3, 0)
    np.random.seed(1)
    first = corrupted(image, corruption, 3, words)
    state = np.random.rand()
    second = corrupted(image, corruption, 3, words)
    assert first.shape == image.shape and first.dtype == np.uint8 and (first == second).all() and (first != image).any()
    np.random.seed(1)
    assert np.random.rand() == state  # and what others draw stays as it was
    is_random = corruption not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (first != corrupted(image, corruption, 3, words_of("rose/a.jpg", corruption, 3, 0))).any() == is_random


def test_corruptions_get_worse_with_severity(photograph):
    for corruption in set(CORRUPTIONS) - {"elastic_transform", "frost", "snow"}:  # of these the severities differ in kind
        away = [np.abs(corrupted(photograph, corruption, s, words_of("x", corruption, 0, 0)).astype(float) - photograph).mean() for s in (1, 3, 5)]
        assert away == sorted(away) and away[2] > 1.1 * away[0], corruption


def test_seventy_five_folders_are_written_with_the_same_bytes_each_time(folder, tmp_path, capsys):
    assert corrupt_images.main([str(folder), str(tmp_path / "c"), *SMALL]) == 0
    assert "225 files written, 0 were there, of 3 images of 2 classes" in capsys.readouterr().out
    first = files_in(tmp_path / "c")
    names = {
        f"{corruption}/{severity}/{name}" for corruption in CORRUPTIONS for severity in SEVERITIES for name in ("lily/a.jpg", "lily/b.png.jpg", "rose/a.jpg")
    }
    assert set(first) == names | {"corruptions.json"}
    with Image.open(tmp_path / "c" / "fog" / "3" / "lily" / "b.png.jpg") as image:
        assert (image.size, image.format) == ((32, 32), "JPEG")
    # beside fewer others, in another number of processes, and from elsewhere
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "lily" / "b.png").unlink()
    flags = ["--size=32", "--crop-pct=1", "--num_workers=2", "--corruptions", "glass_blur", "impulse_noise", "snow", "--severities", "1", "4"]
    assert corrupt_images.main([str(tmp_path / "elsewhere"), str(tmp_path / "d"), *flags]) == 0
    second = files_in(tmp_path / "d")
    assert len(second) == 3 * 2 * 2 + 1 and all(first[name] == data for name, data in second.items())


def test_a_stopped_run_goes_on(folder, tmp_path, capsys, monkeypatch):
    real = corrupting.Corruptions._write
    written = []

    def write_then_stop(self, path, pixels):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        real(self, path, pixels)

    flags = [str(folder), str(tmp_path / "c"), "--size=32", "--crop-pct=1", "--corruptions", "fog", "frost", "--severities", "2", "3"]
    monkeypatch.setattr(corrupt_images, "make", lambda dataset, **_: iter(dataset[i] for i in range(3)))
    monkeypatch.setattr(corrupting.Corruptions, "_write", write_then_stop)
    assert corrupt_images.main(flags) == 130
    assert "interrupted after 4 files; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in written}
    assert corrupt_images.main([*flags, "--num_workers=1"]) == 0
    assert "7 files written, 5 were there" in capsys.readouterr().out and before == {path: path.stat().st_mtime_ns for path in written}
    written[0].write_bytes(b"")  # as a machine that lost power may leave a file
    assert corrupt_images.main([*flags, "--num_workers=1"]) == 0
    assert "1 files written, 11 were there" in capsys.readouterr().out and written[0].stat().st_size
    with pytest.raises(InputError, match="made with size 32, here 64"):
        corrupt_images.main([*flags, "--size=64"])


def test_damaged_images_are_named_and_the_others_written(folder, tmp_path, capsys):
    (folder / "lily" / "a.jpg").write_bytes(b"no image")
    assert corrupt_images.main([str(folder), str(tmp_path / "c"), *SMALL, "--corruptions", "contrast"]) == 1
    out, err = capsys.readouterr()
    assert "10 files written" in out and re.search(r"damaged, and so without corruptions: .*lily/a\.jpg: it begins like no image format", err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}/nowhere", "{}/c"], "is no folder"),
        (["{}", "{}/../c"], "holds val/, which is what to corrupt"),
        (["{}/val", "{}/val/c"], "whose folders are classes: name one outside"),
        (["{}/val", "{}/c", "--size=31"], "less than the 32 pixels"),
        (["{}/val", "{}/c", "--crop-pct=0"], "--crop-pct 0.0 is no part"),
        (["{}/val", "{}/other"], "is not empty and holds no corruptions.json"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, flags, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=message):
        corrupt_images.main([flag.format(tmp_path) for flag in flags])
    assert not (tmp_path / "c").exists()


def test_the_missing_package_is_named_with_its_cure(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
    with pytest.raises(InputError, match=r"imagecorruptions-imaug .*pip install -r requirements-robustness\.txt"):
        corrupt_images.main([str(folder), str(tmp_path / "c"), *SMALL])


def test_a_damaged_manifest_is_named(folder, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "corruptions.json").write_text(json.dumps({"size": 224})[:-3])
    with pytest.raises(InputError, match=r"corruptions\.json cannot be read"):
        corrupt_images.main([str(folder), str(tmp_path / "c"), *SMALL])
