"""Which of storage, cores and model limits a training run on this machine: what each sustains, in images per second.

    python tools/bench_data.py --data-path FOLDER --model recnext_m1 [main.py's other settings] [--seconds 10]

storage: reading files that are not in memory (the system is asked to forget them first; where it cannot, the figure is memory's);
loader: the recipe's augmentation, in one process and in all that the run would start; model: training steps on made-up images,
alone and with the teacher of the recipe running beside it (random weights: they cost the same). Each is measured alone: on a CPU
loader and model share the cores, so the run is slower than the slower of them."""

import argparse
import dataclasses
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

import datasets
import utils
from distillation import teacher
from loading import keys
from loading.images import Images, read_sample
from loading.loaders import count_workers
from measuring import steps
from run import config, process
from run.errors import InputError
from sources.stored import Entry

STORAGE_THREADS = 16


def forget(path: str) -> None:
    """Ask the system to drop a file from memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(samples: list[str | Entry]) -> set[str]:
    """The local files that samples lie in."""
    sources = {sample.source for sample in samples if not isinstance(sample, str)}
    return {sample for sample in samples if isinstance(sample, str)} | {file.path for source in sources for file in source.files if not file.is_remote}


def storage_rate(images: Images, seconds: float) -> tuple[float, float]:
    """Images and megabytes per second that 16 threads read, for at most `seconds`."""
    samples = [images.samples[i] for i in np.random.RandomState(0).permutation(len(images))[:20_000]]
    if hasattr(os, "posix_fadvise"):
        for path in files_of(samples):
            forget(path)
    start, num_images, num_bytes = time.perf_counter(), 0, 0
    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        for first in range(0, len(samples), 256):
            sizes = list(pool.map(lambda sample: len(read_sample(sample)), samples[first : first + 256]))
            num_images, num_bytes = num_images + len(sizes), num_bytes + sum(sizes)
            if time.perf_counter() - start > seconds:
                break
    spent_s = time.perf_counter() - start
    return num_images / spent_s, num_bytes / spent_s / 1e6


def loader_rate(cfg: config.Config, images: Images, rank: utils.Rank, seconds: float) -> float:
    """Training images per second that the loader delivers, after its first batch, for about `seconds`."""
    loader = datasets.build_train_loader(cfg, images, rank)
    start, num_images, epoch = None, 0, 0
    while start is None or time.perf_counter() - start < seconds:
        for batch in loader.batches(epoch):
            num_images += len(batch.positions) if start is not None else 0
            start = start or time.perf_counter()
            if time.perf_counter() - start > seconds:
                break
        epoch += 1
    return num_images / (time.perf_counter() - start)


def model_rate(cfg: config.Config, rank: utils.Rank, seconds: float, *, with_teacher: bool) -> float:
    """Training images per second of the model's steps, on one made-up batch, for about `seconds`."""
    cfg = cfg if with_teacher else dataclasses.replace(cfg, distillation_type="none")
    plan = keys.build_plan(cfg.batch_size, repeated_aug=False, group_size=cfg.batch_size, lanes=1, data_seed=0)
    batch = steps.build_batch(plan, cfg.input_size, num_splits=max(1, cfg.aug_splits))
    answers = steps.build_online(cfg, plan, rank) if with_teacher else teacher.no_teacher
    side = steps.build_side(cfg, plan, rank, answers=answers)
    steps.visit_s(side, batch, 1)
    start, num_steps = time.perf_counter(), 0
    while num_steps == 0 or time.perf_counter() - start < seconds:
        steps.visit_s(side, batch, 1)
        num_steps += 1
    return num_steps * plan.num_positions / (time.perf_counter() - start)


def conclude(rates: dict[str, float], num_workers: int) -> str:
    """One sentence: what limits the run, and what would help."""
    data = {"loader": rates["all loader processes"], **({"storage": rates["storage"]} if "storage" in rates else {})}
    limits = {**data, "model": rates.get("model with teacher", rates["model"])}
    slowest = min(limits, key=limits.get)
    cure = {
        "storage": "put the images on a faster disk, or into tars",
        "loader": f"give the run more cores (one sustains {rates['one loader process']:.0f} images/s, {num_workers} processes are used here)",
        "model": "a faster device, --amp or a larger batch helps; the data keep up",
    }[slowest]
    text = f"the {slowest} limits this run to about {limits[slowest]:.0f} images/s: {cure}"
    if slowest == "model" and "model with teacher" in rates:
        others = {**data, "model": rates["model"]}
        then = min(others, key=others.get)
        text += f". With stored teacher labels (--teacher-labels) the {then} would limit it, to about {others[then]:.0f} images/s"
    return text


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_data.py", description=__doc__.splitlines()[0], epilog="All other flags are main.py's.", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement [%(default)s]")
    own, settings = parser.parse_known_args(argv)
    if own.seconds <= 0:
        raise InputError(f"--seconds {own.seconds:g} is no time to measure anything: take a few seconds")
    cfg, notes = config.parse(settings)
    rank = process.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    if cfg.image_size_schedule is not None:
        utils.log.info("--image-size-schedule is left out: all is measured at --input-size %d", cfg.input_size)
        cfg = dataclasses.replace(cfg, image_size_schedule=None)
    images, _ = datasets.open_images(cfg)
    utils.log.setLevel("WARNING")  # what loaders say of every epoch
    rates = {}

    def add(name: str, rate: float, remark: str = "") -> None:
        rates[name] = rate
        print(f"{name:<22} {rate:10.0f} images/s  {remark}", flush=True)

    num_workers = max(1, count_workers(cfg, rank))
    add("model", model_rate(cfg, rank, own.seconds, with_teacher=False), f"{cfg.model} on {rank.device}, batch {cfg.batch_size}")
    if cfg.distillation != "none":
        add("model with teacher", model_rate(cfg, rank, own.seconds, with_teacher=True), f"{cfg.teacher_model} online")
    if hasattr(images.samples, "sizes"):
        rate, megabytes = storage_rate(images, own.seconds)
        add("storage", rate, f"{megabytes:.0f} MB/s in {STORAGE_THREADS} threads")
    add("one loader process", loader_rate(dataclasses.replace(cfg, num_workers=1), images, rank, own.seconds), f"{cfg.loader} loader")
    rate = loader_rate(dataclasses.replace(cfg, num_workers=num_workers), images, rank, own.seconds)
    add("all loader processes", rate, f"{num_workers} processes on {os.cpu_count()} cores")
    print(conclude(rates, num_workers))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as failure:
        sys.exit(f"error: {failure}")
