"""Images per class, and some of them decoded as the run will decode them."""

import time

import numpy as np
import torch

from loading import decoding
from loading.images import Images
from loading.loaders import TrainLoader
from run.errors import DamagedImage, Faults
from utils import log

FEW_IMAGES, FEW_SHARE = 10, 0.1  # a class has few images below so many, or below that part of the median
NUM_NAMED = 10
NUM_OPENED, OPENING_S = 64, 3.0  # images that are decoded, fewer where that takes longer


def count(images: Images, split: str) -> None:
    """Say how many images the classes have, and which have few."""
    counts = np.bincount(images.targets, minlength=len(images.classes))
    median = float(np.median(counts))
    log.info("%s: %d to %d images per class, median %g, %d in all", split, counts.min(), counts.max(), median, len(images))
    bound = max(FEW_IMAGES, FEW_SHARE * median) if split == "train" else 1
    few = [i for i in np.argsort(counts, kind="stable").tolist() if counts[i] < bound]
    if few:
        named = ", ".join(f"{images.classes[i]} ({counts[i]})" for i in few[:NUM_NAMED]) + (f" and {len(few) - NUM_NAMED} more" if len(few) > NUM_NAMED else "")
        log.warning("%s: %d of %d classes have %s images: %s", split, len(few), len(counts), f"fewer than {bound:g}" if bound > 1 else "no", named)


def open_some(images: Images, split: str, faults: Faults, *, is_fast: bool, is_borne: bool) -> None:
    """Decode some images, evenly spaced, and name those that cannot be: as faults, unless the run bears such (`is_borne`)."""
    start, damaged, num_opened = time.perf_counter(), [], 0
    for i in np.unique(np.linspace(0, len(images) - 1, min(len(images), NUM_OPENED)).astype(int)).tolist():
        try:
            image = images.open(i, is_fast=is_fast)
            decoding.top(image, image.shape[0]) if is_fast else image.load()
        except DamagedImage as error:
            damaged.append(str(error))
        num_opened += 1
        if time.perf_counter() - start > OPENING_S:
            break
    log.info("%s: %d of %d images opened, %d damaged (tools/check_images.py opens all)", split, num_opened, len(images), len(damaged))
    for text in damaged if is_borne else ():
        log.warning("%s: %s", split, text)
    faults.add(*(() if is_borne else damaged))


def view_s(loader: TrainLoader) -> float:
    """CPU seconds in which a loader process makes a training view, from a few of the first epoch. InputError where it cannot."""
    plan, dataset = loader.plan, loader.loader.dataset
    positions = plan.positions(0, min(plan.num_positions, NUM_OPENED))
    keys = plan.keys(0, positions, plan.permutation(0).numpy())
    num_threads, num_made, start = torch.get_num_threads(), 0, 0.0
    torch.set_num_threads(1)  # as in a loader's process
    try:
        dataset.__getitems__(keys[:2])  # what is done once
        start = begin = time.process_time()
        while num_made < len(keys) and time.process_time() - begin < OPENING_S:
            num_made += len(dataset.__getitems__(keys[num_made : num_made + 8]).positions)
        return (time.process_time() - start) / num_made
    finally:
        torch.set_num_threads(num_threads)
