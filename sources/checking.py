"""Whole trees of images, read as the loaders read them, to find what a run would stumble over."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from loading.decoding import Encoded
from loading.images import ENDINGS, NO_IMAGE, Images, Paths, is_image_name, open_sample, read_sample
from loading.loaders import loader_settings
from loading.turning import UPRIGHT, orientation_in
from run.config import Config
from run.errors import DamagedImage, InputError
from sources import archives, packed, parquet
from sources.cache import Cache, default_folder
from sources.files import Files, describe
from sources.progress import Progress
from sources.stored import Ranges, Source
from sources.table import Table
from utils import Rank

BATCH_SIZE = 64
REPORT_EVERY_S = 10.0


class Problem(NamedTuple):
    """What is wrong with a file, or to be known of it: `problem` is one of the four kinds below."""

    path: str
    problem: str
    message: str


DAMAGED, NOT_AN_IMAGE, FALLBACK, TURNED = "damaged", "not an image", "read by the fallback", "turned"
SOUND = {FALLBACK, TURNED}  # what images can be read in spite of


class Tree(NamedTuple):
    """The images in and below a folder: parts, each of the files there or of a file of many; such files that cannot be read; how many other files there
    are, which the loaders pass over."""

    parts: list[Images]
    problems: list[Problem]
    num_others: int

    @property
    def num_images(self) -> int:
        return sum(map(len, self.parts))


def find_images(root: Path) -> Tree:
    """The images in `root`, a folder of any depth without its hidden folders, or a file of many. InputError where there are none."""
    if not root.exists():
        raise InputError(f"{root}: there is no such folder or file")
    paths = _walk(root) if root.is_dir() else [str(root)]
    files = [path for path in paths if is_image_name(path)]
    found = [path for path in paths if path.lower().endswith(HOLDERS)]
    parts, problems = [_unlabelled(Paths(files))] if files else [], []
    for path in found:
        try:
            members = _members(path)
        except InputError as error:
            problems.append(Problem(path, DAMAGED, str(error)))
            continue
        if len(members):
            parts.append(_unlabelled(members).part(members.storage_order()))
    if not parts and not problems:
        raise InputError(f"{root} holds no images ({', '.join(ENDINGS)}), and no files of them ({', '.join(HOLDERS)})")
    return Tree(parts, problems, len(paths) - len(files) - len(found))


HOLDERS = (".tar", ".zip", packed.ENDING, ".parquet")  # files of many images


def _members(path: str) -> Source:
    """The images in a tar or zip, a packed or a parquet file. InputError where it is not whole."""
    files = Files(describe([path]), Cache(default_folder(), 0))
    if path.lower().endswith(packed.ENDING):
        return packed.Packed(files)
    if path.lower().endswith(".parquet"):
        return parquet.Rows(files, Table(*parquet.list_rows(files)))
    return Ranges(files, Table(*archives.list_images(files)))


def _walk(root: Path) -> list[str]:
    """The files in and below a folder, in order."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in sorted(names)]
    return found


def _unlabelled(samples) -> Images:
    return Images(samples, [0] * len(samples), [""], open_sample, read_sample)


class _Checks(Dataset):
    """Per image, what is wrong with it and what is to be known of it."""

    def __init__(self, images: Images, *, is_fast: bool):
        self.images, self.is_fast = images, is_fast

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Problem]:
        try:
            image = self.images.open(index, is_fast=self.is_fast)
            if isinstance(image, Encoded):
                image.top(image.shape[0])
        except DamagedImage as error:
            return [Problem(error.name, NOT_AN_IMAGE if error.reason == NO_IMAGE else DAMAGED, error.reason)]
        name, reason, way = str(self.images.samples[index]), getattr(image, "fallback_reason", None), orientation_in(read_sample(self.images.samples[index]))
        found = [Problem(name, FALLBACK, reason)] if reason else []
        return found if way == UPRIGHT else [*found, Problem(name, TURNED, f"EXIF orientation {way}, which runs ignore without --exif-transpose")]

    def __getitems__(self, indices: list[int]) -> list[list[Problem]]:
        return [self[i] for i in indices]


def check(tree: Tree, *, is_fast: bool, num_workers: int, say: Callable[[str], None]) -> Iterator[Problem]:
    """Each problem of a tree, whose images are read and decoded in `num_workers` processes; `say` hears now and then how far that is."""
    yield from tree.problems
    cfg, rank = Config(num_workers=num_workers), Rank(0, 1, 0, 1, torch.device("cpu"))
    progress, num_problems = Progress(tree.num_images, say, every_s=REPORT_EVERY_S), len(tree.problems)
    for images in tree.parts:
        dataset = _Checks(images, is_fast=is_fast)
        for batch in DataLoader(dataset, batch_size=BATCH_SIZE, **loader_settings(cfg, rank, len(images))):
            problems = list(itertools.chain.from_iterable(batch))
            num_problems += sum(problem.problem != TURNED for problem in problems)
            yield from problems
            progress.add(len(batch), f"{num_problems:,} problems")
