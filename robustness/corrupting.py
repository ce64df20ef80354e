"""The fifteen corruptions of ImageNet-C at five severities, made of any folder of images with the package imagecorruptions-imaug."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loading import augment
from loading.images import Images, open_sample, read_sample
from loading.keys import draw_words, seeded
from loading.loaders import loader_settings
from robustness.scores import SEVERITIES
from run.config import Config
from run.disk import write_whole, writing
from run.errors import DamagedImage, InputError
from sources.folders import class_folders
from sources.progress import Progress
from utils import Rank

MANIFEST = "corruptions.json"
SMALLEST = 32  # pixels of a side that the package takes
OWN_SEED = ("impulse_noise", "glass_blur")  # draw from generators of their own


class Recipe(NamedTuple):
    """What decides the pixels and bytes that are written: side of the square in pixels, the part of the resized short side that it is, quality
    of the JPEGs, the seed."""

    size: int = 224
    crop_pct: float = 0.875
    quality: int = 85
    seed: int = 0


def _package():
    """InputError where imagecorruptions-imaug is not there."""
    try:
        import imagecorruptions
    except ImportError as error:
        install = "pip install -r requirements-robustness.txt, then pip install --no-deps imagecorruptions-imaug"
        raise InputError(f"corruptions are made by imagecorruptions-imaug ({error}): {install}") from error
    return imagecorruptions


def corrupted(image: np.ndarray, corruption: str, severity: int, words: tuple[int, ...]) -> np.ndarray:
    """A uint8 image (H, W, 3), corrupted; `words` decide all that is drawn at random."""
    own = {"seed": words[3] % 2**32} if corruption in OWN_SEED else {}
    with seeded(words):
        return np.array(_package().corrupt(np.ascontiguousarray(image), severity=severity, corruption_name=corruption, **own))


def words_of(name: str, corruption: str, severity: int, seed: int) -> tuple[int, ...]:
    """What decides the corruption of an image: its class and file's name, and not where the folder lies or what else is in it."""
    number = int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little", signed=True)
    return draw_words(f"corruption {corruption}", seed, severity, number)


class Made(NamedTuple):
    """What became of one image: files written, files that were there, and what is wrong with it, if anything is."""

    num_written: int
    num_there: int
    problem: str | None = None


class Corruptions(Dataset):
    """Writes each image's corruptions, those that are not there yet, into `out`/<corruption>/<severity>/<class>/."""

    def __init__(self, root: Path, out: Path, recipe: Recipe, corruptions: Sequence[str], severities: Sequence[int]):
        _package()  # now, and not in each process
        part = class_folders(root)
        self.images = Images(part.samples, part.labels, part.classes, open_sample, read_sample)
        self.root, self.out, self.recipe = root, out, recipe
        self.kinds = [(corruption, severity) for corruption in corruptions for severity in severities]
        self._transform = augment.eval_transform(recipe.size, recipe.crop_pct, "reference")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Class and file of an image, as its copies are called: a JPEG keeps its name, another file's gets an ending."""
        name = Path(self.images.samples[index]).relative_to(self.root).as_posix()
        return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"

    def __getitem__(self, index: int) -> Made:
        name = self.name(index)
        paths = {kind: self.out / kind[0] / str(kind[1]) / name for kind in self.kinds}
        wanted = {kind: path for kind, path in paths.items() if not (path.is_file() and path.stat().st_size)}
        num_there = len(paths) - len(wanted)
        if not wanted:
            return Made(0, num_there)
        try:
            image = self._transform.draw(self.images[index][0])[0]
        except DamagedImage as error:
            return Made(0, num_there, f"{error.name}: {error.reason}")
        for (corruption, severity), path in wanted.items():
            pixels = corrupted(image, corruption, severity, words_of(name, corruption, severity, self.recipe.seed))
            self._write(path, pixels)
        return Made(len(wanted), num_there)

    def __getitems__(self, indices: list[int]) -> list[Made]:
        return [self[i] for i in indices]

    def _write(self, path: Path, pixels: np.ndarray) -> None:
        """The file whole, or none of that name."""
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=self.recipe.quality, optimize=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with writing(str(path), "make room, or name another folder, and start again: it goes on where it was stopped"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data.getvalue())
            os.replace(temporary, path)


def claim(out: Path, recipe: Recipe) -> None:
    """Make the folder, and note in it what decides its content. InputError where it holds files made otherwise."""
    path, here = out / MANIFEST, recipe._asdict()
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): name another folder") from error
        if there != here:
            different = ", ".join(f"{name} {there.get(name)}, here {value}" for name, value in here.items() if there.get(name) != value)
            raise InputError(f"{out} holds corruptions made with {different}: give the same settings to go on, or name another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no {MANIFEST}, so that its files are others': name another folder")
    with writing(str(path), "name another folder"):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(here, indent=2) + "\n")


def make(dataset: Corruptions, *, num_workers: int, say: Callable[[str], None]) -> Iterator[Made]:
    """What becomes of each image, in `num_workers` processes; `say` hears now and then how far that is."""
    for severity in SEVERITIES:  # compiled once, for all processes
        corrupted(np.zeros((SMALLEST, SMALLEST, 3), np.uint8), "glass_blur", severity, (0, 0, 0, 0))
    cfg, rank = Config(num_workers=num_workers), Rank(0, 1, 0, 1, torch.device("cpu"))
    progress = Progress(len(dataset) * len(dataset.kinds), say, what="files")
    settings = loader_settings(cfg, rank, len(dataset))
    for batch in DataLoader(dataset, batch_size=1, **settings):
        for made in batch:
            yield made
            progress.add(len(dataset.kinds))
