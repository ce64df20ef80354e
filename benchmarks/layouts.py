"""A folder of class folders written anew in every layout that `--data-path` takes: what benchmarks and tests compare."""

import contextlib
import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools import pack_dataset


class File(NamedTuple):
    """An image of a split: class, number of the class, name, and bytes."""

    label: str
    number: int
    name: str
    data: bytes


def files_of(folder: Path, split: str) -> Iterator[File]:
    """The images of a split, in an order that is not that of a run, as published shards have them."""
    found = [(number, path) for number, label in enumerate(sorted((folder / split).iterdir())) for path in sorted(label.iterdir())]
    for i in np.random.RandomState(0).permutation(len(found)):
        number, path = found[i]
        yield File(path.parent.name, number, path.name, path.read_bytes())


def _splits(folder: Path) -> list[str]:
    return [split for split in ("train", "val") if (folder / split).is_dir()]


def write_packed(folder: Path, out: Path) -> None:
    pack_dataset.main([str(folder), str(out), "--num-workers=1"])


def write_tar(folder: Path, out: Path) -> None:
    for split in _splits(folder):
        with tarfile.open(out / f"{split}.tar", "w") as tar:
            for file in files_of(folder, split):
                _add(tar, f"{split}/{file.label}/{file.name}", file.data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    item = tarfile.TarInfo(name)
    item.size = len(data)
    tar.addfile(item, io.BytesIO(data))


def write_zip(folder: Path, out: Path) -> None:
    for split in _splits(folder):
        with zipfile.ZipFile(out / f"{split}.zip", "w") as archive:
            for i, file in enumerate(files_of(folder, split)):
                archive.writestr(f"{split}/{file.label}/{file.name}", file.data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])


def write_shards(folder: Path, out: Path, *, num_shards: int = 3) -> None:
    for split in _splits(folder):
        name = "validation" if split == "val" else split
        with contextlib.ExitStack() as stack:
            tars = [stack.enter_context(tarfile.open(out / f"imagenet1k-{name}-{i:04}.tar", "w")) for i in range(num_shards)]
            for i, file in enumerate(files_of(folder, split)):
                stem, tar = f"{file.label}_{Path(file.name).stem}", tars[i % num_shards]
                _add(tar, f"{stem}.jpg", file.data)
                label = {"cls": str(file.number), "json": json.dumps({"label": file.number, "filename": file.name})}
                kind = ("cls", "json")[i % 2]
                _add(tar, f"{stem}.{kind}", label[kind].encode())
    (out / "classes.txt").write_text("\n".join(path.name for path in sorted((folder / "train").iterdir())) + "\n")


def write_parquet(folder: Path, out: Path, *, num_files: int = 2, rows_per_group: int = 10) -> None:
    import pyarrow
    from pyarrow import parquet

    names = [path.name for path in sorted((folder / "train").iterdir())]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], metadata=metadata)
    (out / "data").mkdir()
    for split in _splits(folder):
        name, rows = "validation" if split == "val" else split, list(files_of(folder, split))
        for i in range(num_files):
            part = rows[i::num_files]
            columns = {"image": [{"bytes": row.data, "path": row.name} for row in part], "label": [row.number for row in part]}
            table = pyarrow.table(columns, schema=schema)
            parquet.write_table(table, out / "data" / f"{name}-{i:05}-of-{num_files:05}.parquet", row_group_size=rows_per_group)


def write_kaggle(folder: Path, out: Path) -> None:
    layout = out / "ILSVRC" / "Data" / "CLS-LOC"
    names = [path.name for path in sorted((folder / "train").iterdir())]
    shutil.copytree(folder / "train", layout / "train")
    (layout / "val").mkdir()
    (out / "LOC_synset_mapping.txt").write_text("".join(f"{name} a word, and another\n" for name in names))
    with (out / "LOC_val_solution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for image in files_of(folder, "val"):
            (layout / "val" / f"{image.name}").write_bytes(image.data)
            writer.writerow([Path(image.name).stem, f"{image.label} 85 1 499 272 "])


def write_list(folder: Path, out: Path) -> None:
    for split in _splits(folder):
        shutil.copytree(folder / split, out / "images" / split)
        lines = [f"images/{split}/{file.label}/{file.name},{file.label}" for file in files_of(folder, split)]
        (out / f"{split}.csv").write_text("\n".join(["path,class", *lines]) + "\n")


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "packed": write_packed,
    "tar": write_tar,
    "zip": write_zip,
    "shards": write_shards,
    "parquet": write_parquet,
    "kaggle": write_kaggle,
    "list": write_list,
}


def write(kind: str, folder: Path, out: Path) -> Path:
    """`out`, made, with the train/ and val/ of `folder` in the layout `kind`; itself where that is `folder`."""
    if kind == "folder":
        return folder
    out.mkdir(parents=True)
    WRITERS[kind](folder, out)
    return out
