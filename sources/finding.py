"""What lies at --data-path: which of the layouts that are read, and its parts opened."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loading.images import Images
from run.config import Config
from run.errors import InputError
from sources import archives, folders, index, packed, parquet, remote
from sources.cache import Cache, default_folder
from sources.files import Files, describe, list_folder
from sources.parts import Part, join, read_class_map, settle
from sources.stored import Ranges, Source, key_of
from utils import log

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}  # names of each in files' names
LISTS = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Root:
    """A place that holds a data set: a folder or a file, on a disk or in a store."""

    path: str
    is_file: bool
    files: list[str]
    data_files: list[str]  # in data/ below it, where Hugging Face keeps parquet files
    cache: Cache

    @property
    def local(self) -> Path | None:
        return None if remote.is_url(self.path) else Path(self.path)

    def named(self, name: str) -> str | None:
        """The file of that name at the top; None where there is none."""
        return next((path for path in self.files if path.rpartition("/")[2] == name), None)

    def matching(self, pattern: str, split: str) -> list[str]:
        """The files whose names match `pattern`, in which `SPLIT` stands for the split's names."""
        wanted = re.compile(pattern.replace("SPLIT", f"(?:{'|'.join(SPLITS[split])})"))
        return [path for path in self.files + self.data_files if wanted.fullmatch(path.rpartition("/")[2])]


def open_root(path: str, cache: Cache) -> Root:
    """The folder or file at a path or URL. InputError where there is none."""
    if remote.is_url(path):
        is_file = path.lower().endswith((".zip", ".tar"))
        names = [] if is_file else list_folder(path)
        below = [name for name in names if name.rstrip("/").endswith("/data")]
        return Root(path, is_file, names, [name for folder in below for name in list_folder(folder)], cache)
    local = Path(path).expanduser()
    if local.is_file() and local.suffix.lower() in (".zip", ".tar"):
        return Root(str(local), True, [], [], cache)
    if local.is_file():
        raise InputError(_of_file(local))
    if not local.is_dir():
        raise InputError(
            f"--data-path {local} is no folder: it must hold train/ and val/, each with a folder per class, or tars, zips, packed files, shards, parquet files "
            "or lists of these names; or be a tar or zip of both"
        )
    below = list_folder(str(local / "data")) if (local / "data").is_dir() else []
    return Root(str(local), False, list_folder(str(local)), below, cache)


COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")


def _of_file(path: Path) -> str:
    """Why a file cannot be --data-path."""
    if path.suffix.lower() in COMPRESSED:
        return f"--data-path {path} is compressed as a whole, so that no image in it can be read by itself: unpack it, or make it a plain tar, as gunzip does"
    return f"--data-path {path} is a file: name the folder it lies in, {path.parent}; only a tar or zip that holds train/ and val/ is named itself"


def missing(cfg: Config, split: str) -> InputError:
    """The error where --data-path holds no images of a split: what lies there instead, and what should."""
    roots = [Path(path).expanduser() for path in roots_of(cfg.data_path) if not remote.is_url(path)]
    asked = f" as --data-format {cfg.data_format}" if cfg.data_format != "auto" else ""
    files = f"{split}.tar, {split}.zip, {split}.pack, {split}.csv, shards or parquet files of {split}"
    fact = f"--data-path {cfg.data_path} holds neither {split}/ nor {files}{asked}"
    for root in (root for root in roots if root.is_dir()):
        names = [path.name for path in root.iterdir() if path.suffix.lower() in COMPRESSED]
        if names:
            return InputError(f"{fact}, but {min(names)}", "unpack it, or make it a plain tar, for images inside compressed files cannot be read one by one")
        if root.name in SPLITS[split] and any(path.is_dir() for path in root.iterdir()):
            return InputError(fact, f"name the folder above, {root.parent}")
    return InputError(fact, "put the images there, in a folder per class" + (", or drop --data-format" if asked else ""))


# ---- one split


def _of_source(source: Source, labels, facts: dict, what: str, *, key: Callable) -> Part:
    names, classes = facts.get("names"), facts["classes"]
    return Part(source, labels, classes or names, is_numbered=classes is None, key=key, what=what)


_SPLIT_FOLDERS = tuple(name for names in SPLITS.values() for name in names)


def _archive(root: Root, path: str, split: str) -> Part | None:
    files = Files(describe([path]), root.cache)
    listing = {"wanted": SPLITS[split], "splits": _SPLIT_FOLDERS, "needs_split": root.is_file}
    found = index.cached(f"folders-{split}-{root.is_file}", files, lambda: archives.list_folders(files, **listing))
    source = Ranges(files, found)
    if not len(source) and root.is_file:
        return None
    if not len(source):
        raise InputError(f"{path} holds images of other splits alone: put those of {split} there, or rename it")
    return _of_source(source, found["label"], found.facts, path, key=lambda i: key_of(archives.place(source.names[i], _SPLIT_FOLDERS).rest))


def _folder(root: Root, split: str) -> Part | None:
    return folders.class_folders(root.local / split) if root.local and (root.local / split).is_dir() else None


def _kaggle(root: Root, split: str) -> Part | None:
    return folders.kaggle(root.local, split) if root.local and folders.kaggle_folder(root.local) else None


def _packed(root: Root, split: str) -> Part | None:
    path = root.named(split + packed.ENDING)
    if path is None:
        return None
    source = packed.Packed(Files(describe([path]), root.cache))
    recoded = source.facts["recoded"]
    what = path if recoded is None else f"{path}, made smaller from {source.facts['source']} (sides of at most {recoded['max_side']} pixels)"
    return _of_source(source, source.labels, source.facts, what, key=lambda i: key_of(source.names[i]))


