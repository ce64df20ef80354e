"""Images per second and core of the input pipelines, all sides interleaved in one run.

    python benchmarks/loader.py --data-path FOLDER      (class folders of JPEGs; ImageNet-like ones to be representative)

Sides: `published` is what the published scripts do (ImageFolder, Pillow, timm's transforms up to the normalised tensor), `timm` its
create_loader's uint8 layout, `reference` and `fast` this project's two loaders as they feed a GPU: uint8 out, keyed.
All times are CPU times (user and system). In the plain part each side has a process of its own, a new one in each round; they take
turns on one core, and the memory that they free stays theirs; in the other part the times are those of a DataLoader's two workers, each
side's as it starts them, and of the process that reads from it. A round shows every side the same images; a side's figure is the median
of the rounds, with the range in brackets."""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from timm.data import create_loader, create_transform
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import utils
from loading import (
    augment,
    keys,
    pixels,
)
from loading.batches import Batch, TrainingSet, ValidationSet
from loading.images import Images
from loading.loaders import _as_is, copied, prepare_worker
from run import config
from run.command import positive_int
from run.errors import InputError
from sources.sets import open_folder

BATCH = 50
TURN = 400  # images
PARTS = ("stages", "plain", "workers")
SIDES = ("published", "timm", "reference", "fast")
TIMM_SETTINGS = {"is_training": True, "color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "re_prob": 0.25}


def published_transform(is_training: bool):
    """Transforms of the published scripts: PIL image -> normalised float tensor."""
    if is_training:
        transform = create_transform(224, re_mode="pixel", re_count=1, **TIMM_SETTINGS)
        augment._guard_posterize(transform)
        return transform
    return transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(augment.MEAN, augment.STD),
        ]
    )


@dataclass(frozen=True)
class Sample:
    """At most `num_images` images of a folder of class folders, evenly spaced."""

    folder: Path
    num_images: int

    @property
    def batch_size(self) -> int:
        return min(BATCH, self.num_images)

    def _chosen(self, num_all: int) -> np.ndarray:
        return np.linspace(0, num_all - 1, min(num_all, self.num_images)).astype(int)

    def pil(self, transform=None) -> ImageFolder:
        """As the published scripts open them."""
        images = ImageFolder(self.folder, transform)
        images.samples = [images.samples[i] for i in self._chosen(len(images))]
        return images

    def own(self) -> Images:
        images = open_folder(self.folder)
        return images.part(self._chosen(len(images)))


def timm_loader(sample: Sample, is_training: bool, num_workers: int) -> DataLoader:
    """timm's loader up to its uint8 batches, without the part that runs on the device."""
    settings = TIMM_SETTINGS if is_training else {"is_training": False, "interpolation": "bicubic", "crop_pct": 0.875}
    loader = create_loader(
        sample.pil(),
        (3, 224, 224),
        sample.batch_size,
        num_workers=num_workers,
        device=torch.device("cpu"),
        pin_memory=False,
        persistent_workers=num_workers > 0,
        **settings,
    )
    if is_training:
        augment._guard_posterize(loader.loader.dataset.transform)
    return loader.loader


