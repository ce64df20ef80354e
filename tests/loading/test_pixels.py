"""The fast loader's pixels against Pillow's, on photographs, gradients and checkerboards."""

import io
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import sklearn
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from torchvision import transforms

import datasets
import utils
from loading import augment, decoding, kernels, keys, pixels
from loading.batches import TrainingSet
from loading.loaders import _to_device
from run import config
from run.errors import InputError
from sources.sets import load_digits, open_folder
from tests.conftest import run_command

PHOTOS = sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))
HOW = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}

# op: arguments, greatest mean and greatest single difference to Pillow, of 255
DIFFERENCES = {
    "AutoContrast": ((), 0, 0),
    "Equalize": ((), 0, 0),
    "Invert": ((), 0, 0),
    "Posterize": ((3,), 0, 0),
    "PosterizeIncreasing": ((1,), 0, 0),
    "PosterizeOriginal": ((8,), 0, 0),
    "Solarize": ((100,), 0, 0),
    "SolarizeIncreasing": ((256,), 0, 0),
    "SolarizeAdd": ((60,), 0, 0),
    "Color": ((1.7,), 0.002, 1),
    "ColorIncreasing": ((0.3,), 0.002, 1),
    "Contrast": ((0.4,), 0, 0),
    "ContrastIncreasing": ((1.6,), 0, 0),
    "Brightness": ((1.6,), 0, 0),
    "BrightnessIncreasing": ((0.55,), 0, 0),
    "Sharpness": ((1.8,), 0.001, 1),
    "SharpnessIncreasing": ((0.2,), 0.001, 1),
    "Desaturate": ((0.7,), 0.002, 1),
    "GaussianBlur": ((1.3,), 0, 0),
    "GaussianBlurRand": ((0.8,), 0, 0),
    "ShearX": ((0.2,), 0.005, 1),
    "ShearY": ((-0.27,), 0.005, 1),
    "TranslateX": ((30.3,), 0.005, 1),
    "TranslateY": ((-20.7,), 0.005, 1),
    "TranslateXRel": ((0.4,), 0.005, 1),
    "TranslateYRel": ((-0.313,), 0.005, 1),
    "Rotate": ((17.3,), 1.3, 255),  # OpenCV's bicubic is smoother than Pillow's, and rounds where that cuts off
}


def photos(size: int = 224) -> list[Image.Image]:
    return [Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for path in PHOTOS]


def difference(fast: np.ndarray, reference: Image.Image) -> np.ndarray:
    return fast.astype(int) - np.asarray(reference).astype(int)


@pytest.mark.parametrize("name", NAME_TO_OP)
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR], ids=["bicubic", "bilinear"])
def test_ops_equal_pillows_within_their_bounds(name, resample):
    args, mean, worst = DIFFERENCES[name]
    kernel = kernels.kernel_for(name, NAME_TO_OP[name])
    for photo in photos():
        random.seed(3)
        reference = NAME_TO_OP[name](photo, *args, **{**HOW, "resample": resample})
        random.seed(3)
        off = np.abs(difference(kernel(np.array(photo), *args, **{**HOW, "resample": resample}), reference))
        mean = max(mean, 0.03) if mean and resample == Image.Resampling.BILINEAR else mean  # sums that are whole numbers round either way
        assert off.mean() <= mean and off.max() <= worst, (off.mean(), off.max())


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_ops_that_count_levels_do_so_in_small_and_flat_images(name):
    rng = np.random.RandomState(0)
    for size in ((1, 1), (15, 17), (16, 16), (16, 17), (23, 23), (40, 30)):
        image = Image.fromarray(rng.randint(0, 256, (*size, 3)).astype(np.uint8))
        image.paste((9, 9, 9), (0, 0, size[1], size[0] // 2))
        assert not difference(kernels.kernel_for(name, NAME_TO_OP[name])(np.array(image), **HOW), NAME_TO_OP[name](image, **HOW)).any()


@pytest.mark.parametrize("name", ["ShearX", "ShearY"])
@pytest.mark.parametrize("factor", [-2.6, -0.9, 0.013, 1.0, 3.1])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (3, 1)], ids=str)
def test_shears_of_any_strength_are_pillows(name, factor, size):
    photo = photos(96)[0].crop((0, 0, *size))
    off = difference(kernels.kernel_for(name, NAME_TO_OP[name])(np.array(photo), factor, **HOW), NAME_TO_OP[name](photo, factor, **HOW))
    assert np.abs(off).max() <= 1


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "TranslateY"])
def test_interpolation_is_drawn_as_timm_draws_it(name):
    kernel, photo = kernels.kernel_for(name, NAME_TO_OP[name]), photos(64)[0]
    both = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    for seed in range(4):
        states = []
        for op, image in ((NAME_TO_OP[name], photo), (kernel, np.array(photo))):
            random.seed(seed)
            op(image, 0.1, fillcolor=(0, 0, 0), resample=both)
            states.append(random.random())
        assert states[0] == states[1]


