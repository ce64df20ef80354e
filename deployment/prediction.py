"""The most probable classes of images in files and folders."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from deployment.weights import Trained, eval_transform, fused, labels, load_trained
from loading.images import open_file
from run import disk
from run.errors import InputError, first_line

NUM_TOP = 5
COLUMNS = ("file", "rank", "class", "probability", "index", "label")
REPORT_EVERY_S = 5


@dataclass(frozen=True)
class Guess:
    """A class, as its folder is named and as people read it, and its probability."""

    index: int
    name: str
    label: str
    probability: float


# --- images ----------------------------------------------------------------------------------------------------------------------------


def find_images(paths: list[str]) -> list[str]:
    """Files as named, and images in folders by their suffix, sorted and without hidden ones; each once. InputError where there are none."""
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            files += _images_below(path)
        elif os.path.exists(path):
            files.append(path)
        else:
            raise InputError(f"{path}: there is no such file or folder")
    if not files:
        raise InputError(f"{', '.join(paths)}: no image there; their names must end in {', '.join(IMG_EXTENSIONS)}")
    return list(dict.fromkeys(files))


def _images_below(folder: str) -> list[str]:
    """Images in `folder`, those of its own first; folders that are links count, but none is entered twice."""
    found, entered = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        is_new = os.path.realpath(place) not in entered
        entered.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if is_new else []
        if is_new:
            found += [os.path.join(place, name) for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
    return found


class Files(Dataset):
    """(path, image for the network, None), or (path, None, why it cannot be read)."""

    def __init__(self, paths: list[str], transform):
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        path = self.paths[index]
        try:
            return path, self.transform(open_file(path, turns=True)), None
        except InputError as error:
            return path, None, first_line(error)


def _as_list(items: list) -> list:
    return items


# --- classes ---------------------------------------------------------------------------------------------------------------------------


def name_classes(trained: Trained) -> list[tuple[str, str]]:
    """(name, label to read) of each class: names are the checkpoint's, else ImageNet-1k's where there are 1000, else numbers."""
    readable = labels(trained)
    names = trained.class_names or (ImageNetInfo().label_names() if trained.num_classes == 1000 else readable)
    return list(zip(names, readable, strict=True))


def top_guesses(logits: Tensor, classes: list[tuple[str, str]]) -> list[Guess]:
    """The most probable classes of one image, best first; all of fewer than five."""
    probabilities, indices = logits.float().softmax(0).topk(min(NUM_TOP, len(classes)))
    return [Guess(index, *classes[index], probability) for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)]


@torch.inference_mode()
def predict(net: nn.Module, loader: DataLoader, classes: list[tuple[str, str]], device: torch.device) -> Iterator[tuple[str, list[Guess] | str]]:
    """(path, guesses) of every image in order, or (path, why it cannot be read). InputError where the network gives no finite numbers."""
    for batch in loader:
        images = [image for _, image, _ in batch if image is not None]
        logits = iter(net(torch.stack(images).to(device)).cpu() if images else ())
        for path, image, reason in batch:
            if image is None:
                yield path, reason
                continue
            row = next(logits)
            if not row.isfinite().all():
                raise InputError(f"{path}: the network's output is not finite; its training has diverged or the checkpoint is damaged: use an earlier one")
            yield path, top_guesses(row, classes)


# --- what comes out --------------------------------------------------------------------------------------------------------------------


def print_guesses(path: str, guesses: list[Guess]) -> None:
    print(os.fsencode(path).decode(errors="replace"))
    for rank, guess in enumerate(guesses, 1):
        print(f"  {rank}  {100 * guess.probability:6.2f} %  {guess.name}{f'  {guess.label}' if guess.label != guess.name else ''}", flush=rank == len(guesses))


def guess_rows(path: str, guesses: list[Guess]) -> Iterator[tuple]:
    """The rows, of `COLUMNS`, that tell an image's guesses."""
    return ((path, rank, one.name, f"{one.probability:.6f}", one.index, one.label) for rank, one in enumerate(guesses, 1))


@contextlib.contextmanager
def writing(path: Path | None, columns: tuple[str, ...] = COLUMNS, *, show: Callable = print_guesses, rows: Callable = guess_rows):
    """The function that takes an image's path and what was found in it: it calls `show` without a path, else writes `rows` of that into a CSV file
    that appears once the block is left."""
    if path is None:
        yield show
        return
    with disk.writing_csv(path, columns, flag="--csv") as writer:
        yield lambda image, found: writer.writerows(rows(image, found))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def build_loader(args: argparse.Namespace, files: list[str], trained: Trained) -> DataLoader:
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = min(8, os.cpu_count()) if len(files) > args.batch_size else 0
    if num_workers < 0:
        raise InputError(f"--num-workers {num_workers} is no number of processes: give 0 or more")
    return DataLoader(Files(files, eval_transform(trained)), batch_size=args.batch_size, collate_fn=_as_list, num_workers=num_workers)


class Report:
    """Progress over the images on standard error, and how many could be read."""

    def __init__(self, num_images: int):
        self.num_images, self.num_seen, self.num_read, self.said_at = num_images, 0, 0, time.monotonic()

    def add(self, reason: str | None) -> None:
        """Count an image; `reason`: why it could not be read."""
        self.num_seen += 1
        self.num_read += reason is None
        if reason is not None:
            say(reason)
        elif time.monotonic() - self.said_at > REPORT_EVERY_S:
            self.said_at = time.monotonic()
            say(f"{self.num_seen} of {self.num_images} images")

    def end(self) -> int:
        """How many could be read; InputError where none could."""
        if self.num_read == 0:
            raise InputError(f"none of {self.num_images} images could be read")
        return self.num_read


def predict_files(args: argparse.Namespace, files: list[str], device: torch.device, write: Callable[[str, list[Guess]], None]) -> int:
    """Hand every image's guesses to `write`, with progress on standard error; how many images could be read. InputError where none could."""
    trained = load_trained(args.model, args.resume, use_ema=args.use_ema)
    if trained.class_names is None:
        say(f"{args.resume} holds no class names: {'those of ImageNet-1k' if trained.num_classes == 1000 else 'numbers'} take their place")
    report = Report(len(files))
    for path, outcome in predict(fused(trained).to(device), build_loader(args, files, trained), name_classes(trained), device):
        if isinstance(outcome, str):
            report.add(outcome)
            continue
        write(path, outcome)
        report.add(None)
    return report.end()