def own_set(images: Images, name: str, is_training: bool):
    """This project's data set, giving uint8 batches."""
    cfg, _ = config.parse(["--data-path", "unused", "--loader", name])
    if is_training:
        plan = keys.build_plan(len(images), repeated_aug=False, group_size=len(images) // 2 * 2, lanes=1, data_seed=0)
        return TrainingSet(images, augment.train_transform(cfg), plan, is_finished_here=False, reuses_memory=True, is_hashed=False)
    rank = utils.Rank(0, 1, 0, 1, torch.device("cpu"))
    return ValidationSet(images, augment.eval_transform(224, augment.crop_pct(cfg), name), rank, is_finished_here=False, reuses_memory=True)


class KeySampler:
    """Batches of keys (training) or indices (evaluation) of `num_images` images; another epoch at each pass."""

    def __init__(self, num_images: int, is_training: bool):
        self.num_images, self.is_training = num_images, is_training
        self.epoch = -1

    def __len__(self) -> int:
        return -(-self.num_images // BATCH)

    def __iter__(self):
        self.epoch += 1
        for start in range(0, self.num_images, BATCH):
            indices = range(start, min(start + BATCH, self.num_images))
            yield [keys.Key(self.epoch, i, i, 0) if self.is_training else i for i in indices]


def plain_side(name: str, sample: Sample, is_training: bool):
    """Function of (epoch, indices) that loads these images as one batch."""
    if name == "published":
        images = sample.pil(published_transform(is_training))
        return lambda epoch, indices: torch.stack([images[i][0] for i in indices])
    if name == "timm":
        loader = timm_loader(sample, is_training, 0)
        return lambda epoch, indices: loader.collate_fn([loader.dataset[i] for i in indices])
    own = own_set(sample.own(), name, is_training)
    return lambda epoch, indices: own.__getitems__([keys.Key(epoch, i, i, 0) if is_training else i for i in indices])


def serve(name: str, sample: Sample, is_training: bool, connection, others) -> None:
    """Load the images (epoch, indices) that come through `connection`, and answer with the CPU seconds they took.

    `others`: the benchmark's own ends of the connections so far, which the fork has copied, and which must not outlive it here."""
    for other in others:
        other.close()
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pixels.keep_freed_memory()
    load = plain_side(name, sample, is_training)
    for epoch, indices in iter(functools.partial(receive, connection), None):
        keys.seed_generators((epoch, indices.start, 0))  # for the sides that draw at random: from the same state in every run
        begin = time.process_time()
        for start in range(0, len(indices), BATCH):
            load(epoch, indices[start : start + BATCH])
        connection.send(time.process_time() - begin)


def receive(connection):
    """What comes next; None where the other end is gone."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        return connection.recv()
    return None


@contextlib.contextmanager
def started_sides(sample: Sample, is_training: bool):
    """Connections to a process of each side, by name; the processes end with the block."""
    context, connections, processes = multiprocessing.get_context("fork"), {}, []
    for name in SIDES:
        connections[name], other_end = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, sample, is_training, other_end, list(connections.values())), daemon=True))
        processes[-1].start()
        other_end.close()  # so that a side that fails is noticed
    yield connections
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.close()
        process.join()


def take_turns(connections: dict, epoch: int, num_images: int) -> dict[str, float]:
    """CPU seconds that each side takes for all images, the sides in turn, another one first in each epoch."""
    spent = dict.fromkeys(SIDES, 0.0)
    for start in range(0, num_images, TURN):
        for i in range(len(SIDES)):
            name = SIDES[(epoch + i) % len(SIDES)]
            try:
                connections[name].send((epoch, range(start, min(start + TURN, num_images))))
                spent[name] += connections[name].recv()
            except (EOFError, ConnectionError) as error:
                raise InputError(f"the side {name} failed, see above: free memory or cores, or leave the part out with --parts") from error
    return spent


def measure_plain(sample: Sample, is_training: bool, num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image and side, one figure per round."""
    times = {name: [] for name in SIDES}
    for epoch in range(num_rounds):
        with started_sides(sample, is_training) as connections:  # in every round, for where its memory lies makes a process fast or slow
            take_turns(connections, epoch, sample.num_images)  # warms up
            for name, seconds in take_turns(connections, epoch, sample.num_images).items():
                times[name].append(1000 * seconds / sample.num_images)
    return times


def cpu_time_s(loader: DataLoader) -> float:
    """CPU seconds of this process and of the loader's, so far."""
    ticks = 0
    for worker in loader._iterator._workers:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure_workers(sample: Sample, is_training: bool, num_rounds: int, passes: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time per image and side with two workers, `passes` times through the images per round.

    Own batches are copied as training copies them, out of the memory that the workers use again."""
    images = sample.own()
    settings = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}
    sides = {
        "published": DataLoader(sample.pil(published_transform(is_training)), BATCH, shuffle=is_training, **settings),
        "timm": timm_loader(sample, is_training, 2),
    }
    own = {"collate_fn": _as_is, "worker_init_fn": prepare_worker}
    for name in ("reference", "fast"):
        sides[name] = DataLoader(own_set(images, name, is_training), batch_sampler=KeySampler(len(images), is_training), **own, **settings)
    times = {name: [] for name in sides}
    for is_warm in [False] + num_rounds * [True]:
        for name, loader in sides.items():
            batches, num_images = iter(loader), 0
            begin = cpu_time_s(loader)
            for batch in itertools.chain(batches, *itertools.repeat(loader, passes - 1)):
                num_images += len(batch[0])  # timm leaves out a last batch that is not full
                if isinstance(batch, Batch):
                    copied(batch.images)
            if is_warm:
                times[name].append(1000 * (cpu_time_s(loader) - begin) / num_images)
    return times


def measure_stages(sample: Sample) -> dict[str, float]:
    """Milliseconds per training image of each stage of the fast loader."""
    images = sample.own()
    own = own_set(images, "fast", is_training=True)
    spent = dict.fromkeys(["read", "seed", "decode", "crop and resize", "flip", "RandAugment", "erasing draw"], 0.0)

    def timed(stage, function, *args):
        begin = time.process_time()
        result = function(*args)
        spent[stage] += time.process_time() - begin
        return result

    for epoch in range(2):
        spent.update(dict.fromkeys(spent, 0.0))  # the first epoch warms up
        for i in range(len(images)):
            image = timed("read", functools.partial(images.open, is_fast=True), i)
            image.top = functools.partial(timed, "decode", image.top)
            timed("seed", keys.seed_generators, own.plan.sample_words(epoch, i, 0))
            for stage, part in zip(("crop and resize", "flip", "RandAugment"), own.transform.parts.transforms, strict=True):
                image = timed(stage, part, image)
            timed("erasing draw", augment._draw_erased, own.transform.erasing, image)
    spent["crop and resize"] -= spent["decode"]
    return {stage: 1000 * seconds / len(images) for stage, seconds in spent.items()}


def report(title: str, times: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'side':<10} {'ms/image':>9} {'images/s':>9}   {'fast is faster by':>18}")
    for name, rounds in times.items():
        ratios = [other / own for other, own in zip(rounds, times["fast"], strict=True)]
        middle = statistics.median(rounds)
        print(f"{name:<10} {middle:9.3f} {1000 / middle:9.0f}   {statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-path", type=Path, required=True, metavar="FOLDER", help="folder of class folders of images")
    parser.add_argument("--num-images", type=positive_int, default=400, metavar="N", help="at most so many of them, evenly spaced [%(default)s]")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="times that each side's turn comes [%(default)s]")
    parser.add_argument("--passes", type=positive_int, default=2, metavar="N", help="times through the images per round with workers [%(default)s]")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of the parts to measure [%(default)s]")
    args = parser.parse_args()
    sample = Sample(args.data_path, args.num_images)
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise InputError(f"--parts {args.parts} names a part that there is not: choose from {', '.join(PARTS)}")
    if not args.data_path.is_dir():
        raise InputError(f"--data-path {args.data_path} is no folder: it must be one of class folders with images")
    images = sample.own()
    if len(images) < 2:
        raise InputError("one image is too few: give at least two, by --data-path and --num-images")
    for i in range(len(images)):
        images[i]  # InputError where one cannot be read
    sample = Sample(args.data_path, len(images))
    torch.set_num_threads(1)
    pixels.require()
    pixels.prepare_process()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{os.cpu_count()} cores  torch {torch.__version__} with {capability}  {len(images)} images  median of {args.rounds} rounds")
    if "stages" in parts:
        print("\nfast loader, training, ms per image: " + "  ".join(f"{stage} {ms:.3f}" for stage, ms in measure_stages(sample).items()))
    for is_training, mode in ((True, "training"), (False, "evaluation")):
        if "plain" in parts:
            report(f"{mode}, one process", measure_plain(sample, is_training, args.rounds))
        if "workers" in parts:
            report(f"{mode}, DataLoader with two workers", measure_workers(sample, is_training, args.rounds, args.passes))


if __name__ == "__main__":
    try:
        main()
    except InputError as failure:
        sys.exit(f"error: {failure}")
