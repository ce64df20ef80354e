"""What a network says of each validation image, noted while it is evaluated, on any number of processes; and the table of classes."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loading.damage import ValidationDamage
from loading.loaders import ValLoader
from reporting.outcomes import Outcomes, confusion, joined_outcomes
from run.disk import writing
from run.errors import DamagedImage
from utils import Rank, gather_objects


class Recorder:
    """In place of a loader, whose batches it hands on: it keeps which images they are of, and, told by `note`, what was said of them."""

    def __init__(self, loader: ValLoader):
        self.loader = loader
        self.places: list[Tensor] = []
        self.said: list[Tensor] = []

    @property
    def damage(self) -> ValidationDamage:
        return self.loader.damage

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader.batches():
            self.places.append(batch.positions.clone())  # a loader process's own would keep its shared memory open
            yield batch.images, batch.targets

    def note(self, logits: Tensor, targets: Tensor) -> None:
        """Keep the classes said of a batch's images (B, C), and the probabilities of these and of their `targets` (B,)."""
        probabilities = logits.float().softmax(dim=1)
        best = logits.argmax(dim=1, keepdim=True)
        facts = (targets.view(-1, 1), best, probabilities.gather(1, best), probabilities.gather(1, targets.view(-1, 1)))
        self.said.append(torch.cat([fact.double() for fact in facts], dim=1))

    def outcomes(self, rank: Rank) -> Outcomes:
        """Those of all processes, in each; every process takes part."""
        said = torch.cat(self.said).cpu().numpy() if self.said else np.empty((0, 4))
        places = torch.cat(self.places).numpy() if self.places else np.empty(0, np.int64)
        targets, predictions = (said[:, column].astype(np.int32) for column in (0, 1))
        own = Outcomes(places, targets, predictions, *(said[:, column].astype(np.float32) for column in (2, 3)))
        return joined_outcomes(gather_objects(own, rank))


def write_classes(path: Path, outcomes: Outcomes, classes: list[str]) -> None:
    """CSV: a row per class with its images, how many were recognised, the percentage, then how often each class was predicted."""
    with writing(f"--report {path}", "name another file"), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "correct", "acc1", *(f"predicted {name}" for name in classes)])
        for i, (name, row) in enumerate(zip(classes, confusion(outcomes, len(classes)).tolist(), strict=True)):
            num_images = sum(row)
            writer.writerow([name, num_images, row[i], f"{100 * row[i] / num_images:.3f}" if num_images else "", *row])


def viewer(loader: ValLoader) -> Callable[[int], tuple[Image.Image | None, str]]:
    """What shows the image at a place of the loader's set as the network saw it, and says what file that is; without the picture, where it can be
    read no more."""
    images, transform = loader.loader.dataset.images, loader.loader.dataset.transform

    def show(place: int) -> tuple[Image.Image | None, str]:
        try:
            pixels, _ = transform.draw(images.open(place, is_fast=transform.is_fast))
        except DamagedImage:
            return None, images.name(place)
        return Image.fromarray(pixels), images.name(place)

    return show
