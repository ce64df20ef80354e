"""What a run does about steps that are not finite: it tells, goes on, goes back or stops, and keeps what it saved sound."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import engine
import losses
import main
from run import checkpoint, config, watch
from run.errors import DamagedImages, InputError
from run.skipping import NO_STEP, Skips
from tests.conftest import TINY, TINY_RUN, read_log
from tests.test_main import states_equal, steady

ALONE = engine.Rank(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def run(short_run, monkeypatch):
    """A run of 2 epochs of 6 steps; the losses of the calls in `spoilt` (of the criterion, from 0 on) are NaN."""

    def run_spoilt(folder, *flags: str, spoilt=range(0), looks_often: bool = True) -> str:
        calls, build = iter(range(10**6)), losses.build_criterion

        def build_criterion(cfg):
            criterion = build(cfg)
            return lambda *args: criterion(*args) * (math.nan if next(calls) in spoilt else 1)

        with monkeypatch.context() as patch:
            patch.setattr(losses, "build_criterion", build_criterion)
            patch.setattr(engine, "REPORT_EVERY_S", -1.0 if looks_often else 1e9)
            return short_run(*TINY, f"--output_dir={folder}", *flags)

    return run_spoilt


@pytest.fixture(scope="module")
def unhurt(digits_folder, tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("unhurt") / "run"
    torch.set_num_threads(1)
    main.main([*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={folder}"])
    return folder


def assert_same_run(folder, expected) -> None:
    assert [steady(record) for record in read_log(folder)] == [steady(record) for record in read_log(expected)]
    ours, theirs = (checkpoint.read(str(path / "checkpoint_last.pth")) for path in (folder, expected))
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "best_acc1"):
        assert states_equal(ours[key], theirs[key]), key


def test_a_skipped_step_is_counted_and_named_and_the_run_goes_on(run, tmp_path):
    out = run(tmp_path, spoilt={8}, looks_often=False)
    assert re.findall(r"^\d+ steps? of epoch.*", out, re.M) == [
        "1 step of epoch 1 left out so far, the last was step 2 (learning rate 1.00e-06, float32): loss or gradients were not finite"
    ]
    log = read_log(tmp_path)
    assert [record["skipped_steps"] for record in log] == [0, 1]
    assert all(math.isfinite(record["train_loss"]) for record in log)


def test_the_mean_loss_is_that_of_the_steps_that_were_taken(run, tmp_path, capsys):
    """At a learning rate of zero the steps' losses do not depend on one another."""
    still = ["--lr=0", "--warmup-lr=0", "--min-lr=0", "--epochs=1"]
    whole = run(tmp_path / "whole", *still)
    seen = [float(loss) for loss in re.findall(r"step \d/6  loss ([\d.]+)", whole)]
    first_five = seen[4]
    run(tmp_path / "cut", *still, spoilt={5})
    assert read_log(tmp_path / "cut")[0]["train_loss"] == pytest.approx(first_five, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "spoilt"),
    [(["--max-skipped-steps=3"], range(8, 11)), (["--on-nonfinite=rollback"], {9})],
)
def test_going_back_from_a_passing_fault_ends_like_a_run_without_it(run, unhurt, tmp_path, flags, spoilt):
    out = run(tmp_path / "hurt", *flags, spoilt=spoilt)
    assert out.count(f"Going back to {tmp_path / 'hurt' / 'checkpoint_last.pth'}, epoch 1, step 0") == 1
    assert_same_run(tmp_path / "hurt", unhurt)


def test_going_back_inside_an_epoch_with_loader_processes(run, unhurt, tmp_path):
    out = run(tmp_path / "hurt", "--max-skipped-steps=2", "--checkpoint-steps=2", "--num_workers=2", spoilt={9, 10})
    assert "Going back to" in out and "epoch 1, step 2" in out
    assert_same_run(tmp_path / "hurt", unhurt)


