"""Damaged images that a run meets: each named once, by all processes together, and listed where the run stops for them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from run.errors import DamagedImages
from utils import Rank, any_process, log

NUM_SHOWN = 20  # of a longer list, where all of it is in a file


class Damage:
    """The damaged files that the loaders of all processes have met.

    `list_path`: the file that gets a long list of them; None: there is none."""

    def __init__(self, rank: Rank, list_path: Path | None):
        self.rank, self.list_path = rank, list_path
        self.reasons: dict[str, str] = {}  # by name, known to every process
        self._own: dict[str, str] = {}  # found here since the processes last told each other

    def add(self, damaged: Sequence[tuple[str, str]]) -> None:
        """Note what a batch of this process met."""
        self._own |= {name: reason for name, reason in damaged if name not in self.reasons}

    def share(self) -> dict[str, str]:
        """Names and reasons of what was found since the last call, by all processes, in each; every process takes part."""
        fresh = self._own
        if self.rank.world_size > 1:
            if not any_process([bool(fresh)], self.rank)[0]:
                return {}
            everyone = [None] * self.rank.world_size
            dist.all_gather_object(everyone, fresh, group=self.rank.control)
            fresh = {name: reason for part in everyone for name, reason in part.items()}
        self._own = {}
        self.reasons |= fresh
        return fresh

    def listed(self) -> str:
        """A line per file: name and reason. Of a long list the beginning, if the first process could write all of it to `list_path`."""
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        if len(lines) > NUM_SHOWN and self.rank.is_main and self.list_path is not None:
            try:
                self.list_path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
                lines[NUM_SHOWN:] = [f"and {len(lines) - NUM_SHOWN} more: {self.list_path} has all"]
            except OSError as error:
                log.warning("%s cannot be written (%s)", self.list_path, error.strerror)
        return "".join(f"\n  {line}" for line in lines)


class TrainingDamage(Damage):
    """Damaged training images, for which `others` stand in: each file warned of once, and an error where there are more than `limit`."""

    def __init__(self, rank: Rank, list_path: Path | None, *, limit: int, others: str = "others of its class"):
        super().__init__(rank, list_path)
        self.limit, self.others = limit, others

    def report(self) -> None:
        """Warn of what was found since the last call; DamagedImages, in every process, where that is too much."""
        for name, reason in self.share().items():
            log.warning("damaged: %s cannot be read as an image (%s); %s stand in for it", name, reason, self.others)
        if len(self.reasons) > self.limit:
            raise DamagedImages(
                f"{len(self.reasons)} training images are damaged, more than --max-bad-images {self.limit}: restore them (tools/check_images.py "
                f"finds all that there are), or raise the limit, then --resume auto{self.listed()}"
            )


class ValidationDamage(Damage):
    """Damaged ones among `num_images` validation images: an error once a pass is over or, `is_skipped`, left out."""

    def __init__(self, rank: Rank, list_path: Path | None, *, num_images: int, is_skipped: bool):
        super().__init__(rank, list_path)
        self.num_images, self.is_skipped = num_images, is_skipped
        self.num_skipped = 0  # images that the last pass left out, in all processes

    def end_pass(self, num_damaged: int) -> None:
        """Settle a pass in which this process met `num_damaged` damaged images; DamagedImages, in every process, where they are not to be
        left out, or are all that there is."""
        count = torch.tensor(num_damaged)
        if self.rank.world_size > 1:
            dist.all_reduce(count, group=self.rank.control)
        self.num_skipped = count.item()
        fresh = self.share()
        if self.num_skipped and (not self.is_skipped or self.num_skipped == self.num_images):
            raise DamagedImages(
                f"{self.num_skipped} of {self.num_images} validation images are damaged: restore them, or evaluate the others with "
                f"--skip-bad-images{self.listed()}"
            )
        for name, reason in fresh.items():
            log.warning("damaged: %s cannot be read as an image (%s); evaluation leaves it out", name, reason)
