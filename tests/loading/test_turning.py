"""EXIF orientation: both loaders against Pillow's own turning, and who turns and who does not."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import datasets
import utils
from deployment import prediction
from detection import painting as detection_painting
from distillation import fingerprint
from features import pictures
from loading import augment, decoding, turning
from loading.images import Images, decode, open_file, read_file
from run import checkpoint
from sources import checking, packing
from tests.detection.test_painting import CPU, Bright
from tests.loading.test_damaged import settings
from tools import check_images

CPU_RANK = utils.Rank(0, 1, 0, 1, CPU)
WAYS = range(1, 9)


def photograph() -> Image.Image:
    """40x72 pixels that no turn maps onto themselves."""
    rng = np.random.RandomState(0)
    return Image.fromarray(np.kron(rng.randint(0, 255, (5, 9, 3)), np.ones((8, 8, 1), int)).astype(np.uint8))


def stored(image: Image.Image, way: int | None, kind: str = "JPEG", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({} if way is None else {"exif": turning.exif_of(way)}), **more)
    return file.getvalue()


def upright(data: bytes) -> np.ndarray:
    """What Pillow makes of a file."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def encoded(data: bytes) -> decoding.Encoded:
    return decoding.Encoded(data, lambda: decode(io.BytesIO(data), turns=True), turns=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_are_turned_as_pillow_does(way, kind):
    data = stored(photograph(), way, kind)
    expected, fast = upright(data), encoded(data)
    assert np.array_equal(decode(io.BytesIO(data), turns=True), expected)
    assert fast.is_fallback == (kind not in ("JPEG", "MPO")) and fast.shape == expected.shape
    for num_rows in (7, 40, 72):  # by which the fast decoder stops early in an image that is not turned
        assert np.abs(fast.top(num_rows).astype(int) - expected[:num_rows]).max(initial=0) <= 1
    if kind == "JPEG":
        assert expected.shape[:2] == ((40, 72) if way < 5 else (72, 40)) and np.asarray(decode(io.BytesIO(data))).shape == (40, 72, 3)


@pytest.mark.parametrize("way", WAYS)
def test_crops_are_those_of_the_turned_image(way):
    data = stored(photograph(), way, quality=95)
    transform = augment.train_transform(settings("x", "--input-size=36", "--aa=none", "--color-jitter=0"))
    for seed in range(5):
        views = []
        for image in (encoded(data), upright(data)):
            random.seed(seed)
            torch.manual_seed(seed)
            views.append(transform.draw(image)[0].astype(int))
        assert np.abs(views[0] - views[1]).max() <= 2


DAMAGED = [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0junk", b"II*\0"]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # Pillow's, of every image that it opens
@pytest.mark.parametrize("exif", DAMAGED)
def test_a_damaged_block_leaves_the_image_as_it_lies(exif):
    data = stored(photograph(), None, exif=exif)
    assert turning.orientation_in(data) == 1 and np.array_equal(decode(io.BytesIO(data), turns=True), decode(io.BytesIO(data)))
    assert np.array_equal(encoded(data).top(40), decoding.Encoded(data, None).top(40))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_any_byte_of_a_block_may_be_wrong():
    data = stored(photograph(), 6)
    start, rng, found = data.index(b"Exif"), np.random.RandomState(0), set()
    for place in range(start, start + 32):
        for value in rng.randint(0, 256, 4):
            spoilt = data[:place] + bytes([value]) + data[place + 1 :]
            found.add(turning.orientation_in(spoilt))
            assert turning.orientation(Image.open(io.BytesIO(spoilt))) in WAYS
    assert found >= {1, 6}
    assert turning.orientation_in(b"no image") == 1


@pytest.fixture
def tree(tmp_path):
    """Two classes, of an upright and a turned JPEG each, in train/ and val/."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.jpg").write_bytes(stored(photograph(), None))
            (tmp_path / part / name / "1.jpg").write_bytes(stored(photograph(), 6))
    return tmp_path


@pytest.mark.parametrize("loader", ["fast", "reference"])
def test_runs_turn_where_they_are_told_to(tree, loader):
    flags = (f"--loader={loader}", "--input-size=40", "--crop-pct=1")
    (_, ignoring), (train, turning_ones) = (datasets.open_images(settings(tree, *flags, *more)) for more in ((), ("--exif-transpose",)))
    assert [image.size for image, _ in (ignoring[0], ignoring[1], turning_ones[1], train.part([1, 3])[1])] == [(72, 40), (72, 40), (40, 72), (40, 72)]
    views = []
    for images, more in ((ignoring, ()), (turning_ones, ("--exif-transpose",))):
        cfg = settings(tree, *flags, *more)
        ((batch, _),) = datasets.build_val_loader(cfg, images, CPU_RANK)
        views.append(batch)
    assert torch.equal(views[0][0], views[0][1]) and torch.equal(views[0][0], views[1][0])
    assert torch.allclose(views[1][1], views[1][0].rot90(-1, (1, 2)), atol=0.2)


def test_turning_belongs_to_the_recipe_and_to_what_labels_are_made_for(tree):
    plain, turned = settings(tree), settings(tree, "--exif-transpose")
    saved = {"args": {name: value for name, value in vars(plain).items() if name != "exif_transpose"}}  # from before there was the setting
    assert checkpoint.recipe_changes(saved, plain, {}) == [] and checkpoint.recipe_changes(saved, turned, {}) == ["exif_transpose was False, is True"]
    made = []
    for cfg in (plain, turned):
        loader = datasets.build_train_loader(cfg, datasets.open_images(cfg)[0], CPU_RANK)
        made.append(fingerprint.fingerprint(cfg, loader.loader.dataset, num_classes=2, device=CPU))
    assert "augmentation.exif_transpose" not in made[0]
    assert fingerprint.differences(*made) == ["field augmentation.exif_transpose: the store has None, this run has True"]


def test_predictions_are_of_turned_photographs(tmp_path):
    (tmp_path / "lies.jpg").write_bytes(stored(photograph(), 6))
    transform = augment.eval_transform(40, 1.0)
    _, seen, _ = prediction.Files([str(tmp_path / "lies.jpg")], transform)[0]
    expected = upright((tmp_path / "lies.jpg").read_bytes()).copy()
    assert torch.equal(seen, transform(expected))
    assert not torch.equal(seen, transform(open_file(str(tmp_path / "lies.jpg"))))
    assert np.array_equal(pictures.read_picture(str(tmp_path / "lies.jpg")), expected)  # which segmenters are shown


def test_boxes_are_in_the_turned_pictures_coordinates(tmp_path):
    """A bright part from (8, 16) to (24, 40), of an upright 64x96 picture whose file lies on its side."""
    pixels = np.zeros((96, 64, 3), np.uint8)
    pixels[16:40, 8:24] = 255
    lying = Image.fromarray(pixels).rotate(90, expand=True)
    (tmp_path / "lies.jpg").write_bytes(stored(lying, 6, quality=95))
    picture, found = detection_painting.find_objects(Bright(), str(tmp_path / "lies.jpg"), (96, 64), CPU)
    assert lying.size == (96, 64) and picture.shape == (96, 64, 3)
    assert found["boxes"][0].tolist() == pytest.approx([8, 16, 24, 40], abs=1.5)


def test_packed_images_that_are_made_smaller_lie_as_they_did(tmp_path):
    for way in (1, 6):
        path = tmp_path / f"{way}.jpg"
        path.write_bytes(stored(photograph(), way))
        packed = packing.Recipe(max_side=36).apply(str(path))
        assert Image.open(io.BytesIO(packed)).size == (36, 20) and turning.orientation_in(packed) == way
        assert (b"Exif" in packed) == (way == 6)


def test_check_images_counts_what_is_turned(tree, tmp_path, capsys):
    out = tmp_path / "list.csv"
    assert check_images.main([str(tree), f"--out={out}", "--num-workers=1"]) == 0
    assert "8 images: 4 turned; 0 other files" in capsys.readouterr().out
    assert out.read_text().count(f',{checking.TURNED},"EXIF orientation 6') == 4


def test_images_in_memory_have_nothing_to_turn():
    images = Images([np.zeros((2, 2, 3), np.uint8)], [0], ["a"], Image.fromarray)
    assert images.turned() is images
    files = Images(["x.jpg"], [0], ["a"], open_file, read_file)
    assert files.turned().turns and files.turned().part([0]).turns and not files.part([0]).turns
