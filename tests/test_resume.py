"""Stopping anywhere and going on: the resumed run is, to the last bit, the run that never stopped."""

import json
import shutil
import signal
import time

import pytest
import timm
import torch

import engine
import main
from run import checkpoint, config, optim, signals
from run.errors import InputError
from tests.conftest import ROOT, SHORT_RUN, TINY_RUN, finish, read_log, run_forked, start, wait_for
from tests.test_main import states_equal, steady

DROPS = ["--drop=0.1", "--drop-path=0.1"]  # random state inside the model


def flags_of(digits_folder, folder, *more: str) -> list[str]:
    return [*SHORT_RUN, *DROPS, f"--data-path={digits_folder}", "--distillation-type=none", f"--output_dir={folder}", *more]


def assert_same_run(folder, expected) -> None:
    assert [steady(record) for record in read_log(folder)] == [steady(record) for record in read_log(expected)]
    ours, theirs = (torch.load(path / "checkpoint_last.pth", weights_only=True) for path in (folder, expected))
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "best_acc1", "best_ema_acc1", "epoch", "step"):
        assert states_equal(ours[key], theirs[key]), key


@pytest.fixture(scope="module")
def never_stopped(digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "whole"
    assert main.main(flags_of(digits_folder, folder)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 3])
def test_killed_inside_an_epoch_and_resumed(never_stopped, digits_folder, tmp_path, num_workers):
    """kill -9 some time after the first checkpoint; checkpoints every two of six steps."""
    flags = flags_of(digits_folder, tmp_path, "--checkpoint-steps=2", f"--num_workers={num_workers}")
    process = start("main.py", *flags)
    wait_for(tmp_path / "checkpoint_last.pth", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert main.main([*flags, "--resume=auto", "--num_workers=1"]) == 0
    assert_same_run(tmp_path, never_stopped)


# Settings that make the rates, the groups of parameters and the EMA functions of the step.
BY_STEPS = [
    *(flag for flag in TINY_RUN if not flag.startswith("--lr=")),
    "--drop=0.1", "--drop-path=0.1", "--layer-decay=0.7", "--sched-on-updates", "--warmup-steps=4", "--lr-cycle-limit=2", "--lr-cycle-decay=0.8",
    "--model-ema-warmup", "--freeze", "bn1", "layer1", "--bce-loss", "--bce-target-thresh=0.2", "--lr-base=0.01", "--opt-kwargs", "amsgrad=true",
    "--epochs=1", "--lr-noise", "0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped_by_steps(digits_folder, tmp_path_factory):
    """A run of two cycles of an epoch each."""
    folder = tmp_path_factory.mktemp("resume") / "steps"
    assert main.main([*BY_STEPS, f"--data-path={digits_folder}", f"--output_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("calls", [2, 8])
def test_rates_groups_and_averages_by_steps_go_on_where_they_were(never_stopped_by_steps, digits_folder, tmp_path, monkeypatch, calls):
    """Stopped inside the first or the second epoch; from then on activations are computed again in the backward pass, to the same numbers."""
    torch.set_num_threads(1)
    flags = [*BY_STEPS, f"--data-path={digits_folder}", f"--output_dir={tmp_path}"]
    update, averaged = optim.Ema.update, []
    monkeypatch.setattr(optim.Ema, "update", lambda ema, *args: (averaged.append(ema.num_updates), update(ema, *args))[1])
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(calls))
    assert main.main(flags) == 85
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(1000))
    assert main.main([*flags, "--resume=auto", "--grad-checkpointing"]) == 0
    assert_same_run(tmp_path, never_stopped_by_steps)
    assert averaged == list(range(1, 13))  # steps of both epochs
    cfg, _ = config.parse(flags)
    scheduler = optim.build_scheduler(cfg, optim.build_optimizer(cfg, timm.create_model("resnet18", num_classes=4), 16), 6)
    expected = [(scheduler.step_update(step), optim.current_lr(scheduler.optimizer))[1] for step in (5, 11)]
    assert [record["train_lr"] for record in read_log(tmp_path)] == expected


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--freeze=layer1"], "--freeze changed"),
        (["--layer-decay=none"], "--layer-decay changed"),
        (["--opt=adam"], "--opt changed"),
        (["--opt-kwargs", "amsgrad=false"], "--opt-kwargs changed"),
    ],
)
def test_another_optimiser_and_other_groups_of_parameters_are_refused_even_where_the_recipe_may_change(
    never_stopped_by_steps, digits_folder, tmp_path, flags, word
):
    source = never_stopped_by_steps / "checkpoint_last.pth"
    with pytest.raises(InputError, match=f"{word}.*--finetune"):
        main.main([*BY_STEPS, f"--data-path={digits_folder}", f"--output_dir={tmp_path}", f"--resume={source}", "--allow-config-change", *flags])


