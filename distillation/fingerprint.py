"""What labels are made for: data, order, augmentation, mixing and teacher, as a dictionary that differs by field."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform

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
from run.config import Config

FORMAT = "understudy teacher labels 1"
# Settings that change what the teacher sees.
COMPARED = (
    "input_size", "loader", "three_augment", "color_jitter", "aa", "hflip", "train_interpolation", "reprob", "remode", "recount",
    "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode",
)  # fmt: skip
# Others that do, with what they are where a store does not tell, as those do not that are from before there was the setting.
COMPARED_SINCE = {"vflip": 0.0, "mixup_off_epoch": 0, "exif_transpose": False}
# Settings of augmentation and mixup that are not compared as they are given, and why.
NOT_COMPARED = {
    "train_crop_mode": "what came of it for each size",
    "scale": "what came of it, which --train-crop-mode decides where it is not given",
    "ratio": "what came of it, which --train-crop-mode decides where it is not given",
    "image_size_schedule": "augmentation.size_starts is what came of it, which depends on the number of epochs",
    "mean": "augmentation.mean is what came of it",
    "std": "augmentation.std is what came of it",
    "aug_splits": "several views of an image are for runs without a teacher",
    "resplit": "belongs to --aug-splits",
    "jsd_loss": "belongs to --aug-splits",
    "repeated_aug": "plan.repeats is what came of it",
    "mix_group_size": "plan.group_size is what came of it, which a small data set may shrink",
    "mix_lanes": "plan.lanes is what came of it",
    "smoothing": "changes the targets, not the images",
}


def fingerprint(cfg: Config, dataset: TrainingSet, *, num_classes: int, device: torch.device) -> dict:
    """All that labels depend on but the teacher's weights, by field; plain JSON."""
    plan, (mean, std) = dataset.plan, augment.statistics(cfg)
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
        "augmentation.mean": mean,
        "augmentation.std": std,
        **_since(cfg),
        "teacher.model": cfg.teacher_model,
        "teacher.num_classes": num_classes,
        "teacher.input_size": cfg.input_size,
        "teacher.precision": precision(device),
        "teacher.folding": FOLDING_VERSION,
    }
    return json.loads(json.dumps(found))


def _crops(cfg: Config) -> dict:
    """How images are cropped, by setting: what came of it."""
    scale, ratio = augment.crop_ranges(cfg)
    return {"train_crop_mode": [augment.crop_kind(cfg, size) for size in cfg.train_sizes], "scale": scale, "ratio": ratio}


def _since(cfg: Config) -> dict:
    """Fields of settings that earlier stores know nothing of, where they are not as those runs had them."""
    found = {f"augmentation.{name}": getattr(cfg, name) for name, usual in COMPARED_SINCE.items() if getattr(cfg, name) != usual}
    crops, usual = (_crops(one) for one in (cfg, dataclasses.replace(cfg, train_crop_mode=None, scale=None, ratio=None)))
    found |= {f"augmentation.{name}": values for name, values in crops.items() if values != usual[name]}
    return found | ({"augmentation.size_starts": sorted(cfg.size_starts.items())} if cfg.train_sizes != [cfg.input_size] else {})


def order_hash(plan: Plan, epoch: int) -> str:
    """Hash of the order of the images in `epoch`."""
    return hashlib.blake2b(plan.permutation(epoch).numpy().astype("<i8").tobytes(), digest_size=8).hexdigest()


def _listing(images: Images) -> dict:
    """Number and bytes of the training images, and the hash of each one's class and size, in their order, which tells data apart wherever
    they lie; of images in memory the hash of pixels and class. Files that differ in content alone are told apart by the pixels of the
    canaries and of each mix group."""
    digest = hashlib.blake2b(digest_size=16)
    if hasattr(images.samples, "sizes"):
        sizes = np.asarray(images.samples.sizes(), dtype="<i8")
        digest.update(np.stack([images.targets.astype("<i8"), sizes], axis=1).tobytes())
        num_bytes = int(sizes.sum())
    else:
        num_bytes = 0
        for sample, target in zip(images.samples, images.targets.tolist(), strict=True):
            array = np.ascontiguousarray(sample)
            digest.update(f"{array.shape}\0{target}\n".encode())
            digest.update(array)
            num_bytes += array.nbytes
    return {"data.num_images": len(images), "data.num_bytes": num_bytes, "data.listing": digest.hexdigest()}


def listing_by_path(images: Images) -> str:
    """The listing of stores from before they knew images by content: each one's path below the folder they share, class and size."""
    names, sizes = [str(sample) for sample in images.samples], images.samples.sizes().tolist()
    names = [name.rpartition(": ")[2] for name in names]  # of a tar's member, its name there
    folder, digest = os.path.commonprefix([min(names), max(names)]).rpartition("/")[0], hashlib.blake2b(digest_size=16)
    for name, size, target in zip(names, sizes, images.targets.tolist(), strict=True):
        digest.update(os.fsencode(f"{name[len(folder) :].lstrip('/')}\0{target}\0{size}\n"))
    return digest.hexdigest()


def translated(stored: dict, here: dict, images: Images) -> dict:
    """A store's fingerprint with the listing of today where it has that of these images by path, as earlier stores do."""
    is_earlier = stored.get("data.listing") != here["data.listing"] and stored.get("data.num_bytes") == here["data.num_bytes"]
    if is_earlier and hasattr(images.samples, "sizes") and stored.get("data.listing") == listing_by_path(images):
        return {**stored, "data.listing": here["data.listing"]}
    return stored


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
