"""The engine against numbers recorded on the published training loop: losses, rates, clipping, distillation and EMA at once."""

import numpy as np
import pytest
import timm
import torch

import engine
import losses
import model
import utils
from distillation.teacher import Teacher, no_teacher, pick_answer
from loading import augment, keys
from loading.batches import Batch
from run import clipping, config, hardware, optim
from run.checkpoint import TrainState
from tests.conftest import ROOT
from tests.golden.golden import golden_input, load_golden_weights

CASES = sorted((ROOT / "tests" / "golden" / "training").glob("*.npz"))
NUM_EPOCHS, NUM_STEPS, BATCH = 4, 6, 8
CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))


def batches(epoch: int):
    for i in range(NUM_STEPS):
        images = golden_input((BATCH, 3, 64, 64), 1000 + NUM_STEPS * epoch + i, torch.float64)
        yield Batch(images, torch.tensor([(3 * j + NUM_STEPS * epoch + i) % 10 for j in range(BATCH)]), torch.arange(BATCH))


def sequential_mixing(cfg):
    """Mixing that draws from one generator per epoch, as the recorded runs did; the mix itself is the engine's."""
    if not cfg.is_mixing:
        return augment.no_mixing
    mixer, generators = augment.build_mixer(cfg, num_classes=10), {}
    return lambda images, targets, epoch, positions: mixer(images, targets, generators.setdefault(epoch, np.random.RandomState(epoch)))


def build(cfg):
    net = load_golden_weights(model.create_model("recnext_m0", num_classes=10, distillation=cfg.distillation != "none").double())
    optimizer = optim.build_optimizer(cfg, net, BATCH)
    state = TrainState(
        net=net,
        ema=optim.build_ema(cfg, net),
        optimizer=optimizer,
        scheduler=optim.build_scheduler(cfg, optimizer),
        scaler=hardware.build_scaler("none", CPU.device),
    )
    teacher = no_teacher
    if cfg.distillation != "none":
        plan = keys.build_plan(BATCH, repeated_aug=False, group_size=BATCH, lanes=1, data_seed=0)
        teacher = Teacher(load_golden_weights(timm.create_model("regnety_002", num_classes=10).double()), answer=pick_answer(cfg, 10), plan=plan)
    clip = clipping.build_clipping(cfg)
    return state, engine.Parts(criterion=losses.build_criterion(cfg), teacher=teacher, mix=sequential_mixing(cfg), clip=clip, rank=CPU)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_engine_reproduces_the_published_loop(path, monkeypatch):
    golden = np.load(path)
    cfg, _ = config.parse([*str(golden["args"]).split(), "--data-path", "unused"])
    state, parts = build(cfg)
    step_losses = []
    real_step = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda *args, **kwargs: step_losses.append(real_step(*args, **kwargs)) or step_losses[-1])
    for epoch in range(NUM_EPOCHS):
        done = engine.train_one_epoch(parts, state, batches(epoch), num_steps=NUM_STEPS, epoch=epoch, num_epochs=cfg.epochs, images_per_step=BATCH)
        state.end_epoch()
        state.scheduler.step(epoch)
        assert done["train_lr"] == pytest.approx(golden["epoch_lr"][epoch], rel=1e-12)
        assert done["train_loss"] == pytest.approx(golden["epoch_loss"][epoch], rel=1e-6)
    np.testing.assert_allclose([loss.item() for loss in step_losses], golden["losses"], rtol=1e-6)
    for recorded, net in ((golden["norms"], state.net), (golden["ema_norms"], state.ema.module)):
        norms = {name: value.double().norm().item() for name, value in net.state_dict().items()}
        names = [name for name in golden["names"] if not name.endswith("num_batches_tracked")]
        np.testing.assert_allclose([norms[name] for name in names], [n for n, k in zip(recorded, golden["names"], strict=True) if k in names], rtol=1e-5)
    groups = sorted(f"{group['weight_decay']}:{len(group['params'])}" for group in state.optimizer.param_groups)
    assert groups == sorted(golden["groups"])
