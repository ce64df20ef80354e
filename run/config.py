"""Every setting of a run, declared once: default, YAML key, `--flag` and help text come from one field.

Nothing here imports torch, so that `python main.py --help` answers at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path

import yaml

from run.errors import InputError


def setting(default, text: str, *, choices=None, nargs=None, alias: str = "", const=None, above=None, at_least=None, at_most=None):
    """Field of `Config`: its default, its help text and what values it takes.

    `alias` is a second published spelling; `const` the value of the bare flag; `above`, `at_least` and `at_most` bound a number."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(
        default=default,
        metadata={"help": text, "choices": choices, "nargs": nargs, "alias": alias, "const": const, "bounds": bounds},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run, as given: derived values (scaled learning rate, run folder, device) are computed where needed.

    `GROUPS` orders them for `--help`."""

    # run
    model: str = setting("recnext_m1", "architecture: a name in timm's registry, which includes ours")
    model_kwargs: dict | None = setting(None, "further arguments of the architecture", nargs="+")
    batch_size: int = setting(256, "images per process and micro-batch", at_least=1)
    grad_accum_steps: int = setting(1, "micro-batches per optimiser step", at_least=1)
    recipe_batch: int = setting(2048, "global batch the recipe was made for; another is warned of", at_least=1)
    epochs: int = setting(300, "epochs to train", at_least=0)
    start_epoch: int = setting(0, "first epoch, where no checkpoint says so", at_least=0)
    input_size: int = setting(224, "side of the square input, pixels", at_least=8)
    drop: float | None = setting(None, "dropout before the classifier (default: the variant's)", at_least=0, at_most=0.999)
    drop_path: float | None = setting(None, "stochastic depth rate (default: the variant's)", at_least=0, at_most=0.999)
    seed: int = setting(0, "seed of initialisation and dropout", at_least=0, at_most=2**63 - 1)
    device: str = setting("auto", "cuda, cuda:N or cpu; auto: a GPU where there is one")
    amp: str = setting("auto", "mixed precision; auto: bf16 on a GPU that has it, else none", choices=("auto", "bf16", "fp16", "none"), nargs="?", const="auto")
    memory_format: str = setting("auto", "layout of activations; auto: channels_last", choices=("auto", "nchw", "channels_last"))
    output_dir: str | None = setting(None, "folder of log and checkpoints (default: checkpoints/<model>/<time>)")
    overwrite: bool = setting(False, "start afresh in a folder that holds a run, deleting that run")
    resume: str | None = setting(None, "checkpoint to continue or, with --eval, to evaluate: file, URL, hf-hub:name, or auto (the last one in --output_dir)")
    save_freq: int = setting(1, "epochs between numbered checkpoints, of which the last three are kept", at_least=1)
    checkpoint_steps: int | None = setting(None, "optimiser steps between checkpoints inside an epoch (default: none inside)", at_least=1)
    checkpoint_minutes: float | None = setting(None, "minutes between checkpoints inside an epoch (default: none inside)", above=0)
    allow_config_change: bool = setting(False, "resume although the recipe differs from the checkpoint's")
    project: str | None = setting(None, "Weights & Biases project to log to (needs the package wandb)")
    # evaluation
    eval: bool = setting(False, "evaluate the weights of --resume or --pretrained, fused, and exit")
    use_ema: bool = setting(False, "evaluate a checkpoint's EMA weights instead of the raw ones")
    report: str | None = setting(None, "with --eval: CSV file for per-class accuracy and the confusion matrix")
    pretrained: bool = setting(False, "start from the model's published weights: base variant without, dist variant with distillation")
    # EMA
    model_ema: bool = setting(True, "keep an exponential moving average of the weights and evaluate it each epoch")
    model_ema_decay: float = setting(0.99996, "its decay per optimiser step", at_least=0, at_most=1)
    model_ema_force_cpu: bool = setting(False, "keep it in main memory")
    # optimiser
    opt: str = setting("adamw", "optimiser, by timm's name")
    opt_eps: float | None = setting(1e-8, "its epsilon", at_least=0)
    opt_betas: tuple[float, ...] | None = setting(None, "its betas (default: the optimiser's)", nargs="+")
    momentum: float = setting(0.9, "its momentum, where it has one", at_least=0)
    weight_decay: float = setting(0.025, "decay of weights; biases and one-dimensional parameters are spared", at_least=0)
    clip_grad: float | None = setting(0.02, "gradient clipping bound, over all parameters; none: off", above=0)
    clip_mode: str = setting("agc", "how gradients are clipped: by norm, by value, or adaptively", choices=("norm", "value", "agc"))
    # schedule
    sched: str = setting("cosine", "learning-rate schedule, by timm's name", choices=("cosine", "tanh", "step", "multistep", "plateau", "poly"))
    lr: float = setting(1e-3, "peak learning rate per 512 images of the global batch", at_least=0)
    lr_noise: tuple[float, ...] | None = setting(None, "one or two fractions of the run between which the learning rate is noisy", nargs="+")
    lr_noise_pct: float = setting(0.67, "limit of that noise, as a fraction", at_least=0)
    lr_noise_std: float = setting(1.0, "standard deviation of that noise", at_least=0)
    warmup_lr: float = setting(1e-6, "learning rate at the start of the warm-up, not scaled", at_least=0)
    min_lr: float = setting(1e-5, "lowest learning rate, not scaled", at_least=0)
    warmup_epochs: int = setting(5, "epochs of linear warm-up", at_least=0)
    cooldown_epochs: int = setting(10, "plateau: epochs without a further drop after one", at_least=0)
    decay_epochs: int = setting(30, "step, multistep: epochs between drops", at_least=1)
    patience_epochs: int = setting(10, "plateau: epochs without progress before a drop", at_least=0)
    decay_rate: float = setting(0.1, "factor of a drop", above=0)
    # augmentation
    three_augment: bool = setting(False, "3-Augment instead of RandAugment and erasing", alias="ThreeAugment")
    color_jitter: float = setting(0.4, "brightness, contrast and saturation jitter, where --aa is none or with --ThreeAugment", at_least=0)
    aa: str | None = setting("rand-m9-mstd0.5-inc1", "RandAugment or AutoAugment policy in timm's notation, or none")
    hflip: float = setting(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    train_interpolation: str = setting("bicubic", "resampling of training images", choices=("bicubic", "bilinear", "random"))
    repeated_aug: bool = setting(True, "three views of a third of the images per epoch")
    reprob: float = setting(0.25, "probability of random erasing", at_least=0, at_most=1)
    remode: str = setting("pixel", "what fills an erased box: noise per pixel, one random colour, or the mean", choices=("pixel", "rand", "const"))
    recount: int = setting(1, "erased boxes per image", at_least=1)
    smoothing: float = setting(0.1, "label smoothing", at_least=0, at_most=0.999)
    # mixup
    mixup: float = setting(0.8, "mixup alpha; 0: off", at_least=0)
    cutmix: float = setting(1.0, "CutMix alpha; 0: off", at_least=0)
    cutmix_minmax: tuple[float, ...] | None = setting(None, "CutMix box sides between these two fractions, instead of by alpha", nargs="+")
    mixup_prob: float = setting(1.0, "probability that a group is mixed at all", at_least=0, at_most=1)
    mixup_switch_prob: float = setting(0.5, "probability of CutMix where both are on", at_least=0, at_most=1)
    mixup_mode: str = setting("batch", "one draw per mix group, per pair, or per image", choices=("batch", "pair", "elem"))
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
    # data
    data_set: str = setting(
        "IMNET",
        "IMNET: folders or tars of class folders; DIGITS: scikit-learn's handwritten digits",
        choices=("IMNET", "CIFAR", "INAT", "INAT19", "FLOWERS", "DIGITS"),
    )
    data_path: str | None = setting(None, "folder of train/ and val/, or of the data set's files")
    val_split: float | None = setting(None, "fraction of train/ to hold out where there is no val/", above=0, at_most=0.9)
    inat_category: str = setting(
        "name", "what counts as a class in iNaturalist", choices=("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
    )
    data_seed: int = setting(0, "seed of order, augmentation and mixing", at_least=0, at_most=2**63 - 1)
    crop_pct: float | None = setting(None, "part of the resized short side that evaluation crops (default 0.875; 1 up to 32 pixels)", above=0, at_most=1)
    loader: str = setting(
        "fast", "decoder, resizing and RandAugment kernels: OpenCV, simplejpeg and torch, or Pillow; the same draws", choices=("fast", "reference")
    )
    num_workers: int | None = setting(None, "loader processes per training process (default: as many as there are cores for, at most 10)", at_least=0)
    pin_mem: bool = setting(True, "page-locked batches, for faster copies to a GPU")

    @property
    def distillation(self) -> str:
        """The distillation type in force: `none`, `soft` or `hard`."""
        return self.distillation_type or ("none" if self.finetune else "hard")

    @property
    def labels_mode(self) -> str:
        """What the run does with stored labels of its teacher; `off` where no folder is given."""
        return self.teacher_labels_mode if self.teacher_labels else "off"

    @property
    def is_mixing(self) -> bool:
        """Whether mixup or CutMix is on, and so targets are distributions."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
