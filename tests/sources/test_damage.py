"""Sources that are not whole, not labelled, or not those that were indexed: one message each, and nothing wrong is trained."""

import csv
import io
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import datasets
import utils
from loading.images import Names, read_sample
from run.errors import DamagedImage, InputError
from sources import archives, finding, table
from tests.sources.test_runs import settings


@pytest.fixture
def copied(layouts, tmp_path):
    """A copy of a layout, to be spoilt."""

    def get(kind: str) -> Path:
        return shutil.copytree(layouts(kind), tmp_path / kind)

    return get


def cut(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def rewrite_tar(path: Path, change) -> None:
    """Write a tar anew with what `change(name, data)` yields of each member."""
    with tarfile.open(path) as tar:
        members = [(item.name, tar.extractfile(item).read()) for item in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in (changed for member in members for changed in change(*member)):
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))


def lose_a_row_group(path: Path) -> None:
    """Cut bytes of the first row group out, and leave the footer, which lists all."""
    data = path.read_bytes()
    path.write_bytes(data[:100] + data[5000:])


def lose_the_labels(path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(parquet.read_table(path).drop_columns(["label"]), path)


def lose_a_label(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    found = parquet.read_table(path)
    labels = pyarrow.array([None, *found.column("label").to_pylist()[1:]], pyarrow.int64())
    parquet.write_table(found.set_column(1, "label", labels), path)


def labels_are(label: bytes):
    return lambda name, data: [(name, label if name.endswith(".cls") else data)]


def drop(ending: str):
    return lambda name, data: [] if name.endswith(ending) else [(name, data)]


SHARD, ROWS = "imagenet1k-train-0001.tar", "data/train-00000-of-00002.parquet"


@pytest.mark.parametrize(
    ("kind", "name", "spoil", "message"),
    [
        ("tar", "train.tar", lambda path: cut(path, 0.5), r"train\.tar is no plain, complete tar \((unexpected end of data|its end is missing)\)"),
        ("shards", SHARD, lambda path: cut(path, 0.7), rf"{SHARD} is no plain, complete tar"),
        ("shards", SHARD, lambda path: os.truncate(path, 512 + 1536), rf"{SHARD} is no plain, complete tar \(its end is missing\)"),
        ("shards", SHARD, Path.unlink, r"train-0000\.tar and the 1 others are not all: number 1 of them is missing"),
        ("shards", SHARD, lambda path: rewrite_tar(path, drop(".cls")), r"train-0001\.tar: \S+\.jpg has no \S+\.cls, and no \S+\.json with a 'label'"),
        ("shards", SHARD, lambda path: rewrite_tar(path, drop(".jpg")), r"train-0001\.tar: key \S+ has a class and no image"),
        ("shards", SHARD, lambda path: rewrite_tar(path, labels_are(b"cat")), r"\.cls holds no class"),
        ("shards", SHARD, lambda path: rewrite_tar(path, labels_are(b"-1")), "have a negative label"),
        (
            "shards",
            SHARD,
            lambda path: rewrite_tar(path, labels_are(b"9")),
            "of class 9, but only 4 classes have names",
        ),
        ("parquet", ROWS, lambda path: cut(path, 0.6), r"of-00002\.parquet is no complete parquet file"),
        ("parquet", ROWS, lose_a_row_group, r"of-00002\.parquet lacks rows that its footer lists \(48 in 5 row groups\)"),
        ("parquet", ROWS, Path.unlink, r"number 0 of them is missing"),
        ("parquet", ROWS, lose_the_labels, r"of-00002\.parquet has no column label: its columns are image\.bytes, image\.path"),
        ("parquet", ROWS, lose_a_label, "row group 0 has rows without a label"),
        ("zip", "train.zip", lambda path: cut(path, 0.9), r"train\.zip is no complete zip"),
        ("packed", "train.pack", lambda path: cut(path, 0.9), r"train\.pack is no complete packed file \(its end is missing\)"),
        ("packed", "train.pack", lambda path: flip(path, -200), r"train\.pack is no complete packed file \(its checksum is wrong\)"),
        ("kaggle", "LOC_val_solution.csv", lambda path: path.write_text("".join(path.read_text().splitlines(True)[:-1])), "not listed 0"),
        ("kaggle", "LOC_val_solution.csv", Path.unlink, r"lacks LOC_val_solution\.csv"),
        ("kaggle", "LOC_synset_mapping.txt", lambda path: path.write_text(path.read_text() + "zebra a zebra\n"), "without images zebra"),
        ("list", "train.csv", lambda path: path.write_text(path.read_text() + "images/x.jpg\n"), r"train\.csv, line 98, has no class"),
        ("list", "train.csv", lambda path: path.write_text(re.sub("class", "remark", path.read_text())), r"train\.csv has no column of the class"),
        ("list", "train.csv", lambda path: path.write_text("nowhere.jpg,1\n"), r"nowhere\.jpg, which is not there"),
    ],
)
def test_what_is_not_whole_or_not_labelled_is_refused_by_name(copied, kind, name, spoil, message):
    root = copied(kind)
    spoil(root / name)
    with pytest.raises(InputError, match=message):
        datasets.open_images(settings(root, f"--data-format={kind}"))


class Counting:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *args):
        self.count += 1
        return self.function(*args)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_an_index_that_is_older_than_its_source_is_built_anew(copied, monkeypatch, caplog):
    root = copied("shards")
    monkeypatch.setattr(utils.log, "propagate", True)
    monkeypatch.setattr(archives, "list_shards", calls := Counting(archives.list_shards))
    before, _ = datasets.open_images(settings(root))
    datasets.open_images(settings(root))
    assert calls.count == 2  # one of each split
    rewrite_tar(root / SHARD, lambda name, data: [(name, data + b"x" if name.endswith("jpg") else data)])
    after, _ = datasets.open_images(settings(root))
    said = {message for message in caplog.messages if "is older than" in message}
    assert said == {f"the index of {root / SHARD.replace('1.', '0.')} and 2 others is older than {root / SHARD}: building it anew"} and calls.count == 3
    grown = after.samples.sizes() - before.samples.sizes()
    assert sorted(np.unique(grown)) == [0, 1] and grown.sum() == 32
    assert all(len(read_sample(after.samples[i])) == after.samples.sizes()[i] for i in range(len(after)))


def test_a_damaged_index_is_built_anew(copied, monkeypatch, caplog, tmp_path):
    root = copied("tar")
    cfg = settings(root, f"--data-cache={tmp_path / 'cache'}")
    datasets.open_images(cfg)
    indexes = sorted((tmp_path / "cache" / "indexes").iterdir())
    assert len(indexes) == 2
    for path in indexes:
        flip(path, 100)
    monkeypatch.setattr(utils.log, "propagate", True)
    train, _ = datasets.open_images(cfg)
    said = {f"the index of {root / name} is damaged (its checksum is wrong): building it anew" for name in ("train.tar", "val.tar")}
    assert said <= set(caplog.messages) and len(train) == 96


def test_a_cache_that_cannot_be_written_costs_a_warning(layouts, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(utils.log, "propagate", True)
    train, _ = datasets.open_images(settings(layouts("zip"), f"--data-cache={tmp_path / 'file'}"))
    assert len(train) == 96 and "cannot be written" in caplog.text and "--data-cache" in caplog.text


@pytest.mark.parametrize("kind", ["shards", "packed", "zip"])
def test_what_is_cut_off_while_a_run_reads_it_is_damaged_not_shown(kind, copied):
    train, _ = datasets.open_images(settings(copied(kind)))
    last = int(train.samples.storage_order()[-1])
    cut(Path(train.samples.files[int(train.samples.file[last])].path), 0.5)
    with pytest.raises(DamagedImage, match="the file ends [0-9]+ bytes before the image does"):
        train.open(last, is_fast=True)


def test_labels_that_are_names_and_numbers_are_refused(copied, tmp_path):
    root = copied("list")
    (root / "train.csv").write_text(re.sub(",3$", ",three", (root / "train.csv").read_text(), flags=re.M))
    train, val = finding.find(finding.open_root(str(root), None), "train", "list"), None
    assert train.classes == ["0", "1", "2", "three"] and val is None
    with pytest.raises(InputError, match="of class 3|have the same names"):
        (root / "val.csv").write_text(re.sub(",3$", ",drei", (root / "val.csv").read_text(), flags=re.M))
        datasets.open_images(settings(root))


def test_encrypted_zips_are_refused(tmp_path, layouts):
    shutil.copy(layouts("zip") / "val.zip", tmp_path / "val.zip")
    data = bytearray((layouts("zip") / "train.zip").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "train.zip").write_bytes(data)
    with pytest.raises(InputError, match="is encrypted or compressed in a rare way"):
        datasets.open_images(settings(tmp_path))


def test_tables_are_read_as_written_and_share_the_files_memory(tmp_path):
    columns = {"a": np.arange(5, dtype=np.int32), "b": np.array([1.5]), **Names(["", "ünï", "z"]).columns("t")}
    (tmp_path / "x").write_bytes(b"".join(table.encode({"k": [1, None]}, columns)))
    found = table.read(tmp_path / "x")
    assert found.facts == {"k": [1, None]} and {name: column.tolist() for name, column in found.columns.items()} == {
        name: column.tolist() for name, column in columns.items()
    }
    assert list(Names.of_columns(found.columns, "t")) == ["", "ünï", "z"]
    assert not found["a"].flags.writeable and not found["a"].flags.owndata


def test_deflated_members_and_lists_with_tabs_and_blanks_are_read(tmp_path, digits_folder):
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(next((digits_folder / "train" / "0").iterdir()), "train/0/a.jpg")
    file = next((digits_folder / "train" / "0").iterdir())
    (tmp_path / "val.tsv").write_text(f"{file}\t0\n")
    train, val = datasets.open_images(settings(tmp_path))
    assert read_sample(train.samples[0]) == read_sample(val.samples[0]) == file.read_bytes()
    (tmp_path / "val.tsv").unlink()
    shutil.copy(file, tmp_path / "a photo.jpg")
    (tmp_path / "val.txt").write_text("a photo.jpg 0\n")
    with (tmp_path / "train.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["class", "image"], ["0", "a photo.jpg"]])
    train, val = datasets.open_images(settings(tmp_path, "--data-format=list"))
    assert read_sample(train.samples[0]) == read_sample(val.samples[0]) == file.read_bytes()
