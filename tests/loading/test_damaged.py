"""Damaged images: what stands in for them, how they are named, counted and listed, and that a run stays a function of its recipe and files."""

import dataclasses
import io
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import engine
import main
import utils
from loading import batches, damage, keys
from run import checkpoint, config
from run.errors import DamagedImage, DamagedImages, InputError
from sources.sets import open_folder
from tests.conftest import TINY_RUN, read_log, run_processes, start, wait_for
from tests.test_main import steady
from tests.test_resume import assert_same_run

CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))


def bomb(data: bytes) -> bytes:
    """A JPEG that says it has four thousand million pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "html": lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "bomb": bomb,
}


def spoil(folder: Path, places: dict[int, str]) -> list[str]:
    """Damage the files at some places of a class folder tree; their names."""
    files = open_folder(folder).samples
    for place, kind in places.items():
        path = Path(files[place])
        path.write_bytes(DAMAGES[kind](path.read_bytes()))
    return [files[place] for place in places]


TRAIN = {3: "cut", 25: "empty", 47: "html", 60: "noise", 90: "bomb"}  # 5 % of 96
VAL = {7: "noise", 33: "cut"}


@pytest.fixture(scope="module")
def damaged_folder(digits_folder, tmp_path_factory):
    """The small folder with 5 % of its images damaged; not to be changed."""
    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(digits_folder, folder)
    spoil(folder / "train", TRAIN)
    spoil(folder / "val", VAL)
    return folder


def names_in(folder: Path, places: dict[int, str]) -> list[str]:
    files = open_folder(folder).samples
    return [files[place] for place in places]


def settings(folder: Path, *more: str) -> config.Config:
    flags = ["--input-size=32", "--batch-size=16", "--mix-group-size=16", "--mix-lanes=2", "--num_workers=0"]
    return config.parse([f"--data-path={folder}", *flags, *more])[0]


def train_loader(folder: Path, *more: str):
    cfg = settings(folder, *more)
    return datasets.build_train_loader(cfg, datasets.open_images(cfg)[0], CPU)


def val_loader(folder: Path, *more: str, to: Path | None = None):
    cfg = settings(folder, *more)
    return datasets.build_val_loader(cfg, datasets.open_images(cfg)[1], CPU, to)


# ---- what stands in


def test_images_that_stand_in_are_drawn_by_the_key_each_once():
    plan = keys.build_plan(60, repeated_aug=False, group_size=2, lanes=1, data_seed=0)
    members = np.arange(10, 50)
    orders = {}
    for key in [keys.Key(epoch, 0, sample, repeat) for epoch in (0, 1) for sample in (10, 11) for repeat in (0, 1)]:
        order = list(plan.replacements(key, members))
        assert sorted(order) == [member for member in members if member != key.sample]
        assert order == list(plan.replacements(keys.Key(key.epoch, 77, key.sample, key.repeat), members))  # wherever it stands in the epoch
        orders[key] = tuple(order)
    assert len(set(orders.values())) == len(orders)
    other = keys.build_plan(60, repeated_aug=False, group_size=2, lanes=1, data_seed=1)
    assert tuple(other.replacements(keys.Key(0, 0, 10, 0), members)) != orders[keys.Key(0, 0, 10, 0)]
    firsts = np.bincount([next(plan.replacements(keys.Key(epoch, 0, 10, 0), members)) for epoch in range(2000)], minlength=50)[11:50]
    assert firsts.min() > 20 and firsts.max() < 100  # about 51 each


@pytest.mark.parametrize("loader", ["fast", "reference"])
@pytest.mark.parametrize("storage", ["folder", "tar"])
def test_a_damaged_image_is_replaced_and_no_other_changes(digits_folder, damaged_folder, tmp_path, loader, storage):
    flags = [f"--loader={loader}", "--no-repeated-aug"]
    sound, folder = train_loader(digits_folder, *flags), damaged_folder
    if storage == "tar":
        folder = tmp_path
        for part in ("train", "val"):
            with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
                tar.add(damaged_folder / part, arcname=part)
    damaged = train_loader(folder, *flags)
    seen, replaced = {}, set()
    for good, bad in zip(sound.batches(0), damaged.batches(0), strict=True):
        assert torch.equal(good.targets, bad.targets) and torch.equal(good.positions, bad.positions)
        is_same = [torch.equal(*pair) for pair in zip(good.images, bad.images, strict=True)]
        assert [i for i, same in enumerate(is_same) if not same] == list(bad.replaced)
        replaced |= {int(bad.positions[i]) for i in bad.replaced}
        seen |= dict(bad.damaged)
    assert {damaged.plan.permutation(0)[position].item() for position in replaced} == set(TRAIN)
    expected = names_in(damaged_folder / "train", TRAIN)
    assert sorted(Path(name.rpartition(": ")[2]).name for name in seen) == sorted(Path(name).name for name in expected)
    assert set(seen) == {str(damaged.loader.dataset.images.samples[place]) for place in TRAIN}


def test_what_stands_in_is_augmented_by_the_key_of_the_damaged_image(digits_folder, damaged_folder):
    sound, damaged = (train_loader(folder).loader.dataset for folder in (digits_folder, damaged_folder))
    for sample in TRAIN:
        key = keys.Key(3, 0, sample, 1)
        order = list(sound.plan.replacements(key, np.flatnonzero(sound.images.targets == sound.images.targets[sample])))
        first = next(other for other in order if other not in TRAIN)
        expected = sound._view(first, sound.plan.sample_words(3, sample, 1))
        view = damaged.draw(key)
        assert np.array_equal(view.pixels, expected.pixels) and len(view.damaged) == 1 + order.index(first)
        assert damaged[key][1] == sound.images.targets[sample]


@pytest.mark.parametrize("loader", ["fast", "reference"])
def test_files_deleted_after_the_listing_are_damaged(digits_folder, tmp_path, loader):
    shutil.copytree(digits_folder, tmp_path, dirs_exist_ok=True)
    training, validation = train_loader(tmp_path, f"--loader={loader}", "--no-repeated-aug"), val_loader(tmp_path, f"--loader={loader}")
    gone = [Path(images.samples[5]) for images in (training.loader.dataset.images, validation.loader.dataset.images)]
    for path in gone:
        path.unlink()
    assert [found for batch in training.batches(0) for found in batch.damaged] == [(str(gone[0]), "No such file or directory")]
    with pytest.raises(DamagedImages, match=r"1 of 40 validation images are damaged(.|\n)*No such file or directory"):
        list(validation)


def test_a_class_without_a_sound_image_is_named(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path, dirs_exist_ok=True)
    images = open_folder(tmp_path / "train")
    spoil(tmp_path / "train", dict.fromkeys(np.flatnonzero(images.targets == 2).tolist(), "empty"))
    count = int((images.targets == 2).sum())
    for num_workers in (0, 1):
        with pytest.raises(InputError, match=rf"none of the {count} images of class 2 can be read") as caught:
            list(train_loader(tmp_path, "--no-repeated-aug", f"--num_workers={num_workers}").batches(0))
        assert "\n" not in str(caught.value)


def test_a_tar_that_lost_its_end_after_the_listing_names_what_is_cut(digits_folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(digits_folder / "train", arcname="train")
    shutil.copytree(digits_folder / "val", tmp_path / "val")
    images, _ = datasets.open_images(settings(tmp_path))
    last = int(np.argmax(images.samples.offset))
    with (tmp_path / "train.tar").open("r+b") as file:
        file.truncate(images.samples.offset[last] + 100)
    for is_fast in (True, False):
        with pytest.raises(DamagedImage) as caught:
            images.open(last, is_fast=is_fast)
        assert caught.value.name == f"{tmp_path / 'train.tar'}: {images.samples.names[last]}" and str(caught.value).count("cannot be read") == 1
        images.open(0, is_fast=is_fast)


def test_a_huge_jpeg_is_refused_before_memory_is_taken_for_it(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    data = file.getvalue()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2)
    assert batches.pixels.Encoded(data, None).top(64).shape == (64, 64, 3)  # as large as Pillow takes
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(ZeroDivisionError):  # left to Pillow
        batches.pixels.Encoded(data, lambda: 1 // 0)


# ---- named, counted, limited


def test_any_number_of_processes_trains_on_the_same_images(damaged_folder, tmp_path):
    cfg = settings(damaged_folder, "--batch-size=8", "--distillation-type=hard", f"--teacher-labels={tmp_path}")
    images, _ = datasets.open_images(cfg)
    found = []
    for world_size in (1, 2):
        found.append({})
        for index in range(world_size):
            loader = datasets.build_train_loader(cfg, images, utils.Rank(index, world_size, index, world_size, CPU.device))
            for batch in dataclasses.replace(loader, is_in_step=False).batches(0):
                is_replaced = np.isin(np.arange(8), batch.replaced).tolist()
                found[-1] |= dict(
                    zip(batch.positions.tolist(), zip(batch.pixel_hashes.tolist(), batch.targets.tolist(), is_replaced, strict=True), strict=True)
                )
    assert found[0] == found[1] and len(found[0]) == 96 and any(is_replaced for *_, is_replaced in found[0].values())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_loader_processes_gives_the_same_batches(damaged_folder, tmp_path, num_workers):
    flags = ["--distillation-type=hard", f"--teacher-labels={tmp_path}"]
    alone, several = (list(train_loader(damaged_folder, *flags, f"--num_workers={n}").batches(1)) for n in (0, num_workers))
    assert sum(len(batch.replaced) for batch in alone) > 0
    for one, other in zip(alone, several, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "targets", "pixel_hashes"))
        assert (list(one.replaced), list(one.damaged)) == (list(other.replaced), list(other.damaged))


def test_each_file_is_named_once_by_all_loader_processes(damaged_folder, caplog):
    loader = train_loader(damaged_folder, "--num_workers=2", "--no-repeated-aug")
    for epoch in range(2):
        list(loader.batches(epoch))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(line.split()[1] for line in warnings) == sorted(names_in(damaged_folder / "train", TRAIN))
    assert all("cannot be read as an image (" in line and line.endswith("others of its class stand in for it") for line in warnings)


def test_more_files_than_the_limit_stop_the_run_with_their_list(damaged_folder):
    names = names_in(damaged_folder / "train", TRAIN)
    assert len(list(train_loader(damaged_folder, f"--max-bad-images={len(names)}", "--no-repeated-aug").batches(0))) == 6
    loader = train_loader(damaged_folder, f"--max-bad-images={len(names) - 1}", "--no-repeated-aug")
    with pytest.raises(DamagedImages, match=r"5 training images are damaged, more than --max-bad-images 4: restore them .*then --resume auto") as caught:
        list(loader.batches(0))
    assert [name for name in names if f"\n  {name}: " not in str(caught.value)] == []


def test_without_a_limit_to_bear_the_first_stops_the_run(damaged_folder):
    for num_workers in (0, 1):
        with pytest.raises(InputError) as caught:
            list(train_loader(damaged_folder, "--max-bad-images=0", "--no-repeated-aug", f"--num_workers={num_workers}").batches(0))
        assert [name for name in names_in(damaged_folder / "train", TRAIN) if str(caught.value).startswith(f"{name} cannot be read as an image")]
        assert "\n" not in str(caught.value)


# ---- evaluation


@pytest.mark.parametrize("loader", ["fast", "reference"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_lists_all_that_is_damaged_or_leaves_it_out(digits_folder, damaged_folder, loader, num_workers, caplog):
    flags = [f"--loader={loader}", f"--num_workers={num_workers}", "--batch-size=1", "--mixup=0", "--cutmix=0"]
    names = names_in(damaged_folder / "val", VAL)
    with pytest.raises(DamagedImages, match=r"2 of 40 validation images are damaged: restore them, or .* --skip-bad-images") as caught:
        list(val_loader(damaged_folder, *flags))
    assert [name for name in names if f"\n  {name}: " not in str(caught.value)] == []
    skipping = val_loader(damaged_folder, *flags, "--skip-bad-images")
    expected = [pair for i, pair in enumerate(val_loader(digits_folder, *flags)) if i not in VAL]
    for _ in range(2):
        found = list(skipping)
        assert len(found) == 38 and all(torch.equal(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True))
        assert skipping.damage.num_skipped == 2
    assert [caplog.text.count(name) for name in names] == [1, 1] and "evaluation leaves it out" in caplog.text


def test_images_that_are_all_damaged_are_no_evaluation(digits_folder, tmp_path):
    shutil.copytree(digits_folder / "val", tmp_path / "val")
    spoil(tmp_path / "val", dict.fromkeys(range(40), "empty"))
    with pytest.raises(DamagedImages, match="40 of 40 validation images are damaged"):
        list(val_loader(tmp_path, "--skip-bad-images", "--eval", "--pretrained"))


def test_a_long_list_is_in_a_file_where_there_is_a_folder_for_it(damaged_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "NUM_SHOWN", 1)
    names = names_in(damaged_folder / "val", VAL)
    path = tmp_path / "bad_images_val.txt"
    with pytest.raises(DamagedImages) as caught:
        list(val_loader(damaged_folder, to=tmp_path))
    assert str(caught.value).splitlines()[2] == f"  and 1 more: {path} has all" and len(str(caught.value).splitlines()) == 3
    assert [line.partition(": ")[0] for line in path.read_text().splitlines()] == names
    for nowhere in (None, tmp_path / "missing"):
        with pytest.raises(DamagedImages) as caught:
            list(val_loader(damaged_folder, to=nowhere))
        assert [name for name in names if name not in str(caught.value)] == []


# ---- whole runs


def flags_of(folder: Path, out: Path, *more: str) -> list[str]:
    return [*TINY_RUN, f"--data-path={folder}", f"--output_dir={out}", "--skip-bad-images", *more]


@pytest.fixture(scope="module")
def whole(damaged_folder, tmp_path_factory):
    """A run on damaged images that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main.main(flags_of(damaged_folder, folder)) == 0
    return folder


