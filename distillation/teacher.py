"""The distillation teacher: any network of timm's registry, in evaluation mode, folded, and asked about one mix group at a time."""

import copy
import hashlib

import numpy as np
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

import model
from loading import augment
from loading.batches import Batch
from loading.keys import Plan
from model.layers import fold_norm_after
from run import checkpoint
from run.compiling import Compiler, NoCompiler
from run.config import Config
from run.errors import InputError, first_line
from utils import Rank, log, main_first, replace_batchnorm

# ---- what a teacher's logits become


class HardLabels:
    """Top classes. A label is one 16-bit code."""

    width = 1

    def encode(self, logits: Tensor) -> Tensor:
        """(B, C) -> codes (B, 1) int16, whose bits are unsigned: 65535 is none that a class may have."""
        return logits.argmax(dim=1, keepdim=True).to(torch.int16)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, 1) -> class indices (B,) int64."""
        return codes[:, 0].long() & 0xFFFF


class TopLogits:
    """The k highest log-probabilities and the logarithm of the others' sum, which is taken to be spread evenly: not exact.

    A label is 2 k + 1 codes: k class indices, the k + 1 values in float16."""

    MIN_LOG = -60.0  # finite, so that the loss of a class of no weight is 0

    def __init__(self, k: int, num_classes: int):
        self.k = min(k, num_classes)
        self.num_classes = num_classes
        self.width = 2 * self.k + 1

    def encode(self, logits: Tensor) -> Tensor:
        """(B, C) -> codes (B, 2 k + 1) int16."""
        log_p = logits.float().log_softmax(dim=1)
        top = log_p.topk(self.k, dim=1)
        rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(dim=1, keepdim=True)
        values = torch.cat([top.values, rest], dim=1).clamp(min=self.MIN_LOG).to(torch.float16)
        return torch.cat([top.indices.to(torch.int16), values.view(torch.int16)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, 2 k + 1) -> logits (B, C) float32."""
        indices = codes[:, : self.k].long() & 0xFFFF
        values = codes[:, self.k :].contiguous().view(torch.float16).float()
        each_other = values[:, self.k :] - float(np.log(max(1, self.num_classes - self.k)))
        return each_other.repeat(1, self.num_classes).scatter(1, indices, values[:, : self.k])


class AllLogits:
    """Logits as they are: exact, and too large to store."""

    def encode(self, logits: Tensor) -> Tensor:
        return logits

    def decode(self, codes: Tensor) -> Tensor:
        return codes


def pick_answer(cfg: Config, num_classes: int) -> HardLabels | TopLogits | AllLogits:
    """What the recipe's loss wants of the teacher."""
    if cfg.distillation == "hard":
        return HardLabels()
    return AllLogits() if cfg.teacher_topk is None else TopLogits(cfg.teacher_topk, num_classes)


# ---- the teacher


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """The type that goes with `precision`; None for full precision."""
    return torch.float16 if precision(device) == "float16" else None


def with_half_weights(net: nn.Module) -> nn.Module:
    """`net`, changed in place: weights that float16 autocast would round at every call are so already, with the same results.

    It then runs under that autocast alone."""
    for module in net.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.half()
    return net


def precision(device: torch.device) -> str:
    """What the teacher computes in: float16 autocast on a GPU, as published; it does not depend on the student's precision."""
    return "float16" if device.type == "cuda" else "float32"


class Teacher:
    """What the teacher makes of a student's mixed images: top classes (B,) for hard, logits (B, C) for soft distillation.

    It is shown one mix group at a time, so that the size of the micro-batch cannot change its kernels. `weights` is the hash of
    the weights it was made from."""

    def __init__(self, net: nn.Module, *, answer: HardLabels | TopLogits | AllLogits, plan: Plan, weights: str | None = None):
        self.net = self.run = net.eval().requires_grad_(False)
        self.answer = answer
        self.plan = plan
        self.weights = weights

    def prepare(self, compiler: Compiler | NoCompiler, shape: tuple[int, ...]) -> None:
        """Compile the network, for batches of that shape (B, 3, H, W)."""
        self.run = compiler(self.net)
        one = (min(shape[0], self.plan.group_size), *shape[1:])
        images = torch.zeros(one, device=next(self.net.parameters()).device)
        compiler.prepare("the teacher", self.net, one, lambda: self.logits(images))

    def logits(self, images: Tensor) -> Tensor:
        """(n, C) of images (n, 3, H, W) of one group, in float32 where they were computed in less."""
        with torch.inference_mode(), torch.autocast(images.device.type, torch.float16, enabled=precision(images.device) == "float16"):
            logits = self.run(images.contiguous(memory_format=torch.channels_last))
        # a clone, for autograd would refuse to keep a tensor of the inference mode
        return logits.float() if logits.dtype == torch.float16 else logits.clone()

    def ask(self, images: Tensor) -> Tensor:
        """Codes (n, width) of images of one group."""
        return self.answer.encode(self.logits(images))

    def __call__(self, images: Tensor, batch: Batch, epoch: int) -> Tensor:
        codes = [self.ask(images[start:stop]) for _, start, stop in self.plan.group_parts(batch.positions.numpy())]
        return self.answer.decode(torch.cat(codes))

    def end_epoch(self, epoch: int) -> None:
        """Nothing to store."""


class NoTeacher:
    """What training without distillation has in place of a `Teacher`."""

    net = None

    def prepare(self, compiler: Compiler | NoCompiler, shape: tuple[int, ...]) -> None:
        """Nothing to compile."""

    def __call__(self, images: Tensor, batch: Batch, epoch: int) -> None:
        """Nothing to say."""

    def end_epoch(self, epoch: int) -> None:
        """Nothing to store."""


