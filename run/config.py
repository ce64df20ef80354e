"""Settings, declared once: default, YAML key, `--flag` and help text come from one field. What every kind of training shares, and classification's.

Nothing here imports torch, so that `python main.py --help` answers at once.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import ClassVar

from run.errors import InputError
from run.manifest import LABELS_MANIFEST, read_manifest
from run.settings import Settings, refuse, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every kind of training has. Its own extend them, among others with `model`, `batch_size`, `recipe_batch`, `epochs`, `amp`,
    `clip_grad`, `data_path` and `report`.

    `command`: what a run with such settings is started by."""

    command: ClassVar[str]

    # run
    output_dir: str | None = setting(None, "folder of log and checkpoints (default: checkpoints/<model>/<time>)")
    overwrite: bool = setting(False, "start afresh in a folder that holds a run, deleting that run")
    resume: str | None = setting(None, "checkpoint to continue or, with --eval, to evaluate: file, URL, hf-hub:name, or auto (newest sound one in its folder)")
    save_freq: int = setting(1, "epochs between numbered checkpoints", at_least=1)
    checkpoint_hist: int = setting(3, "numbered checkpoints that are kept, the last ones", at_least=1)
    checkpoint_steps: int | None = setting(None, "optimiser steps between checkpoints inside an epoch (default: none inside)", at_least=1)
    checkpoint_minutes: float | None = setting(None, "minutes between checkpoints inside an epoch (default: none inside)", above=0)
    allow_config_change: bool = setting(False, "resume although the recipe differs from the checkpoint's")
    on_full_disk: str = setting("stop", "what to do where the disk is full: stop, or wait for room", choices=("stop", "wait"))
    full_disk_minutes: float = setting(30.0, "minutes to wait for room", above=0)
    on_nonfinite: str = setting(
        "skip",
        "what to do about a step whose loss or gradients are not finite, besides leaving it out: skip: train on, but after --max-skipped-steps in a row go "
        "back to the newest sound checkpoint, once, then stop; rollback: go back at the first one, and stop if that does not get past it; stop: stop",
        choices=("skip", "stop", "rollback"),
    )
    max_skipped_steps: int = setting(20, "steps in a row that may be left out because they are not finite", at_least=1)
    seed: int = setting(0, "seed of initialisation and dropout", at_least=0, at_most=2**63 - 1)
    device: str = setting("auto", "cuda, cuda:N or cpu; auto: a GPU where there is one")
    tracker: str | None = setting(
        None,
        "where the numbers go besides log.txt and TensorBoard, by a package of that name: wandb (offline unless WANDB_MODE is set) or trackio",
        choices=("none", "wandb", "trackio"),
    )
    project: str | None = setting(None, "the tracker's project; without --tracker, one of Weights & Biases")
    grad_accum_steps: int = setting(1, "micro-batches per optimiser step", at_least=1)
    eval: bool = setting(False, "evaluate the given weights and exit")
    # optimiser
    opt: str = setting("adamw", "optimiser, by timm's name")
    opt_eps: float | None = setting(1e-8, "its epsilon", at_least=0)
    opt_betas: tuple[float, ...] | None = setting(None, "its betas (default: the optimiser's)", nargs="+")
    momentum: float = setting(0.9, "its momentum, where it has one", at_least=0)
    opt_kwargs: dict | None = setting(None, "its further arguments, by timm's or torch's names", nargs="+")
    clip_mode: str = setting("agc", "how gradients are clipped: by norm, by value, or adaptively", choices=("norm", "value", "agc"))
    # loading
    data_seed: int = setting(0, "seed of order, augmentation and mixing", at_least=0, at_most=2**63 - 1)
    num_workers: int | None = setting(None, "loader processes per training process (default: as many as there are cores for, at most 10)", at_least=0)
    pin_mem: bool = setting(True, "page-locked batches, for faster copies to a GPU")
    max_bad_images: int = setting(
        100,
        "damaged training images (files) that a run bears, another, of its class or shape, standing in for each; beyond, and at the first where 0, it stops",
        at_least=0,
    )
    skip_bad_images: bool = setting(False, "evaluate without the validation images that are damaged")

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of one run of classification, as given: derived values (scaled learning rate, run folder, device) are computed where needed.

    `GROUPS` orders them for `--help`."""

    command: ClassVar[str] = "python main.py"

    # network
    model: str = setting("recnext_m1", "architecture: a name in timm's registry, which includes ours")
    model_kwargs: dict | None = setting(None, "further arguments of the architecture", nargs="+")
    batch_size: int = setting(256, "images per process and micro-batch", at_least=1)
    recipe_batch: int = setting(2048, "global batch the recipe was made for; another is warned of", at_least=1)
    epochs: int = setting(300, "epochs to train; with --lr-cycle-limit above 1 those of the first cycle", at_least=0)
    start_epoch: int = setting(0, "first epoch, where no checkpoint says so", at_least=0)
    input_size: int = setting(224, "side of the square input, pixels; with --eval also several, with commas, for a table of accuracies", at_least=8)
    drop: float | None = setting(None, "dropout before the classifier (default: the variant's)", at_least=0, at_most=0.999)
    drop_path: float | None = setting(None, "stochastic depth rate (default: the variant's)", at_least=0, at_most=0.999)
    amp: str = setting("auto", "mixed precision; auto: bf16 on a GPU that has it, else none", choices=("auto", "bf16", "fp16", "none"), nargs="?", const="auto")
    compile: bool = setting(False, "run networks through torch.compile: takes some minutes before the first step, then each is faster")
    compile_mode: str = setting("default", "torch.compile's mode", choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))
    grad_checkpointing: bool = setting(
        False, "compute activations again in the backward pass instead of keeping them: less memory, more time, the same numbers"
    )
    sync_bn: bool = setting(False, "take BatchNorm's statistics over the images of all processes")
    memory_format: str = setting("auto", "layout of activations; auto: channels_last", choices=("auto", "nchw", "channels_last"))
    # weights
    dry_run: bool = setting(False, "look at all that the run needs, tell every fault, and what a step and the run will cost, and exit; leaves nothing behind")
    use_ema: bool = setting(False, "evaluate a checkpoint's EMA weights instead of the raw ones")
    tta: str = setting(
        "none", "with --eval: hflip: the mean of what the network says of an image and of its mirror image, in probabilities", choices=("none", "hflip")
    )
    report: str | None = setting(
        None, "with --eval: page of accuracies, calibration and mistakes (.html), all that was measured (.json), or per-class accuracy and confusions as CSV"
    )
    pretrained: bool = setting(False, "start from the model's published weights: base variant without, dist variant with distillation")
    # robustness
    inc_path: str | None = setting(None, "with --eval: folder of ImageNet-C or of what tools/corrupt_images.py writes, <corruption>/<1..5>/<class>/")
    ina_path: str | None = setting(None, "with --eval: folder of ImageNet-A, a folder per class named by its WordNet id")
    inr_path: str | None = setting(None, "with --eval: folder of ImageNet-R, laid out like ImageNet-A")
    insk_path: str | None = setting(None, "with --eval: folder of ImageNet-Sketch, laid out like ImageNet-A")
    inv2_path: str | None = setting(None, "with --eval: folder of ImageNet-V2, of one variant or of several in folders of their own")
    real_labels: str | None = setting(
        None, "with --eval: measure the validation images against the labels of ReaL too: timm's, or those of a JSON file", nargs="?", const="timm"
    )
    fgsm_test: bool = setting(False, "with --eval: measure the validation images after FGSM's step of 1/255 too")
    pgd_test: bool = setting(False, "with --eval: measure the validation images after five steps of PGD, within 1/255, too")
    # EMA
    model_ema: bool = setting(True, "keep an exponential moving average of the weights and evaluate it each epoch")
    model_ema_decay: float = setting(0.99996, "its decay per optimiser step", at_least=0, at_most=1)
    model_ema_warmup: bool = setting(False, "begin with a short memory: after n optimiser steps the decay is at most 1 - n^(-2/3)")
    model_ema_force_cpu: bool = setting(False, "keep it in main memory")
    # rates
    weight_decay: float = setting(0.025, "decay of weights; biases and one-dimensional parameters are spared", at_least=0)
    clip_grad: float | None = setting(0.02, "gradient clipping bound, over all parameters; none: off", above=0)
    sched: str = setting("cosine", "learning-rate schedule, by timm's name", choices=("cosine", "tanh", "step", "multistep", "plateau", "poly"))
    lr: float = setting(1e-3, "peak learning rate per 512 images of the global batch", at_least=0)
    lr_base: float | None = setting(None, "instead of --lr: peak learning rate at a global batch of --lr-base-size images", at_least=0)
    lr_base_size: int = setting(256, "that global batch", at_least=1)
    lr_base_scale: str | None = setting(
        None,
        "how --lr-base grows with the global batch (default: sqrt where the optimiser's name has ada or lamb in it, else linear)",
        choices=("linear", "sqrt"),
    )
    layer_decay: float | None = setting(
        None, "factor on the learning rate from each layer to the one before it, the classifier's being the highest; layers are timm's", above=0, at_most=1
    )
    sched_on_updates: bool = setting(False, "move along the schedule at every optimiser step instead of every epoch")
    lr_cycle_limit: int = setting(1, "cosine, tanh, poly: cycles of the schedule, the first of which takes --epochs", at_least=1)
    lr_cycle_mul: float = setting(1.0, "length of a cycle, relative to the one before", above=0)
    lr_cycle_decay: float = setting(0.5, "peak learning rate of a cycle, relative to the one before", above=0)
    lr_noise: tuple[float, ...] | None = setting(None, "one or two fractions of the run between which the learning rate is noisy", nargs="+")
    lr_noise_pct: float = setting(0.67, "limit of that noise, as a fraction", at_least=0)
    lr_noise_std: float = setting(1.0, "standard deviation of that noise", at_least=0)
    warmup_lr: float = setting(1e-6, "learning rate at the start of the warm-up, not scaled", at_least=0)
    min_lr: float = setting(1e-5, "lowest learning rate, not scaled", at_least=0)
    warmup_epochs: int = setting(5, "epochs of linear warm-up", at_least=0)
    warmup_steps: int | None = setting(None, "with --sched-on-updates: optimiser steps of linear warm-up, instead of --warmup-epochs", at_least=0)
    cooldown_epochs: int = setting(10, "plateau: epochs without a further drop after one", at_least=0)
    decay_epochs: int = setting(30, "step, multistep: epochs between drops", at_least=1)
    patience_epochs: int = setting(10, "plateau: epochs without progress before a drop", at_least=0)
    decay_rate: float = setting(0.1, "factor of a drop", above=0)
    # augmentation
    three_augment: bool = setting(False, "3-Augment instead of RandAugment and erasing", alias="ThreeAugment")
    color_jitter: float = setting(0.4, "brightness, contrast and saturation jitter, where --aa is none or with --ThreeAugment", at_least=0)
    aa: str | None = setting("rand-m9-mstd0.5-inc1", "RandAugment, AutoAugment or AugMix policy in timm's notation (augmix-m5-w4-d2), or none")
    train_crop_mode: str | None = setting(
        None,
        "crops of training: rrc: any part, resized to a square; rkrc, rkrr: the short side resized, then the centre or any square (default: rrc; up to 32 "
        "pixels the image padded by 4, then any square)",
        choices=("rrc", "rkrc", "rkrr"),
    )
    scale: tuple[float, ...] | None = setting(None, "least and greatest part of the area in such a crop (default: 0.08 1; 0.8 1 for rkrc, rkrr)", nargs="+")
    ratio: tuple[float, ...] | None = setting(
        None, "least and greatest width / height of such a crop, or change of the image's (default: 3/4 4/3; 0.9 1/0.9 for rkrc, rkrr)", nargs="+"
    )
    hflip: float = setting(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    vflip: float = setting(0.0, "probability of a vertical flip", at_least=0, at_most=1)
    image_size_schedule: str | None = setting(
        None, "progressive resizing: sizes of training images, each with the part of the epochs after which it begins, as 160:0,192:0.4,224:0.8"
    )
    mean: tuple[float, ...] | None = setting(None, "mean of pixels from 0 to 1, per channel, that is taken from them (default: ImageNet's)", nargs="+")
    std: tuple[float, ...] | None = setting(None, "their standard deviation, which they are divided by (default: ImageNet's)", nargs="+")
    aug_splits: int = setting(0, "views of each image in a batch, of one crop: the first without --aa, each further one with its own; 0: one view", at_least=0)
    resplit: bool = setting(False, "random erasing spares the first of the --aug-splits")
    jsd_loss: bool = setting(False, "Jensen-Shannon divergence between the --aug-splits, and cross entropy on the first")
    train_interpolation: str = setting("bicubic", "resampling of training images", choices=("bicubic", "bilinear", "random"))
    repeated_aug: bool = setting(True, "three views of a third of the images per epoch")
    reprob: float = setting(0.25, "probability of random erasing", at_least=0, at_most=1)
    remode: str = setting("pixel", "what fills an erased box: noise per pixel, one random colour, or the mean", choices=("pixel", "rand", "const"))
    recount: int = setting(1, "erased boxes per image", at_least=1)
    smoothing: float = setting(0.1, "label smoothing", at_least=0, at_most=0.999)
    # loss
    bce_loss: bool = setting(False, "binary cross entropy of each class instead of cross entropy over the classes")
    bce_target_thresh: float | None = setting(None, "with --bce-loss: targets above this are 1, others 0", at_least=0, at_most=1)
    bce_sum: bool = setting(False, "with --bce-loss: sum over the classes instead of their mean")
    # mixup
    mixup: float = setting(0.8, "mixup alpha; 0: off", at_least=0)
    cutmix: float = setting(1.0, "CutMix alpha; 0: off", at_least=0)
    cutmix_minmax: tuple[float, ...] | None = setting(None, "CutMix box sides between these two fractions, instead of by alpha", nargs="+")
    mixup_prob: float = setting(1.0, "probability that a group is mixed at all", at_least=0, at_most=1)
    mixup_switch_prob: float = setting(0.5, "probability of CutMix where both are on", at_least=0, at_most=1)
    mixup_mode: str = setting("batch", "one draw per mix group, per pair, or per image", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = setting(0, "epoch from which on nothing is mixed; 0: never", at_least=0)
    mix_group_size: int = setting(256, "images that share one draw of mixup or CutMix", at_least=2)
    mix_lanes: int = setting(8, "mix groups that are filled in turn", at_least=1)
    # distillation
    distillation_type: str | None = setting(None, "teacher's term of the loss (default: hard; none when fine-tuning)", choices=("none", "soft", "hard"))
    distillation_alpha: float = setting(0.5, "its share of the loss", at_least=0, at_most=1)
    distillation_tau: float = setting(1.0, "temperature of soft distillation", above=0)
    teacher_model: str = setting("regnety_160", "teacher, a name in timm's registry")
    teacher_min_acc1: float | None = setting(
        None, "top-1 %% the teacher must reach on validation images before training; 0: no check (default: chance + 3 standard errors)", at_least=0, at_most=100
    )
    teacher_path: str | None = setting(
        "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth", "its weights: file, URL or hf-hub:name; none: timm's own"
    )
    teacher_labels: str | None = setting(None, "folder in which the teacher's labels are stored, for this run and others of the same data and augmentation")
    teacher_labels_mode: str = setting(
        "auto",
        "read: stored labels alone, the teacher is never built; auto: the teacher where labels are missing, which are then stored; write: the teacher "
        "everywhere; verify: auto, and one group in 16 compared with the teacher; off: as without a folder",
        choices=("off", "auto", "read", "write", "verify"),
    )
    teacher_topk: int | None = setting(
        None,
        "soft distillation from the K highest of the teacher's log-probabilities and the sum of the others: not exact, but small enough to store",
        at_least=1,
    )
    # fine-tuning
    finetune: str | None = setting(None, "weights to start from: file, URL or hf-hub:name; heads of another shape are dropped")
    set_bn_eval: bool = setting(False, "train with BatchNorm's statistics frozen")
    freeze: tuple[str, ...] | None = setting(None, "modules or parameters, by name, that do not learn; BatchNorm's statistics in them stay too", nargs="+")
    # data
    data_set: str = setting(
        "IMNET",
        "IMNET: folders or tars of class folders; DIGITS: scikit-learn's handwritten digits",
        choices=("IMNET", "CIFAR", "INAT", "INAT19", "FLOWERS", "DIGITS"),
    )
    data_path: str | None = setting(
        None, "folder of train/ and val/, or of the data set's files; also a tar or zip, a URL that fsspec knows (s3://, gs://, hf://), or several, with commas"
    )
    data_format: str = setting(
        "auto",
        "what holds the images at --data-path: class folders, Kaggle's ILSVRC, packed files, tars, zips, WebDataset shards, parquet files, or lists of "
        "path,class; auto: the first of these that is there",
        choices=("auto", "folder", "kaggle", "packed", "tar", "zip", "shards", "parquet", "list"),
    )
    data_cache: str | None = setting(None, "folder of indexes and of blocks fetched from stores, for all processes of a node (default: ~/.cache/understudy)")
    data_cache_gb: float = setting(50.0, "GiB that fetched blocks may take there; the oldest go first", above=0)
    class_map: str | None = setting(
        None, "file of class names by number, a line each or JSON: names the classes that data number, and numbers those that data name"
    )
    classes: str | None = setting(None, "file of class names, a line each: train and evaluate on these classes of the data alone")
    train_fraction: float = setting(1.0, "part of each class's training images to train on, the same ones for one --data-seed", above=0, at_most=1)
    val_split: float | None = setting(None, "fraction of train/ to hold out where there is no val/", above=0, at_most=0.9)
    inat_category: str = setting(
        "name", "what counts as a class in iNaturalist", choices=("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
    )
    crop_pct: float | None = setting(None, "part of the resized short side that evaluation crops (default 0.875; 1 up to 32 pixels)", above=0, at_most=1)
    crop_mode: str = setting(
        "center",
        "how evaluation crops: center: the short side resized, the centre cut out; squash: both sides resized; border: the long side resized, the rest mean",
        choices=("center", "squash", "border"),
    )
    interpolation: str = setting("bicubic", "resampling of evaluation's images", choices=("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"))
    exif_transpose: bool = setting(False, "turn photographs as their EXIF orientation says, in training and evaluation; published runs ignore it")
    loader: str = setting(
        "fast", "decoder, resizing and RandAugment kernels: OpenCV, simplejpeg and torch, or Pillow; the same draws", choices=("fast", "reference")
    )

    @property
    def distillation(self) -> str:
        """The distillation type in force: `none`, `soft` or `hard`."""
        return self.distillation_type or ("none" if self.finetune else "hard")

    @property
    def labels_mode(self) -> str:
        """What the run does with stored labels of its teacher; `off` where no folder is given."""
        return self.teacher_labels_mode if self.teacher_labels else "off"

    @property
    def set_flags(self) -> list[str]:
        """The flags of the sets of images that are to be evaluated besides the validation images."""
        paths = {"--inc-path": self.inc_path, "--ina-path": self.ina_path, "--inr-path": self.inr_path, "--insk-path": self.insk_path}
        return [flag for flag, path in {**paths, "--inv2-path": self.inv2_path}.items() if path]

    @property
    def robustness_flags(self) -> list[str]:
        """Those, and the flags of what else is to be measured on the validation images."""
        others = {"--real-labels": self.real_labels, "--fgsm-test": self.fgsm_test, "--pgd-test": self.pgd_test}
        return self.set_flags + [flag for flag, is_on in others.items() if is_on]

    @property
    def has_validation(self) -> bool:
        """Whether there are validation images: an evaluation of other sets needs none."""
        return not (self.eval and self.set_flags and self.data_set != "DIGITS" and not self.data_path)

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run: of all cycles of the schedule together."""
        return epochs_of_cycles(self.epochs, self.lr_cycle_limit, self.lr_cycle_mul)

    @property
    def keeps_statistics(self) -> tuple[str, ...]:
        """Names of the modules in which BatchNorm's statistics stay as they are; "" is the whole network."""
        return ("",) if self.set_bn_eval else self.freeze or ()

    @property
    def size_starts(self) -> dict[int, int]:
        """Size of training images by the epoch from which on they have it; the first is 0. InputError where --image-size-schedule says none."""
        if self.image_size_schedule is None:
            return {0: self.input_size}
        starts = {round(share * self.num_epochs): size for size, share in schedule_pairs(self.image_size_schedule)}
        return {epoch: size for epoch, size in starts.items() if epoch < max(1, self.num_epochs)}

    @property
    def train_sizes(self) -> list[int]:
        """The sizes that training images have, each once, in their order."""
        return list(dict.fromkeys(self.size_starts.values()))

    @property
    def unused_sizes(self) -> list[int]:
        """Sizes that --image-size-schedule names and no epoch has: the run is too short."""
        return [size for size, _ in schedule_pairs(self.image_size_schedule or "8:0") if self.image_size_schedule and size not in self.train_sizes]

    @property
    def sized_flags(self) -> list[tuple[str, int]]:
        """Every size of images in the run, after the flag that says so."""
        return [
            (f"--input-size {self.input_size}", self.input_size),
            *((f"--image-size-schedule {self.image_size_schedule}, {size} pixels,", size) for size in self.train_sizes if size != self.input_size),
        ]

    @property
    def is_mixing(self) -> bool:
        """Whether mixup or CutMix is on, and so targets are distributions."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


RUN_GROUPS = {"run": "output_dir", "optimiser": "opt", "loading": "data_seed"}  # first field of each section of --help
GROUPS = RUN_GROUPS | {
    "network": "model",
    "weights and their evaluation": "use_ema",
    "robustness": "inc_path",
    "EMA": "model_ema",
    "rates and schedule": "weight_decay",
    "augmentation": "three_augment",
    "loss": "bce_loss",
    "mixup": "mixup",
    "distillation": "distillation_type",
    "fine-tuning": "finetune",
    "data": "data_set",
}
RESERVED_OF_OPTIMISER = {"params", "lr", "weight_decay", "momentum", "eps", "betas", "layer_decay"}
CYCLIC = ("cosine", "tanh", "poly")  # schedules
RESERVED = {"num_classes", "in_chans", "features_only", "distillation", "drop_rate", "drop_path_rate", "pretrained", "checkpoint_path"}
FAST_INTERPOLATIONS = ("bicubic", "bilinear")  # those of --interpolation that the fast loader has
DATA_FILES = {
    "IMNET": "train/ and val/",
    "FLOWERS": "train/ and test/",
    "CIFAR": "cifar-100-python/",
    "INAT": "train2018.json, val2018.json and categories.json",
    "INAT19": "train2019.json, val2019.json and categories.json",
}
WITHOUT_EFFECT = {  # published flags that have nothing left to decide: number of values, and why
    "dist_eval": (0, "evaluation is always distributed and exact"),
    "deploy": (0, "--eval always fuses"),
    "dist_url": (1, "the launcher's environment says where to meet"),
    "world_size": (1, "the launcher's environment says how many"),
    "local_rank": (1, "the launcher's environment says which"),
}


SETTINGS = Settings(
    Config,
    prog="main.py",
    description="Train or evaluate an image classifier. Settings: defaults < --config < flags.",
    groups=GROUPS,
    without_effect=WITHOUT_EFFECT,
)


def epochs_of_cycles(first: int, count: int, factor: float) -> int:
    """Epochs of `count` cycles, the first of `first` epochs and each `factor` times as long as the one before, as timm counts them.

    InputError where these are more than can be counted."""
    try:
        return first * count if factor == 1 else math.floor(-first * (factor**count - 1) / (1 - factor))
    except OverflowError:
        raise InputError(f"--lr-cycle-limit {count} --lr-cycle-mul {factor:g}: such a run never ends", "give fewer cycles, or a smaller factor") from None


def epochs_of_run(settings: dict) -> int | None:
    """Those of the whole run that had these settings, by name; None where they do not say."""
    first = settings.get("epochs")
    return epochs_of_cycles(first, settings.get("lr_cycle_limit", 1), settings.get("lr_cycle_mul", 1.0)) if isinstance(first, int) else None


def schedule_pairs(text: str) -> list[tuple[int, float]]:
    """Sizes in pixels and the parts of the epochs after which they begin, as --image-size-schedule has them. InputError where it has not."""
    form = "sizes of at least 8 pixels, each with a part of the epochs, the first 0, ascending and below 1, as in 160:0,192:0.4,224:0.8"
    try:
        pairs = [(int(size), float(share)) for size, share in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        raise InputError(f"--image-size-schedule {text}: write {form}") from None
    shares = [share for _, share in pairs]
    is_ascending = all(one < other for one, other in itertools.pairwise(shares))
    if shares[0] != 0 or not is_ascending or not shares[-1] < 1 or min(size for size, _ in pairs) < 8:
        raise InputError(f"--image-size-schedule {text}: write {form}")
    return pairs


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Settings from a command line (without the program's name), and notes to show the user.

    Defaults < `--config` file < flags. Raises InputError on whatever is unknown, does not fit or contradicts itself."""
    settings, notes = SETTINGS.parse(argv)
    adopted = _adopted(settings)
    cfg = Config(**settings, **adopted)
    validate(cfg)
    if cfg.lr_base is not None and any(text.partition("=")[0] == "--lr" for text in argv):
        raise InputError(f"--lr beside --lr-base {cfg.lr_base:g}, which takes its place: drop one of them; --lr-base none undoes a recipe's")
    if cfg.resplit and not cfg.aug_splits:
        notes = [*notes, "--resplit has no effect: it spares the first of --aug-splits, and there are none"]
    if cfg.mixup_off_epoch >= cfg.num_epochs > 0:
        notes = [*notes, f"--mixup-off-epoch {cfg.mixup_off_epoch} has no effect: the run ends with epoch {cfg.num_epochs - 1}"]
    return cfg, notes + [f"--{name.replace('_', '-')} {value}, as in {cfg.teacher_labels}" for name, value in adopted.items()]


