"""Cost of keyed seeding: the reference loader's training transform with generators seeded per image against the same transform unseeded.

    python benchmarks/keyed.py --data-path FOLDER      (a folder of class folders of JPEGs; ImageNet-like ones to be representative)

One process, one thread, both sides interleaved image by image in every round; prints the ratio of CPU times with its spread."""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.utils.data import _utils

from loading import (
    augment,
    keys,
)
from run import config
from sources.sets import open_folder


def measure(images, transform, plan, epoch: int) -> tuple[float, float]:
    """CPU seconds for all images: unseeded, keyed. Both sides draw the same, for another crop takes another time: the unseeded
    side is seeded before its clock starts. Which side goes first alternates."""
    spent = [0.0, 0.0]
    for i in range(len(images)):
        for is_keyed in (False, True) if i % 2 else (True, False):
            if not is_keyed:
                keys.seed_generators(plan.sample_words(epoch, i, 0))
            start = time.process_time()
            if is_keyed:
                with keys.seeded(plan.sample_words(epoch, i, 0)):
                    transform(images[i][0])
            else:
                transform(images[i][0])
            spent[is_keyed] += time.process_time() - start
    return tuple(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _utils.worker._worker_info = object()  # as in a loader's worker, where the ambient generators need no restoring
    images = open_folder(args.data_path)
    cfg, _ = config.parse(["--data-path", str(args.data_path), "--loader", "reference"])
    transform = augment.train_transform(cfg)
    plan = keys.build_plan(len(images), repeated_aug=True, group_size=256, lanes=8, data_seed=0)
    measure(images.part(range(min(20, len(images)))), transform, plan, epoch=0)
    ratios = []
    for epoch in range(args.rounds):
        unseeded_s, keyed_s = measure(images, transform, plan, epoch)
        ratios.append(keyed_s / unseeded_s)
        print(f"unseeded {1000 * unseeded_s / len(images):.3f} ms/image  keyed {1000 * keyed_s / len(images):.3f} ms/image  ratio {ratios[-1]:.4f}")
    start = time.process_time()
    for i in range(2000):
        with keys.seeded(plan.sample_words(0, i, 0)):
            pass
    print(f"seeding alone: {(time.process_time() - start) / 2000 * 1e6:.1f} us/image")
    print(
        f"keyed / unseeded: median {statistics.median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f}, {args.rounds} rounds of {len(images)} images"
    )


if __name__ == "__main__":
    main()
