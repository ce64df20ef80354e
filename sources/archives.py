"""Images in tars and zips of class folders, and in WebDataset shards: where each one's bytes lie."""

import json
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from loading.images import is_image_name
from run.errors import InputError
from sources.files import Files
from sources.index import Built
from sources.progress import Progress
from sources.stored import DEFLATED, PLAIN, RANGE_COLUMNS, Row, columns_of, key_of
from utils import log


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    offset: int
    stored: int
    size: int
    method: int


def tar_members(file: BinaryIO, path: str) -> Iterator[Member]:
    """The regular files in a tar, as they lie; InputError where it is compressed, cut off or no tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (item := tar.next()) is not None:
                tar.members.clear()  # else all of them are kept
                if item.isreg():
                    yield Member(item.name, item.offset_data, item.size, item.size, PLAIN)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is no plain, complete tar ({error}): fetch or write it again, uncompressed") from error


_LOCAL_HEADER = struct.Struct("<4s22xHH")


def zip_members(file: BinaryIO, path: str) -> Iterator[Member]:
    """The files in a zip, as they lie; InputError where it is cut off, encrypted, no zip, or compressed in another way than zips mostly are."""
    try:
        with zipfile.ZipFile(file) as archive:
            for item in sorted(archive.infolist(), key=lambda item: item.header_offset):
                if item.is_dir():
                    continue
                if item.flag_bits & 1 or item.compress_type not in (PLAIN, DEFLATED):
                    raise InputError(f"{path}: {item.filename} is encrypted or compressed in a rare way: write the zip again, best with zip -0")
                file.seek(item.header_offset)
                magic, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if magic != zipfile.stringFileHeader:
                    raise zipfile.BadZipFile(f"{item.filename} is not where it should be")
                offset = item.header_offset + _LOCAL_HEADER.size + name_size + extra_size
                yield Member(item.filename, offset, item.compress_size, item.file_size, item.compress_type)
    except (zipfile.BadZipFile, struct.error, OSError) as error:
        raise InputError(f"{path} is no complete zip ({error}): fetch or write it again") from error


class Place(NamedTuple):
    """Where a member lies: its split (None: not said), class, and path below the class's folder."""

    split: str | None
    label: str
    rest: str