ALIASES = {field.metadata["alias"]: name for name, field in FIELDS.items() if field.metadata["alias"]}
GROUPS = {  # first field of each section of --help
    "run": "model",
    "evaluation": "eval",
    "EMA": "model_ema",
    "optimiser": "opt",
    "schedule": "sched",
    "augmentation": "three_augment",
    "mixup": "mixup",
    "distillation": "distillation_type",
    "fine-tuning": "finetune",
    "data": "data_set",
}
RESERVED = {"num_classes", "in_chans", "features_only", "distillation", "drop_rate", "drop_path_rate", "pretrained", "checkpoint_path"}
DATA_FILES = {
    "IMNET": "train/ and val/",
    "FLOWERS": "train/ and test/",
    "CIFAR": "cifar-100-python/",
    "INAT": "train2018.json, val2018.json and categories.json",
    "INAT19": "train2019.json, val2019.json and categories.json",
}
KINDS = {int: "whole number", float: "number", str: "text"}
WITHOUT_EFFECT = {  # published flags that have nothing left to decide: number of values, and why
    "dist_eval": (0, "evaluation is always distributed and exact"),
    "resplit": (0, "every augmentation split is treated alike"),
    "deploy": (0, "--eval always fuses"),
    "dist_url": (1, "the launcher's environment says where to meet"),
    "world_size": (1, "the launcher's environment says how many"),
    "local_rank": (1, "the launcher's environment says which"),
}


