"""Reading images from every kind of source against reading them from class folders, and the memory of an index of ImageNet's size.

    python benchmarks/sources.py FOLDER [--num-images 2000] [--rounds 5] [--decode]

FOLDER holds train/ and val/ with a folder per class; up to --num-images of train/ are written anew in every layout below --scratch. One process
reads them in the random order of an epoch, sources in turn, each round once after the system was asked to forget the files (cold; where it can
be asked) and once more (warm). Prints images per second of one core, and the median over rounds of the ratio to folders in the same round.
Then a made index of --index-images images is looked up at random in two forked processes, and their private memory printed."""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

import datasets
from benchmarks import layouts
from benchmarks.loader_memory import measure
from loading import pixels
from loading.images import Images, Names, read_sample
from run import config
from run.command import positive_int
from sources import table
from sources.cache import write_whole
from sources.files import DataFile, Files
from sources.finding import cache_of
from sources.sets import open_folder
from sources.stored import Ranges
from tools.bench_data import files_of, forget

KINDS = ("folder", *layouts.WRITERS)


def copy_some(folder: Path, out: Path, num_images: int) -> None:
    """At most `num_images` of the training images, evenly spaced, and an image of each class for validation."""
    images = open_folder(folder / "train")
    for i in np.unique(np.linspace(0, len(images) - 1, min(len(images), num_images)).astype(int)):
        name = images.classes[images.targets[i]]
        (out / "train" / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images.samples[i], out / "train" / name / Path(images.samples[i]).name)
    for label in (out / "train").iterdir():
        (out / "val" / label.name).mkdir(parents=True)
        first = min(label.iterdir())
        shutil.copyfile(first, out / "val" / label.name / f"{label.name}_{first.name}")


def rate(images: Images, order: np.ndarray, *, is_decoded: bool) -> float:
    """Images per second that this process reads, and if asked decodes, in that order."""
    start = time.perf_counter()
    for i in order.tolist():
        if is_decoded:
            image = images.open(i, is_fast=True)
            image.top(image.shape[0])
        else:
            read_sample(images.samples[i])
    return len(order) / (time.perf_counter() - start)


def compare(sources: dict[str, Images], num_rounds: int, *, is_decoded: bool) -> dict[tuple[str, str], list[float]]:
    """Rates of each round by state of the system's memory and source; sources take turns."""
    rates = {}
    for number in range(num_rounds):
        order = np.random.RandomState(number).permutation(len(sources["folder"]))
        for name, images in sources.items():
            states = ["warm"]
            if hasattr(os, "posix_fadvise"):
                for path in files_of(list(images.samples)):
                    forget(path)
                states = ["cold", "warm"]
            for state in states:
                rates.setdefault((state, name), []).append(rate(images, order, is_decoded=is_decoded))
    return rates


def show(rates: dict[tuple[str, str], list[float]]) -> None:
    for (state, name), found in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found, rates[state, "folder"], strict=True))
        print(f"{state}  {name:<8} {statistics.median(found):9.0f} images/s  {ratio:.2f} times folders", flush=True)


def made_index(folder: Path, num_images: int) -> Ranges:
    """A source whose index has `num_images` entries; there are no images."""
    names = Names(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(num_images))
    columns = {name: np.arange(num_images, dtype=np.int64) for name in ("offset", "stored", "size")}
    columns |= {"file": np.zeros(num_images, np.int32), "label": np.zeros(num_images, np.int32), "method": np.zeros(num_images, np.uint8)}
    write_whole(folder / "made.table", table.encode({}, columns | names.columns("name")))
    files = Files([DataFile(str(folder / "made.pack"), 0, "")], cache_of(config.Config()))
    return Ranges(files, table.read(folder / "made.table"))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--num-images", type=positive_int, default=2000, metavar="N", help="of each source [%(default)s]")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="[%(default)s]")
    parser.add_argument("--decode", action="store_true", help="decode the images too, with the fast loader's decoder")
    parser.add_argument("--index-images", type=positive_int, default=1281167, metavar="N", help="entries of the made index [%(default)s]")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the layouts are written, on the disk to be measured [the system's]")
    args = parser.parse_args(argv)
    pixels.prepare_process()
    random.seed(0)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        copy_some(args.folder.expanduser(), root / "folder", args.num_images)
        sources = {}
        for kind in KINDS:
            flags = [f"--data-path={layouts.write(kind, root / 'folder', root / kind)}", f"--data-cache={root / 'cache'}"]
            sources[kind], _ = datasets.open_images(config.parse(flags)[0])
        show(compare(sources, args.rounds, is_decoded=args.decode))
        made = made_index(root, args.index_images)
        print(f"an index of {args.index_images:,} images, {(root / 'made.table').stat().st_size / 2**20:.0f} MiB, looked up by two processes:")
        measure("index", made.offset, made.size, args.index_images)


if __name__ == "__main__":
    main(sys.argv[1:])
