"""Memory of the loader's processes on a synthetic listing of ImageNet's size, and of the same listing kept as Python lists.

    python benchmarks/loader_memory.py [--num-images 1281167] [--reads 600000]

Each side forks two workers that look up `--reads` random entries each, as training does, and report their private memory (pages
that they no longer share with their parent) before and after. Flat means: what they read stays shared."""

import argparse
import multiprocessing
import random
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loading.images import Images, Names, open_file, read_file
from run.command import positive_int


def private_mib() -> float:
    """Memory in MiB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def read(entries, targets, num_reads: int, seed: int, results) -> None:
    """Look up random entries; put the private memory at tenths of the way into `results`."""
    draw = random.Random(seed)
    sizes = [private_mib()]
    for _ in range(10):
        for _ in range(num_reads // 10):
            i = draw.randrange(len(entries))
            _ = entries[i], targets[i]
        sizes.append(private_mib())
    results.put(sizes)


def measure(name: str, entries, targets, num_reads: int) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=read, args=(entries, targets, num_reads, seed, results)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        sizes = results.get()
        worker.join()
        print(f"{name:<8} private memory {sizes[0]:7.1f} MiB at the start, then " + " ".join(f"{size:.1f}" for size in sizes[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num-images", type=positive_int, default=1281167, metavar="N", help="length of the listing [%(default)s]")
    parser.add_argument("--reads", type=positive_int, default=600_000, metavar="N", help="entries that each worker looks up [%(default)s]")
    args = parser.parse_args()
    paths = [f"/datasets/imagenet/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(args.num_images)]
    targets = [i % 1000 for i in range(args.num_images)]
    random.Random(0).shuffle(paths)  # as read from a disk: neighbours in the listing are not neighbours in memory
    measure("lists", paths, targets, args.reads)
    images = Images(Names(paths), targets, [str(i) for i in range(1000)], open_file, read_file)
    del paths, targets
    measure("arrays", images.samples, images.targets, args.reads)


if __name__ == "__main__":
    main()