def _value_type(field: dataclasses.Field) -> type:
    """Type of one value of `field`: `float` for `float`, `float | None` and `tuple[float, ...] | None`."""
    hint = field.type
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _is_optional(field: dataclasses.Field) -> bool:
    return isinstance(field.type, types.UnionType)


def _is_tuple(field: dataclasses.Field) -> bool:
    return "tuple" in str(field.type)


def _convert(field: dataclasses.Field, value):
    """One value of `field`, from YAML or from the command line's text; ValueError where it does not fit."""
    wanted = _value_type(field)
    if wanted is dict:
        if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            raise ValueError(f"{value!r} is not a mapping of names to values")
        return value
    if value is False and "off" in (field.metadata["choices"] or ()):
        return "off"  # as YAML reads it
    if value is None or (isinstance(value, str) and value.lower() == "none" and "none" not in (field.metadata["choices"] or ())):
        if not _is_optional(field):
            raise ValueError("needs a value")
        return None
    if wanted is bool or isinstance(value, bool):
        if wanted is not bool or not isinstance(value, bool):
            hint = "; YAML reads no and off as false: write none" if value is False and _is_optional(field) else ""
            raise ValueError(f"{value!r} is not {'true or false' if wanted is bool else 'a ' + KINDS[wanted]}{hint}")
        return value
    if wanted is int and isinstance(value, float):
        raise ValueError(f"{value!r} is not a whole number")
    try:
        return wanted(value)  # also "5e-4", which YAML 1.1 reads as text
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a {KINDS[wanted]}") from None


