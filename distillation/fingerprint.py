"""What labels are made for: data, order, augmentation, mixing and teacher, as a dictionary that differs by field."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from distillation.teacher import (
    FOLDING_VERSION,
    precision,
)
from loading import augment, pixels
from loading.batches import TrainingSet
from loading.images import Images
from loading.keys import VERSION, Plan, draw_words
from loading.sets import TarMember
from run.config import Config
from run.errors import InputError

FORMAT = "understudy teacher labels 1"
# Settings that change what the teacher sees.
COMPARED = (
    "input_size", "loader", "three_augment", "color_jitter", "aa", "hflip", "train_interpolation", "reprob", "remode", "recount",
    "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode",
)  # fmt: skip
# Settings of augmentation and mixup that are not compared as they are given, and why.
NOT_COMPARED = {
    "repeated_aug": "plan.repeats is what came of it",
    "mix_group_size": "plan.group_size is what came of it, which a small data set may shrink",
    "mix_lanes": "plan.lanes is what came of it",
    "smoothing": "changes the targets, not the images",
}


def fingerprint(cfg: Config, dataset: TrainingSet, *, num_classes: int, device: torch.device) -> dict:
    """All that labels depend on but the teacher's weights, by field; plain JSON."""
    plan = dataset.plan
    found = {
        "labels.kind": cfg.distillation,
        "labels.topk": cfg.teacher_topk,
        **_listing(dataset.images),
        "plan.data_seed": plan.data_seed,
        "plan.repeats": plan.repeats,
        "plan.lanes": plan.lanes,
        "plan.group_size": plan.group_size,
        "plan.num_positions": plan.num_positions,
        "plan.keys": VERSION.decode(),
        "plan.permutations": "-".join(order_hash(plan, epoch) for epoch in range(2)),
        "plan.pixel_hash": pixels.pixel_hash(np.arange(3 * 16 * 16).astype(np.uint8).reshape(16, 16, 3)),
        **{f"augmentation.{name}": getattr(cfg, name) for name in COMPARED},
        "augmentation.mean": augment.MEAN,
        "augmentation.std": augment.STD,
        "teacher.model": cfg.teacher_model,
        "teacher.num_classes": num_classes,
        "teacher.input_size": cfg.input_size,
        "teacher.precision": precision(device),
        "teacher.folding": FOLDING_VERSION,
    }
    return json.loads(json.dumps(found))


def order_hash(plan: Plan, epoch: int) -> str:
    """Hash of the order of the images in `epoch`."""
    return hashlib.blake2b(plan.permutation(epoch).numpy().astype("<i8").tobytes(), digest_size=8).hexdigest()


def _listing(images: Images) -> dict:
    """Number and bytes of the training images, and the hash of each one's path below the folder they share, class and size; of
    images in memory the hash of pixels and class."""
    digest, num_bytes = hashlib.blake2b(digest_size=16), 0
    if isinstance(images.samples[0], str | TarMember):
        names, sizes = _names_and_sizes(images.samples)
        folder = os.path.commonprefix([min(names), max(names)]).rpartition("/")[0]
        for name, size, target in zip(names, sizes, images.targets.tolist(), strict=True):
            digest.update(os.fsencode(f"{name[len(folder) :].lstrip('/')}\0{target}\0{size}\n"))
            num_bytes += size
    else:
        for sample, target in zip(images.samples, images.targets.tolist(), strict=True):
            array = np.ascontiguousarray(sample)
            digest.update(f"{array.shape}\0{target}\n".encode())
            digest.update(array)
            num_bytes += array.nbytes
    return {"data.num_images": len(images), "data.num_bytes": num_bytes, "data.listing": digest.hexdigest()}


def _names_and_sizes(samples: Sequence) -> tuple[list[str], list[int]]:
    if isinstance(samples[0], TarMember):
        return [member.name for member in samples], [member.size for member in samples]
    names, num_threads = list(samples), 32  # a network's file system takes its time for each, and for many at once hardly more
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            parts = list(pool.map(lambda i: [os.stat(name).st_size for name in names[i::num_threads]], range(num_threads)))
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read as an image ({error.strerror}): replace or remove it") from error
    sizes = [0] * len(names)
    for i, part in enumerate(parts):
        sizes[i::num_threads] = part
    return names, sizes


def versions() -> dict[str, str | None]:
    """Libraries that decode, augment or compute; recorded, and no reason to refuse labels."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "Pillow", "opencv-python-headless", "simplejpeg"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def draw_canaries(cfg: Config, dataset: TrainingSet, count: int) -> list[dict]:
    """What fixed keys of epoch 0 draw: pixels (hash of the view), erased (boxes with the mean and the root mean square of their
    fill), mixing (share, is_cutmix and box of the group's draw). Pixels and erased are None where the image is damaged."""
    plan, mixer = dataset.plan, augment.build_mixer(cfg, num_classes=2) if cfg.is_mixing else None
    positions = [draw_words("canary", i)[0] % plan.num_positions for i in range(min(count, plan.num_positions))]
    drawn = []
    for key in plan.keys(0, np.array(positions, dtype=np.int64), plan.permutation(0).numpy()):
        view = dataset.draw(key)
        pixel_hash = None if view.damaged else pixels.pixel_hash(view.pixels)
        erased = None if view.damaged else [[*box, fill.mean().item(), fill.square().mean().sqrt().item()] for box, fill in view.erased]
        group, member = (int(number) for number in plan.groups_and_members(np.array(key.position)))
        mixing = []
        if mixer is not None:
            draw = mixer.draw(plan.group_generator(0, group), plan.group_size, *view.pixels.shape[:2])
            mixing = [float(draw.lam[member]), int(draw.is_cutmix[member]), *draw.boxes[member].tolist()]
        drawn.append({"position": key.position, "pixels": pixel_hash, "erased": erased, "mixing": mixing})
    return drawn


def _is_close(a, b) -> bool:
    """Equal, but for fractions: noise that is drawn with other vector instructions differs in its last digits. None tells nothing."""
    if a is None or b is None:
        return True
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_is_close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 1e-3
    return a == b


def differences(stored: dict, here: dict) -> list[str]:
    """How the fingerprint of a store differs from this run's, a line per field."""
    return [
        f"field {name}: the store has {stored.get(name)}, this run has {here.get(name)}"
        for name in dict.fromkeys([*here, *stored])
        if stored.get(name) != here.get(name)
    ]


def canary_differences(stored: list[dict], here: list[dict]) -> list[str]:
    """How what a store's keys drew differs from what they draw in this run, a line per kind."""
    lines = []
    for kind in ("position", "pixels", "erased", "mixing"):
        wrong = [there["position"] for there, ours in zip(stored, here, strict=False) if not _is_close(there[kind], ours[kind])]
        if wrong or len(stored) < len(here):
            lines.append(
                f"field canary.{kind}: {len(wrong)} of {len(here)} views are not those of the store ({len(stored)} there), "
                f"first at positions {wrong[:3]} of epoch 0"
            )
    return lines
