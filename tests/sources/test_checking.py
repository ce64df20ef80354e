"""tools/check_images.py: what it finds in a tree, what it writes, and how it ends."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from run.errors import InputError
from sources import checking
from sources.sets import open_folder
from tests.conftest import ROOT
from tests.loading.test_damaged import spoil
from tools import check_images


@pytest.fixture(scope="module")
def tree(digits_folder, tmp_path_factory):
    """A folder of a sound part, a spoilt part, a tar of it, a cut tar, and what loaders pass over; and the paths of what is wrong there."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(digits_folder / "val", folder / "a" / "val")
    shutil.copytree(digits_folder / "train", folder / "b")
    kinds = {"cut": "damaged", "bomb": "damaged", "html": "not an image", "noise": "not an image", "empty": "not an image"}
    wrong = dict(zip(spoil(folder / "b", dict(zip((1, 20, 50, 70, 90), kinds, strict=True))), kinds.values(), strict=True))
    odd = Path(open_folder(folder / "b").samples[40])
    Image.open(digits_folder / "train" / odd.relative_to(folder / "b")).save(odd, "PNG")
    with tarfile.open(folder / "c.tar", "w") as tar:
        tar.add(folder / "b", arcname="b")
    wrong |= {f"{folder / 'c.tar'}: {Path(path).relative_to(folder)}": problem for path, problem in wrong.items()}
    (folder / "d.tar").write_bytes((folder / "c.tar").read_bytes()[:5000])
    (folder / "a" / "notes.txt").write_text("no image, and not named as one")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jpg").write_bytes(b"")
    fallback = dict.fromkeys((str(odd), f"{folder / 'c.tar'}: {odd.relative_to(folder)}"), "read by the fallback")
    return folder, {**wrong, str(folder / "d.tar"): "damaged"}, fallback


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("loader", ["fast", "reference"])
def test_all_that_is_wrong_in_a_tree_is_listed(tree, tmp_path, capsys, loader):
    folder, wrong, fallback = tree
    out = tmp_path / "list.csv"
    assert check_images.main([str(folder), f"--out={out}", f"--loader={loader}", "--num-workers=2"]) == 1
    header, *rows = read_csv(out)
    expected = wrong | (fallback if loader == "fast" else {})
    assert header == ["path", "problem", "message"] and {path: problem for path, problem, _ in rows} == expected and len(rows) == len(expected)
    assert all(message for *_, message in rows) and [path.name for path in tmp_path.iterdir()] == ["list.csv"]
    last = capsys.readouterr().out.splitlines()[-1]
    counts = "5 damaged, 6 not an image" + (", 2 read by the fallback" if loader == "fast" else "")
    assert last == f"232 images: {counts}; 1 other files passed over. The list: {out}"


def test_sound_trees_and_those_that_the_fallback_reads_are_no_failure(digits_folder, tree, tmp_path):
    argv = [f"--out={tmp_path / 'list.csv'}", "--num-workers=1"]
    assert check_images.main([str(digits_folder), *argv]) == 0 and read_csv(tmp_path / "list.csv") == [["path", "problem", "message"]]
    odd = next(iter(tree[2]))
    shutil.copy(odd, tmp_path / "odd.jpg")
    assert check_images.main([str(tmp_path), *argv]) == 0
    assert read_csv(tmp_path / "list.csv")[1:] == [[str(tmp_path / "odd.jpg"), "read by the fallback", "it is no JPEG in colour or grayscale"]]
    assert check_images.main([str(tree[0] / "c.tar"), *argv]) == 1


def test_the_fallbacks_reason_is_what_the_strict_decoder_says(digits_folder, tmp_path):
    data = bytearray(Path(open_folder(digits_folder / "train").samples[0]).read_bytes())
    at = data.index(b"\xff\xda") + 40
    data[at : at + 40] = 20 * b"\xff\x00"
    (tmp_path / "odd.jpg").write_bytes(data)
    (problem,) = checking.check(checking.find_images(tmp_path), is_fast=True, num_workers=0, say=lambda text: None)
    assert problem.problem == "read by the fallback" and "orrupt" in problem.message


def test_progress_says_how_much_is_left(digits_folder, monkeypatch):
    monkeypatch.setattr(checking, "REPORT_EVERY_S", 0.0)
    lines = []
    assert list(checking.check(checking.find_images(digits_folder), is_fast=True, num_workers=0, say=lines.append)) == []
    assert [line.split("  ")[0] for line in lines] == ["64 of 136 images", "128 of 136 images", "136 of 136 images"]
    assert "images/s  0 problems  ETA 0:00:00" in lines[-1] and "100.0%" in lines[-1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no such folder or file"),
        (lambda path: path.mkdir(), r"holds no images \(\.jpg"),
        (lambda path: path.write_bytes(b"x"), "holds no images"),
    ],
)
def test_where_there_is_nothing_to_read_is_said(tmp_path, make, words):
    make(tmp_path / "there")
    with pytest.raises(InputError, match=words):
        check_images.main([str(tmp_path / "there"), f"--out={tmp_path / 'list.csv'}"])


def test_a_list_that_cannot_be_written_is_said_before_anything_is_read(digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(check_images, "check", None)
    with pytest.raises(InputError, match=r"--out .*list\.csv cannot be written \(No such file or directory\)"):
        check_images.main([str(digits_folder), f"--out={tmp_path / 'missing' / 'list.csv'}"])


def ignores_control_c(pid: str) -> bool:
    """Whether a process ignores SIGINT, as the loader's do once they are set up."""
    (ignored,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


@pytest.mark.slow
def test_control_c_ends_all_processes_with_one_line(digits_folder, tmp_path):
    for i in range(200):
        (tmp_path / "tree").mkdir(exist_ok=True)
        (tmp_path / "tree" / str(i)).symlink_to(digits_folder)
    command = [sys.executable, "tools/check_images.py", str(tmp_path / "tree"), f"--out={tmp_path / 'list.csv'}", "--num-workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers = []
    while len(workers) < 2 or not all(map(ignores_control_c, workers)):
        assert process.poll() is None, process.communicate()
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", f"interrupted: {tmp_path / 'list.csv'} is not written\n")
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()] and not list(tmp_path.glob("list.csv*"))


@pytest.mark.parametrize("kind", ["packed", "parquet", "shards"])
def test_files_of_many_images_are_read_too(kind, layouts, tmp_path):
    """And of one that is cut, that it is."""
    tree = checking.find_images(layouts(kind))
    assert tree.num_images == 136 and list(checking.check(tree, is_fast=True, num_workers=0, say=lambda text: None)) == []
    path = max((path for path in layouts(kind).rglob("*") if path.suffix in checking.HOLDERS), key=lambda path: path.stat().st_size)
    (tmp_path / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    problems = list(checking.check(checking.find_images(tmp_path), is_fast=True, num_workers=0, say=lambda text: None))
    assert [problem.problem for problem in problems] == ["damaged"] and str(tmp_path / path.name) in problems[0].path
