"""From files to batches: image folders and built-in sets, keyed training loader, exact evaluation loader.

Run from the project's root, this file hides the Hugging Face package of the same name."""

import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading import augment, pixels
from loading.keys import Key, KeyedBatchSampler, Plan, borrowed_generators, build_plan, fit_batch_size, seed_generators
from run.config import Config
from run.errors import InputError
from utils import Rank, log, prefetched


class Names(Sequence):
    """Texts in two buffers. A list of a million strings would be copied, page by page, into every loader process that counts
    references to them."""

    def __init__(self, texts: Iterable[str]):
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = array("q", np.cumsum([0, *map(len, encoded)], dtype=np.int64).tobytes())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class Images(Sequence):
    """Labelled images: `images[i]` is (RGB PIL image, class index).

    `open_image` makes the PIL image of a sample; `read_bytes`, where samples are files, reads one for a decoder of its own."""

    def __init__(self, samples: Sequence, targets: Sequence[int], classes: list[str], open_image: Callable, read_bytes: Callable | None = None):
        self.samples = samples
        self.targets = np.asarray(targets, dtype=np.int32)
        self.classes = classes
        self._open_image = open_image
        self._read_bytes = read_bytes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._open_image(self.samples[index]), int(self.targets[index])

    def open(self, index: int, *, is_fast: bool) -> augment.AnyImage:
        """The image as the loaders' transforms take it."""
        if not is_fast:
            return self[index][0]
        sample = self.samples[index]
        if self._read_bytes is None:
            return np.array(self._open_image(sample))
        return pixels.Encoded(self._read_bytes(sample), lambda: self._open_image(sample))

    def part(self, indices: Sequence[int]) -> "Images":
        """The images at `indices`, in that order, with all classes."""
        chosen = [self.samples[i] for i in indices]
        samples = Names(chosen) if isinstance(self.samples, Names) else chosen
        return Images(samples, self.targets[np.asarray(indices)], self.classes, self._open_image, self._read_bytes)


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for files that are no images


def decode(file) -> Image.Image:
    """The RGB image in an open file, whatever its mode there (grayscale, CMYK, palette, 16 bit)."""
    with Image.open(file) as image:
        if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def open_file(path: str) -> Image.Image:
    """The RGB image in a file; InputError naming the file if it cannot be decoded."""
    try:
        return decode(path)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove it") from error


def read_file(path: str) -> bytes:
    """Content of a file; InputError naming it if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove it") from error


class ClassFolders(ImageFolder):
    """torchvision's, without the hidden folders that notebooks and file managers leave behind."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(directory)
        return classes, {name: i for i, name in enumerate(classes)}


def open_folder(path: Path) -> Images:
    """Images in one sub-folder per class, classes in alphabetical order; InputError where there are none."""
    try:
        folder = ClassFolders(str(path))
    except FileNotFoundError as error:
        if not any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()):
            raise InputError(
                f"{path} holds no class folders: put each class's images into a folder named after the class "
                "(tools/extract_imagenet.py does so for ImageNet's archives)"
            ) from error
        empty = re.search(r"for the classes (.*?)\. Supported", str(error))
        raise InputError(f"{path}: no image in the class folders {empty[1] if empty else ''}: fill or remove them") from error
    return Images(Names(file for file, _ in folder.samples), folder.targets, folder.classes, open_file, read_file)


@dataclass(frozen=True)
class TarMember:
    """Where an image's bytes lie inside a tar."""

    tar: str
    name: str
    offset: int
    size: int


class TarMembers(Sequence):
    """Members of a tar, in arrays (see `Names`)."""

    def __init__(self, members: Sequence[TarMember]):
        self._tar = members[0].tar
        self._names = Names(member.name for member in members)
        self._offsets = np.array([member.offset for member in members])
        self._sizes = np.array([member.size for member in members])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> TarMember:
        return TarMember(self._tar, self._names[index], int(self._offsets[index]), int(self._sizes[index]))


