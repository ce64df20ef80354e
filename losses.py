"""From logits to a scalar: the criterion of a recipe, with or without a teacher."""

import torch
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from run.config import Config


def hard_distillation(student_logits: Tensor, teacher_labels: Tensor) -> Tensor:
    """Cross entropy of the student (B, C) against the teacher's top classes (B,); scalar, mean over the batch, in nats.

    Source: DeiT, hard-label distillation (arXiv:2012.12877)."""
    return F.cross_entropy(student_logits, teacher_labels)


def soft_distillation(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher at temperature `tau`, times tau^2 per logit; scalar.

    Both (B, C), raw scores. Source: Hinton et al. (arXiv:1503.02531), with DeiT's scaling: the sum over the number of logits."""
    log_student = F.log_softmax(student_logits / tau, dim=1)
    log_teacher = F.log_softmax(teacher_logits / tau, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * tau**2 / student_logits.numel()


class DistillationLoss(nn.Module):
    """(1 - alpha) * base loss + alpha * the teacher's term.

    `outputs` is (class logits, distillation logits), or one (B, C) tensor that learns both terms. `teacher_output` holds top
    classes (B,) for hard, logits (B, C) for soft distillation."""

    def __init__(self, base: nn.Module, *, kind: str, alpha: float, tau: float):
        super().__init__()
        self.base = base
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, outputs, targets: Tensor, teacher_output: Tensor) -> Tensor:
        logits, logits_dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        is_hard = self.kind == "hard"
        distillation = hard_distillation(logits_dist, teacher_output) if is_hard else soft_distillation(logits_dist, teacher_output, self.tau)
        return (1 - self.alpha) * self.base(logits, targets) + self.alpha * distillation


class TargetLoss(nn.Module):
    """The base loss alone; what the teacher says (nothing) is ignored."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, outputs: Tensor, targets: Tensor, teacher_output: None) -> Tensor:
        return self.base(outputs, targets)


class BinaryLoss(BinaryCrossEntropy):
    """timm's binary cross entropy of (B, C) logits against (B,) classes or (B, C) targets; in full precision under autocast too."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def build_criterion(cfg: Config) -> nn.Module:
    """The recipe's criterion: `(outputs, targets, teacher_output) -> scalar`.

    Targets are smoothed in the mixing where there is one, else in the loss."""
    smoothing = 0.0 if cfg.is_mixing else cfg.smoothing
    base = nn.CrossEntropyLoss(label_smoothing=smoothing)
    if cfg.bce_loss:
        base = BinaryLoss(smoothing, target_threshold=cfg.bce_target_thresh, sum_classes=cfg.bce_sum)
    if cfg.jsd_loss:
        base = JsdCrossEntropy(num_splits=cfg.aug_splits, smoothing=cfg.smoothing)
    if cfg.distillation == "none":
        return TargetLoss(base)
    return DistillationLoss(base, kind=cfg.distillation, alpha=cfg.distillation_alpha, tau=cfg.distillation_tau)


def count_correct(logits: Tensor, targets: Tensor, top: int) -> Tensor:
    """How many of `targets` (B,) are among the `top` highest of `logits` (B, C); a scalar. Fewer classes than `top`: all of them."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (best == targets.view(-1, 1)).sum()
