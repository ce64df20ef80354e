"""ImageNet's archives to folders: the same bytes, also after a kill; one clear line for whatever is wrong with them."""

import io
import multiprocessing
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import datasets
from run import config
from tests.conftest import run_forked
from tools import extract_imagenet
from tools.extract_imagenet import DEVKIT, TRAIN, VAL

WNIDS = ["n01440764", "n01443537", "n02084071"]  # the devkit numbers them 2, 3, 1
IDS = {"n01440764": 2, "n01443537": 3, "n02084071": 1}
VAL_LABELS = [1, 3, 2, 2, 1, 3, 1]


def jpeg(seed: int) -> bytes:
    """A JPEG of noise, of another size in bytes for almost every seed."""
    pixels = np.random.RandomState(seed).randint(0, 256, (24 + seed % 7, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
    return buffer.getvalue()


def devkit_bytes(lines: list) -> bytes:
    """The devkit, its table of synsets with a row for each class and one for a synset above them."""
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"]
    rows = sorted((number, wnid, f"{wnid}, another word", "a gloss", 0, np.zeros(0), 0, 4) for wnid, number in IDS.items())
    rows.append((4, "n00001740", "entity", "above them", 3, np.array([1, 2, 3]), 1, 0))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=[(name, object) for name in names]).reshape(-1, 1)})
    folder = "ILSVRC2012_devkit_t12"
    ground_truth = "".join(f"{line}\n" for line in lines).encode()
    return tar_bytes(
        {f"{folder}/readme.txt": b"", f"{folder}/{extract_imagenet.META}": meta.getvalue(), f"{folder}/{extract_imagenet.GROUND_TRUTH}": ground_truth}, "w:gz"
    )


def train_images() -> dict[str, dict[str, bytes]]:
    return {wnid: {f"{wnid}_{10 * i}.JPEG": jpeg(10 * k + i) for i in range(4)} for k, wnid in enumerate(WNIDS)}


@pytest.fixture
def archives(tmp_path) -> Path:
    """The three archives, of three classes with 12 training and 7 validation images."""
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / TRAIN).write_bytes(tar_bytes({f"{wnid}.tar": tar_bytes(images) for wnid, images in train_images().items()}))
    (folder / VAL).write_bytes(tar_bytes({f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in (3, 1, 2, 7, 5, 6, 4)}))
    (folder / DEVKIT).write_bytes(devkit_bytes(VAL_LABELS))
    return folder


def expected() -> dict[str, bytes]:
    """Bytes by path below the folder to fill."""
    wnids = {number: wnid for wnid, number in IDS.items()}
    files = {f"train/{wnid}/{name}": data for wnid, images in train_images().items() for name, data in images.items()}
    return files | {f"val/{wnids[label]}/ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i, label in enumerate(VAL_LABELS, start=1)}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def extract(archives: Path, out: Path, *flags: str) -> int:
    return extract_imagenet.main(["--archives", str(archives), "--out", str(out), *flags])


def refusal(archives: Path, out: Path, capsys, *flags: str) -> str:
    """The one line that a failing run prints."""
    assert extract(archives, out, *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_images_come_out_byte_for_byte_in_their_classes(archives, tmp_path, capsys):
    assert extract(archives, tmp_path / "imagenet") == 0
    assert files_below(tmp_path / "imagenet") == expected()
    *_, val, train, command = capsys.readouterr().out.splitlines()
    assert val.startswith("val: 7 images of 3 classes, where ILSVRC2012 has 50,000; 7 written at ") and val.endswith(" images/s, 0 there already")
    assert train.startswith("train: 12 images of 3 classes, where ILSVRC2012 has 1,281,167; 12 written at ")
    assert command.endswith(f"main.py --config recipes/recnext_300e.yaml --data-path {tmp_path / 'imagenet'}")
    cfg, _ = config.parse(["--data-path", str(tmp_path / "imagenet")])
    train, val = datasets.open_images(cfg)
    assert (train.classes, len(train), len(val)) == (WNIDS, 12, 7) and val.classes == WNIDS
    assert val.targets.tolist() == sorted(WNIDS.index({1: "n02084071", 2: "n01440764", 3: "n01443537"}[label]) for label in VAL_LABELS)
    assert train[5][0].size == (32, 24 + 11 % 7)


def test_runs_as_written_from_the_root(archives, tmp_path):
    done = run_forked("tools/extract_imagenet.py", "--archives", str(archives), "--out", str(tmp_path / "a b"), "--val_only")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.splitlines()[-1]
        == f"evaluate with: python main.py --eval --model recnext_m1 --pretrained --distillation-type none --data-path '{tmp_path / 'a b'}'"
    )
    assert files_below(tmp_path / "a b").keys() == {name for name in expected() if name.startswith("val/")}


def test_flags_are_not_abbreviated(archives, tmp_path):
    with pytest.raises(SystemExit):
        extract(archives, tmp_path, "--val")


def test_parts_one_after_the_other(archives, tmp_path, capsys):
    for name in (VAL, DEVKIT):
        (archives / name).rename(tmp_path / name)
    out = tmp_path / "imagenet"
    assert extract(archives, out, "--train-only") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the validation images are still missing: python tools/extract_imagenet.py --val-only")
    assert extract(tmp_path, out, "--val-only") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("train with: ") and files_below(out) == expected()


def extract_until_killed(argv: list[str], num_files: int) -> None:
    """Die of SIGKILL when all bytes of image `num_files` + 1 are written, before it has its name."""
    real, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) > num_files:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*paths)

    os.replace = replace
    extract_imagenet.main(argv)


