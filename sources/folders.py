"""Images that are files of their own: class folders, Kaggle's layout of ImageNet, and lists."""

import csv
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from loading.images import Paths, is_image_name
from run.errors import InputError
from sources.archives import ending_of, say_left_out
from sources.parts import Part
from sources.stored import key_of


def _walk(folder: str, left_out: "Counter[str]") -> list[tuple[tuple[str, str], str]]:
    """Keys and paths of the images in and below a class's folder, in order; other files are counted in `left_out`."""
    found = []
    for root, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = os.path.relpath(root, folder) if root != folder else ""
        for name in names:
            if is_image_name(name):
                found.append(((below, name), os.path.join(root, name)))
            else:
                left_out[ending_of(name)] += 1
    return sorted(found)


def _subfolders(path: Path) -> list[str]:
    """The folders in one, but for hidden ones, by name."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def class_folders(path: Path) -> Part:
    """Images in one sub-folder per class, classes in alphabetical order. InputError where there are none, or a class has none."""
    classes = _subfolders(path)
    if not classes:
        raise InputError(
            f"{path} holds no class folders: put each class's images into a folder named after the class "
            "(tools/extract_imagenet.py does so for ImageNet's archives)"
        )
    left_out: Counter[str] = Counter()
    found = [_walk(os.path.join(path, name), left_out) for name in classes]
    say_left_out(str(path), left_out)
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        raise InputError(f"{path}: no image in the class folders {', '.join(empty[:10])}: fill or remove them")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in found])
    paths = Paths(file for files in found for _, file in files)

    def key(i: int) -> tuple[str, str]:
        return key_of(os.path.relpath(paths[i], os.path.join(path, classes[labels[i]])))

    return Part(paths, labels, classes, is_numbered=False, key=key, what=f"class folders in {path}")


def _by_class(entries: list[tuple[str, str]], what: str, *, is_numbered: bool) -> Part:
    """The files of (path, class) pairs, by class and name."""
    classes = None if is_numbered else sorted({label for _, label in entries})
    number = None if is_numbered else {name: i for i, name in enumerate(classes)}
    entries = [(path, int(label) if is_numbered else number[label]) for path, label in entries]
    entries.sort(key=lambda entry: (entry[1], key_of(entry[0])))
    paths = Paths(path for path, _ in entries)
    labels = np.array([label for _, label in entries], np.int32)
    return Part(paths, labels, classes, is_numbered=is_numbered, key=lambda i: key_of(os.path.basename(paths[i])), what=what)


# ---- Kaggle


def kaggle_folder(root: Path) -> Path | None:
    """The folder of train/ and val/ in Kaggle's layout of ILSVRC below `root`; None where there is none."""
    return next((folder for folder in (root / "Data" / "CLS-LOC", root / "ILSVRC" / "Data" / "CLS-LOC") if folder.is_dir()), None)


def _kaggle_file(root: Path, name: str) -> Path:
    found = next((path for path in (root / name, root.parent / name, root / "ILSVRC" / name) if path.is_file()), None)
    if found is None:
        raise InputError(f"{root} lacks {name}, which belongs to Kaggle's layout of ImageNet: put it beside Data/ or ILSVRC/")
    return found


def kaggle(root: Path, split: str) -> Part | None:
    """A split of Kaggle's layout; None where it is not there. InputError where files and lists disagree."""
    folder = kaggle_folder(root) / split
    if not folder.is_dir():
        return None
    mapping = _kaggle_file(root, "LOC_synset_mapping.txt")
    synsets = [line.split(None, 1)[0] for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip()]
    part = class_folders(folder) if _subfolders(folder) else _kaggle_flat(folder, _kaggle_file(root, "LOC_val_solution.csv"))
    if sorted(synsets) != part.classes:
        missing, unknown = sorted(set(synsets) - set(part.classes)), sorted(set(part.classes) - set(synsets))
        raise InputError(
            f"{folder} has images of {len(part.classes)} classes, {mapping} lists {len(synsets)}: without images {', '.join(missing[:3]) or 'none'}, "
            f"not listed {', '.join(unknown[:3]) or 'none'}; fetch what is missing"
        )
    return part


def _kaggle_flat(folder: Path, solution: Path) -> Part:
    """Images that lie side by side, whose classes a solution lists (ImageId,PredictionString: `n01440764 <box> ...`)."""
    with solution.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    try:
        labels = {row[0]: row[1].split(None, 1)[0] for row in rows}
    except IndexError:
        raise InputError(f"{solution}: a line has no class: fetch it again") from None
    left_out: Counter[str] = Counter()
    files = {key[1]: path for key, path in _walk(str(folder), left_out)}
    say_left_out(str(folder), left_out)
    by_stem = {name.rpartition(".")[0]: path for name, path in files.items()}
    unlisted, missing = sorted(set(by_stem) - set(labels)), sorted(set(labels) - set(by_stem))
    if unlisted or missing:
        raise InputError(
            f"{folder} holds {len(by_stem)} images, {solution} lists {len(labels)}: not listed {', '.join(unlisted[:3]) or 'none'}, "
            f"without an image {', '.join(missing[:3]) or 'none'}; fetch what is missing"
        )
    return _by_class([(path, labels[stem]) for stem, path in by_stem.items()], f"Kaggle's {folder}", is_numbered=False)


# ---- lists


_PATH_COLUMNS, _LABEL_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path"), ("class", "label", "target", "class_name", "category")


def _cells(line: str, path: Path) -> list[str]:
    if path.suffix == ".txt" and "," not in line and "\t" not in line:
        return [cell.strip() for cell in re.split(r"\s+(?=\S+$)", line, maxsplit=1)]
    return [cell.strip() for cell in next(csv.reader([line], delimiter="\t" if "\t" in line else ","))]


def file_list(path: Path) -> Part:
    """Images that a text file lists, `path,class` (or with a tab, or in a .txt a blank) a line, relative to its folder. A first line may name
    the columns; classes that are all whole numbers are taken as the numbers they are. InputError where a line has no class, or the first image is not there."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a list of images ({error}): write path,class lines in UTF-8") from error
    rows = [(number, _cells(line, path)) for number, line in enumerate(lines, 1) if line.strip()]
    at_path, at_label = 0, 1
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if header and not is_image_name(rows[0][1][0]) and set(header) & {*_PATH_COLUMNS, *_LABEL_COLUMNS}:
        places = [next((header.index(name) for name in names if name in header), None) for names in (_PATH_COLUMNS, _LABEL_COLUMNS)]
        if None in places:
            wanted = "the class: name it 'class'" if places[1] is None else "the image: name it 'path'"
            raise InputError(f"{path} has no column of {wanted}; its columns are {', '.join(header)}")
        (at_path, at_label), rows = places, rows[1:]
    entries = []
    for number, cells in rows:
        if len(cells) <= max(at_path, at_label) or not cells[at_label]:
            raise InputError(f"{path}, line {number}, has no class: each line must be path,class")
        entries.append((os.path.join(path.parent, cells[at_path]), cells[at_label]))
    if not entries:
        raise InputError(f"{path} lists no images: write path,class lines")
    if not os.path.isfile(entries[0][0]):
        raise InputError(f"{path} lists {entries[0][0]}, which is not there: paths are relative to the list's folder")
    return _by_class(entries, f"the list {path}", is_numbered=all(label.isdecimal() for _, label in entries))
