"""Weights tried on validation images: some of them choose, the others, which had no say in it, judge."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

import datasets
import engine
from engine import EvalParts
from loading.images import Images
from loading.keys import draw_words
from loading.loaders import ValLoader
from refining.statistics import recalibrate, training_batches
from run import checkpoint, hardware, network
from run.config import Config
from run.errors import InputError
from sources.parts import fraction_of
from sources.progress import Progress
from utils import Rank, log

State = dict[str, Tensor]


def split(images: Images, share: float, data_seed: int) -> tuple[Images, Images | None]:
    """That share of each class, the same for one data seed, and the rest; None where nothing is left."""
    rng = np.random.RandomState(draw_words("held out", data_seed)[0] % 2**32)
    chosen = fraction_of(images.targets, share, rng)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    return images.part(chosen), images.part(rest) if len(rest) else None


class Trial:
    """A network of the recipe that takes the weights to try, the images that choose (`share` of each class's), and those that judge.

    It says how far it is with `num_trials` on all images, the most that there will be."""

    def __init__(self, cfg: Config, state: State, rank: Rank, *, share: float, num_trials: int):
        self.cfg, self.rank = cfg, rank
        self.train, images = datasets.open_images(cfg)
        self.net = network.build(cfg, len(images.classes), distillation=any("dist" in name for name in state)).to(rank.device)
        self.parts = EvalParts(rank=rank, amp_dtype=hardware.pick_amp(cfg.amp, rank.device))
        choosing, judging = split(images, share, cfg.data_seed)
        self.num_choosing, self.num_judging = len(choosing), 0 if judging is None else len(judging)
        self.choosing = datasets.build_val_loader(cfg, choosing, rank)
        self.judging = None if judging is None else datasets.build_val_loader(cfg, judging, rank)
        self.progress = Progress(num_trials * len(images), lambda line: log.info("%s", line))

    def _counted(self, loader: ValLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in loader:
            yield images, targets
            self.progress.add(len(targets))

    def _acc1(self, state: State, loader: ValLoader) -> float:
        checkpoint.load_weights(self.net, state, where="the weights to try")
        return engine.evaluate(self.net, self._counted(loader), self.parts)["acc1"]

    def score(self, state: State) -> float:
        """Top-1 accuracy, percent, on the images that choose."""
        return self._acc1(state, self.choosing)

    def judge(self, state: State) -> float | None:
        """On those that judge; None where there are none."""
        return None if self.judging is None else self._acc1(state, self.judging)

    def recalibrated(self, state: State, num_images: int) -> State:
        """The weights with BatchNorm's statistics of so many training images. InputError where there are none."""
        if self.train is None:
            raise InputError("--bn recalibrate takes statistics from training images, and there are none", "add --data-path with train/, or --bn average")
        checkpoint.load_weights(self.net, state, where="the weights to try")
        recalibrate(self.net, training_batches(self.cfg, self.train, self.rank, num_images))
        return {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