def _check(field: dataclasses.Field, value) -> None:
    """ValueError where a value is outside its field's choices or bounds."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices and value is not None and value not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")
        if bounds["above"] is not None and number <= bounds["above"]:
            raise ValueError(f"{number} is not above {bounds['above']}")
        if bounds["at_least"] is not None and number < bounds["at_least"]:
            raise ValueError(f"{number} is less than {bounds['at_least']}")
        if bounds["at_most"] is not None and number > bounds["at_most"]:
            raise ValueError(f"{number} is more than {bounds['at_most']}")


def _setting(name: str, value, *, where: str):
    """Checked value of the field `name`; InputError naming `where` it came from."""
    field = FIELDS[name]
    try:
        if _is_tuple(field) and isinstance(value, list | tuple):
            value = tuple(_convert(field, item) for item in value)
        elif _is_tuple(field) and value is not None:
            value = (_convert(field, value),)
        else:
            value = _convert(field, value)
        _check(field, value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return value


def _hint(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's loader, refusing a key that is given twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.YAMLError(f"'{twice}' is given twice")
        return super().construct_mapping(node, deep)


def load_recipe(path: str) -> dict:
    """Settings of a YAML file, by field name; InputError on an unknown key or a value that does not fit."""
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys) or {}
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; name a YAML file such as recipes/demo.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"--config {path} holds no settings: write one 'key: value' per line")
    settings = {}
    for key, value in recipe.items():
        name = ALIASES.get(key, str(key).replace("-", "_"))
        if name not in FIELDS:
            raise InputError(f"{path}: unknown setting '{key}'{_hint(name, FIELDS)}")
        if name in settings:
            raise InputError(f"{path}: setting '{key}' is given twice")
        settings[name] = _setting(name, value, where=f"{path}: {key}")
    return settings


def _key_value(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form key=value")
    return key, yaml.safe_load(value)


def _flags(name: str, alias: str = "") -> list[str]:
    """Kebab-case first: it is what `--help` shows."""
    return [f"--{name.replace('_', '-')}", *([f"--{alias}"] if alias else [])]


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to each setting's help and leaves out the published second spellings' metavars."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = FIELDS[action.dest].default if action.dest in FIELDS else None
        return action.help if default is None else f"{action.help} [{default}]".replace("%", "%%")


def build_parser() -> argparse.ArgumentParser:
    """Command-line parser of every field; flags absent from the command line are absent from its result."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train or evaluate an image classifier. Settings: defaults < --config < flags.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument("--config", metavar="YAML", help="recipe: a YAML file of settings, such as recipes/demo.yaml")
    starts = {first: title for title, first in GROUPS.items()}
    group = parser
    for name, field in FIELDS.items():
        if name in starts:
            group = parser.add_argument_group(starts[name])
        meta, wanted = field.metadata, _value_type(field)
        flags = _flags(name, meta["alias"])
        if wanted is bool:
            group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, help=meta["help"])
            continue
        metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else {str: "X", dict: "K=V"}.get(wanted, wanted.__name__.upper())
        value_type, action = (_key_value, "extend") if wanted is dict else (str, "store")
        extra = {"const": meta["const"]} if meta["const"] else {}
        group.add_argument(*flags, dest=name, action=action, type=value_type, nargs=meta["nargs"], metavar=metavar, help=meta["help"], **extra)
    for name, (num_values, reason) in WITHOUT_EFFECT.items():
        kwargs = {"action": "store_true"} if num_values == 0 else {"metavar": "X"}
        parser.add_argument(*_flags(name), dest=name, help=f"accepted, without effect: {reason}", **kwargs)
    return parser