@pytest.mark.parametrize(
    ("flags", "spoilt", "times", "where"),
    [
        (["--max-skipped-steps=3"], range(8, 99), 1, r"3 steps in a row, the last was step 2 of epoch 1"),
        (["--on-nonfinite=rollback"], range(8, 99), 1, r"in step 0 of epoch 1"),
        (["--on-nonfinite=stop"], {8}, 0, r"in step 2 of epoch 1"),
        (["--max-skipped-steps=3"], range(2, 99), 1, r"3 steps in a row, the last was step 2 of epoch 0"),
    ],
)
def test_a_lasting_fault_ends_the_run_with_its_place_and_cure(run, tmp_path, capsys, flags, spoilt, times, where):
    with pytest.raises(
        InputError, match=where + r" \(learning rate 1.00e-06, precision float32\): run again, every module.*Try a lower --lr\. .*--resume auto"
    ):
        run(tmp_path, *flags, spoilt=spoilt)
    assert capsys.readouterr().out.count("Going back to") == times
    if min(spoilt) > 5:
        assert checkpoint.read(str(tmp_path / "checkpoint_last.pth"))["epoch"] == 0 and len(read_log(tmp_path)) == 1


@pytest.mark.parametrize(
    ("flags", "rate", "cure"),
    [(["--lr=1e8"], r"3.12e\+06", "a lower --lr"), ([*TINY, "--opt=sgd", "--lr=1e30", "--clip-grad=none"], r"3.13e\+28", "a lower --lr, --clip-grad 1")],
)
def test_a_network_that_cannot_be_evaluated_either_is_not_saved(short_run, tmp_path, flags, rate, cure):
    """The first step sends the weights far away, and there are fewer steps than may be skipped."""
    where = r"5 steps in a row, the last was step 5 of epoch 0 \(learning rate " + rate
    with pytest.raises(InputError, match=where + r".*the first module whose output is not finite is .* \((Depthwise)?Conv2d\)\. Try " + cure):
        short_run(*flags, "--warmup-epochs=0", f"--output_dir={tmp_path}")
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint_last.pth"] and not (tmp_path / "log.txt").exists()
    saved = checkpoint.read(str(tmp_path / "checkpoint_last.pth"))
    assert (saved["epoch"] + 1, saved["step"]) == (0, 0)


@pytest.fixture
def spoil_weights(monkeypatch):
    """Sends a weight to infinity after the steps, (epoch, step), that it is given; each once if `is_passing`."""

    def spoil(steps: list, *, is_passing: bool) -> None:
        left, real = list(steps), engine.train_step

        def step_then_spoil(parts, state, *args, epoch, step):
            loss = real(parts, state, *args, epoch=epoch, step=step)
            if (epoch, step) in left:
                state.net.fc.bias.data[0] = torch.inf
                left[:] = [] if is_passing else left
            return loss

        monkeypatch.setattr(engine, "train_step", step_then_spoil)

    return spoil


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, capsys, spoil_weights):
    run(tmp_path, "--epochs=1")
    before = checkpoint.read(str(tmp_path / "checkpoint_last.pth"))
    spoil_weights([(1, 0)], is_passing=False)
    with pytest.raises(InputError, match=r"model.fc.bias is not finite before step 1 of epoch 1, and was not saved \(.*: the weight fc.bias is not finite"):
        run(tmp_path, "--resume=auto", "--allow-config-change", "--checkpoint-steps=1")
    assert capsys.readouterr().out.count("Going back to") == 1
    after = checkpoint.read(str(tmp_path / "checkpoint_last.pth"))
    assert states_equal(before["model"], after["model"]) and not list(tmp_path.glob("*.tmp*"))


def test_an_epoch_that_could_not_be_saved_is_logged_once(run, unhurt, tmp_path, spoil_weights):
    spoil_weights([(1, 5)], is_passing=True)
    out = run(tmp_path / "hurt")
    assert "model.fc.bias is not finite before step 0 of epoch 2" in out and "1 lines of log.txt from epoch 1 on moved" in out
    assert_same_run(tmp_path / "hurt", unhurt)


def test_damaged_weights_are_nothing_to_start_from(run, tmp_path):
    run(tmp_path / "a", "--epochs=0")
    saved = checkpoint.read(str(tmp_path / "a" / "checkpoint_last.pth"))
    saved["model"]["fc.bias"][0] = torch.nan
    torch.save(saved, tmp_path / "a" / "checkpoint_last.pth")
    with pytest.raises(InputError, match=r"what the run starts from is damaged \(model.fc.bias is not finite .*: start from other weights"):
        run(tmp_path / "b", f"--finetune={tmp_path / 'a' / 'checkpoint_last.pth'}")