def ramp(axis: int, is_falling: bool, size: tuple[int, int] = (120, 120)) -> Image.Image:
    """Two levels per pixel along an axis, flat along the other."""
    levels = 2 * np.arange(size[axis])
    levels = levels[::-1] if is_falling else levels
    plane = np.broadcast_to(levels[:, None] if axis == 0 else levels[None], size)
    return Image.fromarray(np.repeat(plane[:, :, None], 3, axis=2).astype(np.uint8))


def shift(fast, reference, axis: int) -> float:
    """Pixels by which `fast` moves an image against `reference`, along an axis: rounding is alike on rising and falling ramps, a
    shift has opposite signs."""
    inner = np.s_[40:80, 40:80]
    offs = []
    for is_falling in (False, True):
        image = ramp(axis, is_falling)
        offs.append(difference(fast(np.array(image)), reference(image))[inner].mean())
    return (offs[0] - offs[1]) / 4


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel", "Sharpness"])
def test_warps_do_not_shift(name, axis):
    args = {"Rotate": (10.0,), "TranslateXRel": (0.11,), "TranslateYRel": (0.11,), "TranslateX": (7.4,), "TranslateY": (7.4,)}.get(name, (0.15,))
    kernel = kernels.kernel_for(name, NAME_TO_OP[name])
    off = shift(lambda image: kernel(image, *args, **HOW), lambda image: NAME_TO_OP[name](image, *args, **HOW), axis)
    assert abs(off) < 0.03
    off = shift(lambda image: kernel(image, -args[0], **HOW), lambda image: NAME_TO_OP[name](image, -args[0], **HOW), axis)
    assert abs(off) < 0.03


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("flags", "size"), [([], 96), ([], 120), (["--train-interpolation", "bilinear"], 150)])
def test_crops_do_not_shift(axis, flags, size):
    both = []
    for loader in ("fast", "reference"):
        cfg, _ = config.parse(
            ["--data-path", "x", "--aa", "none", "--color-jitter", "0", "--hflip", "0", "--input-size", str(size), "--loader", loader, *flags]
        )
        both.append(augment.train_transform(cfg))

    def view(transform, image):
        keys.seed_generators((5, 5, 5))
        drawn = transform.draw(image)[0]
        return drawn if transform.is_fast else Image.fromarray(drawn)

    assert abs(shift(lambda image: view(both[0], image), lambda image: view(both[1], image), axis)) < 0.02


def checkerboard(cell: int) -> Image.Image:
    rows, columns = np.indices((96, 128)) // cell
    return Image.fromarray(np.repeat(((rows + columns) % 2 * 255)[:, :, None], 3, axis=2).astype(np.uint8))


@pytest.mark.parametrize("cell", [1, 2, 7])
@pytest.mark.parametrize("size", [48, 80, 110])
def test_evaluation_of_checkerboards_is_pillows(cell, size):
    image = checkerboard(cell)
    fast, reference = (augment.eval_transform(size, 0.875, loader).draw(image)[0] for loader in ("fast", "reference"))
    assert np.abs(fast.astype(int) - reference.astype(int)).max() <= 2