no_teacher = NoTeacher()


# ---- its weights


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


def read_weights(cfg: Config) -> dict[str, Tensor]:
    """Weights at --teacher-path, under the names they have there."""
    return _read(cfg)[0]


def _read(cfg: Config) -> tuple[dict[str, Tensor], dict]:
    """Those, and the --model-kwargs of the run that trained them, where the file is of one of this project's."""
    try:
        saved = checkpoint.read(cfg.teacher_path)
    except InputError as error:
        raise InputError(f"--teacher-path {error}; train the teacher first or name another file, or --distillation-type none for a run without one") from error
    args = saved["args"] if isinstance(saved.get("args"), dict) else {}
    options = checkpoint.model_options(args) if args.get("model") == cfg.teacher_model else {}
    return checkpoint.weights(saved, where=f"--teacher-path {cfg.teacher_path}"), options


def hash_weights(state: dict[str, Tensor]) -> str:
    """Hash of a state dict's names and values, whatever their order: 32 hexadecimal digits. Batch counters do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        if value.is_floating_point():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _create(cfg: Config, num_classes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The recipe's teacher on the CPU, and its weights as they were read."""
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
        return net, net.state_dict()
    state, options = _read(cfg)
    net = model.create_model(cfg.teacher_model, num_classes=num_classes, **options)
    teacher_count = _other_class_count(net, state, num_classes)
    if teacher_count is not None:
        _refuse_class_count(cfg, teacher_count, num_classes)
    checkpoint.load_weights(net, state, where=f"--teacher-path {cfg.teacher_path}")
    return net, state


def load_teacher(cfg: Config, num_classes: int, rank: Rank, *, plan: Plan) -> Teacher:
    """The recipe's teacher on the run's device. InputError where it cannot be had or does not fit the data."""
    if not timm.is_model(cfg.teacher_model):
        raise InputError(f"--teacher-model {cfg.teacher_model} is no model that timm or this project knows")
    with main_first(rank):
        net, state = _create(cfg, num_classes)
    weights = hash_weights(state) if rank.is_main and cfg.labels_mode != "off" else None
    net.eval()
    if cfg.teacher_model.partition(".")[0] in model.list_models():
        net = replace_batchnorm(net)
    net = folded(cfg, net).to(rank.device, memory_format=torch.channels_last)
    net = with_half_weights(net) if precision(rank.device) == "float16" else net
    _warn_of_statistics(cfg)
    return Teacher(net, answer=pick_answer(cfg, num_classes), plan=plan, weights=weights)


def _warn_of_statistics(cfg: Config) -> None:
    known = get_pretrained_cfg(cfg.teacher_model)
    if known is not None and cfg.teacher_path is None and (tuple(known.mean), tuple(known.std)) != augment.statistics(cfg):
        log.warning(
            "the teacher %s was trained with mean %s and std %s, students here see images with %s and %s: expect a weaker teacher",
            cfg.teacher_model,
            known.mean,
            known.std,
            *augment.statistics(cfg),
        )


# ---- folding its BatchNorms

FOLDING_VERSION = 1  # changes whenever another network would come of the same weights
FOLDING_TOLERANCE = 1e-3  # of the logits; what a wrong fold does is far above, what rounding does far below


def _trace(net: nn.Module, images: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of each convolution and of the BatchNorm that takes its output, both used once; and the logits (n, C)."""
    made_by, uses, pairs, kept = {}, {}, [], []

    def after_conv(conv: nn.Module, inputs: tuple, output: Tensor) -> None:
        uses[conv] = uses.get(conv, 0) + 1
        made_by[id(output)] = conv
        kept.append(output)  # alive, so that no other tensor gets its id

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        uses[norm] = uses.get(norm, 0) + 1
        if id(inputs[0]) in made_by and made_by[id(inputs[0])].padding_mode == "zeros":
            pairs.append((made_by[id(inputs[0])], norm))

    names = {module: name for name, module in net.named_modules()}
    hooks = [module.register_forward_hook(after_conv) for module in names if type(module) is nn.Conv2d]
    hooks += [module.register_forward_pre_hook(before_norm) for module in names if type(module) in (nn.BatchNorm2d, BatchNormAct2d)]
    try:
        with torch.inference_mode():
            logits = net(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = [(names[conv], names[norm]) for conv, norm in pairs if uses[conv] == uses[norm] == 1 and norm.running_var is not None]
    return once, logits


def _fold(net: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """A copy of `net` without the BatchNorms in `pairs`: their convolutions do their work."""
    copied = copy.deepcopy(net)
    for conv_name, norm_name in pairs:
        norm = copied.get_submodule(norm_name)
        copied.set_submodule(conv_name, fold_norm_after(copied.get_submodule(conv_name), norm))
        copied.set_submodule(norm_name, nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return copied.eval()


def folded(cfg: Config, net: nn.Module) -> nn.Module:
    """`net` with each BatchNorm that follows a convolution folded into it, where that leaves the logits as they are.

    InputError where the teacher does not take images of the recipe's size."""
    for flag, size in reversed(cfg.sized_flags):  # --input-size is what its BatchNorms are looked at with
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            pairs, logits = _trace(net, images)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"the teacher {cfg.teacher_model} does not take images of {flag} ({first_line(error)}): choose a size or a teacher that fits"
            ) from error
    if not pairs:
        return net
    candidate = _fold(net, pairs)
    with torch.inference_mode():
        difference = (candidate(images) - logits).abs().max().item()
    if not difference <= FOLDING_TOLERANCE * max(1.0, logits.abs().max().item()):
        log.warning("the teacher %s does something with its BatchNorms that folding would change: it runs as it is, slower", cfg.teacher_model)
        return net
    return candidate