def parse_sizes(argv: list[str]) -> tuple[list[Config], list[str]]:
    """As `parse`, a Config for each of the sizes in `--input-size 192,224,256`; of one size, or none, one Config.

    InputError also where several are given to what is no evaluation."""
    flags = [i for i, text in enumerate(argv) if text.partition("=")[0] in ("--input-size", "--input_size")]
    last = flags[-1] if flags else len(argv)
    text = "".join(argv[last : last + 1]).partition("=")[2] or "".join(argv[last + 1 : last + 2])
    if "," not in text:
        cfg, notes = parse(argv)
        return [cfg], notes
    rest = argv[:last] + argv[last + (1 if "=" in argv[last] else 2) :]
    parsed = [parse([*rest, f"--input-size={size}"]) for size in dict.fromkeys(text.split(","))]
    cfgs = [cfg for cfg, _ in parsed]
    if not cfgs[0].eval:
        raise InputError(f"--input-size {text}: several sizes are for an evaluation: add --eval, or train at one, or with --image-size-schedule")
    return [dataclasses.replace(cfg, report=_of_size(cfg.report, cfg.input_size)) for cfg in cfgs], parsed[0][1]


def _of_size(report: str | None, size: int) -> str | None:
    """`out.json` -> `out_192.json`."""
    path = Path(report) if report else None
    return str(path.with_name(f"{path.stem}_{size}{path.suffix}")) if path else None