def test_evaluation_skips_only_what_it_does_not_need():
    rng = np.random.RandomState(0)
    sides = [(250, 250), (254, 254), (254, 294), (107, 147), (240, 240), (256, 300), (239, 241), (224, 224), (100, 90), *rng.randint(60, 520, (60, 2)).tolist()]
    for height, width in sides:
        image = rng.randint(0, 256, (height, width, 3), dtype=np.uint8)
        for size in (96, 224):
            whole = pixels.Resize(256 * size // 224, interpolation=transforms.InterpolationMode.BICUBIC)
            expected = transforms.functional.center_crop(pixels.to_tensor(whole(image)), size)
            off = np.abs(pixels.ResizedCenterCrop(256 * size // 224, size)(image).astype(int) - pixels.from_tensor(expected).astype(int))
            assert off.max() <= 1 and off.mean() < 1e-3, (height, width, size)


def jpeg(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory) -> Path:
    """Photographs of many shapes and codings in one class folder."""
    folder = tmp_path_factory.mktemp("photos") / "train" / "class"
    folder.mkdir(parents=True)
    for photo in PHOTOS:
        shutil.copy(photo, folder)
        image = Image.open(photo)
        image.crop((100, 0, 340, 427)).save(folder / f"tall_{photo.name}", quality=95, subsampling=0)
        image.crop((11, 40, 611, 241)).save(folder / f"wide_{photo.name}", quality=90, subsampling=1)
        image.resize((901, 603)).save(folder / f"large_{photo.name}", quality=75, progressive=True)
        image.resize((150, 133)).convert("L").save(folder / f"gray_{photo.name}", quality=85)
    return folder.parent.parent


def differences(folder: Path, *flags: str, epochs: int) -> tuple[float, int]:
    """Mean and greatest difference of the loaders' uint8 views of all images, `epochs` views of each."""
    images = open_folder(folder / "train")
    plan = keys.build_plan(len(images), repeated_aug=False, group_size=2, lanes=1, data_seed=0)
    sets = []
    for loader in ("fast", "reference"):
        cfg, _ = config.parse(["--data-path", "x", "--loader", loader, *flags])
        sets.append(TrainingSet(images, augment.train_transform(cfg), plan))
    offs = []
    for key in (keys.Key(epoch, 0, i, 0) for epoch in range(epochs) for i in range(len(images))):
        views = [one.draw(key)[0].astype(int) for one in sets]
        offs.append(np.abs(views[0] - views[1]))
    return np.mean([off.mean() for off in offs]), max(off.max() for off in offs)


@pytest.mark.parametrize(
    ("flags", "mean"),
    [
        ([], 0.5),
        (["--aa", "none", "--color-jitter", "0"], 0.05),
        (["--aa", "none"], 0.05),
        (["--ThreeAugment"], 0.1),
        (["--train-interpolation", "random"], 0.5),
        (["--aa", "v0"], 0.5),
        (["--aa", "augmix-m5"], 0.5),
        (["--input-size", "32"], 0.5),
    ],
)
def test_training_views_of_photographs_are_pillows(photo_folder, flags, mean):
    measured, _ = differences(photo_folder, *flags, epochs=4)
    assert measured <= mean


@pytest.mark.parametrize("size", [32, 160, 224, 320])
def test_evaluation_views_of_photographs_are_pillows(photo_folder, size):
    images = open_folder(photo_folder / "train")
    offs = []
    for i in range(len(images)):
        views = [augment.eval_transform(size, 0.875, name).draw(images.open(i, is_fast=name == "fast"))[0] for name in ("fast", "reference")]
        offs.append(np.abs(views[0].astype(int) - views[1].astype(int)))
    assert np.mean([off.mean() for off in offs]) <= 0.05 and max(off.max() for off in offs) <= 2


@pytest.mark.parametrize(("flags", "count"), [([], 1000), (["--ThreeAugment"], 100), (["--aa", "none", "--train-interpolation", "random"], 100)])
def test_loaders_draw_alike(flags, count):
    image = photos(40)[0]
    plan = keys.build_plan(2048, repeated_aug=True, group_size=256, lanes=8, data_seed=7)
    both = []
    for loader in ("fast", "reference"):
        cfg, _ = config.parse(["--data-path", "x", "--input-size", "48", "--loader", loader, "--recount", "2", *flags])
        both.append(augment.train_transform(cfg))
    boxes = set()
    for i in range(count):
        key = keys.Key(i % 3, 0, i, i % 2)
        fast, reference = (augment.describe(key, plan=plan, transform=transform, image=image) for transform in both)
        assert fast == reference
        boxes.add(fast["box"])
    assert len(boxes) > count / 2


SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS.values(), ids=SUBSAMPLINGS)
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}, {"exif": b"Exif\0\0 broken"}])
def test_the_top_of_a_jpeg_is_that_of_the_whole(subsampling, settings):
    for size in ((75, 131), (200, 97)):
        data = jpeg(photos(256)[1].resize(size), subsampling=subsampling, quality=92, **settings)
        whole = np.array(Image.open(io.BytesIO(data)))
        for num_rows in (1, 15, 16, 17, 48, 63, size[1] - 1, size[1]):
            encoded = decoding.Encoded(data, None)
            assert encoded.shape == whole.shape
            assert np.abs(encoded.top(num_rows).astype(int) - whole[:num_rows].astype(int)).max() <= 1
            assert np.array_equal(encoded.top(num_rows), encoded.top(size[1])[:num_rows]) and not encoded.is_fallback


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_any_number_of_rows_is_that_of_the_whole(subsampling):
    for height, width in ((70, 75), (17, 33), (16, 16), (2, 5)):
        array, space = np.asarray(photos(80)[1])[:height, :width], "GRAY" if subsampling == "Gray" else "RGB"
        array = np.ascontiguousarray(array[:, :, :1] if subsampling == "Gray" else array)
        data = simplejpeg.encode_jpeg(array, quality=93, colorsubsampling=subsampling, colorspace=space)
        whole = simplejpeg.decode_jpeg(data, colorspace="RGB")
        encoded = decoding.Encoded(data, None)
        assert all(np.array_equal(encoded.top(num_rows), whole[:num_rows]) for num_rows in range(1, height + 1)) and not encoded.is_fallback


