"""Whole runs from every source: the run from class folders, to the last bit, also on two processes and after a kill."""

import shutil
import zipfile

import pytest

import datasets
import main
from benchmarks import layouts
from loading.images import read_sample
from run import config
from run.errors import InputError
from tests.conftest import FEW_STEPS, read_log, run_processes, start, wait_for
from tests.test_resume import assert_same_run

RUN = [*FEW_STEPS, "--model=test_resnet", "--distillation-type=none"]  # twelve steps


def settings(path, *flags: str) -> config.Config:
    return config.parse([f"--data-path={path}", "--distillation-type=none", *flags])[0]


@pytest.fixture(scope="module")
def whole(digits_folder, tmp_path_factory):
    """The run from class folders."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main.main([*RUN, f"--data-path={digits_folder}", f"--output_dir={folder}"])
    return folder


@pytest.mark.parametrize("kind", layouts.WRITERS)
def test_every_source_gives_the_images_of_the_folder_and_its_run(kind, layouts, whole, tmp_path, capsys):
    ours, theirs = (datasets.open_images(settings(layouts(name))) for name in (kind, "folder"))
    for images, expected in zip(ours, theirs, strict=True):
        assert images.classes == expected.classes and images.targets.tolist() == expected.targets.tolist()
        assert [read_sample(sample) for sample in images.samples] == [read_sample(sample) for sample in expected.samples]
        assert images.samples.sizes().tolist() == expected.samples.sizes().tolist()
        assert sorted(images.samples.storage_order()) == list(range(len(images)))
    num_workers = 1 if kind in ("parquet", "shards") else 0
    main.main([*RUN, f"--data-path={layouts(kind)}", f"--output_dir={tmp_path}", f"--data-format={kind}", f"--num_workers={num_workers}"])
    assert "train: 96 images of 4 classes, " in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_and_a_kill_change_nothing(layouts, whole, tmp_path):
    """Begun from parquet files and killed, gone on with from a packed file; and two processes on different nodes' copies."""
    flags = [*RUN, f"--output_dir={tmp_path / 'killed'}", "--checkpoint-steps=2"]
    process = start("main.py", *flags, f"--data-path={layouts('parquet')}", "--num_workers=1")
    wait_for(tmp_path / "killed" / "checkpoint_last.pth", process)
    process.kill()
    process.communicate()
    main.main([*flags, f"--data-path={layouts('packed')}", "--resume=auto"])
    assert_same_run(tmp_path / "killed", whole)
    argvs = [[*RUN, "--batch-size=8", f"--data-path={layouts(kind)}", f"--output_dir={tmp_path / kind}"] for kind in ("folder", "shards", "zip")]
    found = run_processes(*((2, "main", argv) for argv in argvs))
    assert [codes for codes, *_ in found] == [[0, 0]] * 3, found
    for kind in ("shards", "zip"):
        assert_same_run(tmp_path / kind, tmp_path / "folder")
    assert len(read_log(tmp_path / "shards")) == 2


def test_a_format_that_is_not_there_is_said(layouts):
    with pytest.raises(InputError, match=r"holds neither train/ nor train\.tar"):
        datasets.open_images(settings(layouts("tar"), "--data-format=zip"))


def test_who_names_a_wrong_place_is_told_the_right_one(layouts, tmp_path):
    (tmp_path / "train.tar.gz").write_bytes(b"")
    cases = {
        layouts("folder") / "train": f"name the folder above, {layouts('folder')}",
        layouts("packed") / "train.pack": f"name the folder it lies in, {layouts('packed')}",
        tmp_path / "train.tar.gz": "is compressed as a whole",
        tmp_path: "but train.tar.gz: unpack it",
    }
    for path, words in cases.items():
        with pytest.raises(InputError) as error:
            datasets.open_images(settings(path))
        assert words in str(error.value), path
    with pytest.raises(InputError, match="as --data-format zip: .*, or drop --data-format"):
        datasets.open_images(settings(layouts("tar"), "--data-format=zip"))


@pytest.mark.parametrize("kind", ["kaggle", "shards", "packed"])
def test_evaluation_needs_the_validation_images_alone(kind, layouts, tmp_path):
    for path in layouts(kind).iterdir():
        if "train" not in path.name and path.name != "ILSVRC":
            (tmp_path / path.name).symlink_to(path)
    if kind == "kaggle":
        (tmp_path / "Data" / "CLS-LOC").mkdir(parents=True)
        (tmp_path / "Data" / "CLS-LOC" / "val").symlink_to(layouts(kind) / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    train, val = datasets.open_images(settings(tmp_path, "--eval", "--resume=x"))
    assert train is None and (len(val), val.classes) == (40, ["0", "1", "2", "3"])


def test_one_archive_may_hold_both_splits(layouts, tmp_path, digits_folder):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(digits_folder.rglob("*.jpg")):
            archive.write(path, f"imagenet/{path.relative_to(digits_folder)}")
        archive.writestr("__MACOSX/imagenet/train/0/._0000.jpg", b"x")
    train, val = datasets.open_images(settings(tmp_path / "all.zip"))
    assert (len(train), len(val)) == (96, 40)
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for path in sorted((digits_folder / "val").rglob("*.jpg")):
            archive.write(path, f"x/validation/{path.relative_to(digits_folder / 'val')}")
    train, val = datasets.open_images(settings(tmp_path / "val.zip", "--eval", "--resume=x"))
    assert train is None and len(val) == 40
    shutil.copy(tmp_path / "val.zip", tmp_path / "train.zip")
    with pytest.raises(InputError, match=r"train\.zip holds images of other splits alone"):
        datasets.open_images(settings(tmp_path))
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.write(path, "cat/0.jpg")
    with pytest.raises(InputError, match=r"flat\.zip holds class folders, but no train/ and val/ above them"):
        datasets.open_images(settings(tmp_path / "flat.zip"))