def _archive_of(ending: str) -> Callable[[Root, str], Part | None]:
    def find(root: Root, split: str) -> Part | None:
        path = root.path if root.is_file and root.path.lower().endswith(ending) else root.named(split + ending)
        return None if path is None else _archive(root, path, split)

    return find


def _require_all(paths: list[str]) -> None:
    """InputError where numbered files lack one among them."""
    matches = [match for path in paths if (match := re.search(r"(\d+)(?:-of-(\d+)(?:-[0-9a-f]+)?)?\.\w+$", path))]
    numbers = {int(match[1]) for match in matches}
    totals = [int(match[2]) for match in matches if match[2]]
    wanted = range(max(totals)) if totals else range(min(numbers, default=0), max(numbers, default=-1) + 1)
    missing = sorted(set(wanted) - numbers)
    if missing:
        raise InputError(f"{paths[0]} and the {len(paths) - 1} others are not all: number {missing[0]} of them is missing; fetch it")


def _class_names(root: Root) -> list[str] | None:
    return read_class_map(str(root.local / "classes.txt"), flag="--data-path") if root.local and (root.local / "classes.txt").is_file() else None


def _shards(root: Root, split: str) -> Part | None:
    paths = root.matching(r"(?:.*[-_.])?SPLIT[-_.]?\d+(?:-of-\d+)?\.tar", split)
    if not paths:
        return None
    _require_all(paths)
    files = Files(describe(paths), root.cache)
    found = index.cached("shards", files, lambda: archives.list_shards(files))
    source = Ranges(files, found)
    what = f"{len(paths)} shards in {paths[0].rpartition('/')[0]}"
    return _of_source(source, found["label"], {**found.facts, "names": _class_names(root)}, what, key=lambda i: _shard_key(source.names[i]))


def _shard_key(name: str) -> tuple[str, str]:
    folder, base = key_of(name)
    return folder, base.partition(".")[0] + "."


def _parquet(root: Root, split: str) -> Part | None:
    paths = root.matching(r"(?:.*[-_.])?SPLIT(?:[-_.]?\d+)?(?:-of-\d+)?(?:-[0-9a-f]+)?\.parquet", split)
    if not paths:
        return None
    _require_all(paths)
    files = Files(describe(paths), root.cache)
    found = index.cached("parquet", files, lambda: parquet.list_rows(files))
    source = parquet.Rows(files, found)
    what = f"{len(paths)} parquet files in {paths[0].rpartition('/')[0]}"
    log.info("%s: reading an image takes reading %.0f rows; files made by tools/pack_dataset.py need no such", what, source.rows_per_group())
    names = _class_names(root) or found.facts["names"]
    return _of_source(source, found["label"], {**found.facts, "names": names}, what, key=lambda i: parquet.key_of_row(source.names[i]))


def _list(root: Root, split: str) -> Part | None:
    path = next((path for ending in LISTS if (path := root.named(split + ending)) is not None), None) if root.local else None
    return folders.file_list(Path(path)) if path is not None else None


FORMATS: dict[str, Callable[[Root, str], Part | None]] = {
    "folder": _folder,
    "kaggle": _kaggle,
    "packed": _packed,
    "tar": _archive_of(".tar"),
    "zip": _archive_of(".zip"),
    "shards": _shards,
    "parquet": _parquet,
    "list": _list,
}


def find(root: Root, split: str, data_format: str) -> Part | None:
    """The images of a split; None where there are none. Of several formats side by side the first is taken, unless one is asked for."""
    for name, opener in FORMATS.items():
        if data_format in ("auto", name) and (part := opener(root, split)) is not None:
            return part
    return None


# ---- all of it


def roots_of(data_path: str) -> list[str]:
    """The roots that --data-path names: one, or several with commas between them."""
    if os.path.exists(os.path.expanduser(data_path)) or "," not in data_path:
        return [data_path]
    return [path for path in data_path.split(",") if path]


def cache_of(cfg: Config) -> Cache:
    """The local folder of indexes and blocks."""
    return Cache(Path(cfg.data_cache).expanduser() if cfg.data_cache else default_folder(), int(cfg.data_cache_gb * 2**30))


def parts_of(cfg: Config, val_name: str) -> list[tuple[str, Part, Images]]:
    """Each split that there is at --data-path: its name, its source, and its images with classes that all splits share; said in a line each."""
    cache, splits = cache_of(cfg), ("train", val_name)
    roots = [open_root(path, cache) for path in roots_of(cfg.data_path)]
    found = []
    for split in splits:
        parts = [part for root in roots if (part := find(root, split, cfg.data_format)) is not None]
        found.append(join(parts) if parts else None)
    found, images = settle(*found, cfg.class_map, splits=splits)
    there = [entry for entry in zip(splits, found, images, strict=True) if entry[1] is not None]
    for split, part, opened in there:
        log.info("%s: %d images of %d classes, %s", split, len(opened), len(opened.classes), part.what)
    return there


def open_splits(cfg: Config, val_name: str) -> tuple[Images | None, Images | None]:
    """Training and validation images at --data-path, each None where there are none."""
    images = {split: opened for split, _, opened in parts_of(cfg, val_name)}
    return images.get("train"), images.get(val_name)


def open_first(cfg: Config, splits: tuple[str, ...]) -> Images | None:
    """The images of the first of these splits that there is at --data-path; None where there is none of them."""
    roots = [open_root(path, cache_of(cfg)) for path in roots_of(cfg.data_path)]
    for split in splits:
        parts = [part for root in roots if (part := find(root, split, cfg.data_format)) is not None]
        if parts:
            return settle(join(parts), None, cfg.class_map, splits=(split, split))[1][0]
    return None