def test_the_log_counts_damaged_images(whole, damaged_folder):
    loader = train_loader(damaged_folder)
    counts = [sum(len(batch.replaced) for batch in loader.batches(epoch)) for epoch in range(2)]
    assert [(record["bad_images"], record["test_bad_images"]) for record in read_log(whole)] == [(count, 2) for count in counts] and min(counts) > 0


def test_evaluation_says_how_many_it_left_out(whole, damaged_folder, capsys):
    argv = [*TINY_RUN, f"--data-path={damaged_folder}", "--eval", f"--resume={whole / 'checkpoint_last.pth'}"]
    main.main([*argv, "--skip-bad-images"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Accuracy of the network on the 38 test images: acc1 ") and line.endswith("  damaged images left out: 2")
    assert f"acc1 {read_log(whole)[-1]['test_acc1']:.3f}" in line
    with pytest.raises(DamagedImages, match="2 of 40 validation images are damaged"):
        main.main(argv)


@pytest.mark.slow
def test_killed_and_resumed_with_other_loader_processes(whole, damaged_folder, tmp_path):
    flags = flags_of(damaged_folder, tmp_path, "--checkpoint-steps=2")
    process = start("main.py", *flags, "--num_workers=3")
    wait_for(tmp_path / "checkpoint_last.pth", process)
    process.kill()
    process.communicate()
    assert main.main([*flags, "--num_workers=1", "--resume=auto"]) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_count_name_stop_and_go_on_together(whole, damaged_folder, tmp_path):
    """Each with loader processes of its own: a run to the end, and one that damaged validation images stop after its first epoch."""
    flags = flags_of(damaged_folder, tmp_path / "end", "--batch-size=8", "--num_workers=1")
    cut = [*flags, f"--output_dir={tmp_path / 'cut'}"]
    argvs = [flags, [flag for flag in cut if flag != "--skip-bad-images"], [*cut, "--resume=auto"]]
    (codes, errors, output), (codes_cut, errors_cut, _), (codes_resumed, *_) = run_processes(*((2, "main", argv) for argv in argvs))
    assert codes == codes_resumed == [0, 0] and 0 not in codes_cut, errors
    met = {name for epoch in range(2) for batch in train_loader(damaged_folder).batches(epoch) for name, _ in batch.damaged}
    assert {name: output.count(f"damaged: {name} ") for name in met} == dict.fromkeys(met, 1)
    assert [name for name in names_in(damaged_folder / "val", VAL) if f"\n  {name}: " not in errors_cut] == []
    assert_same_run(tmp_path / "cut", tmp_path / "end")
    counts = [[(record["bad_images"], record["test_bad_images"]) for record in read_log(folder)] for folder in (tmp_path / "end", whole)]
    assert counts[0] == counts[1]


def test_a_run_that_the_limit_stopped_goes_on_where_it_was(whole, damaged_folder, tmp_path, capsys):
    with pytest.raises(DamagedImages):
        main.main(flags_of(damaged_folder, tmp_path, "--max-bad-images=1"))
    assert (tmp_path / "checkpoint_last.pth").exists()
    assert main.main(flags_of(damaged_folder, tmp_path, "--resume=auto")) == 0
    assert_same_run(tmp_path, whole)


def test_a_run_that_goes_back_counts_damaged_images_once(whole, damaged_folder, tmp_path, monkeypatch, capsys):
    """A step of each epoch is not finite the first time; in the first epoch it is before, in the second behind a checkpoint inside."""
    real, spoilt = engine.mixed, {(0, 0), (1, 4)}
    monkeypatch.setattr(engine, "REPORT_EVERY_S", -1.0)

    def mixed(parts, batch, epoch):
        images, targets = real(parts, batch, epoch)
        place = (epoch, int(batch.positions.min()) // 16)
        is_spoilt = place in spoilt and torch.is_grad_enabled()  # not while its place is looked for
        spoilt.difference_update({place} if is_spoilt else ())
        return images * (torch.nan if is_spoilt else 1), targets

    monkeypatch.setattr(engine, "mixed", mixed)
    assert main.main(flags_of(damaged_folder, tmp_path, "--on-nonfinite=rollback", "--checkpoint-steps=2")) == 0
    assert capsys.readouterr().out.count("Going back to") == 2
    assert_same_run(tmp_path, whole)
    assert [steady(record) for record in read_log(tmp_path)] == [steady(record) for record in read_log(whole)]


def test_a_run_that_damaged_validation_images_stopped_repeats_the_evaluation_alone(whole, damaged_folder, tmp_path, capsys, monkeypatch):
    flags = [flag for flag in flags_of(damaged_folder, tmp_path) if flag != "--skip-bad-images"]
    with pytest.raises(DamagedImages):
        main.main(flags)
    saved = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)
    assert (saved["epoch"], saved["step"], (tmp_path / "log.txt").exists()) == (-1, 6, False)
    capsys.readouterr()
    assert main.main([*flags, "--skip-bad-images", "--resume=auto"]) == 0
    assert "epoch 0/2  step" not in capsys.readouterr().out
    assert_same_run(tmp_path, whole)
    assert [steady(record) for record in read_log(tmp_path)] == [steady(record) for record in read_log(whole)]


def test_checkpoints_from_before_damage_was_counted_resume():
    state = checkpoint.TrainState(net=None, ema=None, optimizer=None, scheduler=None, scaler=None)
    checkpoint._resume_inside_epoch({"loss_sums": [1.5], "skipped_steps": 1}, state, CPU)
    assert (state.loss_sum, state.skipped_steps, state.bad_images) == (1.5, 1, 0)
    assert {"max_bad_images", "skip_bad_images"} <= checkpoint.FREE_SETTINGS