def read_tar_member(member: TarMember) -> bytes:
    """Bytes of `member`; InputError naming it if they cannot be read."""
    try:
        with open(member.tar, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
    except OSError as error:
        raise InputError(f"{member.tar}: {member.name} cannot be read as an image ({error}): is the tar still there?") from error


def open_tar_member(member: TarMember) -> Image.Image:
    """The RGB image at `member`; InputError naming it if it cannot be decoded."""
    try:
        return decode(io.BytesIO(read_tar_member(member)))
    except UNREADABLE as error:
        raise InputError(f"{member.tar}: {member.name} cannot be read as an image ({error}): replace or remove it") from error


def open_tar(path: Path) -> Images:
    """Images in a tar of class folders, classes in alphabetical order; InputError where there are none."""
    log.info("reading the index of %s", path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = sorted(
                (TarMember(str(path), item.name, item.offset_data, item.size) for item in tar if item.isfile() and item.name.lower().endswith(IMG_EXTENSIONS)),
                key=lambda member: member.name,
            )
    except tarfile.TarError as error:
        raise InputError(f"{path} is no plain, complete tar ({error}): it must be an uncompressed tar of class folders") from error
    names = [Path(member.name).parent.name for member in members]
    classes = sorted(set(names))
    if not members or "" in classes:
        raise InputError(f"{path} holds no images in class folders: it must be a tar of class folders")
    index = {name: i for i, name in enumerate(classes)}
    return Images(TarMembers(members), [index[name] for name in names], classes, open_tar_member, read_tar_member)


def open_part(root: Path, name: str) -> Images | None:
    """The images of `root/name`, a folder or a tar; None where there is neither."""
    if (root / name).is_dir():
        return open_folder(root / name)
    return open_tar(root / f"{name}.tar") if (root / f"{name}.tar").is_file() else None


def open_folders(cfg: Config, val_name: str = "val") -> tuple[Images | None, Images]:
    """Training and validation images below --data-path; no training images are fine for an evaluation."""
    root = Path(cfg.data_path).expanduser()
    if not root.is_dir():
        raise InputError(f"--data-path {root} is no folder: it must hold train/ and {val_name}/, each with a folder per class, or tars of the same names")
    train, val = open_part(root, "train"), open_part(root, val_name)
    if train is None and (val is None or not cfg.eval):
        raise InputError(f"--data-path {root} holds neither train/ nor train.tar: put the training images there, in a folder per class")
    if cfg.val_split is not None:
        if val is not None:
            raise InputError(f"--val-split holds images out of train/, but {root / val_name} exists: drop one of them")
        kept, held_out = stratified_split(train.targets, max(1, round(cfg.val_split * len(train))))
        return train.part(kept), train.part(held_out)
    if val is None:
        raise InputError(f"--data-path {root} has no {val_name}/: add it, or hold out a tenth of train/ with --val-split 0.1")
    if train is not None and train.classes != val.classes:
        _refuse_classes(root, train.classes, val.classes, val_name)
    return train, val


def _refuse_classes(root: Path, train: list[str], val: list[str], val_name: str) -> None:
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise InputError(
        f"{root}: train/ has {len(train)} classes, {val_name}/ has {len(val)}, and their folders must have the same names, for classes are numbered by name. "
        f"Only in train/: {', '.join(only_train[:3]) or 'none'}; only in {val_name}/: {', '.join(only_val[:3]) or 'none'}"
    )


def open_cifar(cfg: Config) -> tuple[Images, Images]:
    """CIFAR-100 from its local files."""
    try:
        parts = [CIFAR100(str(Path(cfg.data_path).expanduser()), train=is_training) for is_training in (True, False)]
    except (RuntimeError, OSError) as error:
        raise InputError(f"--data-path {cfg.data_path} holds no complete cifar-100-python/ ({error}): unpack cifar-100-python.tar.gz there") from error
    return tuple(Images(part.data, part.targets, part.classes, Image.fromarray) for part in parts)


def open_inat(cfg: Config, year: int) -> tuple[Images, Images]:
    """iNaturalist 2018 or 2019: images listed in train<year>.json and val<year>.json, classes from categories.json.

    Classes are the values of --inat-category, numbered as they first appear among the training annotations (as in DeiT)."""
    root = Path(cfg.data_path).expanduser()
    try:
        train, val, categories = (json.loads((root / name).read_text()) for name in (f"train{year}.json", f"val{year}.json", "categories.json"))
        labels = {entry.get("id", i): entry[cfg.inat_category] for i, entry in enumerate(categories)}
        classes = list(dict.fromkeys(labels[annotation["category_id"]] for annotation in train["annotations"]))
        return tuple(_inat_part(root, listing, labels, classes) for listing in (train, val))
    except (OSError, ValueError) as error:
        raise InputError(f"--data-path {root}: {error}; --data-set {cfg.data_set} needs train{year}.json, val{year}.json and categories.json there") from error
    except KeyError as error:
        raise InputError(f"--data-path {root}: the iNaturalist listings have no entry {error}; check --inat-category {cfg.inat_category}") from error


def _inat_part(root: Path, listing: dict, labels: dict, classes: list[str]) -> Images:
    files = {image["id"]: image["file_name"] for image in listing["images"]}
    index = {name: i for i, name in enumerate(classes)}
    samples = [_inat_path(root, files[annotation["image_id"]]) for annotation in listing["annotations"]]
    return Images(Names(samples), [index[labels[annotation["category_id"]]] for annotation in listing["annotations"]], classes, open_file, read_file)


def _inat_path(root: Path, name: str) -> str:
    """Path of a listed image; published copies often leave out the second folder, the supercategory."""
    path = root / name
    if path.is_file() or name.count("/") < 3:
        return str(path)
    first, _, *rest = name.split("/")
    return str(Path(root, first, *rest))


def stratified_split(targets: list[int], num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a fixed split, (kept, held out), both sorted: every class gives the same share, up to rounding."""
    targets = np.asarray(targets)
    rng = np.random.RandomState(0)  # legacy generator: its stream never changes
    quantile = np.empty(len(targets))
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        quantile[members] = (rng.permutation(len(members)) + 0.5) / len(members)
    order = np.argsort(quantile, kind="stable")
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


DIGITS_HELD_OUT = 360


def load_digits() -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, 8x8, as 32x32 RGB images: 1437 for training, 360 for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    samples = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in pixels]
    every = Images(samples, digits.target, [str(name) for name in digits.target_names], lambda image: image)
    kept, held_out = stratified_split(every.targets, DIGITS_HELD_OUT)
    return every.part(kept), every.part(held_out)


def open_images(cfg: Config) -> tuple[Images | None, Images]:
    """Training and validation images of --data-set; for an evaluation the former may be missing.

    InputError where there are none, or where --loader cannot run here."""
    if cfg.loader == "fast":
        pixels.require()
        pixels.prepare_process()
    return {
        "DIGITS": load_digits,
        "IMNET": lambda: open_folders(cfg),
        "FLOWERS": lambda: open_folders(cfg, val_name="test"),
        "CIFAR": lambda: open_cifar(cfg),
        "INAT": lambda: open_inat(cfg, 2018),
        "INAT19": lambda: open_inat(cfg, 2019),
    }[cfg.data_set]()


class Batch(NamedTuple):
    """A micro-batch of training images.

    images (B, 3, H, W): normalised float32, or uint8 on its way to a device that will finish them; targets (B,) class indices;
    positions (B,) in the epoch; pixel_hashes (B,) int64, of the uint8 images before erasing, where stored labels need them; erased:
    what is still to be erased; num_fallbacks: images that the fast decoder could not decode."""

    images: Tensor
    targets: Tensor
    positions: Tensor
    pixel_hashes: Tensor | None = None
    erased: augment.Erased | None = None
    num_fallbacks: int = 0


PREFETCH = 2  # batches that a DataLoader has each of its processes work ahead


class _Rooms:
    """Memory for a loader process's batches, shared with its parent, that takes turns: fresh pages cost more than filling them.

    A process is at most `PREFETCH` batches ahead of the one that its parent has just taken, and is copying (see `_ready`)."""

    def __init__(self):
        self._storages: list[torch.UntypedStorage] = []
        self._turn = -1

    def next(self, num_bytes: int) -> torch.UntypedStorage:
        """Room of at least `num_bytes`, that used longest ago."""
        self._turn = (self._turn + 1) % (PREFETCH + 2)
        if self._turn == len(self._storages):
            self._storages.append(torch.UntypedStorage._new_shared(num_bytes))
        elif self._storages[self._turn].nbytes() < num_bytes:  # made for an epoch's last batch
            self._storages[self._turn] = torch.UntypedStorage._new_shared(num_bytes)
        return self._storages[self._turn]


class _LoadedSet(Dataset):
    """Images that a loader's processes open and transform, written once into the batch (B, 3, H, W) that holds them.

    `is_finished_here`: normalise and erase in the loader; else batches are uint8 and finished on the device. `reuses_memory`:
    a batch of a loader's process is overwritten three batches later."""

    def __init__(self, images: Images, transform: augment.Transform, *, is_finished_here: bool = True, reuses_memory: bool = False):
        self.images = images
        self.transform = transform
        self.is_finished_here = is_finished_here
        self._rooms = _Rooms() if reuses_memory else None

    def _allocate(self, num_images: int, height: int, width: int) -> Tensor:
        """Room for a batch (B, H, W, 3); in a loader's process in memory shared with its parent."""
        dtype = torch.float32 if self.is_finished_here else torch.uint8
        shape, num_bytes = (num_images, height, width, 3), num_images * height * width * 3 * dtype.itemsize
        if get_worker_info() is None:
            return torch.empty(shape, dtype=dtype)
        storage = torch.UntypedStorage._new_shared(num_bytes) if self._rooms is None else self._rooms.next(num_bytes)
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)

    def _fill(self, batch: Tensor | None, i: int, num_images: int, view: np.ndarray, erased: list) -> Tensor:
        """Write the `i`-th of `num_images` views (H, W, 3), uint8, into the batch (B, H, W, 3), which the first one makes."""
        if batch is None:
            batch = self._allocate(num_images, *view.shape[:2])
        batch.numpy()[i] = augment.finish_one(view, erased).permute(1, 2, 0) if self.is_finished_here else view
        return batch


class TrainingSet(_LoadedSet):
    """Augmented images by key: (normalised float32 (3, H, W), class index, position), and whole batches of them.

    `is_hashed`: batches come with hashes of their pixels."""

    def __init__(
        self,
        images: Images,
        transform: augment.Transform,
        plan: Plan,
        *,
        is_finished_here: bool = True,
        reuses_memory: bool = False,
        is_hashed: bool = True,
    ):
        super().__init__(images, transform, is_finished_here=is_finished_here, reuses_memory=reuses_memory)
        self.plan = plan
        self.is_hashed = is_hashed

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, key: Key) -> tuple[np.ndarray, list, bool]:
        """uint8 pixels (H, W, 3) of a view, what is to be erased of it, and whether Pillow had to decode it."""
        with borrowed_generators():
            return self._draw(key)

    def _draw(self, key: Key) -> tuple[np.ndarray, list, bool]:
        image = self.images.open(key.sample, is_fast=self.transform.is_fast)
        seed_generators(self.plan.sample_words(key.epoch, key.sample, key.repeat))
        view, erased = self.transform.draw(image)
        return view, erased, getattr(image, "is_fallback", False)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        view, erased, _ = self.draw(key)
        return augment.finish_one(view, erased), int(self.images.targets[key.sample]), key.position

    def __getitems__(self, keys: list[Key]) -> Batch:
        batch, hashes, all_erased, num_fallbacks = None, [], [], 0
        with borrowed_generators():  # once, for a state is longer to save than to seed
            for i, key in enumerate(keys):
                view, erased, is_fallback = self._draw(key)
                batch = self._fill(batch, i, len(keys), view, erased)
                if self.is_hashed:
                    hashes.append(pixels.pixel_hash(view))
                all_erased.append(erased)
                num_fallbacks += is_fallback
        targets = torch.from_numpy(self.images.targets[[key.sample for key in keys]].astype(np.int64))
        positions, hashes = torch.tensor([key.position for key in keys]), torch.tensor(hashes) if self.is_hashed else None
        erased = None if self.is_finished_here else augment.gather_erased(all_erased)
        return Batch(batch.permute(0, 3, 1, 2), targets, positions, hashes, erased, num_fallbacks)


class ValidationSet(_LoadedSet):
    """One process's share of the images, each in one process alone: (normalised float32 (3, H, W), class index), and batches."""

    def __init__(self, images: Images, transform: augment.Transform, rank: Rank, *, is_finished_here: bool = True, reuses_memory: bool = False):
        super().__init__(images, transform, is_finished_here=is_finished_here, reuses_memory=reuses_memory)
        self.indices = range(rank.index, len(images), rank.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.open(self.indices[index], is_fast=self.transform.is_fast)
        return self.transform(image), int(self.images.targets[self.indices[index]])

    def __getitems__(self, indices: list[int]) -> Batch:
        batch, num_fallbacks, chosen = None, 0, [self.indices[i] for i in indices]
        for i, index in enumerate(chosen):
            image = self.images.open(index, is_fast=self.transform.is_fast)
            batch = self._fill(batch, i, len(chosen), *self.transform.draw(image))
            num_fallbacks += getattr(image, "is_fallback", False)
        targets = torch.from_numpy(self.images.targets[chosen].astype(np.int64))
        erased = None if self.is_finished_here else augment.gather_erased([])
        return Batch(batch.permute(0, 3, 1, 2), targets, torch.tensor(chosen), erased=erased, num_fallbacks=num_fallbacks)


def copied(images: Tensor) -> Tensor:
    """A copy of a batch laid out (B, H, W, 3), made by this thread alone: torch would wake its others, and they would take cores
    from the loader's processes."""
    return torch.from_numpy(images.permute(0, 2, 3, 1).numpy().copy()).permute(0, 3, 1, 2)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its images on `device` and finished, in memory that no loader process overwrites."""
    images = copied(batch.images) if batch.images.is_shared() else batch.images
    images = images.to(device, non_blocking=True)
    if batch.erased is not None:
        images = augment.finish(images, batch.erased._replace(fill=batch.erased.fill.to(device, non_blocking=True)))
    return batch._replace(images=images, erased=None)


def _ready(batches: Iterator[Batch], device: torch.device, *, num_batches: int, purpose: str) -> Iterator[Batch]:
    """The `num_batches` batches on `device` and finished, the next one while the last is in use; says with the last of them how many
    images Pillow had to decode."""
    num_fallbacks = num_images = 0
    for i, batch in enumerate(prefetched(batches, lambda batch: _to_device(batch, device), device), 1):
        num_fallbacks, num_images = num_fallbacks + batch.num_fallbacks, num_images + len(batch.targets)
        if i == num_batches and num_fallbacks:
            log.info("%s: %d of %d images were no JPEGs that the fast decoder takes and were decoded by Pillow", purpose, num_fallbacks, num_images)
        yield batch


@dataclass(frozen=True)
class TrainLoader:
    """Micro-batches of any epoch, from any step on."""

    loader: DataLoader
    sampler: KeyedBatchSampler
    plan: Plan
    device: torch.device

    @property
    def num_steps(self) -> int:
        """Optimiser steps per epoch."""
        return self.sampler.num_steps

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.sampler.batch_size * self.sampler.accum_steps * self.sampler.world_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of `epoch` from optimiser step `first_step` on."""
        self.sampler.start(epoch=epoch, step=first_step)
        return _ready(iter(self.loader), self.device, num_batches=len(self.sampler), purpose="training")


@dataclass(frozen=True)
class ValLoader:
    """Batches (images, targets) of a process's share of the validation images."""

    loader: DataLoader
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = _ready(iter(self.loader), self.device, num_batches=len(self.loader), purpose="evaluation")
        return ((batch.images, batch.targets) for batch in batches)

    def __len__(self) -> int:
        return len(self.loader)


def count_workers(cfg: Config, rank: Rank) -> int:
    """Loader processes of this process: as asked for, else one per core that it has to itself, at most 10."""
    if cfg.num_workers is not None:
        return cfg.num_workers
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(10, max(1, num_cores // rank.local_world_size))


def _obey_parent_alone() -> None:
    """Make a loader's worker ignore what asks a whole process group to stop, but for its own parent's SIGTERM.

    The training process still needs its workers to reach the next checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def prepare_worker(worker_id: int) -> None:
    """What a loader's process does first."""
    _obey_parent_alone()
    pixels.prepare_process()
    pixels.keep_freed_memory()


def _as_is(batch: Batch) -> Batch:
    """What collates batches that are none to be collated."""
    return batch


def _loader_settings(cfg: Config, rank: Rank, num_items: int) -> dict:
    num_workers = count_workers(cfg, rank) if num_items else 0
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "worker_init_fn": prepare_worker, "collate_fn": _as_is}
    workers["prefetch_factor"] = PREFETCH if num_workers else None
    if num_workers and "fork" in multiprocessing.get_all_start_methods():  # spawned ones take seconds to start
        workers["multiprocessing_context"] = "fork"
    return {**workers, "pin_memory": cfg.pin_mem and rank.device.type == "cuda"}


def build_train_loader(cfg: Config, images: Images, rank: Rank) -> TrainLoader:
    """The recipe's training data, in keyed order."""
    plan = build_plan(len(images), repeated_aug=cfg.repeated_aug, group_size=cfg.mix_group_size, lanes=cfg.mix_lanes, data_seed=cfg.data_seed)
    num_shares = rank.world_size * cfg.grad_accum_steps
    batch_size = fit_batch_size(plan, cfg.batch_size, num_shares=num_shares, group_size=cfg.mix_group_size, is_mixing=cfg.is_mixing)
    sampler = KeyedBatchSampler(plan, batch_size=batch_size, accum_steps=cfg.grad_accum_steps, rank=rank.index, world_size=rank.world_size)
    dataset = TrainingSet(
        images,
        augment.train_transform(cfg),
        plan,
        is_finished_here=rank.device.type == "cpu",
        reuses_memory=True,
        is_hashed=cfg.labels_mode != "off",
    )
    settings = _loader_settings(cfg, rank, len(images))
    log.info(
        "training images %d  views per epoch %d in mix groups of %d, %d lanes  steps %d (%d views left over)  %s loader, processes %d",
        len(images),
        plan.num_positions,
        plan.group_size,
        plan.lanes,
        sampler.num_steps,
        plan.num_positions - sampler.num_steps * batch_size * num_shares,
        cfg.loader,
        settings["num_workers"],
    )
    if batch_size < cfg.batch_size:
        log.warning("the training set does not fill --batch-size %d: using %d", cfg.batch_size, batch_size)
    return TrainLoader(DataLoader(dataset, batch_sampler=sampler, **settings), sampler, plan, rank.device)


def build_val_loader(cfg: Config, images: Images, rank: Rank) -> ValLoader:
    """Each validation image once, over all processes; the last batch may be smaller."""
    transform = augment.eval_transform(cfg.input_size, augment.crop_pct(cfg), cfg.loader)
    dataset = ValidationSet(images, transform, rank, is_finished_here=rank.device.type == "cpu", reuses_memory=True)
    return ValLoader(DataLoader(dataset, batch_size=cfg.batch_size, **_loader_settings(cfg, rank, len(dataset))), rank.device)


NUM_TEACHER_IMAGES = 512


def build_teacher_loader(cfg: Config, images: Images, rank: Rank) -> ValLoader:
    """At least 512 validation images, evenly spaced (so of many classes), or all of fewer."""
    stride = max(1, len(images) // NUM_TEACHER_IMAGES)
    return build_val_loader(cfg, images.part(np.arange(0, len(images), stride)), rank)


def facts(cfg: Config, classes: list[str]) -> dict:
    """What a checkpoint's user must know of the images: class names, size, normalisation, crop."""
    return {"class_names": classes, "input_size": cfg.input_size, "mean": augment.MEAN, "std": augment.STD, "crop_pct": augment.crop_pct(cfg)}