class StopAt(signals.StopRequest):
    """A request to stop that arrives during one chosen step of the run."""

    def __init__(self, calls: int):
        self.left = calls

    @property
    def is_made(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("calls", [0, 3, 5, 6, 9])
def test_stopped_at_any_step_and_resumed(never_stopped, digits_folder, tmp_path, monkeypatch, calls):
    """Five looks at the request inside an epoch of six steps, one after it."""
    torch.set_num_threads(1)
    flags = flags_of(digits_folder, tmp_path)
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(calls))
    assert main.main(flags) == 85
    saved = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) == {0: (-1, 1), 3: (-1, 4), 5: (0, 0), 6: (0, 1), 9: (0, 4)}[calls]
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(1000))
    assert main.main([*flags, "--resume=auto"]) == 0
    assert_same_run(tmp_path, never_stopped)


@pytest.mark.slow
def test_a_signal_has_it_save_and_exit_with_85(never_stopped, digits_folder, tmp_path):
    flags = flags_of(digits_folder, tmp_path, "--num_workers=2", "--checkpoint-steps=1")
    process = start("main.py", *flags)
    wait_for(tmp_path / "checkpoint_last.pth", process)
    process.send_signal(signal.SIGTERM)
    out = finish(process, 85)
    assert "told to stop: saved after" in out
    assert main.main([*flags, "--resume=auto"]) == 0
    assert_same_run(tmp_path, never_stopped)


@pytest.mark.slow
def test_two_processes_stopped_inside_an_epoch_and_resumed(digits_folder, tmp_path):
    """One of the two is asked to stop; both agree on the step (here after each), and the statistics of each go on."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script = tmp_path / "stop.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport json, os, signal, engine, main, utils\nfrom tests.programs.processes import launch\n"
        "real, utils.AGREE_EVERY_S = engine.train_step, 0\nwhole, cut, resumed = json.loads(sys.argv[1])\n"
        "def step_then_ask(parts, *args, epoch, step):\n    loss = real(parts, *args, epoch=epoch, step=step)\n"
        "    if parts.rank.index == 1 and (epoch, step) == (1, 2): os.kill(os.getpid(), signal.SIGUSR1)\n    return loss\n"
        "found = [launch(2, 'main', whole)]\nengine.train_step = step_then_ask\nfound.append(launch(2, 'main', cut))\n"
        f"engine.train_step = real\nos.link({str(cut / 'checkpoint_last.pth')!r}, {str(tmp_path / 'stopped.pth')!r})\n"
        f"open({str(cut / 'checkpoint_7.pth')!r}, 'w').close()\nprint(json.dumps([*found, launch(2, 'main', resumed)]))\n"
    )
    argvs = [flags_of(digits_folder, folder, "--batch-size=8", "--epochs=2") for folder in (whole, cut)]
    done = run_forked(str(script), json.dumps([*argvs, [*argvs[1], "--resume=auto"]]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [codes for codes, *_ in found] == [[0, 0], [85, 85], [0, 0]], found
    saved = torch.load(tmp_path / "stopped.pth", weights_only=True)
    assert (saved["epoch"], saved["step"], len(saved["loss_sums"])) == (0, 3, 2)
    assert found[2][2].count(f"passed over: {cut / 'checkpoint_7.pth'}") == 1  # the first process chooses for both
    assert_same_run(cut, whole)


def test_random_state_inside_the_model_depends_on_the_step_alone(digits_folder, tmp_path, never_stopped, monkeypatch):
    """Scrambling torch's generator between the steps changes nothing."""
    torch.set_num_threads(1)
    real = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda *args, **kwargs: (torch.manual_seed(time.time_ns() % 1000), real(*args, **kwargs))[1])
    assert main.main(flags_of(digits_folder, tmp_path)) == 0
    assert_same_run(tmp_path, never_stopped)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size=32"], ["global_batch was 16, is 32"]),
        (["--epochs=9", "--lr=1e-3"], ["epochs was 2, is 9", "lr was 0.03, is 0.001"]),
        (["--mix-group-size=8", "--batch-size=16"], ["mix_group_size was 16, is 8"]),
        (["--mixup=0.5"], ["mixup was 0.8, is 0.5"]),
        (["--layer-decay=0.9"], ["layer_decay was None, is 0.9"]),
        (["--data-set=DIGITS"], ["data_set was IMNET, is DIGITS", "num_images was 96, is 1437"]),
    ],
)
def test_changed_recipe_is_refused_with_the_list_of_differences(never_stopped, digits_folder, tmp_path, flags, words):
    shutil.copytree(never_stopped, tmp_path / "run")
    before = (tmp_path / "run" / "log.txt").read_text()
    argv = [flag for flag in flags_of(digits_folder, tmp_path / "run", *flags, "--resume=auto") if not ("DIGITS" in str(flags) and "--data-path" in flag)]
    with pytest.raises(InputError) as error:
        main.main(argv)
    assert [word for word in [*words, "--allow-config-change"] if word not in str(error.value)] == []
    assert (tmp_path / "run" / "log.txt").read_text() == before


