"""Stored teacher labels in a run: what they were made for, reading them with checks, and the teacher where there are none.

A label is a function of (data seed, epoch, position), so whoever has the same data, order, augmentation, mixing and teacher may read
what another run stored (`label_store` says in which files). That all this is the same is checked twice: at the start by the store's
fingerprint, and while reading by each mix group's pixels and labels."""

import os
import secrets
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

import datasets
import engine
from distillation.fingerprint import FORMAT, canary_differences, differences, draw_canaries, fingerprint, order_hash, translated, versions
from distillation.store import MAX_CLASSES, Fresh, LabelStore, Page
from distillation.teacher import (
    HardLabels,
    NoTeacher,
    Teacher,
    TopLogits,
    amp_dtype,
    hash_weights,
    load_teacher,
    no_teacher,
    pick_answer,
    precision,
    read_weights,
)
from loading.batches import Batch, TrainingSet
from loading.images import Images
from loading.keys import Plan, draw_words
from loading.loaders import TrainLoader
from loading.transfer import sent
from run import config
from run.compiling import Compiler, NoCompiler
from run.config import Config
from run.errors import InputError, first_line
from run.manifest import LABELS_MANIFEST, read_manifest
from utils import Rank, any_process, log

# ---- what labels are made for


NUM_CANARIES, NUM_WIDE_CANARIES = 64, 1024


# ---- the start of a run


def build_teacher(cfg: Config, loader: TrainLoader, rank: Rank, *, num_classes: int, epochs: range) -> "NoTeacher | Teacher | StoredLabels":
    """What answers for the teacher in training: nothing without distillation, the teacher, or stored labels of `epochs` with the
    teacher for those that are missing."""
    if cfg.distillation == "none":
        return no_teacher
    if cfg.labels_mode == "off":
        return load_teacher(cfg, num_classes, rank, plan=loader.plan)
    plan, answer = loader.plan, pick_answer(cfg, num_classes)
    store = open_store(cfg, plan, num_classes)
    survey = Survey(cfg, store, loader, num_classes=num_classes, rank=rank)
    needs_teacher = from_main(lambda: survey.needs_teacher(epochs), rank)
    teacher = load_teacher(cfg, num_classes, rank, plan=plan) if needs_teacher else None
    if rank.is_main and teacher is not None:
        survey.compare_weights(teacher.weights)
    batch_size = loader.sampler.batch_size
    is_spread = rank.world_size > 1 and batch_size % plan.group_size != 0
    return StoredLabels(
        store,
        plan=plan,
        answer=answer,
        teacher=teacher,
        mode=cfg.labels_mode,
        is_mixing=cfg.is_mixing,
        is_spread=is_spread,
        rank=rank,
        claim=survey.claim,
    )


def check_teacher(cfg: Config, net: nn.Module, val_images: Images, rank: Rank, num_images: int = datasets.NUM_TEACHER_IMAGES) -> None:
    """InputError where the teacher `net` recognises too few of some validation images. It runs as it does in training."""
    parts = engine.EvalParts(rank=rank, amp_dtype=amp_dtype(rank.device), memory_format=torch.channels_last)
    loader = datasets.build_teacher_loader(cfg, val_images, rank, num_images)
    engine.check_teacher(net, loader, parts, num_classes=len(val_images.classes), min_acc1=cfg.teacher_min_acc1)