def _normalise(argv: list[str]) -> list[str]:
    """Published commands mix `-` and `_` inside flags; values stay as they are."""
    return [arg if not arg.startswith("--") else arg.partition("=")[0].replace("_", "-") + "".join(arg.partition("=")[1:]) for arg in argv]


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Settings from a command line (without the program's name), and notes to show the user.

    Defaults < `--config` file < flags. Raises InputError on whatever is unknown, does not fit or contradicts itself."""
    parser = build_parser()
    parser.exit_on_error = False
    try:
        given, unknown = parser.parse_known_args(_normalise(argv))
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise InputError(f"unknown flag {flag}{_hint(flag, known)}" if flag.startswith("-") else f"stray argument '{flag}': values follow a --flag")
    given = vars(given)
    notes = [f"--{name.replace('_', '-')} has no effect: {reason}" for name, (_, reason) in WITHOUT_EFFECT.items() if given.pop(name, None)]
    recipe = given.pop("config", None)
    settings = load_recipe(recipe) if recipe else {}
    for name, value in given.items():
        value = dict(value) if _value_type(FIELDS[name]) is dict else value
        settings[name] = _setting(name, value, where=_flags(name)[0])
    adopted = _adopted(settings)
    cfg = Config(**settings, **adopted)
    validate(cfg)
    return cfg, notes + [f"--{name.replace('_', '-')} {value}, as in {cfg.teacher_labels}" for name, value in adopted.items()]


LABELS_MANIFEST = "manifest.json"
ADOPTED = ("repeated_aug", "mix_group_size", "mix_lanes")


def _is_canary(drawn) -> bool:
    return isinstance(drawn, dict) and {name: type(value) for name, value in drawn.items()} == {"position": int, "pixels": int, "erased": list, "mixing": list}


def read_manifest(folder: str | Path) -> dict | None:
    """What the labels stored in `folder` were made for; None where there are none. InputError where the file is damaged."""
    path = Path(folder).expanduser() / LABELS_MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(
            isinstance(manifest[part], kind)
            for part, kind in (("format", str), ("settings", dict), ("fingerprint", dict), ("canary", list), ("versions", dict))
        ) and all(_is_canary(drawn) for drawn in manifest["canary"]):
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): choose another --teacher-labels folder") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is damaged: restore it from a copy, or store labels anew in another --teacher-labels folder")


def _adopted(settings: dict) -> dict:
    """The order of the data that stored labels were made for, as far as `settings` leave it open and differ from the defaults."""
    folder, mode = settings.get("teacher_labels"), settings.get("teacher_labels_mode", FIELDS["teacher_labels_mode"].default)
    manifest = read_manifest(folder) if folder and mode != "off" and not settings.get("eval") else None
    if manifest is None:
        return {}
    stored = {name: _setting(name, manifest["settings"].get(name), where=f"{folder}/{LABELS_MANIFEST}: {name}") for name in ADOPTED}
    return {name: value for name, value in stored.items() if name not in settings and value != FIELDS[name].default}


def validate(cfg: Config) -> None:
    """InputError where settings contradict each other."""
    rules = [
        (cfg.eval and not (cfg.resume or cfg.pretrained), "--eval needs weights: add --resume FILE or --pretrained"),
        (cfg.resume == "auto" and not cfg.output_dir, "--resume auto looks in the run's folder: add --output_dir"),
        (cfg.overwrite and bool(cfg.resume), "--overwrite deletes the run that --resume would continue: drop one of them"),
        (cfg.use_ema and not (cfg.eval and cfg.resume), "--use-ema chooses weights of a checkpoint: it needs --eval --resume FILE"),
        (bool(cfg.report) and not cfg.eval, "--report describes an evaluation: it needs --eval"),
        (cfg.data_set != "DIGITS" and not cfg.data_path, f"--data-set {cfg.data_set} needs --data-path, the folder that holds {DATA_FILES.get(cfg.data_set)}"),
        (cfg.data_set == "DIGITS" and bool(cfg.data_path), "--data-set DIGITS comes with scikit-learn and takes no --data-path: drop one of them"),
        (
            cfg.val_split is not None and cfg.data_set not in ("IMNET", "FLOWERS"),
            f"--val-split holds images out of train/, which --data-set {cfg.data_set} does not have",
        ),
        (cfg.cutmix_minmax is not None and len(cfg.cutmix_minmax) != 2, "--cutmix-minmax takes two fractions"),
        (cfg.cutmix_minmax is not None and not all(0 <= x <= 1 for x in cfg.cutmix_minmax), "--cutmix-minmax takes fractions from 0 to 1"),
        (cfg.cutmix_minmax is not None and list(cfg.cutmix_minmax) != sorted(cfg.cutmix_minmax), "--cutmix-minmax takes the smaller fraction first"),
        (cfg.opt_betas is not None and len(cfg.opt_betas) < 2, "--opt-betas takes at least two numbers"),
        (cfg.opt_betas is not None and not all(0 <= beta < 1 for beta in cfg.opt_betas), "--opt-betas must be at least 0 and below 1"),
        (cfg.lr_noise is not None and len(cfg.lr_noise) > 2, "--lr-noise takes one or two fractions of the run"),
        (cfg.lr_noise is not None and not all(0 <= x <= 1 for x in cfg.lr_noise), "--lr-noise takes fractions from 0 to 1"),
        (cfg.lr_noise is not None and list(cfg.lr_noise) != sorted(cfg.lr_noise), "--lr-noise takes the earlier fraction first"),
        (cfg.output_dir == "", "--output-dir is empty: name a folder, or drop it"),
        (cfg.mix_group_size % 2 == 1, f"--mix-group-size {cfg.mix_group_size} is odd: images of a group are mixed in pairs"),
        (
            not cfg.eval and cfg.is_mixing and cfg.batch_size % 2 == 1,
            f"--batch-size {cfg.batch_size} is odd: mixup pairs the images of a batch; make it even, or --mixup 0 --cutmix 0",
        ),
        (cfg.three_augment and cfg.aa not in (None, FIELDS["aa"].default), "--ThreeAugment replaces --aa: drop one of them"),
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
    for is_wrong, message in rules:
        if is_wrong:
            raise InputError(message)


def dump(cfg: Config) -> str:
    """YAML text that `--config` reads back to an equal `Config`."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(cfg).items()}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
