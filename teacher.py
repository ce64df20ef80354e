"""The distillation teacher: any network of timm's registry, in evaluation mode and without gradient."""

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

import augment
import checkpoint
import model
from config import Config
from errors import InputError, first_line
from utils import Rank, log, main_first, pick_memory_format


class Teacher:
    """What the teacher makes of a student's images (B, 3, H, W): top classes (B,) for hard, logits (B, C) for soft distillation.

    On a GPU it runs in float16 autocast, as published; its labels do not depend on the student's precision."""

    def __init__(self, net: nn.Module, *, is_hard: bool):
        self.net = net.eval().requires_grad_(False)
        self.is_hard = is_hard

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
            logits = self.net(images)
        return logits.argmax(dim=1) if self.is_hard else logits.float() if logits.dtype == torch.float16 else logits


def no_teacher(images: Tensor) -> None:
    """What training without distillation has in place of a `Teacher`."""


def _other_class_count(net: nn.Module, state: dict[str, Tensor], num_classes: int) -> int | None:
    """Class count of `state` where its classifier alone differs from that of `net`; else None."""
    own = net.state_dict()
    for name, value in state.items():
        if name in own and own[name].shape != value.shape and own[name].shape[:1] == (num_classes,) and own[name].shape[1:] == value.shape[1:]:
            return value.shape[0]
    return None


def _refuse_class_count(cfg: Config, teacher_count: int, num_classes: int) -> None:
    raise InputError(
        f"the teacher {cfg.teacher_model} ({cfg.teacher_path or 'pretrained'}) knows {teacher_count} classes, the data has {num_classes}: "
        "name another with --teacher-model and --teacher-path, or train with --distillation-type none"
    )


def build_teacher(cfg: Config, num_classes: int, rank: Rank):
    """The function from images to the teacher's output: a `Teacher`, or `no_teacher` without distillation."""
    return no_teacher if cfg.distillation == "none" else load_teacher(cfg, num_classes, rank)


def load_teacher(cfg: Config, num_classes: int, rank: Rank) -> Teacher:
    """The recipe's teacher on the run's device. InputError where it cannot be had or does not fit the data."""
    if not timm.is_model(cfg.teacher_model):
        raise InputError(f"--teacher-model {cfg.teacher_model} is no model that timm or this project knows")
    with main_first(rank):
        if cfg.teacher_path is None:
            try:
                net = model.create_model(cfg.teacher_model, pretrained=True)
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"timm's weights of the teacher {cfg.teacher_model} could not be fetched ({first_line(error)}): "
                    "download some where there is a network, and name the file with --teacher-path"
                ) from error
            if net.num_classes != num_classes:
                _refuse_class_count(cfg, net.num_classes, num_classes)
        else:
            net = model.create_model(cfg.teacher_model, num_classes=num_classes)
            where = f"--teacher-path {cfg.teacher_path}"
            state = checkpoint.weights(checkpoint.read(cfg.teacher_path), where=where)
            teacher_count = _other_class_count(net, state, num_classes)
            if teacher_count is not None:
                _refuse_class_count(cfg, teacher_count, num_classes)
            checkpoint.load_weights(net, state, where=where)
    _check_input(cfg, net)
    return Teacher(net.to(rank.device, memory_format=pick_memory_format(cfg.memory_format, rank.device, None)), is_hard=cfg.distillation == "hard")


def _check_input(cfg: Config, net: nn.Module) -> None:
    """InputError where the teacher takes another image size; a warning where it was trained on other pixel statistics."""
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, cfg.input_size, cfg.input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the teacher {cfg.teacher_model} does not take images of --input-size {cfg.input_size} ({first_line(error)}): choose a size or a teacher that fits"
        ) from error
    known = get_pretrained_cfg(cfg.teacher_model)
    if known is not None and cfg.teacher_path is None and (tuple(known.mean), tuple(known.std)) != (augment.MEAN, augment.STD):
        log.warning(
            "the teacher %s was trained with mean %s and std %s, students here see images with ImageNet's: expect a weaker teacher",
            cfg.teacher_model,
            known.mean,
            known.std,
        )