ADOPTED = ("repeated_aug", "mix_group_size", "mix_lanes")


def _adopted(settings: dict) -> dict:
    """The order of the data that stored labels were made for, as far as `settings` leave it open and differ from the defaults."""
    folder, mode = settings.get("teacher_labels"), settings.get("teacher_labels_mode", SETTINGS.fields["teacher_labels_mode"].default)
    manifest = read_manifest(folder) if folder and mode != "off" and not settings.get("eval") else None
    if manifest is None:
        return {}
    stored = {name: SETTINGS.value(name, manifest["settings"].get(name), where=f"{folder}/{LABELS_MANIFEST}: {name}") for name in ADOPTED}
    return {name: value for name, value in stored.items() if name not in settings and value != SETTINGS.fields[name].default}


def _robustness_rules(cfg: Config) -> list[tuple[bool, str]]:
    flags, on_validation = cfg.robustness_flags, [flag for flag in cfg.robustness_flags if flag not in cfg.set_flags]
    return [
        (bool(flags) and not cfg.eval, f"{' '.join(flags)}: networks are tried on these by an evaluation: add --eval"),
        (bool(on_validation) and not cfg.has_validation, f"{' '.join(on_validation)}: these are measured on the validation images: add --data-path"),
        (
            bool(cfg.report) and not cfg.has_validation and not cfg.report.lower().endswith(".json"),
            f"--report {cfg.report}: the table of classes is of the validation images: add --data-path, or name a .json file for the sets' accuracies",
        ),
    ]