def test_changed_model_is_refused(never_stopped, digits_folder):
    with pytest.raises(InputError, match="model was recnext_m0, is recnext_m1"):
        main.main([*flags_of(digits_folder, never_stopped, "--resume=auto"), "--model=recnext_m1"])


def test_accepted_change_takes_the_new_recipes_rates(never_stopped, digits_folder, tmp_path):
    shutil.copytree(never_stopped, tmp_path / "run")
    flags = ["--epochs=4", "--lr=6e-2", "--weight-decay=0.5", "--resume=auto", "--allow-config-change"]
    assert main.main(flags_of(digits_folder, tmp_path / "run", *flags)) == 0
    log = read_log(tmp_path / "run")
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
    cfg, _ = config.parse([*flags_of(digits_folder, tmp_path, "--epochs=4", "--lr=6e-2")])
    scheduler = optim.build_scheduler(cfg, optim.build_optimizer(cfg, torch.nn.Linear(2, 2), 16))
    scheduler.step(1)
    assert log[2]["train_lr"] == scheduler.optimizer.param_groups[0]["lr"]
    saved = torch.load(tmp_path / "run" / "checkpoint_last.pth", weights_only=True)
    assert {group["weight_decay"] for group in saved["optimizer"]["param_groups"]} == {0.0, 0.5}


def test_the_same_run_goes_on_with_other_batches_per_process(never_stopped, digits_folder, tmp_path):
    """Half the batch, twice the accumulation: the recipe did not change."""
    shutil.copytree(never_stopped, tmp_path / "run")
    assert main.main(flags_of(digits_folder, tmp_path / "run", "--batch-size=8", "--grad-accum-steps=2", "--resume=auto")) == 0


def test_minutes_between_checkpoints(digits_folder, tmp_path, monkeypatch):
    written = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda saved, folder, names: (written.append((saved["epoch"], saved["step"])), real(saved, folder, names)))
    assert main.main(flags_of(digits_folder, tmp_path, "--checkpoint-minutes=1e-9", "--epochs=1")) == 0
    assert written == [(-1, step) for step in range(6)] + [(0, 0)]  # the first before the first step


def test_sizes_that_grow_and_views_of_an_image_go_on_where_they_were(digits_folder, tmp_path, monkeypatch):
    """Stopped before and after the images grow, with other loader processes then."""
    torch.set_num_threads(1)
    more = ["--image-size-schedule=24:0,32:0.5", "--mixup=0", "--cutmix=0", "--aa=augmix-m3-w2-d2", "--aug-splits=2", "--jsd-loss", "--vflip=0.3"]
    assert main.main(flags_of(digits_folder, tmp_path / "whole", *more)) == 0
    flags = flags_of(digits_folder, tmp_path / "cut", *more)
    for calls, workers in ((2, 1), (5, 0), (1000, 2)):  # in the first epoch's third step, in the second epoch's second, never
        monkeypatch.setattr(signals, "StopRequest", lambda calls=calls: StopAt(calls))
        assert main.main([*flags, "--resume=auto", f"--num_workers={workers}"]) == (85 if calls < 1000 else 0)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(InputError, match="image_size_schedule was 24:0,32:0.5, is None"):
        main.main(flags_of(digits_folder, tmp_path / "cut", *more, "--image-size-schedule=none", "--resume=auto"))