def count_decoded_rows(monkeypatch) -> list[int]:
    """The rows of each JPEG that is decoded from here on."""
    rows = []

    def decode_jpeg(data, **settings):
        rows.append(simplejpeg.decode_jpeg_header(data)[0])
        return simplejpeg.decode_jpeg(data, **settings)

    monkeypatch.setattr(decoding, "simplejpeg", types.SimpleNamespace(decode_jpeg=decode_jpeg))
    return rows


def test_the_bytes_after_the_rows_wanted_are_not_decoded(monkeypatch):
    data = bytearray(jpeg(photos(256)[1], quality=92))
    whole = decoding.Encoded(data, None).top(256)
    data[-2000:-1000] = bytes(1000)
    rows = count_decoded_rows(monkeypatch)
    assert np.array_equal(decoding.Encoded(data, None).top(64), whole[:64]) and rows == [64 + decoding.MARGIN]
    assert np.array_equal(decoding.Encoded(data + b"rubbish", None).top(100), whole[:100]) and rows[1:] == [100 + decoding.MARGIN]


@pytest.mark.parametrize("settings", [{"progressive": True}, {"restart_marker_rows": 1}])
def test_jpegs_that_cannot_be_left_early_are_decoded_once(monkeypatch, settings):
    data = jpeg(photos(256)[1], **settings)
    rows = count_decoded_rows(monkeypatch)
    decoding.Encoded(data, None).top(64)
    assert rows == [256]


@pytest.mark.parametrize("spoil", [20 * b"\xff\x00", bytes(300), bytes(range(200))], ids=["no code", "zeros", "other codes"])
def test_rows_with_damaged_codes_are_pillows(spoil):
    data = bytearray(jpeg(photos(256)[1], quality=92))
    at = len(data) // 4
    data[at : at + len(spoil)] = spoil
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(decoding.Encoded(data, lambda: reference).top(200), np.array(reference)[:200])