def open_store(cfg: Config, plan: Plan, num_classes: int) -> LabelStore:
    """The recipe's store. InputError where its codes cannot tell so many classes apart."""
    if num_classes > MAX_CLASSES:
        raise InputError(f"--teacher-labels stores class indices in 16 bits, for at most {MAX_CLASSES} classes; the data has {num_classes}: drop it")
    width = pick_answer(cfg, num_classes).width
    return LabelStore(cfg.teacher_labels, num_positions=plan.num_positions, num_groups=plan.num_positions // plan.group_size, width=width)


def from_main(make: Callable, rank: Rank):
    """What `make()` returns in the first process, in every process."""
    if rank.world_size == 1:
        return make()
    box = [make() if rank.is_main else None]
    dist.broadcast_object_list(box, src=0, group=rank.control)
    return box[0]


class Survey:
    """The first process's look at a store before a run: is it for this run, and what does it hold?"""

    def __init__(self, cfg: Config, store: LabelStore, loader: TrainLoader, *, num_classes: int, rank: Rank):
        self.cfg, self.store, self.loader = cfg, store, loader
        self.dataset: TrainingSet = loader.loader.dataset
        self.num_classes, self.rank = num_classes, rank
        self.manifest = self.here = None

    def needs_teacher(self, epochs: range) -> bool:
        """Whether the run needs the teacher. InputError where the store is not for this run, or not as the mode wants it."""
        self._compare()
        missing = [epoch for epoch in epochs if not self._is_stored(epoch)]
        mode = self.cfg.labels_mode
        if mode == "read" and (missing or self.manifest is None):
            raise InputError(
                f"--teacher-labels-mode read: {self.store.folder} lacks labels of {_brief(missing)}: "
                "make them with tools/make_teacher_labels.py, or use --teacher-labels-mode auto, which asks the teacher for them"
            )
        if missing:
            self.store.require_writable()
        needs_teacher = bool(missing) or mode in ("write", "verify")
        self._log(len(epochs), len(missing), needs_teacher=needs_teacher)
        return needs_teacher

    def _compare(self) -> None:
        """Read the manifest, if there is one; InputError naming each field in which this run differs."""
        self.manifest = read_manifest(self.store.folder)
        if self.manifest is None and self.store.epochs():
            raise InputError(
                f"{self.store.folder} holds labels but no {LABELS_MANIFEST}, which says what for: restore it from a copy, or choose another folder"
            )
        self.here = fingerprint(self.cfg, self.dataset, num_classes=self.num_classes, device=self.rank.device)
        if self.manifest is None:
            return
        self.manifest["fingerprint"] = translated(self.manifest["fingerprint"], self.here, self.dataset.images)
        if self.manifest["format"] != FORMAT:
            self._refuse([f"field format: the store has {self.manifest['format']}, this project writes {FORMAT}"])
        stored = {name: value for name, value in self.manifest["fingerprint"].items() if name != "teacher.weights"}
        self._refuse(differences(stored, self.here))
        self._refuse(self._canary_differences())
        weights = self._weights_at_hand()
        if weights is not None:
            self.compare_weights(weights)

    def _refuse(self, lines: list[str]) -> None:
        if lines:
            raise InputError(
                f"teacher labels in {self.store.folder}: {'; '.join(lines)}. "
                "Train with the data, settings and teacher that they were made for, or choose another --teacher-labels folder"
            )

    def _canary_differences(self) -> list[str]:
        count, stored = NUM_CANARIES, self.manifest["canary"]
        updates = differences(self.manifest["versions"], versions())
        if updates:
            count = NUM_WIDE_CANARIES
            log.warning("teacher labels in %s: %s; looking at %d views instead of %d", self.store.folder, "; ".join(updates), count, NUM_CANARIES)
        return canary_differences(stored, draw_canaries(self.cfg, self.dataset, count))

    def _weights_at_hand(self) -> str | None:
        """Hash of the teacher's weights where they are in a local file, which is all there is to tell without building the teacher."""
        path = self.cfg.teacher_path
        return hash_weights(read_weights(self.cfg)) if path is not None and os.path.isfile(os.path.expanduser(path)) else None

    def compare_weights(self, weights: str) -> None:
        """InputError where the store was made with other weights of the teacher; with which it is made, where it is yet to be."""
        self.here["teacher.weights"] = weights
        if self.manifest is not None:
            self._refuse(differences(self.manifest["fingerprint"], self.here))

    def claim(self) -> None:
        """Write the manifest, unless there is one by now. InputError where another run wrote one that is not for this run."""
        if self.manifest is None:
            manifest = {
                "format": FORMAT,
                "settings": {name: getattr(self.cfg, name) for name in config.ADOPTED},
                "fingerprint": self.here,
                "canary": draw_canaries(self.cfg, self.dataset, NUM_WIDE_CANARIES),
                "versions": versions(),
            }
            self.manifest = self.store.create_manifest(manifest)
            self._refuse(differences(self.manifest["fingerprint"], self.here))

    def _is_stored(self, epoch: int) -> bool:
        """Whether the store holds all labels of `epoch` that the run uses."""
        status = self.store.status(epoch) if self.cfg.labels_mode != "write" else None
        if status is None or status["num_filled"] == self.store.num_positions:
            return status is not None
        used = self.dataset.plan.positions(0, self.loader.num_steps * self.loader.global_batch)
        page = self.store.read(epoch)
        return page is not None and bool(page.is_filled[used].all())

    def _log(self, num_epochs: int, num_missing: int, *, needs_teacher: bool) -> None:
        mode = self.cfg.labels_mode
        then = {True: "the teacher labels what is missing, which is then stored", False: "the teacher is not built"}[needs_teacher]
        if not needs_teacher and "teacher.weights" not in self.here:
            then += ", and its weights are not compared (--teacher-path is no local file)"
        if mode == "verify":
            then = f"the teacher is asked again about one group in {VERIFY_ONE_IN}" + (", and about what is missing" if num_missing else "")
        if mode == "write":
            log.info("teacher labels: mode write: the teacher labels all %d epochs, and what %s lacks is stored", num_epochs, self.store.folder)
            return
        log.info("teacher labels: %d of %d epochs stored in %s; %s", num_epochs - num_missing, num_epochs, self.store.folder, then)


def _brief(epochs: list[int]) -> str:
    if not epochs:
        return "any run"
    return f"{len(epochs)} epochs, first {', '.join(map(str, epochs[:5]))}"


# ---- while training

VERIFY_ONE_IN = 16
# By how much of their range logits may move between kernels and devices: ten times and more what RegNetY-16GF and ResNet-50 showed
# (4e-7 between layouts and batch sizes, 5e-4 between float16 and float32).
NOISE = {"float32": 1e-5, "float16": 5e-3}


class StoredLabels:
    """What the teacher says of a student's mixed images, read where it is stored; the teacher's own answer where not, to be stored.

    `teacher` may be None where nothing is missing; `is_spread`: a mix group's images may be in several processes; `claim` is called by
    the first process before the first image, when the run is sure to begin."""

    def __init__(
        self,
        store: LabelStore,
        *,
        plan: Plan,
        answer: HardLabels | TopLogits,
        teacher: Teacher | None,
        mode: str,
        is_mixing: bool,
        is_spread: bool,
        rank: Rank,
        claim: Callable[[], None],
    ):
        self.store, self.plan, self.answer, self.teacher = store, plan, answer, teacher
        self.mode, self.is_mixing, self.is_spread, self.rank, self.claim = mode, is_mixing, is_spread, rank, claim
        self.groups = plan.groups_and_members(np.arange(plan.num_positions))[0]
        self.epoch = None

    @property
    def net(self) -> nn.Module | None:
        return self.teacher.net if self.teacher is not None else None

    def prepare(self, compiler: Compiler | NoCompiler, shape: tuple[int, ...]) -> None:
        """Compile the teacher, if there is one, for batches of that shape (B, 3, H, W)."""
        if self.teacher is not None:
            self.teacher.prepare(compiler, shape)

    def __call__(self, images: Tensor, batch: Batch, epoch: int) -> Tensor:
        if epoch != self.epoch:
            self.start_epoch(epoch)
        codes = self.codes[batch.positions]
        parts = self.plan.group_parts(batch.positions.numpy())
        shows_other = self._shows_other(batch, parts)
        codes[shows_other] = -1
        self.num_left_out += int(shows_other.sum())
        is_stored = codes[:, 0] != -1
        own, partner = self._classes(batch, parts)
        if self.num_stored:
            self._check_groups(batch, parts, labels=codes[:, 0], is_stored=is_stored, own=own, partner=partner)
        answers = sent(codes, images.device)
        for group, start, stop in parts:
            rows = slice(start, stop)
            is_missing = not is_stored[rows].all()
            if is_missing or self._is_verified(group):
                logits = self._logits(images[rows], epoch, group, damaged=batch.damaged if shows_other[rows].any() else ())
                if self._is_verified(group):
                    self._verify(logits, answers[rows], is_stored[rows], group=group)
                if is_missing:
                    self._fill(answers[rows], self.answer.encode(logits), is_stored[rows])
                    kept = start + np.flatnonzero(~shows_other[rows]) if shows_other[rows].any() else rows
                    self._keep(answers[kept], batch.positions[kept], hashes=batch.pixel_hashes[kept], own=own[kept], partner=partner[kept])
        return self.answer.decode(answers)

    def start_epoch(self, epoch: int) -> None:
        """Read what is stored of `epoch`; every process takes part."""
        self.epoch = epoch
        page = from_main(lambda: self._read(epoch), self.rank)
        self.codes = torch.from_numpy(page.codes.view(np.int16))
        num_stored = np.bincount(self.groups[page.is_filled], minlength=len(page.checks))
        self.expected = np.stack([num_stored, page.checks["num_agree"].astype(np.int64), page.checks["pixels"].view(np.int64)], axis=1)
        self.seen = np.zeros_like(self.expected)
        self.num_stored = int(num_stored.sum())
        self.num_verified = self.num_near_ties = self.num_left_out = 0
        self.verify_seed = from_main(lambda: secrets.randbits(62), self.rank)  # other groups in every run
        self.has_fresh = False

    def _read(self, epoch: int) -> Page:
        """What the first process finds of the epoch; in mode write nothing, though damage stops the run there too."""
        if self.teacher is not None:
            self.claim()
        page = self.store.read(epoch)
        if self.mode == "write":
            return self.store.blank_page()
        if page is not None and (stored := self.store.status(epoch)["order"]) != (here := order_hash(self.plan, epoch)):
            self._refuse(epoch, f"field order: the store has {stored}, this run has {here}")
        return page or self.store.blank_page()

    def _refuse(self, epoch: int, what: str) -> None:
        raise InputError(f"teacher labels in {self.store.folder}: epoch {epoch}, {what}")

    def _classes(self, batch: Batch, parts: list) -> tuple[np.ndarray, np.ndarray]:
        """(B,) class of each image, and of the image it is mixed with."""
        own = batch.targets.cpu().numpy()
        return own, self._of_partners(own, parts)

    def _of_partners(self, values: np.ndarray, parts: list) -> np.ndarray:
        """(B,) the value of the image that each is mixed with."""
        return np.concatenate([values[start:stop][::-1] for _, start, stop in parts]) if self.is_mixing else values

    def _shows_other(self, batch: Batch, parts: list) -> np.ndarray:
        """(B,) whether an image, or its partner, stands in for a damaged one: labels of such are neither read nor stored, for the store's
        are those of the images that it lists."""
        is_replaced = np.zeros(len(batch.targets), dtype=bool)
        is_replaced[list(batch.replaced)] = True
        return is_replaced | self._of_partners(is_replaced, parts)

    # ---- checks of what was read

    def _check_groups(self, batch: Batch, parts: list, *, labels: Tensor, is_stored: Tensor, own: np.ndarray, partner: np.ndarray) -> None:
        """InputError where the images of a group, or how many of its labels are their classes, are not those that were stored.

        Groups are checked when their last image has been seen, in whichever process and step."""
        labels, is_stored = labels.numpy().view(np.uint16), is_stored.numpy()
        is_agreeing = is_stored & ((labels == own) | (labels == partner))
        hashes = np.where(is_stored, batch.pixel_hashes.numpy(), 0)
        starts = [start for _, start, _ in parts]
        per_image = np.stack([is_stored, is_agreeing, hashes], axis=1).astype(np.int64)
        sums = np.concatenate([np.array([[group] for group, _, _ in parts]), np.add.reduceat(per_image, starts)], axis=1)
        if self.is_spread:
            is_whole = np.array([stop - start == self.plan.group_size for _, start, stop in parts])
            sums = np.concatenate([sums[is_whole], self._of_all_processes(sums[~is_whole])])
        np.add.at(self.seen, sums[:, 0], sums[:, 1:])
        for group in np.unique(sums[:, 0]):
            if self.expected[group, 0] and self.seen[group, 0] == self.expected[group, 0]:
                self._require_same(group)
                self.seen[group] = 0

    def _of_all_processes(self, sums: np.ndarray) -> np.ndarray:
        """The rows (group, sums) of every process; each has at most two, those of the groups that its micro-batch cuts."""
        own = torch.full((2, 4), -1)
        own[: len(sums)] = torch.from_numpy(sums)
        everyone = [torch.empty_like(own) for _ in range(self.rank.world_size)]
        dist.all_gather(everyone, own, group=self.rank.control)
        rows = torch.cat(everyone).numpy()
        return rows[rows[:, 0] >= 0]

    def _require_same(self, group: int) -> None:
        names = ("num_filled", "num_agree", "pixels")
        meanings = {
            "num_agree": "labels that are the class of their image or its partner; order, mixing or classes changed",
            "pixels": "sum of the images' hashes; a file, the decoder, a crop or another part of the augmentation changed",
        }
        for name, stored, here in zip(names, self.expected[group].tolist(), self.seen[group].tolist(), strict=True):
            if stored != here:
                self._refuse(self.epoch, f"group {group}: field {name}: the store has {stored}, this run has {here} ({meanings[name]})")

    def _is_verified(self, group: int) -> bool:
        """Whether it is the one that this run drew out of its block of groups."""
        if self.mode != "verify":
            return False
        block, member = divmod(group, VERIFY_ONE_IN)
        size = min(VERIFY_ONE_IN, self.store.num_groups - block * VERIFY_ONE_IN)
        return draw_words("verify", self.verify_seed, self.epoch, block)[0] % size == member

    def _verify(self, logits: Tensor, answers: Tensor, is_stored: Tensor, *, group: int) -> None:
        """InputError where the teacher's top class is not the stored one, unless its logits nearly tie."""
        stored, logits = answers[:, 0].long()[is_stored] & 0xFFFF, logits[is_stored]
        top = logits.max(dim=1)
        margin = top.values - logits.gather(1, stored.unsqueeze(1)).squeeze(1)
        is_tie = margin <= NOISE[precision(logits.device)] * (top.values - logits.amin(dim=1))
        is_other = top.indices != stored
        self.num_verified += len(stored)
        self.num_near_ties += int((is_other & is_tie).sum())
        wrong = torch.nonzero(is_other & ~is_tie).flatten().tolist()
        if wrong:
            i = wrong[0]
            self._refuse(
                self.epoch,
                f"group {group}: the teacher does not give the stored class to {len(wrong)} of {len(stored)} images, nor nearly: of the first it says "
                f"class {top.indices[i]}, the store {stored[i]}, {margin[i]:.4g} of a logit below. Other weights, device or library: make them anew elsewhere",
            )

    # ---- the teacher's answers, to be stored

    def _logits(self, images: Tensor, epoch: int, group: int, *, damaged: Sequence[tuple[str, str]]) -> Tensor:
        if self.teacher is None and damaged:
            name, reason = damaged[0]
            self._refuse(
                epoch,
                f"group {group}: {name} is damaged ({reason}); another image stands in for it, which the stored label is not for, and the teacher is "
                "not built: restore the file, or ask the teacher with --teacher-labels-mode verify; then --resume auto",
            )
        if self.teacher is None:
            self._refuse(epoch, f"group {group}: its labels are gone since the run began: start it again, with --resume auto")
        return self.teacher.logits(images)

    def _fill(self, answers: Tensor, fresh: Tensor, is_stored: Tensor) -> None:
        """Write the fresh answers where none are stored, in place."""
        answers.copy_(torch.where(is_stored.to(answers.device).unsqueeze(1), answers, fresh) if is_stored.any() else fresh)

    def _keep(self, answers: Tensor, positions: Tensor, *, hashes: Tensor, own: np.ndarray, partner: np.ndarray) -> None:
        if not self.has_fresh:
            self._make_room(answers.device)
            self.has_fresh = True
        self.fresh_codes[positions.to(answers.device, non_blocking=True)] = answers
        index = positions.numpy()
        self.own[index], self.partner[index], self.hashes[index] = own, partner, hashes.numpy()

    def _make_room(self, device: torch.device) -> None:
        num_positions = self.plan.num_positions
        self.fresh_codes = torch.full((num_positions, self.store.width), -1, dtype=torch.int16, device=device)
        self.own, self.partner, self.hashes = (np.zeros(num_positions, np.int64) for _ in range(3))

    def end_epoch(self, epoch: int) -> None:
        """Store what the teacher said in `epoch`, whole or not. Where that fails, training goes on, and says so."""
        if epoch != self.epoch:
            return
        counts = torch.tensor([self.num_verified, self.num_near_ties, self.num_left_out])
        if self.rank.world_size > 1:
            dist.all_reduce(counts, group=self.rank.control)
        *verified, num_left_out = counts.tolist()
        if self.mode == "verify":
            log.info("teacher labels: epoch %d: %d labels verified, %d differ, all near ties", epoch, *verified)
        if num_left_out:
            log.warning("teacher labels: epoch %d: %d labels are neither read nor stored, for damaged images were replaced", epoch, num_left_out)
        if any_process([self.has_fresh], self.rank)[0]:
            fresh = self._fresh_of_all_processes()
            if self.rank.is_main:
                self._commit(epoch, fresh)
        self.epoch = None

    def _fresh_of_all_processes(self) -> Fresh:
        """The teacher's answers of all processes; in the others than the first, part of them."""
        if not self.has_fresh:
            self._make_room(torch.device("cpu"))
        codes = self.fresh_codes.cpu().int() & 0xFFFF
        is_agreeing = torch.from_numpy((codes[:, 0].numpy() == self.own) | (codes[:, 0].numpy() == self.partner)).int()
        hashes = torch.from_numpy(self.hashes)
        if self.rank.world_size > 1:  # each position is in one process alone, and neutral in the others
            for values, operation in ((codes, dist.ReduceOp.MIN), (is_agreeing, dist.ReduceOp.MAX), (hashes, dist.ReduceOp.SUM)):
                dist.reduce(values, 0, operation, group=self.rank.control)
        return Fresh(codes.numpy().astype(np.uint16), self.groups, is_agreeing.bool().numpy(), hashes.numpy())

    def _commit(self, epoch: int, fresh: Fresh) -> None:
        try:
            merged = self.store.commit(epoch, fresh, order=order_hash(self.plan, epoch))
        except InputError as error:
            log.warning("%s. Training goes on; these labels are to be made again", first_line(error))
            return
        if merged.num_different:
            log.warning(
                "teacher labels: epoch %d: %d of %d labels differ from those that were stored first, which stay",
                epoch, merged.num_different, merged.num_known,
            )  # fmt: skip