def run_rules(cfg: RunConfig) -> list[tuple[bool, str]]:
    """What is wrong with settings that every kind of training has, as `refuse` takes it."""
    return [
        (cfg.resume == "auto" and not cfg.output_dir, "--resume auto looks in the run's folder: add --output_dir"),
        (cfg.overwrite and bool(cfg.resume), "--overwrite deletes the run that --resume would continue: drop one of them"),
        (bool(cfg.report) and not cfg.eval, "--report describes an evaluation: it needs --eval"),
        (cfg.output_dir == "", "--output-dir is empty: name a folder, or drop it"),
        (cfg.opt_betas is not None and len(cfg.opt_betas) < 2, "--opt-betas takes at least two numbers"),
        (cfg.opt_betas is not None and not all(0 <= beta < 1 for beta in cfg.opt_betas), "--opt-betas must be at least 0 and below 1"),
        (
            bool(RESERVED_OF_OPTIMISER & set(cfg.opt_kwargs or {})),
            f"--opt-kwargs cannot set {', '.join(sorted(RESERVED_OF_OPTIMISER & set(cfg.opt_kwargs or {})))}: flags of their own do",
        ),
    ]


def _optimisation_rules(cfg: Config) -> list[tuple[bool, str]]:
    scaling, cycles = cfg.lr_base_scale is not None or cfg.lr_base_size != 256, cfg.lr_cycle_mul != 1 or cfg.lr_cycle_decay != 0.5
    return [
        (scaling and cfg.lr_base is None, "--lr-base-size and --lr-base-scale say how --lr-base is scaled: add it, or drop them (--lr is per 512 images)"),
        (
            cfg.lr_cycle_limit > 1 and cfg.sched not in CYCLIC,
            f"--lr-cycle-limit {cfg.lr_cycle_limit}: --sched {cfg.sched} has no cycles, {', '.join(CYCLIC)} have",
        ),
        (cycles and cfg.lr_cycle_limit == 1, "--lr-cycle-mul and --lr-cycle-decay say what a cycle is to the one before: add --lr-cycle-limit N, or drop them"),
        (
            cfg.compile and cfg.sync_bn,
            "--compile --sync-bn: processes that wait for one another inside the network wait for ever where one's compiler fails: drop one of them",
        ),
        (cfg.sched_on_updates and cfg.sched == "plateau", "--sched plateau waits for accuracies, which come with epochs: drop --sched-on-updates"),
        (
            cfg.warmup_steps is not None and not cfg.sched_on_updates,
            "--warmup-steps are of a schedule by steps: add --sched-on-updates, or use --warmup-epochs",
        ),
        (
            not cfg.bce_loss and (cfg.bce_sum or cfg.bce_target_thresh is not None),
            "--bce-target-thresh and --bce-sum are of the binary cross entropy: add --bce-loss, or drop them",
        ),
        (cfg.model_ema_warmup and not cfg.model_ema, "--model-ema-warmup warms up the moving average, which --no-model-ema drops: drop one of them"),
    ]