def spoilt(folder: Path) -> dict[str, bytes]:
    photo = photos(64)[0]
    png, deep = io.BytesIO(), io.BytesIO()
    photo.save(png, "PNG")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(deep, "PNG")
    return {
        "rgb.jpg": jpeg(photo),
        "gray.jpg": jpeg(photo.convert("L")),
        "cmyk.jpg": jpeg(photo.convert("CMYK")),
        "png.jpg": png.getvalue(),
        "deep.png": deep.getvalue(),
        "progressive.jpg": jpeg(photo, progressive=True),
        "exif.jpg": jpeg(photo, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "trailing.jpg": jpeg(photo) + b"rubbish",
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's
def test_odd_files_are_decoded_alike_or_by_pillow_and_counted(tmp_path, caplog):
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for name, data in spoilt(tmp_path).items():
        (folder / name).write_bytes(data)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    images = open_folder(tmp_path / "train")
    for i in range(len(images)):
        encoded, name = images.open(i, is_fast=True), Path(images.samples[i]).name
        fast, reference = encoded.top(64), np.array(images[i][0])
        assert np.abs(fast.astype(int) - reference.astype(int)).max() <= 1, name
        assert encoded.is_fallback == (name in ("cmyk.jpg", "png.jpg", "deep.png")), name
        assert np.array_equal(encoded.top(10), fast[:10]), name
    flags = ["--data-path", str(tmp_path), "--input-size", "32", "--batch-size", "4", "--mix-group-size", "4", "--num_workers", "0", "--no-repeated-aug"]
    cfg, _ = config.parse(flags)
    loader = datasets.build_train_loader(cfg, images, CPU)
    caplog.set_level("INFO", logger="understudy")
    batches = loader.batches(0)
    assert sum(next(batches).num_fallbacks for _ in range(loader.num_steps)) == 3  # training asks for no more than there are
    assert "training: 3 of 8 images were no JPEGs that the fast decoder takes and were decoded by Pillow" in caplog.text
    assert len(list(datasets.build_val_loader(cfg, images, CPU))) == 2 and "evaluation: 3 of 8 images" in caplog.text


@pytest.mark.parametrize("keep", [300, 0.5, -2], ids=["header", "half", "end"])
def test_truncated_files_are_named_by_either_loader(tmp_path, keep):
    data = jpeg(photos(128)[0])
    path = tmp_path / "train" / "class" / "cut.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    images = open_folder(tmp_path / "train")
    with pytest.raises(InputError, match=r"cut\.jpg cannot be read as an image"):
        images[0]
    with pytest.raises(InputError, match=r"cut\.jpg cannot be read as an image"):
        images.open(0, is_fast=True).top(10)


def marked(data: bytes) -> bytes:
    """A JPEG with a second start inside its codes."""
    at = len(data) // 2
    return data[:at] + b"\xff\xd8" + data[at + 2 :]


def without_height(data: bytes) -> bytes:
    """A JPEG that leaves its height to be told after the codes."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + b"\0\0" + data[at + 2 :]


@pytest.mark.parametrize("spoil", [marked, without_height])
@pytest.mark.parametrize("num_rows", [20, 200])
def test_jpegs_that_pillow_refuses_are_refused_by_either_loader(tmp_path, spoil, num_rows):
    path = tmp_path / "train" / "class" / "broken.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(spoil(jpeg(photos(256)[0], quality=95)))
    images = open_folder(tmp_path / "train")
    for read in (lambda: images[0], lambda: images.open(0, is_fast=True).top(num_rows)):
        with pytest.raises(InputError, match=r"broken\.jpg cannot be read as an image"):
            read()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3)])
def test_images_of_a_pixel_or_two_are_black_where_their_crop_is_empty(size):
    image = Image.new("RGB", size, (200, 100, 50))
    plan = keys.build_plan(256, repeated_aug=False, group_size=2, lanes=1, data_seed=0)
    flags = ["--data-path", "x", "--aa", "none", "--color-jitter", "0", "--input-size", "40"]
    fast, reference = (augment.train_transform(config.parse([*flags, "--loader", loader])[0]) for loader in ("fast", "reference"))
    for sample in range(100):
        views = []
        for transform in (fast, reference):
            with keys.seeded(plan.sample_words(0, sample, 0)):
                views.append(transform.draw(image)[0])
        assert np.array_equal(*views)


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("loader", ["fast", "reference"])
def test_batches_finished_on_the_device_are_those_finished_in_the_loader(remode, loader):
    cfg, _ = config.parse(["--data-set", "DIGITS", "--input-size", "48", "--reprob", "0.7", "--recount", "2", "--remode", remode, "--loader", loader])
    images = load_digits()[0]
    plan = keys.build_plan(len(images), repeated_aug=True, group_size=256, lanes=8, data_seed=0)
    wanted = [keys.Key(2, position, position // 3, position % 3) for position in range(40)]
    here, there = (TrainingSet(images, augment.train_transform(cfg), plan, is_finished_here=is_here).__getitems__(wanted) for is_here in (True, False))
    assert there.images.dtype == torch.uint8 and there.images.is_contiguous(memory_format=torch.channels_last) and len(there.erased.boxes) > 20
    assert torch.equal(_to_device(there, torch.device("cpu")).images, here.images)
    assert torch.equal(here.images[7], TrainingSet(images, augment.train_transform(cfg), plan)[wanted[7]][0])
    assert torch.equal(here.pixel_hashes, there.pixel_hashes) and len(set(here.pixel_hashes.tolist())) == 40


def test_hash_tells_any_change_apart():
    image = np.array(photos(33)[0])
    seen = {pixels.pixel_hash(image)}
    for channel, row, column in ((0, 0, 0), (2, 32, 32), (1, 17, 5)):
        other = image.copy()
        other[row, column, channel] ^= 1
        seen.add(pixels.pixel_hash(other))
    seen |= {pixels.pixel_hash(np.flip(image, axis)) for axis in range(3)}
    assert len(seen) == 7 and pixels.pixel_hash(image.copy()) in seen and all(-(2**63) <= value < 2**63 for value in seen)


def test_a_missing_package_stops_the_run_and_names_the_cure(monkeypatch, short_run):
    monkeypatch.setattr(kernels, "cv2", None)
    with pytest.raises(InputError, match=r"needs opencv-python-headless: pip install -r requirements.txt, or train with --loader reference"):
        short_run("--epochs=1", "--output_dir=none")


def test_a_cpu_without_avx2_stops_the_run_and_names_the_cure(digits_folder, tmp_path):
    command = ["main.py", "--data-path", str(digits_folder), "--output_dir", str(tmp_path / "run"), "--distillation-type", "none"]
    done = run_command(*command, ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 1 and "needs a CPU with AVX2" in done.stderr and "--loader reference" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path):
    flags = ["--batch-size", "32", "--mix-group-size", "32", "--num_workers", "2", "--distillation-type", "hard", "--teacher-labels", str(tmp_path)]
    cfg, _ = config.parse(["--data-set", "DIGITS", "--input-size", "48", *flags])
    images = load_digits()[0]
    loaders = [datasets.build_train_loader(cfg, images, utils.Rank(0, 1, 0, 1, torch.device(name))) for name in ("cpu", "cuda")]
    for here, there in zip(*(loader.batches(1) for loader in loaders), strict=True):
        assert there.images.is_cuda and torch.equal(here.targets, there.targets) and torch.equal(here.pixel_hashes, there.pixel_hashes)
        torch.testing.assert_close(there.images.cpu(), here.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (41, 50), (32, 47), (32, 32)])
def test_centre_crops_are_torchvisions_and_resize_nothing(height, width):
    image = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.array(transforms.CenterCrop(32)(Image.fromarray(image)))
    fast, reference = (augment.crop_transform(32, loader).draw(as_loaded(image, loader))[0] for loader in ("fast", "reference"))
    assert np.array_equal(fast, expected) and np.array_equal(reference, expected)


def as_loaded(image: np.ndarray, loader: str):
    return image if loader == "fast" else Image.fromarray(image)


def test_centre_crops_of_smaller_images_are_of_enlarged_ones():
    image = np.random.RandomState(0).randint(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = np.array(transforms.CenterCrop(32)(transforms.Resize(32, transforms.InterpolationMode.BICUBIC)(Image.fromarray(image))))
    fast, reference = (augment.crop_transform(32, loader).draw(as_loaded(image, loader))[0] for loader in ("fast", "reference"))
    assert np.array_equal(reference, expected) and np.abs(fast.astype(int) - expected).mean() < 0.5