def test_damaged_images_are_told_of_also_where_the_weights_are_not_worth_saving():
    def refuse(names: list[str]) -> None:
        raise watch.NotFinite("model.fc.bias is not finite", epoch=0, step=1)

    saver = object.__new__(engine.Saver)
    saver.parts, saver.state, saver._write = SimpleNamespace(end_epoch=lambda epoch: None), SimpleNamespace(epoch=0), refuse
    with pytest.raises(DamagedImages, match="2 images"), saver.saving_if_damaged():
        raise DamagedImages("2 images are damaged")


@pytest.mark.parametrize("path", ["model.stem.weight", "model_ema.stem.weight", "optimizer.state.0.exp_avg"])
def test_weights_average_and_moments_are_looked_at_before_saving(path):
    net = {"stem.weight": torch.ones(2), "batches": torch.tensor(3)}
    saved = {
        "model": net,
        "model_ema": copy.deepcopy(net),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }
    watch.require_finite(saved, ALONE, epoch=0, step=0)
    watch.require_finite({**saved, "model_ema": None}, ALONE, epoch=0, step=0)
    dict(watch.tensors_of(saved))[path][1] = -torch.inf
    with pytest.raises(watch.NotFinite, match=re.escape(path)):
        watch.require_finite(saved, ALONE, epoch=0, step=0)


def test_all_processes_refuse_to_save_what_is_not_finite_in_one(monkeypatch):
    monkeypatch.setattr(watch, "gather_objects", lambda own, rank: [own, "model.stem.weight"])
    with pytest.raises(watch.NotFinite, match="model.stem.weight"):
        watch.require_finite({"model": {}, "model_ema": None, "optimizer": {}}, ALONE, epoch=0, step=0)


class Overflows(nn.Module):
    def forward(self, x):
        return {"features": [x * 2, (x * 1e30) ** 2]}


class Takes(nn.Module):
    def forward(self, x):
        return x["features"][1].sum()


def test_the_first_module_whose_output_is_not_finite_is_found():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Overflows()), Takes())
    assert watch.first_nonfinite_in(net, lambda: net(torch.ones(1, 2))) == "the first module whose output is not finite is 1.1 (Overflows)"
    assert not any(module._forward_hooks for module in net.modules())
    assert watch.first_nonfinite_in(net[0], lambda: net[0](torch.ones(1, 2))) is None
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    assert watch.first_nonfinite_in(net, lambda: None) == "the weight 0.weight is not finite"


def watch_of(*flags: str, amp_dtype=None) -> watch.Watch:
    return watch.Watch(config.parse(["--data-set=DIGITS", *flags])[0], amp_dtype)


def test_a_loss_scale_that_is_too_high_stops_nothing_at_once():
    eager = watch_of("--on-nonfinite=stop", amp_dtype=torch.float16)
    eager.look(Skips(2, 5, 0, 7), num_skipped=5, epoch=0, lr=0.1)
    assert not eager.is_tripped
    eager.look(Skips(0, 20, 0, 30), num_skipped=25, epoch=0, lr=0.1)
    assert eager.is_tripped
    eager.look(Skips(1, 1, 1, 7), num_skipped=1, epoch=0, lr=0.1)
    assert eager.is_tripped


def test_advice_depends_on_what_is_not_tried_yet():
    assert "--amp bf16 or none" in watch_of(amp_dtype=torch.float16).advice() and "--clip-grad" not in watch_of().advice()
    assert "--amp none" in watch_of(amp_dtype=torch.bfloat16).advice() and "--amp" not in watch_of().advice()
    assert "--clip-grad 1" in watch_of("--clip-grad=none").advice()


def test_an_epoch_that_went_well_earns_another_way_back_in_mode_rollback_alone():
    for mode, may_go_back in (("rollback", True), ("skip", False), ("stop", False)):
        one = watch_of(f"--on-nonfinite={mode}")
        one.has_gone_back = True
        assert not one.may_go_back()
        one.look(Skips(0, 0, 0, NO_STEP), num_skipped=0, epoch=3, lr=0.1)
        one.end_epoch(ALONE, epoch=3, num_steps=5, test_loss=1.0)
        assert one.may_go_back() == may_go_back