def test_killed_run_leaves_whole_files_alone_and_goes_on(archives, tmp_path, capsys):
    out = tmp_path / "imagenet"
    process = multiprocessing.get_context("spawn").Process(target=extract_until_killed, args=(["--archives", str(archives), "--out", str(out)], 10))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    left, wanted = files_below(out), expected()
    (partial,) = left.keys() - wanted.keys()
    assert partial == "train/n01440764/n01440764_30.JPEG.part" and len(left) == 11
    assert all(left[name] == wanted[name] for name in left if name != partial)
    cut = out / "val/n02084071/ILSVRC2012_val_00000001.JPEG"
    cut.write_bytes(cut.read_bytes()[:-1])  # as a machine that lost power may leave it
    kept = out / "train/n01440764/n01440764_0.JPEG"
    before = kept.stat().st_mtime_ns
    assert extract(archives, out) == 0
    assert files_below(out) == wanted and kept.stat().st_mtime_ns == before
    val, train, _ = capsys.readouterr().out.splitlines()
    assert "; 1 written at " in val and val.endswith("6 there already")
    assert "; 9 written at " in train and train.endswith("3 there already")


def test_progress_tells_rate_and_time_left(archives, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extract_imagenet, "REPORT_S", 0)
    extract(archives, tmp_path / "imagenet")
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert len(lines) == 7 + 12
    assert all(re.fullmatch(r"(val|train): \d+ images  \d+\.\d%  [\d,]+ images/s  ETA \d+:\d\d:\d\d", line) for line in lines)
    extract(archives, tmp_path / "imagenet")
    assert "train: 1 images  " in (out := capsys.readouterr().out) and "  0 images/s  ETA unknown" in out and "none written, 12 there already" in out
    progress = extract_imagenet.Progress("train", 4000)
    progress.add(1000, is_written=True)
    assert progress.line(elapsed_s=60) == "train: 1 images  25.0%  0 images/s  ETA 0:03:00"


def test_missing_archives_are_named_with_their_place(archives, tmp_path, capsys):
    (archives / VAL).unlink()
    (archives / DEVKIT).unlink()
    line = refusal(archives, tmp_path / "imagenet", capsys)
    assert f"--archives {archives} lacks {DEVKIT}, {VAL}: log in at https://image-net.org" in line and not (tmp_path / "imagenet").exists()


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
@pytest.mark.parametrize("kept", [0, 0.3, 0.6])
def test_truncated_archive_is_one_line(archives, tmp_path, capsys, name, kept):
    data = (archives / name).read_bytes()
    (archives / name).write_bytes(data[: int(kept * len(data))])
    assert f"{archives / name} is truncated or damaged (" in refusal(archives, tmp_path / "imagenet", capsys)


def test_archive_cut_between_two_files_is_truncated_too(archives, tmp_path, capsys):
    with tarfile.open(archives / TRAIN) as tar:
        end = tar.getmembers()[2].offset
    (archives / TRAIN).write_bytes((archives / TRAIN).read_bytes()[:end])
    assert "its end is missing" in refusal(archives, tmp_path / "imagenet", capsys, "--train-only")


def test_damaged_tar_of_one_class_is_one_line(archives, tmp_path, capsys):
    (archives / TRAIN).write_bytes(tar_bytes({"n01440764.tar": tar_bytes(train_images()["n01440764"])[:2000]}))
    assert f"{archives / TRAIN} is truncated or damaged (" in refusal(archives, tmp_path / "imagenet", capsys, "--train-only")