def place(name: str, splits: tuple[str, ...]) -> Place:
    """Where a member of an archive of class folders lies. Below a folder that is named after a split, or else as deep as it is, the
    folder is the class."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    at = next((i for i, part in enumerate(parts[:-2]) if part in splits), None)
    if at is None:
        return Place(None, parts[-2] if len(parts) > 1 else "", parts[-1])
    return Place(parts[at], parts[at + 1], "/".join(parts[at + 2 :]))


def is_hidden(name: str) -> bool:
    """Whether a member is what file managers leave behind."""
    return any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in name.split("/"))


def say_left_out(where: str, names: "Counter[str]") -> None:
    """One line on files that are not read, by ending."""
    if names:
        commonest = sorted(names.items(), key=lambda found: (-found[1], found[0]))[:8]
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in commonest) + (", and others" if len(names) > 8 else "")
        log.warning("%s: %s files are left out, for they are hidden or no images that are read here: %s", where, f"{names.total():,}", kinds)


def ending_of(name: str) -> str:
    """How left-out files are counted: by ending, hidden ones together."""
    base = name.rpartition("/")[2]
    return "hidden" if is_hidden(name) else (base[base.rindex(".") :].lower() if "." in base else "without an ending")


def _members(files: Files) -> list[Member]:
    """The files in a tar or zip, as they lie."""
    path = files[0].path
    log.info("reading the index of %s", path)
    with files.open(0) as file:
        return list((zip_members if path.lower().endswith(".zip") else tar_members)(file, path))


def _is_listed(member: Member) -> bool:
    return is_image_name(member.name) and not is_hidden(member.name)


def _row(member: Member, label: str | int, key: tuple[str, str], file: int = 0) -> Row:
    return Row(member.name, label, key, (file, member.offset, member.stored, member.size, member.method))


def list_images(files: Files) -> Built:
    """Index of all images in an archive, by name, without classes."""
    return columns_of([_row(member, 0, ("", member.name)) for member in _members(files) if _is_listed(member)], RANGE_COLUMNS, where=files[0].path)


def list_folders(files: Files, *, wanted: tuple[str, ...], splits: tuple[str, ...], needs_split: bool) -> Built:
    """Index of an archive of class folders: of the images below a folder that is named as the split is `wanted`, or of all where no folder
    is named after one of `splits`, unless the archive `needs_split` folders. Empty where there are only those of other splits."""
    members, path = _members(files), files[0].path
    placed = [(member, place(member.name, splits)) for member in members if _is_listed(member)]
    say_left_out(path, Counter(ending_of(member.name) for member in members if not _is_listed(member)))
    if not placed or any(where.label == "" for _, where in placed):
        raise InputError(f"{path} holds no images in class folders: it must be a tar or zip of class folders")
    if any(where.split is not None for _, where in placed):
        placed = [(member, where) for member, where in placed if where.split in wanted]
    elif needs_split:
        raise InputError(f"{path} holds class folders, but no train/ and val/ above them: name the folder that holds train{path[-4:]} and val{path[-4:]}")
    rows = [_row(member, where.label, key_of(where.rest)) for member, where in placed]
    return columns_of(rows, RANGE_COLUMNS, where=path)


class _Sample:
    """The members of a shard that share a key."""

    def __init__(self):
        self.image: Member | None = None
        self.label: int | None = None


def _read_label(files: Files, i: int, member: Member) -> int | None:
    """The class in a member `key.cls` or `key.json`; None where a JSON does not say. InputError where it is none."""
    text = files.pread(i, member.size, member.offset)
    where = f"{files[i].path}: {member.name}"
    try:
        if member.name.endswith(".cls"):
            return int(text)
        found = json.loads(text)
        label = found.get("label", found.get("cls")) if isinstance(found, dict) else None
        return None if label is None else int(label)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} holds no class ({text[:40]!r}): it must be a whole number, or JSON with one under 'label'") from error


def _shard_rows(files: Files, i: int, left_out: "Counter[str]") -> Iterator[Row]:
    samples: dict[str, _Sample] = {}
    path = files[i].path
    with files.open(i) as file:
        for member in tar_members(file, path):
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = f"{folder}/{stem}".lstrip("./")
            kind = kind.lower()
            if is_hidden(member.name):
                left_out["hidden"] += 1
            elif is_image_name(member.name):
                sample = samples.setdefault(key, _Sample())
                if sample.image is not None:
                    raise InputError(f"{path}: key {key} has two images, {sample.image.name} and {member.name}: a sample has one")
                sample.image = member
            elif kind in ("cls", "json"):
                label = _read_label(files, i, member)
                sample = samples.setdefault(key, _Sample())
                if label is not None and sample.label not in (None, label):
                    raise InputError(f"{path}: key {key} is of class {sample.label} and of class {label}: its .cls and .json must agree")
                sample.label = label if label is not None else sample.label
            else:
                left_out[ending_of(member.name)] += 1
    for key, sample in samples.items():
        if sample.image is None:
            raise InputError(f"{path}: key {key} has a class and no image: write the shard again")
        if sample.label is None:
            raise InputError(f"{path}: {sample.image.name} has no {key}.cls, and no {key}.json with a 'label': write the shards with one of them")
        folder, base = key_of(key)
        yield _row(sample.image, sample.label, (folder, f"{base}."), i)


def list_shards(files: Files) -> Built:
    """Index of WebDataset shards: images with the classes in `key.cls` or `key.json`. InputError naming a shard that is not whole."""
    log.info("reading the index of %d shards in %s", len(files), files[0].path.rpartition("/")[0])
    progress, rows, left_out = Progress(len(files), log.info, what="shards"), [], Counter()
    for i in range(len(files)):
        rows += _shard_rows(files, i, left_out)
        progress.add()
    say_left_out(files[0].path, left_out)
    if not rows:
        raise InputError(f"{files[0].path} and the other shards hold no images")
    return columns_of(rows, RANGE_COLUMNS, where=files[0].path)
