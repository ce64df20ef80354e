import dataclasses
import io
import json
import multiprocessing
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import utils
from loading import augment, keys
from loading.batches import TrainingSet, ValidationSet
from loading.images import Images, decode, open_file, read_file, read_sample
from run import config
from run.errors import InputError
from sources import sets
from sources.sets import load_digits, stratified_split

CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))


def write_image(path, mode="RGB", size=(20, 12), value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16") else tuple([value] * len(mode))).save(path)


def write_folders(root, names=("cat", "dog"), parts=("train", "val"), count=2):
    for part in parts:
        for name in names:
            for i in range(count):
                write_image(root / part / name / f"{i}.jpg")
    return root


def settings(path, *flags):
    return config.parse(["--data-path", str(path), "--distillation-type", "none", *flags])[0]


def test_digits_are_split_once_and_evenly():
    train, val = load_digits()
    assert (len(train), len(val)) == (1437, 360)
    assert train[0][0].size == (32, 32) and train[0][0].mode == "RGB"
    shares = np.bincount(val.targets) / (np.bincount(val.targets) + np.bincount(train.targets))
    assert np.abs(shares - 360 / 1797).max() < 0.01
    pixels = {image.tobytes() for image in train.samples}
    assert sum(image.tobytes() in pixels for image in val.samples) <= 1  # none leaks; two writers may draw the same pixels
    again = load_digits()[1]
    assert np.array_equal(again.targets, val.targets) and again[7][0].tobytes() == val[7][0].tobytes()


def test_split_gives_every_class_its_share_and_keeps_all():
    targets = [0] * 50 + [1] * 30 + [2] * 1
    kept, held_out = stratified_split(targets, 8)
    assert sorted([*kept, *held_out]) == list(range(81))
    assert np.bincount([targets[i] for i in held_out], minlength=3).tolist() == [5, 3, 0]


def test_folders_with_any_names_and_classes(tmp_path):
    names = ("a class", "ünï — 中文", "z")
    train, val = datasets.open_images(settings(write_folders(tmp_path, names)))
    assert train.classes == val.classes == sorted(names) and len(train) == 6


def test_grayscale_cmyk_palette_and_16_bit_images_become_rgb(tmp_path):
    write_folders(tmp_path)
    for mode in ("L", "CMYK", "RGB"):
        write_image(tmp_path / "train" / "cat" / f"{mode}.jpg", mode)
    for i, mode in enumerate(("P", "RGBA", "I;16", "LA")):
        path = tmp_path / "train" / "dog" / f"{i}.png"
        (Image.new("P", (9, 9)) if mode == "P" else Image.new(mode, (9, 9))).save(path)
    train, _ = datasets.open_images(settings(tmp_path))
    assert {train[i][0].mode for i in range(len(train))} == {"RGB"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: None, ["neither train/ nor train.tar"]),
        (lambda root: write_folders(root, parts=("train",)), ["has no val/", "--val-split 0.1"]),
        (lambda root: [write_folders(root, parts=("train",)), write_image(root / "val" / "0.jpg")], ["val holds no class folders", "extract_imagenet"]),
        (lambda root: [write_folders(root), (root / "train" / "empty").mkdir()], ["no image in the class folders", "empty"]),
        (lambda root: [write_folders(root, parts=("train",)), write_folders(root, ("cat", "eel"), ("val",))], ["Only in train/: dog", "only in val/: eel"]),
        (lambda root: [write_folders(root, parts=("train",)), (root / "val.tar").write_bytes(b"no tar")], ["val.tar is no plain, complete tar"]),
    ],
)
def test_wrong_folders_are_refused_with_the_reason(tmp_path, spoil, words):
    spoil(tmp_path)
    with pytest.raises(InputError) as error:
        datasets.open_images(settings(tmp_path))
    assert [word for word in words if word not in str(error.value)] == []


def test_missing_data_path_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is no folder"):
        datasets.open_images(settings(tmp_path / "nowhere"))


def test_val_split_holds_out_a_fixed_part_and_refuses_an_existing_val(tmp_path):
    write_folders(tmp_path, parts=("train",), count=10)
    train, val = datasets.open_images(settings(tmp_path, "--val-split", "0.2"))
    assert (len(train), len(val)) == (16, 4) and np.bincount(val.targets).tolist() == [2, 2]
    assert not set(train.samples) & set(val.samples)
    assert list(datasets.open_images(settings(tmp_path, "--val-split", "0.2"))[1].samples) == list(val.samples)
    write_folders(tmp_path, parts=("val",))
    with pytest.raises(InputError, match="drop one of them"):
        datasets.open_images(settings(tmp_path, "--val-split", "0.2"))