@pytest.mark.parametrize("name", ["../evil.JPEG", "/tmp/evil.JPEG", "n01440764_1.JPEG/../../../evil.JPEG", "notes.txt"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_names_that_lead_elsewhere_are_refused(archives, tmp_path, capsys, name, part):
    evil = tar_bytes({name: b"x"})
    (archives / TRAIN).write_bytes(tar_bytes({"n01440764.tar": evil}))
    (archives / VAL).write_bytes(evil)
    before = files_below(tmp_path)
    assert f"holds '{name}', which is no file of ImageNet's" in refusal(archives, tmp_path / "imagenet", capsys, f"--{part}-only")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(archives, tmp_path, capsys, kind):
    with tarfile.open(archives / VAL, "w") as tar:
        item = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        item.type, item.linkname = kind, "/etc/passwd"
        tar.addfile(item)
    assert "which is no file of ImageNet's" in refusal(archives, tmp_path / "imagenet", capsys, "--val-only")


def test_folders_and_leading_dots_in_a_tar_do_no_harm(archives, tmp_path):
    with tarfile.open(archives / VAL, "w") as tar:
        folder = tarfile.TarInfo(".")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i in range(1, 8):
            item = tarfile.TarInfo(f"./ILSVRC2012_val_{i:08d}.JPEG")
            item.size = len(jpeg(100 + i))
            tar.addfile(item, io.BytesIO(jpeg(100 + i)))
    assert extract(archives, tmp_path / "imagenet") == 0
    assert files_below(tmp_path / "imagenet") == expected()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (VAL_LABELS[:-1], "ground truth of 6 lines"),
        ([*VAL_LABELS, 1], "ground truth of 8 lines"),
        ([1, 2, 4, *VAL_LABELS[3:]], "line 3 of data/ILSVRC2012_validation_ground_truth.txt is '4', which is no class of data/meta.mat"),
        (["dog", *VAL_LABELS[1:]], "line 1 of data/ILSVRC2012_validation_ground_truth.txt is 'dog'"),
    ],
)
def test_ground_truth_must_fit(archives, tmp_path, capsys, labels, message):
    (archives / DEVKIT).write_bytes(devkit_bytes(labels))
    assert message in refusal(archives, tmp_path / "imagenet", capsys)
    assert not (tmp_path / "imagenet").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [({"devkit/readme.txt": b"x"}, "has no data/meta.mat"), ({"d/data/meta.mat": b"x" * 200}, "ground_truth.txt: it must be the devkit")],
)
def test_another_archive_in_place_of_the_devkit(archives, tmp_path, capsys, files, message):
    (archives / DEVKIT).write_bytes(tar_bytes(files, "w:gz"))
    assert message in refusal(archives, tmp_path / "imagenet", capsys)


def test_table_of_synsets_must_be_one(archives, tmp_path, capsys):
    (archives / DEVKIT).write_bytes(tar_bytes({"d/data/meta.mat": b"x" * 200, f"d/{extract_imagenet.GROUND_TRUTH}": b"1\n"}, "w:gz"))
    assert "data/meta.mat is not the devkit's table of synsets" in refusal(archives, tmp_path / "imagenet", capsys)


def test_empty_archive_is_named(archives, tmp_path, capsys):
    (archives / TRAIN).write_bytes(tar_bytes({}))
    assert f"{archives / TRAIN} is empty" in refusal(archives, tmp_path / "imagenet", capsys, "--train-only")


def test_full_disk_is_one_line_and_leaves_no_partial_file(archives, tmp_path, capsys, monkeypatch):
    real, calls = Path.write_bytes, []

    def write_bytes(path, data):
        calls.append(path)
        if len(calls) == 4:
            real(path, data[:100])
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    line = refusal(archives, tmp_path / "imagenet", capsys)
    assert "cannot be written (No space left on device): make room" in line and str(tmp_path / "imagenet" / "val") in line
    monkeypatch.undo()
    assert all(name in expected() for name in files_below(tmp_path / "imagenet")) and len(files_below(tmp_path / "imagenet")) == 3
    assert extract(archives, tmp_path / "imagenet") == 0 and files_below(tmp_path / "imagenet") == expected()


def test_folder_below_a_file_is_one_line(archives, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refusal(archives, tmp_path / "file" / "imagenet", capsys)


def test_interrupted_run_says_how_to_go_on(archives, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(extract_imagenet, "extract_train", interrupt)
    assert extract(archives, tmp_path / "imagenet") == 130
    assert "start again to go on" in capsys.readouterr().err
