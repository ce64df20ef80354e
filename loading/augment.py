"""Image transforms (timm's, repaired where they break) and mixup / CutMix with their random generator as an argument."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import CenterCropOrPad, RandomCropOrPad, RandomResizedCropAndInterpolation, ResizeKeepRatio, str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from loading import kernels, pixels
from loading.decoding import AnyImage
from loading.keys import Key, Plan, restored_generators, seeded
from loading.transfer import sent
from run.config import Config
from run.errors import InputError

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
SMALL_INPUT = 32  # up to here images are used at their own scale: padded crops in training, no enlarging in evaluation


def crop_pct(cfg: Config) -> float:
    """Part of the resized short side that evaluation crops."""
    if cfg.crop_pct is not None:
        return cfg.crop_pct
    return 0.875 if cfg.input_size > SMALL_INPUT else 1.0


class Statistics(NamedTuple):
    """Mean and standard deviation per channel of pixels from 0 to 1, by which images are normalised; ImageNet's."""

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


IMAGENET = Statistics()


def statistics(cfg: Config) -> Statistics:
    """By which the recipe's images are normalised."""
    given = (values * (3 // len(values)) if values is not None else None for values in (cfg.mean, cfg.std))
    return Statistics(*(tuple(values or usual) for values, usual in zip(given, IMAGENET, strict=True)))


class Erased(NamedTuple):
    """Boxes of a batch that random erasing fills, and with what.

    boxes (K, 5) int64: index in the batch, top, left, height, width; fill float32, flat: the boxes' normalised (3, height, width)
    one after the other."""

    boxes: Tensor
    fill: Tensor


def gather_erased(per_image: list[list[tuple[tuple[int, int, int, int], Tensor]]]) -> Erased:
    """What `Transform.draw` found for each image of a batch, for the whole batch."""
    boxes = [(i, *box) for i, erased in enumerate(per_image) for box, _ in erased]
    fills = [fill.flatten() for erased in per_image for _, fill in erased]
    return Erased(torch.tensor(boxes, dtype=torch.int64).view(-1, 5), torch.cat(fills) if fills else torch.empty(0))


@functools.cache
def tensors_of(values: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on `device`, each (3, 1, 1)."""
    return torch.tensor(values.mean, device=device).view(3, 1, 1), torch.tensor(values.std, device=device).view(3, 1, 1)


def finish(images: Tensor, erased: Erased, values: Statistics = IMAGENET) -> Tensor:
    """Normalised float32 images (B, 3, H, W), with boxes erased, of uint8 ones; on their device, where `erased.fill` must be too."""
    mean, std = tensors_of(values, images.device)
    finished = images.to(torch.float32).div_(255).sub_(mean).div_(std)
    start = 0
    for i, top, left, height, width in erased.boxes.tolist():
        stop = start + 3 * height * width
        finished[i, :, top : top + height, left : left + width] = erased.fill[start:stop].view(3, height, width)
        start = stop
    return finished


def finish_one(view: np.ndarray, erased: list[tuple[tuple[int, int, int, int], Tensor]], values: Statistics = IMAGENET) -> Tensor:
    """What `Transform.draw` gave, finished: normalised float32 (3, H, W)."""
    return finish(pixels.to_tensor(view).unsqueeze(0), gather_erased([erased]), values)[0]


@dataclass(frozen=True)
class Transform:
    """From a decoded image to a network's input: `parts` on the image, then random erasing and normalisation.

    `is_fast`: the parts take images as `pixels` has them, in place of PIL's. Where `num_splits` views of an image are made, the first is what the
    `parts` give, which is erased if `erases_first`, and each other one that after the parts of `further`."""

    parts: transforms.Compose
    erasing: RandomErasing | None
    is_fast: bool
    statistics: Statistics = IMAGENET
    further: transforms.Compose | None = None
    num_splits: int = 1
    erases_first: bool = True

    def open(self, image: AnyImage) -> AnyImage:
        """The image as the parts take it."""
        return np.array(image) if self.is_fast and isinstance(image, Image.Image) else image

    def draw(self, image: AnyImage) -> tuple[np.ndarray, list[tuple[tuple[int, int, int, int], Tensor]]]:
        """uint8 pixels (H, W, 3), and what is to be erased: boxes (top, left, height, width) with their fill (3, height, width)."""
        return next(self.draw_splits(image))

    def draw_splits(self, image: AnyImage) -> Iterator[tuple[np.ndarray, list[tuple[tuple[int, int, int, int], Tensor]]]]:
        """What `draw` gives, of each of the image's views."""
        image = self.parts(self.open(image))
        yield self._with_erased(image, erases=self.erases_first)
        for _ in range(self.num_splits - 1):
            yield self._with_erased(self.further(image), erases=True)

    def _with_erased(self, image: AnyImage, *, erases: bool) -> tuple[np.ndarray, list]:
        view = image if self.is_fast else np.array(image)
        return view, _draw_erased(self.erasing, view) if self.erasing is not None and erases else []

    def __call__(self, image: AnyImage) -> Tensor:
        """Normalised float32 (3, H, W)."""
        return finish_one(*self.draw(image), self.statistics)


def resized_side(input_size: int, crop: float) -> int:
    """Pixels to which evaluation resizes before it cuts out the centre: that part `crop` of the resized image."""
    return int(input_size / crop)


def eval_transform(
    input_size: int, crop: float, loader: str = "fast", *, mode: str = "center", interpolation: str = "bicubic", values: Statistics = IMAGENET
) -> Transform:
    """Evaluation's: image -> (3, input_size, input_size) normalised float32. timm's crop modes: the short side (`center`), both (`squash`) or the
    long one (`border`, the rest is filled with the mean) to input_size / crop, then the centre."""
    side, resampling, is_fast = resized_side(input_size, crop), str_to_interp_mode(interpolation), loader == "fast"
    if mode == "center" and is_fast:
        parts = [pixels.ResizedCenterCrop(side, input_size, resampling)]
    elif mode == "border":
        fill = tuple(round(255 * value) for value in values.mean)
        parts = [_KeepRatio((side, side), longest=1.0, interpolation=interpolation), CenterCropOrPad(input_size, fill=fill)]
        parts = [_fast(part) for part in parts] if is_fast else parts
    elif is_fast:
        parts = [pixels.SquashedCenterCrop(side, input_size, resampling)]
    else:
        parts = [transforms.Resize(side if mode == "center" else (side, side), interpolation=resampling), transforms.CenterCrop(input_size)]
    return Transform(transforms.Compose(parts), None, is_fast, values)


def recipe_eval_transform(cfg: Config) -> Transform:
    """`eval_transform` as the recipe sets it."""
    return eval_transform(cfg.input_size, crop_pct(cfg), cfg.loader, mode=cfg.crop_mode, interpolation=cfg.interpolation, values=statistics(cfg))


class _KeepRatio(ResizeKeepRatio):
    """timm's, where an image's short side may come out as less than a pixel too."""

    @staticmethod
    def get_params(*args) -> list[int]:
        return [max(1, side) for side in ResizeKeepRatio.get_params(*args)]


def crop_transform(input_size: int, loader: str = "fast", values: Statistics = IMAGENET) -> Transform:
    """Centre crop alone, for images made at their final size; smaller ones are enlarged first: image -> as `eval_transform`."""
    if loader == "fast":
        return Transform(transforms.Compose([pixels.CenterCrop(input_size)]), None, is_fast=True, statistics=values)
    return Transform(transforms.Compose([_AtLeast(input_size), transforms.CenterCrop(input_size)]), None, is_fast=False, statistics=values)


@dataclass(frozen=True)
class _AtLeast:
    """PIL images with a short side of `size` pixels at least, the smaller ones enlarged, bicubic."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        is_small = min(image.size) < self.size
        return transforms.functional.resize(image, self.size, transforms.InterpolationMode.BICUBIC) if is_small else image


def crop_ranges(cfg: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """--scale and --ratio, or what timm has in their place."""
    scale, ratio = ((0.08, 1.0), (3 / 4, 4 / 3)) if cfg.train_crop_mode in (None, "rrc") else ((0.8, 1.0), (0.9, 1 / 0.9))
    return cfg.scale or scale, cfg.ratio or ratio


def crop_kind(cfg: Config, input_size: int) -> str:
    """How training crops images to that size: one of timm's modes, or `padded`: small ones at their own scale, where nothing else is asked for."""
    is_usual = cfg.train_crop_mode is None and cfg.scale is None and cfg.ratio is None
    return "padded" if is_usual and input_size <= SMALL_INPUT else cfg.train_crop_mode or "rrc"


def train_transform(cfg: Config, input_size: int | None = None) -> Transform:
    """The recipe's augmentation: image -> (3, input_size, input_size) normalised float32, at --input-size or another. InputError where --aa is no policy."""
    input_size, values = input_size or cfg.input_size, statistics(cfg)
    scale, ratio = crop_ranges(cfg)
    try:
        spatial, color, final = create_transform(
            input_size,
            is_training=True,
            train_crop_mode=cfg.train_crop_mode,
            scale=scale,
            ratio=ratio,
            hflip=cfg.hflip,
            vflip=cfg.vflip,
            color_jitter=cfg.color_jitter,
            auto_augment="3a" if cfg.three_augment else cfg.aa,
            interpolation=cfg.train_interpolation,
            mean=values.mean,
            std=values.std,
            re_prob=0.0 if cfg.three_augment else cfg.reprob,
            re_mode=cfg.remode,
            re_count=cfg.recount,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"--aa {cfg.aa} is no policy timm knows ({error}); write for example rand-m9-mstd0.5-inc1, or none") from error
    if crop_kind(cfg, input_size) == "padded":
        to_size = transforms.Resize(input_size, interpolation=transforms.InterpolationMode.BICUBIC)
        spatial.transforms[:1] = [to_size, transforms.RandomCrop(input_size, padding=4)]
    _guard_posterize(color)
    if cfg.loader == "fast":
        spatial.transforms, color.transforms = ([_fast(part) for part in some.transforms] for some in (spatial, color))
    erasing = next((part for part in final.transforms if isinstance(part, RandomErasing)), None)
    if cfg.aug_splits > 1:
        return Transform(spatial, erasing, cfg.loader == "fast", values, color, cfg.aug_splits, erases_first=not cfg.resplit)
    return Transform(transforms.Compose([*spatial.transforms, *color.transforms]), erasing, cfg.loader == "fast", values)


def train_transforms(cfg: Config) -> dict[int, Transform]:
    """The recipe's augmentation by the epoch from which on it is that, at the sizes of --image-size-schedule."""
    return {epoch: train_transform(cfg, size) for epoch, size in cfg.size_starts.items()}


FAST_KINDS = {
    RandomResizedCropAndInterpolation: pixels.RandomResizedCrop,
    ResizeKeepRatio: pixels.ResizeKeepRatio,
    _KeepRatio: pixels.ResizeKeepRatio,
    CenterCropOrPad: pixels.CenterCropOrPad,
    RandomCropOrPad: pixels.RandomCropOrPad,
    transforms.Resize: pixels.Resize,
    transforms.RandomHorizontalFlip: pixels.RandomHorizontalFlip,
    transforms.RandomVerticalFlip: pixels.RandomVerticalFlip,
    transforms.ColorJitter: pixels.ColorJitter,
    transforms.RandomCrop: pixels.RandomCrop,
    RandAugment: RandAugment,
    AutoAugment: AutoAugment,
    AugMixAugment: pixels.AugMix,
}


def _fast(part):
    """`part` with the same settings and draws, for images as `pixels` has them."""
    if type(part) not in FAST_KINDS:
        return kernels.ThroughPil(part)
    part.__class__ = FAST_KINDS[type(part)]
    if isinstance(part, RandAugment | AutoAugment | AugMixAugment):
        for op in _augment_ops([part]):
            op.aug_fn = kernels.kernel_for(op.name, op.aug_fn)
    if isinstance(part, RandAugment | AugMixAugment):
        part.ops = np.array(part.ops, dtype=object)  # numpy would convert the list anew at each draw
    return part


def _guard_posterize(transform: transforms.Compose) -> None:
    """Make timm's posterize accept 0 bits, which its RandAugment draws once in 700 images and Pillow 13 refuses."""
    for op in _augment_ops(transform.transforms):
        if op.name.startswith("Posterize"):
            op.aug_fn = _Posterize(op.aug_fn)


def _augment_ops(parts: list) -> list[AugmentOp]:
    """All ops of the RandAugment, AutoAugment or AugMix among the parts of a transform."""
    ops = []
    for part in parts:
        ops += list(getattr(part, "ops", []))
        ops += [op for policy in getattr(part, "policy", []) for op in policy]
    return ops


@dataclass(frozen=True)
class _Posterize:
    """timm's posterize, giving a black image for 0 bits as Pillow did before version 13."""

    aug_fn: Callable

    def __call__(self, image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
        if bits_to_keep < 1:
            return Image.new(image.mode, image.size)
        return self.aug_fn(image, bits_to_keep, **kwargs)


def describe(key: Key, *, plan: Plan, transform: Transform, image: AnyImage) -> dict:
    """What the training transform draws for `key`, without changing what it draws; the same with either loader.

    resized: (height, width) to which the whole image is resized before it is cropped, where it is (rkrc, rkrr); box: (top, left, height, width) of
    the crop, in pixels of `image` (of its padded form for inputs up to 32 pixels, else of its resized one; negative where it reaches beyond);
    flip, vflip: whether mirrored; ops: (name, arguments) of each op of RandAugment, AutoAugment or AugMix in order; erased: (top, left, height, width)
    of each erased box, in pixels of the input; splits: ops and erased of each further view of --aug-splits."""
    drawn = {"resized": None, "box": None, "flip": False, "vflip": False, "ops": [], "erased": [], "splits": []}
    recorded = copy.deepcopy(transform)
    ops = []
    for op in _augment_ops([*recorded.parts.transforms, *(recorded.further.transforms if recorded.further is not None else [])]):
        op.aug_fn = _Recorder(op.name, op.aug_fn, ops)
    recorded.parts.transforms = [_Peeking(part, drawn) for part in recorded.parts.transforms]
    with seeded(plan.sample_words(key.epoch, key.sample, key.repeat)):
        for i, (_, erased) in enumerate(recorded.draw_splits(image)):
            split = {"ops": ops.copy(), "erased": [box for box, _ in erased]}
            ops.clear()
            drawn |= {"splits": [*drawn["splits"], split]} if i else split
    return drawn


@dataclass(frozen=True)
class _Peeking:
    """A part of a transform that notes in `drawn` what it is about to draw."""

    part: Callable
    drawn: dict

    def __call__(self, image: AnyImage) -> AnyImage:
        with restored_generators():
            self.drawn.update(_peek(self.part, image))
        return self.part(image)


def _peek(part, image) -> dict:
    """What one part of a transform is about to draw; the ops record themselves."""
    if isinstance(part, RandomResizedCropAndInterpolation):
        return {"box": tuple(part.get_params(image, part.scale, part.ratio))}
    if isinstance(part, ResizeKeepRatio):
        settings = (part.random_scale_prob, part.random_scale_range, part.random_scale_area, part.random_aspect_prob, part.random_aspect_range)
        return {"resized": tuple(part.get_params(pixels.stand_in(image), part.size, part.longest, *settings))}
    if isinstance(part, CenterCropOrPad):
        sides = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
        return {"box": (*pixels.centred(sides, part.size), *part.size)}
    if isinstance(part, RandomCropOrPad):
        return {"box": (*part.get_params(pixels.stand_in(image), part.size), *part.size)}
    if isinstance(part, transforms.RandomCrop):
        image = pixels.to_tensor(image) if isinstance(image, np.ndarray) else image
        return {"box": tuple(part.get_params(transforms.functional.pad(image, part.padding), part.size))}
    if isinstance(part, transforms.RandomHorizontalFlip):
        return {"flip": bool(torch.rand(1) < part.p)}
    if isinstance(part, transforms.RandomVerticalFlip):
        return {"vflip": bool(torch.rand(1) < part.p)}
    return {}


def _draw_erased(erasing: RandomErasing, image: np.ndarray) -> list[tuple[tuple[int, int, int, int], Tensor]]:
    """Boxes (top, left, height, width) that `erasing` draws for the image (H, W, 3), each with its fill (3, height, width)."""
    canvas = _Canvas(*image.shape)
    erasing(canvas)
    return canvas.erased


@dataclass(frozen=True)
class _Recorder:
    """An op that notes its name and arguments before it runs."""

    name: str
    aug_fn: Callable
    calls: list

    def __call__(self, image: Image.Image, *args, **kwargs) -> Image.Image:
        self.calls.append((self.name, args))
        return self.aug_fn(image, *args, **kwargs)


class _Canvas:
    """Stands in for a normalised image tensor (C, H, W) and notes which boxes are assigned to, and what."""

    dtype = torch.float32

    def __init__(self, height: int, width: int, num_channels: int):
        self._size = num_channels, height, width
        self.erased = []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, index: tuple[slice, slice, slice], fill: Tensor) -> None:
        _, rows, columns = index
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.erased.append(((rows.start, columns.start, height, width), fill.expand(-1, height, width)))


@dataclass(frozen=True)
class MixDraw:
    """What a group of `n` images was dealt: each image's share `lam` of itself, and the box its partner's pixels fill.

    `lam` (n,) is what remains after clipping the box; boxes (n, 4) hold top, bottom, left, right, and are empty for mixup."""

    lam: np.ndarray
    is_cutmix: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Mixer:
    """Mixup and CutMix of timm >= 1.0.29, draw for draw, with the generator as an argument.

    Arguments as timm's `Mixup`: alphas of the beta distributions (0: off), box sides, probabilities, mode, label smoothing."""

    mixup: float
    cutmix: float
    cutmix_minmax: tuple[float, float] | None
    prob: float
    switch_prob: float
    mode: str
    smoothing: float
    num_classes: int

    def draw(self, rng: np.random.RandomState, group_size: int, height: int, width: int) -> MixDraw:
        """The draw of one group; timm's order of calls to `rng`."""
        num_draws = {"batch": None, "pair": group_size // 2, "elem": group_size}[self.mode]
        lam, is_cutmix = self._draw_lam(rng) if num_draws is None else self._draw_lams(rng, num_draws)
        lam, is_cutmix = np.atleast_1d(lam).copy(), np.atleast_1d(is_cutmix)
        boxes = np.zeros((len(lam), 4), dtype=np.int64)
        for i in np.flatnonzero(is_cutmix & (lam != 1)):
            boxes[i] = self._draw_box(rng, lam[i], height, width)
            top, bottom, left, right = boxes[i]
            lam[i] = 1.0 - (bottom - top) * (right - left) / float(height * width)
        if num_draws is None:
            return MixDraw(np.repeat(lam, group_size), np.repeat(is_cutmix, group_size), np.repeat(boxes, group_size, axis=0))
        if self.mode == "pair":
            return MixDraw(np.concatenate((lam, lam[::-1])), np.concatenate((is_cutmix, is_cutmix[::-1])), np.concatenate((boxes, boxes[::-1])))
        return MixDraw(lam, is_cutmix, boxes)

    def _alphas(self) -> tuple[float, float]:
        return self.mixup, 1.0 if self.cutmix_minmax is not None else self.cutmix

    def _draw_lam(self, rng: np.random.RandomState) -> tuple[float, bool]:
        mixup, cutmix = self._alphas()
        if rng.rand() >= self.prob:
            return 1.0, False
        is_cutmix = bool(rng.rand() < self.switch_prob) if mixup > 0 and cutmix > 0 else cutmix > 0
        alpha = cutmix if is_cutmix else mixup
        return float(rng.beta(alpha, alpha)), is_cutmix

    def _draw_lams(self, rng: np.random.RandomState, count: int) -> tuple[np.ndarray, np.ndarray]:
        mixup, cutmix = self._alphas()
        if mixup > 0 and cutmix > 0:
            is_cutmix = rng.rand(count) < self.switch_prob
            lam = np.where(is_cutmix, rng.beta(cutmix, cutmix, size=count), rng.beta(mixup, mixup, size=count))
        else:
            alpha = cutmix if cutmix > 0 else mixup
            is_cutmix = np.full(count, cutmix > 0)
            lam = rng.beta(alpha, alpha, size=count)
        return np.where(rng.rand(count) < self.prob, lam.astype(np.float32), np.ones(count, dtype=np.float32)), is_cutmix

    def _draw_box(self, rng: np.random.RandomState, lam: float, height: int, width: int) -> tuple[int, int, int, int]:
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            cut_h, cut_w = (rng.randint(int(side * low), max(int(side * high), int(side * low) + 1)) for side in (height, width))
            top, left = rng.randint(0, height - cut_h + 1), rng.randint(0, width - cut_w + 1)
            return top, top + cut_h, left, left + cut_w
        ratio = np.sqrt(1 - lam)
        cut_h, cut_w = int(height * ratio), int(width * ratio)
        centre_y, centre_x = rng.randint(0, height), rng.randint(0, width)
        rows = np.clip((centre_y - cut_h // 2, centre_y + (cut_h + 1) // 2), 0, height)
        columns = np.clip((centre_x - cut_w // 2, centre_x + (cut_w + 1) // 2), 0, width)
        return (*rows, *columns)

    def mix_images(self, images: Tensor, draw: MixDraw) -> None:
        """Mix images (n, 3, H, W) with their mirror images in the batch, in place, as timm does."""
        how = list(zip(draw.lam.tolist(), draw.is_cutmix, draw.boxes.tolist(), strict=True))
        if self.mode == "batch" and images.device.type != "cpu":
            _mix(images, _share(images, *how[0]).flip(0), *how[0])
            return
        for i in range((len(images) + 1) // 2):  # a CPU's caches hold two images
            pair = {i, len(images) - 1 - i}
            shares = [(images[j], _share(images[-1 - j], *how[j])) for j in pair]
            for j, (own, share) in zip(pair, shares, strict=True):
                _mix(own, share, *how[j])

    def smoothed(self, targets: Tensor) -> Tensor:
        """Class indices (n,) as smoothed distributions (n, num_classes); float32."""
        off = self.smoothing / self.num_classes
        own = torch.full((len(targets), self.num_classes), off, device=targets.device)
        return own.scatter_(1, targets.view(-1, 1), 1.0 - self.smoothing + off)

    def mix_targets(self, targets: Tensor, draw: MixDraw) -> Tensor:
        """Class indices (n,) as smoothed distributions (n, num_classes), mixed like the images; float32."""
        own = self.smoothed(targets)
        lam = sent(torch.as_tensor(draw.lam, dtype=torch.float32), targets.device).view(-1, 1)
        return own * lam + own.flip(0) * (1.0 - lam)

    def __call__(self, images: Tensor, targets: Tensor, rng: np.random.RandomState) -> tuple[Tensor, Tensor]:
        """One whole group, drawn from `rng`: images (n, 3, H, W), class indices (n,) -> the same images, mixed, distributions (n, num_classes)."""
        draw = self.draw(rng, len(images), *images.shape[-2:])
        self.mix_images(images, draw)
        return images, self.mix_targets(targets, draw)


def _share(partner: Tensor, lam: float, is_cutmix: bool, box: list[int]) -> Tensor:
    """What an image gets of its partner."""
    if is_cutmix or lam == 1:
        top, bottom, left, right = box
        return partner[..., top:bottom, left:right].clone()
    return partner * (1.0 - lam)


def _mix(own: Tensor, share: Tensor, lam: float, is_cutmix: bool, box: list[int]) -> None:
    if is_cutmix or lam == 1:
        top, bottom, left, right = box
        own[..., top:bottom, left:right] = share
    else:
        own.mul_(lam).add_(share)


@dataclass(frozen=True)
class KeyedMixing:
    """Mixes micro-batches of a keyed run: every group, or part of one, by its group's own draw. From `off_epoch` on, but for 0, none."""

    mixer: Mixer
    plan: Plan
    off_epoch: int = 0

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and class indices (B,) at `positions` (B,) -> the same images, mixed in place, distributions (B, num_classes)."""
        if 0 < self.off_epoch <= epoch:
            return images, self.mixer.smoothed(targets)
        _, members = self.plan.groups_and_members(positions.numpy())
        mixed_targets = []
        for group, start, stop in self.plan.group_parts(positions.numpy()):
            rng = self.plan.group_generator(epoch, group)
            whole = self.mixer.draw(rng, self.plan.group_size, *images.shape[-2:])
            part = members[start:stop]
            draw = MixDraw(whole.lam[part], whole.is_cutmix[part], whole.boxes[part])
            self.mixer.mix_images(images[start:stop], draw)
            mixed_targets.append(self.mixer.mix_targets(targets[start:stop], draw))
        return images, torch.cat(mixed_targets)


def no_mixing(images: Tensor, targets: Tensor, epoch: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What training uses where mixup and CutMix are off: everything stays as it is."""
    return images, targets


def build_mixing(cfg: Config, plan: Plan, num_classes: int):
    """The function that mixes a micro-batch: `(images, targets, epoch, positions) -> (images, targets)`."""
    if not cfg.is_mixing:
        return no_mixing
    return KeyedMixing(build_mixer(cfg, num_classes), plan, cfg.mixup_off_epoch)


def build_mixer(cfg: Config, num_classes: int) -> Mixer:
    """Mixup and CutMix as the recipe sets them."""
    return Mixer(
        mixup=cfg.mixup,
        cutmix=cfg.cutmix,
        cutmix_minmax=cfg.cutmix_minmax,
        prob=cfg.mixup_prob,
        switch_prob=cfg.mixup_switch_prob,
        mode=cfg.mixup_mode,
        smoothing=cfg.smoothing,
        num_classes=num_classes,
    )