def test_evaluation_needs_no_training_images(tmp_path):
    write_folders(tmp_path, parts=("val",))
    train, val = datasets.open_images(settings(tmp_path, "--eval", "--resume", "x"))
    assert train is None and len(val) == 4


def test_tars_give_the_images_of_the_folders(tmp_path):
    write_folders(tmp_path / "folders", ("b", "a"), count=3)
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            tar.add(tmp_path / "folders" / part, arcname=part)
    from_tar, from_folder = (datasets.open_images(settings(path)) for path in (tmp_path, tmp_path / "folders"))
    for tar_images, folder_images in zip(from_tar, from_folder, strict=True):
        assert tar_images.classes == folder_images.classes and tar_images.targets.tolist() == folder_images.targets.tolist()
        assert [tar_images[i][0].tobytes() for i in range(6)] == [folder_images[i][0].tobytes() for i in range(6)]
        assert list(map(read_sample, tar_images.samples)) == list(map(read_file, folder_images.samples))


def test_unreadable_images_are_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "0.jpg").write_bytes(b"\xff\xd8\xff broken")
    train, _ = datasets.open_images(settings(tmp_path))
    with pytest.raises(InputError, match=r"cat/0\.jpg cannot be read as an image"):
        train[0]


def test_16_bit_images_keep_their_brightness(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    pixels = np.asarray(open_file(str(tmp_path / "x.png")))
    assert np.abs(pixels[..., 0].astype(int) - (values >> 8)).max() == 0 and pixels.mean() == pytest.approx(127.5, abs=1)


def test_hidden_folders_are_no_classes(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert datasets.open_images(settings(tmp_path))[0].classes == ["cat", "dog"]


def test_flowers_keep_their_validation_images_in_test(tmp_path):
    write_folders(tmp_path, parts=("train", "test"))
    train, val = datasets.open_images(settings(tmp_path, "--data-set", "FLOWERS"))
    assert len(train) == len(val) == 4


def test_cifar_100_from_local_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        entry = {"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), "fine_labels": [99, 3]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    with pytest.raises(InputError, match="cifar-100-python.tar.gz"):  # other bytes than the published files'
        datasets.open_images(settings(tmp_path, "--data-set", "CIFAR"))
    monkeypatch.setattr(sets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    train, val = datasets.open_images(settings(tmp_path, "--data-set", "CIFAR"))
    image, target = train[0]
    assert (len(train.classes), len(val), target, image.size) == (100, 2, 99, (32, 32))
    assert np.asarray(image)[0, 0].tolist() == [0, 0, 0] and np.asarray(image)[1, 0].tolist() == [32, 32, 32]  # planes of 1024 bytes


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_from_its_listings(tmp_path, name, year):
    categories = [{"id": i, "name": f"species {i}", "kingdom": "Plantae" if i < 2 else "Fungi"} for i in range(3)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for part, labels in (("train", [2, 0, 1]), ("val", [0, 2])):
        images = [{"id": i, "file_name": f"train_val{year}/Group/{label}/{part}{i}.jpg"} for i, label in enumerate(labels)]
        annotations = [{"image_id": i, "category_id": label} for i, label in enumerate(labels)]
        (tmp_path / f"{part}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        for image in images:
            write_image(tmp_path / (image["file_name"] if part == "train" else image["file_name"].replace("Group/", "")))
    train, val = datasets.open_images(settings(tmp_path, "--data-set", name))
    assert train.classes == ["species 2", "species 0", "species 1"] and val.targets.tolist() == [1, 0]
    assert [train[i][0].size for i in range(3)] + [val[0][0].size] == [(20, 12)] * 4
    train, val = datasets.open_images(settings(tmp_path, "--data-set", name, "--inat-category", "kingdom"))
    assert train.classes == ["Fungi", "Plantae"] and val.targets.tolist() == [1, 0]
    with pytest.raises(InputError, match="--inat-category order"):
        datasets.open_images(settings(tmp_path, "--data-set", name, "--inat-category", "order"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_is_a_partition_for_any_number_of_processes(tmp_path, world_size):
    images = Images(list(range(7)), [0] * 7, ["only"], lambda i: Image.new("RGB", (4, 4), (i, 0, 0)))
    transform = augment.eval_transform(4, 1.0)
    shares = [ValidationSet(images, transform, utils.Rank(rank, world_size, 0, 1, CPU.device)) for rank in range(world_size)]
    singly = [share[i][0] for share in shares for i in range(len(share))]
    assert sorted(round(255 * (image[0, 0, 0].item() * augment.STD[0] + augment.MEAN[0])) for image in singly) == list(range(7))
    batches = [share.__getitems__(list(range(len(share)))) for share in shares]
    assert sorted(torch.cat([batch.positions for batch in batches]).tolist()) == list(range(7))
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack(singly))


def test_evaluation_takes_a_last_batch_of_one_image(digits_folder):
    cfg = settings(digits_folder, "--input-size", "32", "--batch-size", "13", "--num_workers", "0", "--mixup", "0", "--cutmix", "0")
    _, val = datasets.open_images(cfg)
    loader = datasets.build_val_loader(cfg, val, CPU)
    assert [len(targets) for _, targets in loader] == [13, 13, 13, 1]


@pytest.mark.parametrize("is_started", [False, True])
def test_evaluation_is_the_same_in_processes_that_were_started_before(digits_folder, is_started):
    cfg = settings(digits_folder, "--input-size", "32", "--batch-size", "16", "--num_workers", "2")
    _, val = datasets.open_images(cfg)
    here = list(datasets.build_val_loader(dataclasses.replace(cfg, num_workers=0), val, CPU))
    loader, before = datasets.build_val_loader(cfg, val, CPU), multiprocessing.active_children()
    torch.manual_seed(0)
    if is_started:
        loader.start()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # the run's first weights are those of a run without such processes
    processes = set(multiprocessing.active_children()) - set(before)
    assert len(processes) == 2 * is_started
    for _ in range(2):
        for (images, targets), (expected_images, expected_targets) in zip(loader, here, strict=True):
            assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)
    assert processes <= set(multiprocessing.active_children())


def test_train_loader_is_the_same_for_any_number_of_workers(digits_folder, tmp_path):
    batches = []
    flags = ["--input-size", "32", "--batch-size", "16", "--mix-group-size", "16", "--distillation-type", "hard", "--teacher-labels", str(tmp_path)]
    for num_workers in ("0", "2"):
        cfg = settings(digits_folder, *flags, "--num_workers", num_workers)
        loader = datasets.build_train_loader(cfg, datasets.open_images(cfg)[0], CPU)
        batches.append([batch for epoch in (0, 1) for batch in loader.batches(epoch)])
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "targets", "positions", "pixel_hashes"))


def test_pixels_are_hashed_only_for_stored_labels(digits_folder):
    cfg = settings(digits_folder, "--input-size", "32", "--batch-size", "16", "--mix-group-size", "16", "--num_workers", "0")
    loader = datasets.build_train_loader(cfg, datasets.open_images(cfg)[0], CPU)
    assert next(loader.batches(0)).pixel_hashes is None


@pytest.mark.parametrize("loader", ["fast", "reference"])
def test_loading_here_leaves_the_generators_as_they_were(digits_folder, loader):
    cfg = settings(digits_folder, "--input-size", "48", "--loader", loader)
    images, _ = datasets.open_images(cfg)
    plan = keys.build_plan(len(images), repeated_aug=False, group_size=2, lanes=1, data_seed=0)
    dataset = TrainingSet(images, augment.train_transform(cfg), plan)
    good, bad = keys.Key(0, 0, 0, 0), keys.Key(0, 0, len(images), 0)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    dataset.draw(good)
    assert states() == before
    dataset.__getitems__([good, good])
    assert states() == before
    with pytest.raises(IndexError):
        dataset.__getitems__([good, bad])
    assert states() == before


@pytest.mark.parametrize(("batch_size", "num_workers"), [(3, 2), (15, 1)], ids=["many batches", "a short one among the first"])
def test_batches_of_changing_sizes_are_right_epoch_after_epoch_and_stay_so(digits_folder, batch_size, num_workers):
    """Loader processes use the memory of earlier batches again: those that were handed out must not change."""
    cfg = settings(digits_folder, "--input-size", "32", "--batch-size", str(batch_size), "--num_workers", str(num_workers), "--mixup", "0", "--cutmix", "0")
    _, val = datasets.open_images(cfg)
    loader = datasets.build_val_loader(cfg, val, CPU)
    expected = ValidationSet(val, augment.eval_transform(32, augment.crop_pct(cfg)), CPU)
    for _ in range(4):
        images = torch.cat([images for images, _ in list(loader)])
        assert torch.equal(images, torch.stack([expected[i][0] for i in range(len(val))]))
        if batch_size == 3:
            next(iter(loader))  # an epoch that is given up


def test_every_class_is_among_the_images_that_judge_a_teacher():
    images = Images(list(range(5000)), sorted(i % 10 for i in range(5000)), [str(i) for i in range(10)], lambda i: Image.new("RGB", (32, 32)))
    cfg = config.parse(["--data-set", "DIGITS", "--input-size", "32", "--num_workers", "0"])[0]
    targets = torch.cat([targets for _, targets in datasets.build_teacher_loader(cfg, images, CPU)])
    assert len(targets) >= 512 and len(set(targets.tolist())) == 10


def test_decoding_reads_from_memory_too():
    file = io.BytesIO()
    Image.new("L", (5, 4)).save(file, "PNG")
    assert decode(file).mode == "RGB"