def _is_range(values: tuple[float, ...] | None) -> bool:
    return values is None or (len(values) == 2 and 0 < values[0] <= values[1])


def _augmentation_rules(cfg: Config) -> list[tuple[bool, str]]:
    is_zoomed_out = cfg.scale is not None and max(cfg.scale) > 1
    others = [f"--interpolation {cfg.interpolation}"] if cfg.interpolation not in FAST_INTERPOLATIONS else []
    return [
        (cfg.three_augment and cfg.aa not in (None, SETTINGS.fields["aa"].default), "--ThreeAugment replaces --aa: drop one of them"),
        (not _is_range(cfg.scale), "--scale takes two parts of an image's area, above 0, the smaller first"),
        (not _is_range(cfg.ratio), "--ratio takes two ratios, above 0, the smaller first"),
        (
            is_zoomed_out and cfg.train_crop_mode in (None, "rrc"),
            "--scale: a crop is no larger than its image, so 1 is the most; --train-crop-mode rkrc or rkrr make images smaller",
        ),
        (
            cfg.train_crop_mode in ("rkrc", "rkrr") and any(not 0.01 <= x <= 100 for x in (*(cfg.scale or ()), *(cfg.ratio or ()))),
            f"--train-crop-mode {cfg.train_crop_mode} takes --scale and --ratio from 0.01 to 100: an image is resized by their roots",
        ),
        (cfg.mean is not None and len(cfg.mean) not in (1, 3), "--mean takes one number, or one per channel"),
        (cfg.std is not None and len(cfg.std) not in (1, 3), "--std takes one number, or one per channel"),
        (
            any(not 0 <= x <= 1 for x in cfg.mean or ()) or any(not 0.001 <= x <= 1 for x in cfg.std or ()),
            "--mean and --std are of pixels from 0 to 1, from 0 and 0.001 on; those of pixels from 0 to 255 are to be divided by 255",
        ),
        (cfg.mixup_off_epoch > 0 and not cfg.is_mixing, "--mixup-off-epoch ends mixup and CutMix, and neither is on: drop it"),
        (cfg.aug_splits == 1, "--aug-splits 1 is the one view of an image that there is without: use 2 or more, or 0"),
        (cfg.jsd_loss and cfg.aug_splits < 2, "--jsd-loss compares views of an image: add --aug-splits 3"),
        (cfg.jsd_loss and cfg.bce_loss, "--jsd-loss and --bce-loss are two losses for one run: drop one of them"),
        (
            cfg.aug_splits > 1 and cfg.is_mixing and not cfg.eval,
            "--aug-splits compares views of an image, which mixup and CutMix would mix with others: add --mixup 0 --cutmix 0",
        ),
        (
            cfg.aug_splits > 1 and cfg.distillation != "none" and not cfg.eval,
            "--aug-splits has no teacher, which sees one view of an image: add --distillation-type none",
        ),
        (
            bool(others) and cfg.loader == "fast",
            f"{' '.join(others)}: the fast loader has bicubic and bilinear: use one of them, or add --loader reference",
        ),
    ]


