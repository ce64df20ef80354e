"""tools/pack_dataset.py: the source's bytes, gone on with after a stop, checked, made smaller, and from every source."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import datasets
from loading.images import read_sample
from run.errors import InputError
from sources import packing
from sources.packed import Packed
from tests.sources.test_runs import settings
from tools import pack_dataset


def pack(source, out, *flags: str) -> int:
    return pack_dataset.main([str(source), str(out), "--num-workers=1", *flags])


@pytest.mark.parametrize("kind", ["folder", "parquet", "shards"])
def test_packed_files_hold_the_same_from_every_source(kind, layouts, tmp_path, capsys):
    assert pack(layouts(kind), tmp_path, "--check") == 0
    assert "val.pack: 40 images compared" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["train.pack", "val.pack"]
    ours, theirs = datasets.open_images(settings(tmp_path)), datasets.open_images(settings(layouts("folder")))
    for images, expected in zip(ours, theirs, strict=True):
        assert images.classes == expected.classes and images.targets.tolist() == expected.targets.tolist()
        assert list(map(read_sample, images.samples)) == list(map(read_sample, expected.samples))


def test_images_are_packed_as_their_source_lies(layouts, tmp_path):
    """Else each image of a parquet file would cost its row group."""
    pack(layouts("parquet"), tmp_path)
    packed, _ = datasets.open_images(settings(tmp_path))
    source, _ = datasets.open_images(settings(layouts("parquet")))
    assert packed.samples.storage_order().tolist() == source.samples.storage_order().tolist() != list(range(96))


def test_a_stopped_command_goes_on_where_it_was(layouts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(packing, "BATCH_SIZE", 8)
    real, calls = packing.Recipe.apply, []

    def apply(recipe, sample):
        calls.append(str(sample))
        if len(calls) == 50:
            raise KeyboardInterrupt
        return real(recipe, sample)

    monkeypatch.setattr(packing, "loader_settings", lambda *_: {"collate_fn": lambda batch: batch})
    monkeypatch.setattr(packing.Recipe, "apply", apply)
    assert pack(layouts("folder"), tmp_path) == 130 and sorted(os.listdir(tmp_path)) == ["train.pack.journal", "train.pack.partial"]
    with (tmp_path / "train.pack.partial").open("ab") as file:
        file.write(b"written, and not yet noted")
    with (tmp_path / "train.pack.journal").open("ab") as file:
        file.write(b"torn")
    before = len(calls)
    assert pack(layouts("folder"), tmp_path) == 0
    assert "48 of 96 images are there already" in capsys.readouterr().err and len(calls) - before == 48 + 40
    assert pack(layouts("folder"), tmp_path, "--check") == 0
    assert pack(layouts("folder"), tmp_path) == 0 and "is there already" in capsys.readouterr().out


def test_what_was_begun_from_other_images_is_begun_anew(layouts, tmp_path):
    (tmp_path / "train.pack.partial").write_bytes(bytes(5000))
    (tmp_path / "train.pack.journal").write_bytes(b"0" * 32 + b"\n" + bytes(24))
    assert pack(layouts("folder"), tmp_path, "--check") == 0


def test_a_packed_file_that_differs_from_its_source_is_found_out(layouts, tmp_path, capsys):
    shutil.copytree(layouts("packed"), tmp_path / "packed")
    train, _ = datasets.open_images(settings(tmp_path / "packed"))
    source: Packed = train.samples
    with (tmp_path / "packed" / "train.pack").open("r+b") as file:
        for i in (3, 70):
            file.seek(int(source.offset[i]) + 100)
            file.write(b"\xff")
    assert pack(layouts("folder"), tmp_path / "packed", "--check") == 1
    out, err = capsys.readouterr()
    assert "96 images compared" in out and "2 differ" in out and [err.count(f"{source.name(i)} is not what ") for i in (3, 4, 70)] == [1, 0, 1]
    with pytest.raises(InputError, match="or not the same: pack the source anew"):
        shutil.copy(tmp_path / "packed" / "val.pack", tmp_path / "packed" / "train.pack")
        pack(layouts("folder"), tmp_path / "packed", "--check")


def test_smaller_images_are_another_data_set(layouts, tmp_path, capsys):
    flags = ["--max-side=40", "--quality=80"]
    assert pack(layouts("folder"), tmp_path, *flags, "--check") == 0
    capsys.readouterr()
    train, _ = datasets.open_images(settings(tmp_path))
    whole, _ = datasets.open_images(settings(layouts("folder")))
    assert train[5][0].size == (40, 40) and train.targets.tolist() == whole.targets.tolist()
    expected, file = whole[5][0].resize((40, 40), Image.Resampling.LANCZOS), io.BytesIO()
    expected.save(file, "JPEG", quality=80, subsampling=0)
    assert read_sample(train.samples[5]) == file.getvalue()
    with pytest.raises(InputError, match="was made with .*'max_side': 40.*: check it with the same --max-side"):
        pack(layouts("folder"), tmp_path, "--check")
    assert pack(layouts("folder"), tmp_path / "large", "--max-side=48") == 0
    large, _ = datasets.open_images(settings(tmp_path / "large"))
    assert read_sample(large.samples[5]) == read_sample(whole.samples[5])  # small enough as it is


def test_a_source_that_cannot_be_read_is_named(layouts, tmp_path):
    shutil.copytree(layouts("shards"), tmp_path / "shards")
    images, _ = datasets.open_images(settings(tmp_path / "shards"))
    last = int(np.argmax(images.samples.offset))
    path = tmp_path / "shards" / os.path.basename(images.samples.files[int(images.samples.file[last])].path)
    part = packing.pack
    (tmp_path / "out").mkdir()
    os.truncate(path, int(images.samples.offset[last]) + 10)
    with pytest.raises(InputError, match="cannot be read as an image .*goes on from here"):
        part(None, images, tmp_path / "out" / "train.pack", packing.Recipe(), num_workers=1, say=print)
    with pytest.raises(InputError, match="holds no images of train or val"):
        pack(tmp_path / "out", tmp_path / "none")