def validate(cfg: Config) -> None:
    """InputError where settings contradict each other."""
    _ = cfg.num_epochs, cfg.size_starts
    rules = [
        *run_rules(cfg),
        (cfg.eval and not (cfg.resume or cfg.pretrained), "--eval needs weights: add --resume FILE or --pretrained"),
        (cfg.tta != "none" and not cfg.eval, f"--tta {cfg.tta}: training measures networks as they are: add --eval, or drop it"),
        (cfg.use_ema and not (cfg.eval and cfg.resume), "--use-ema chooses weights of a checkpoint: it needs --eval --resume FILE"),
        *_robustness_rules(cfg),
        *_optimisation_rules(cfg),
        (
            cfg.data_set != "DIGITS" and not cfg.data_path and cfg.has_validation,
            f"--data-set {cfg.data_set} needs --data-path, the folder that holds {DATA_FILES.get(cfg.data_set)}",
        ),
        (cfg.data_set == "DIGITS" and bool(cfg.data_path), "--data-set DIGITS comes with scikit-learn and takes no --data-path: drop one of them"),
        (
            cfg.val_split is not None and cfg.data_set not in ("IMNET", "FLOWERS"),
            f"--val-split holds images out of train/, which --data-set {cfg.data_set} does not have",
        ),
        (
            cfg.data_set not in ("IMNET", "FLOWERS") and (cfg.data_format != "auto" or bool(cfg.class_map)),
            f"--data-format and --class-map are for data at --data-path, and --data-set {cfg.data_set} has a layout and classes of its own: drop them",
        ),
        (cfg.cutmix_minmax is not None and len(cfg.cutmix_minmax) != 2, "--cutmix-minmax takes two fractions"),
        (cfg.cutmix_minmax is not None and not all(0 <= x <= 1 for x in cfg.cutmix_minmax), "--cutmix-minmax takes fractions from 0 to 1"),
        (cfg.cutmix_minmax is not None and list(cfg.cutmix_minmax) != sorted(cfg.cutmix_minmax), "--cutmix-minmax takes the smaller fraction first"),
        (cfg.lr_noise is not None and len(cfg.lr_noise) > 2, "--lr-noise takes one or two fractions of the run"),
        (cfg.lr_noise is not None and not all(0 <= x <= 1 for x in cfg.lr_noise), "--lr-noise takes fractions from 0 to 1"),
        (cfg.lr_noise is not None and list(cfg.lr_noise) != sorted(cfg.lr_noise), "--lr-noise takes the earlier fraction first"),
        (cfg.mix_group_size % 2 == 1, f"--mix-group-size {cfg.mix_group_size} is odd: images of a group are mixed in pairs"),
        (
            not cfg.eval and cfg.is_mixing and cfg.batch_size % 2 == 1,
            f"--batch-size {cfg.batch_size} is odd: mixup pairs the images of a batch; make it even, or --mixup 0 --cutmix 0",
        ),
        *_augmentation_rules(cfg),
        (
            bool(RESERVED & set(cfg.model_kwargs or {})),
            f"--model-kwargs cannot set {', '.join(sorted(RESERVED & set(cfg.model_kwargs or {})))}: other flags and the data do",
        ),
        (
            cfg.labels_mode != "off" and cfg.distillation == "none" and not cfg.eval,
            "--teacher-labels holds labels to distil from, and this run does not distil: add --distillation-type hard, or drop it",
        ),
        (
            cfg.teacher_labels_mode in ("read", "write", "verify") and not cfg.teacher_labels,
            f"--teacher-labels-mode {cfg.teacher_labels_mode} needs a folder: add --teacher-labels DIR",
        ),
        (
            cfg.labels_mode != "off" and cfg.distillation == "soft" and cfg.teacher_topk is None,
            "--teacher-labels stores part of the logits of soft distillation: say how many with --teacher-topk (16, for example; not exact), or distil hard",
        ),
        (cfg.teacher_topk is not None and cfg.distillation != "soft" and not cfg.eval, "--teacher-topk is for --distillation-type soft: drop one of them"),
        (bool(cfg.finetune) and cfg.pretrained, "--finetune and --pretrained both say what to start from: drop one of them"),
    ]
    refuse(rules)
