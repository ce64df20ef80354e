"""Whole runs through main on real JPEGs: train, distil, stop, resume, evaluate."""

import json
import math
import re
import shutil

import pytest
import torch
import yaml

import datasets
import engine
import main
import model
import utils
from distillation import teacher
from loading import keys
from loading.batches import Batch
from run import checkpoint, config, records
from run.errors import InputError
from tests.conftest import ROOT, SHORT_RUN, SMALL_NET, TINY_RUN, read_log, run_command

PUBLISHED_KEYS = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
UNSTEADY = {"images_per_s", "data_wait_s", "epoch_s", "eval_s"}
ACCURACY = re.compile(r"Accuracy of the network on the (\d+) test images: acc1 (\d+\.\d{3}) acc5 (\d+\.\d{3}) loss (\d+\.\d{4})")


def steady(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in UNSTEADY}


def states_equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(states_equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def finished(digits_folder, tmp_path_factory):
    """A run of three epochs that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    main.main([*SHORT_RUN, f"--data-path={digits_folder}", "--distillation-type=none", "--epochs=3", f"--output_dir={folder}"])
    return folder


def test_log_has_one_strict_json_object_per_epoch_published_keys_first(finished):
    lines = (finished / "log.txt").read_text().splitlines()
    log = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert [record["epoch"] for record in log] == [0, 1, 2]
    assert [list(record)[:8] for record in log] == [[*PUBLISHED_KEYS, "test_ema_acc1"]] * 3
    assert {"images_per_s", "data_wait_s", "skipped_steps"} <= set(log[0])
    assert log[0]["n_parameters"] == sum(p.numel() for p in model.create_model("recnext_m0", num_classes=4, **SMALL_NET).parameters())
    assert max(record["test_acc1"] for record in log) == log[-1]["best_acc1"]


def test_folder_holds_plain_checkpoints_and_settings(finished):
    assert {path.name for path in finished.glob("*.pth")} >= {"checkpoint_last.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth", "checkpoint_2.pth"}
    saved = torch.load(finished / "checkpoint_last.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"} <= set(saved)
    assert list(saved["model"]) == list(model.create_model("recnext_m0", num_classes=4, **SMALL_NET).state_dict())
    assert (saved["class_names"], saved["input_size"], saved["crop_pct"]) == (["0", "1", "2", "3"], 32, 1.0)
    assert saved["metrics"] == read_log(finished)[-1]


def test_saved_settings_run_the_same_again(finished, tmp_path):
    settings = yaml.safe_load((finished / "args.yaml").read_text())
    assert settings["lr"] == 3e-2 and settings["output_dir"] == str(finished)
    main.main(["--config", str(finished / "args.yaml"), "--output_dir", str(tmp_path)])
    assert [steady(record) for record in read_log(tmp_path)] == [steady(record) for record in read_log(finished)]


def test_resumed_run_equals_one_never_stopped(finished, tmp_path, short_run, monkeypatch):
    """Killed after the log line of epoch 1, before its checkpoint: the epoch is trained again and logged once."""
    real_save = checkpoint.save

    def die_at_epoch_1(saved, folder, names):
        if saved["epoch"] == 1:
            raise KeyboardInterrupt
        real_save(saved, folder, names)

    monkeypatch.setattr(checkpoint, "save", die_at_epoch_1)
    with pytest.raises(KeyboardInterrupt):
        short_run("--epochs=3", f"--output_dir={tmp_path}")
    assert [record["epoch"] for record in read_log(tmp_path)] == [0, 1]
    monkeypatch.setattr(checkpoint, "save", real_save)
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"train_lr": 0.1, "tra')  # half a line
    with (tmp_path / "log.txt").open("ab") as file:
        file.write(b"\xff\xfe\x00")  # a torn block
    short_run("--epochs=3", f"--output_dir={tmp_path}", "--resume=auto")
    assert [steady(record) for record in read_log(tmp_path)] == [steady(record) for record in read_log(finished)]
    ours, theirs = (torch.load(folder / "checkpoint_last.pth", weights_only=True) for folder in (tmp_path, finished))
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "best_acc1", "best_ema_acc1"):
        assert states_equal(ours[key], theirs[key]), key
    assert len((tmp_path / "log_dropped.txt").read_text().splitlines()) == 2


def test_resuming_a_finished_run_changes_nothing(finished, short_run):
    before = (finished / "log.txt").read_text()
    short_run("--epochs=3", f"--resume={finished / 'checkpoint_last.pth'}")
    assert (finished / "log.txt").read_text() == before


def test_resume_auto_starts_where_there_is_nothing_to_continue(tmp_path, short_run):
    short_run("--epochs=1", f"--output_dir={tmp_path / 'new'}", "--resume=auto")
    assert len(read_log(tmp_path / "new")) == 1


def test_a_folder_that_holds_a_run_is_refused_or_overwritten(finished, tmp_path, short_run):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run: continue it with --resume auto"):
        short_run(f"--output_dir={tmp_path / 'run'}")
    assert len(read_log(tmp_path / "run")) == 3
    short_run(f"--output_dir={tmp_path / 'run'}", "--overwrite", "--epochs=1")
    assert len(read_log(tmp_path / "run")) == 1 and not (tmp_path / "run" / "checkpoint_2.pth").exists()


def test_default_folder_names_model_and_time(tmp_path, monkeypatch, short_run):
    monkeypatch.chdir(tmp_path)
    short_run("--epochs=1")
    (log,) = tmp_path.glob("checkpoints/recnext_m0/*/log.txt")
    assert re.fullmatch(r"\d{8}-\d{6}", log.parent.name)


def test_only_the_last_three_numbered_checkpoints_stay(tmp_path):
    for epoch in (0, 1, 2, 3, 9):
        (tmp_path / f"checkpoint_{epoch}.pth").touch()
    (tmp_path / "checkpoint_best.pth").touch()
    checkpoint.prune(tmp_path, 3, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint_{name}.pth" for name in ("1", "2", "3", "9", "best")]


@pytest.mark.parametrize("flags", [[], ["--use-ema"]])
def test_evaluation_fuses_and_ends_with_the_training_runs_accuracy(finished, short_run, flags, monkeypatch):
    fused, real = [], engine.report
    monkeypatch.setattr(engine, "report", lambda net, *args, **kwargs: fused.append(net) or real(net, *args, **kwargs))
    out = short_run("--eval", f"--resume={finished / 'checkpoint_last.pth'}", *flags)
    match = ACCURACY.fullmatch(out.splitlines()[-1])
    prefix = "test_ema_" if flags else "test_"
    last = read_log(finished)[-1]
    assert int(match[1]) == 40
    assert (float(match[2]), float(match[3])) == pytest.approx((last[prefix + "acc1"], last[prefix + "acc5"]), abs=5e-4)
    assert float(match[4]) == pytest.approx(last[prefix + "loss"], abs=2e-4)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in fused[0].modules())


def test_evaluation_warns_of_another_size_and_other_classes(finished, short_run, digits_folder, tmp_path):
    out = short_run("--eval", f"--resume={finished / 'checkpoint_last.pth'}", "--input-size=40", "--crop-mode=squash", "--mean=0.5")
    assert set(re.findall(r"made with other (\w+)", out)) == {"input_size", "crop_pct", "crop_mode", "mean"}
    shutil.copytree(digits_folder / "val", tmp_path / "val")
    (tmp_path / "val" / "3").rename(tmp_path / "val" / "drei")
    out = short_run("--eval", f"--resume={finished / 'checkpoint_last.pth'}", f"--data-path={tmp_path}")
    assert "made with other class_names" in out


def test_report_holds_per_class_accuracy_and_confusions(finished, short_run, tmp_path):
    out = short_run("--eval", f"--resume={finished / 'checkpoint_last.pth'}", f"--report={tmp_path / 'out.csv'}")
    rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert rows[0][:4] == ["class", "images", "correct", "acc1"] and [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]
    counts = torch.tensor([[int(cell) for cell in row[4:]] for row in rows[1:]])
    assert counts.sum() == 40 and counts.sum(1).tolist() == [int(row[1]) for row in rows[1:]]
    assert 100 * counts.diag().sum() / 40 == pytest.approx(float(ACCURACY.search(out)[2]), abs=1e-3)
    saved = torch.load(finished / "checkpoint_last.pth", weights_only=True)
    saved["model"]["stem.stem.0.conv.weight"][0] = torch.nan
    torch.save(saved, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="what the network says of some of the validation images is not finite, so that there is no accuracy: "):
        short_run("--eval", f"--resume={tmp_path / 'nan.pth'}", f"--report={tmp_path / 'nan.json'}")
    assert not (tmp_path / "nan.json").exists()


class StubTeacher(torch.nn.Module):
    """Calls an image's class by the sign of its mean, and keeps what it saw."""

    seen = []

    def __init__(self, **kwargs):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        StubTeacher.seen.append(images.clone())
        return torch.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3)), *[torch.full((len(images),), -9.0)] * 2], dim=1) * self.scale


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_teacher_sees_exactly_the_mixed_images_of_the_student(kind, short_run, tmp_path, monkeypatch):
    torch.save({"model": StubTeacher().state_dict()}, tmp_path / "teacher.pth")
    student_saw, real = [], model.create_model

    def create(name, **kwargs):
        if name == "resnet18":
            return StubTeacher()
        net = real(name, **kwargs)
        net.register_forward_pre_hook(lambda module, args: student_saw.append(args[0].clone()) if module.training else None)
        return net

    monkeypatch.setattr(model, "create_model", create)
    StubTeacher.seen = []
    short_run(
        f"--distillation-type={kind}",
        "--teacher-model=resnet18",
        f"--teacher-path={tmp_path / 'teacher.pth'}",
        "--teacher-min-acc1=0",
        "--epochs=1",
        f"--output_dir={tmp_path / 'run'}",
    )
    shown = StubTeacher.seen[1:]  # the first call is the check of the input size
    assert len(student_saw) == len(shown) == 6
    assert all(torch.equal(a, b) for a, b in zip(student_saw, shown, strict=True))
    unmixed = datasets_of_the_run(short_run, tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(shown, unmixed, strict=True))


def datasets_of_the_run(short_run, tmp_path):
    cfg, _ = config.parse(["--config", str(tmp_path / "run" / "args.yaml")])
    loader = datasets.build_train_loader(cfg, datasets.open_images(cfg)[0], utils.Rank(0, 1, 0, 1, torch.device("cpu")))
    return [batch.images for batch in loader.batches(0)]


def test_distilling_from_a_teacher_that_main_trained(short_run, tmp_path):
    """A one-output student learns both terms on its output; a teacher with other classes or bad accuracy is refused."""
    short_run("--model=test_resnet", "--epochs=1", f"--output_dir={tmp_path / 'teacher'}")
    teacher = f"--teacher-path={tmp_path / 'teacher' / 'checkpoint_best.pth'}"
    flags = ["--distillation-type=hard", "--teacher-model=test_resnet", teacher, f"--output_dir={tmp_path / 'run'}"]
    out = short_run(*flags, "--model=test_resnet", "--epochs=1", "--teacher-min-acc1=1")
    assert "test_resnet has one output: it learns both terms of the hard distillation loss on it" in out and "teacher: top-1" in out
    with pytest.raises(InputError, match=r"knows 4 classes, the data has 10.*--distillation-type none"):
        short_run(*flags, "--overwrite", "--data-set=DIGITS")
    with pytest.raises(InputError, match=r"teacher's top-1 accuracy on 40 validation images is .* below 99.90"):
        short_run(*flags, "--overwrite", "--teacher-min-acc1=99.9")


def test_untrained_teacher_is_refused(short_run, tmp_path):
    torch.manual_seed(0)
    torch.save({"model": model.create_model("resnet18", num_classes=4).state_dict()}, tmp_path / "t.pth")
    with pytest.raises(InputError, match="wrong weights, class order or normalisation"):
        short_run("--distillation-type=hard", "--teacher-model=resnet18", f"--teacher-path={tmp_path / 't.pth'}", f"--output_dir={tmp_path / 'run'}")


def test_banner_states_batch_rate_and_departures_from_the_recipe(short_run, tmp_path):
    out = short_run("--epochs=1", "--grad-accum-steps=2", f"--output_dir={tmp_path}", "--model-ema-decay=0.999", "--image-size-schedule=32:0,24:0.9")
    assert "the warm-up of 3 steps never ends: this run has 3" in out
    assert "--image-size-schedule 32:0,24:0.9: no epoch of this run is at 24 pixels" in out
    assert "batch 16 x 1 processes x 2 accumulation = global batch 32" in out and "0.03 x 32 / 512 = 0.001875" in out
    assert "the recipe was made for a global batch of 2048, this run's is 32" in out
    assert "--model-ema-decay 0.999 averages over 1000 steps, more than a third of this run's 3" in out
    assert "steps 3 (0 views left over)" in out


def test_rates_of_a_run_follow_the_published_formula(short_run, tmp_path):
    """Stepped with e after epoch e: epochs 0 and 1 at the warm-up's start, then the ramp, then the cosine."""
    short_run("--epochs=6", "--warmup-epochs=2", f"--output_dir={tmp_path / 'a'}")
    peak, low, start = 3e-2 * 16 / 512, 1e-5, 1e-6
    cosine = [low + (peak - low) * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
    expected = [start, start, start + (peak - start) / 2, *cosine[2:5]]
    assert [record["train_lr"] for record in read_log(tmp_path / "a")] == pytest.approx(expected, rel=1e-12)
    short_run("--epochs=6", "--warmup-epochs=2", "--start_epoch=4", f"--output_dir={tmp_path / 'b'}")
    assert [record["train_lr"] for record in read_log(tmp_path / "b")] == pytest.approx(expected[4:], rel=1e-12)


def test_gradients_are_clipped_at_their_true_size_under_a_loss_scale(digits_folder, short_run, tmp_path, monkeypatch):
    """With float16's scaled loss the clipping sees unscaled gradients: those of full precision, nearly."""
    norms = {}
    for amp in ("none", "fp16"):
        seen = norms.setdefault(amp, [])

        def record(parameters, seen=seen):
            norm = torch.cat([p.grad.flatten().float() for p in parameters]).norm()
            seen.append(norm.item())
            return norm

        monkeypatch.setattr("run.clipping.build_clipping", lambda cfg, record=record: record)
        short_run(f"--amp={amp}", "--epochs=1", f"--output_dir={tmp_path / amp}")
    assert norms["fp16"][:2] == pytest.approx(norms["none"][:2], rel=0.05)


def test_first_epoch_is_the_best_so_far_whatever_its_accuracy(tmp_path):
    state = checkpoint.TrainState(net=None, ema=None, optimizer=None, scheduler=None, scaler=None, best={"best_acc1": -1.0, "best_ema_acc1": -1.0})
    for tested, best, best_ema in (((0.0, 0.0), 0.0, 0.0), ((2.0, None), 2.0, 0.0), ((1.0, 5.0), 2.0, 5.0)):
        engine._keep_best(engine.Parts, state, {key: value for key, value in zip(("test_acc1", "test_ema_acc1"), tested, strict=True) if value is not None})
        assert state.best == {"best_acc1": best, "best_ema_acc1": best_ema}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=vit_tiny_patch16_224"], "does not take images of --input-size 32"),
        (["--model-kwargs", "dims=[1]"], "does not take an option given to it"),
        (["--model=recnext_m0.foo"], "recnext_m0.foo"),
        (["--model=recnext_mo"], "did you mean recnext_m"),
        (["--opt=adamm"], "did you mean"),
        (["--opt=adahessian"], "second derivatives"),
        (["--distillation-type=hard", "--teacher-model=nonet"], "--teacher-model nonet"),
    ],
)
def test_models_and_optimisers_that_cannot_be_used_are_refused_in_one_line(short_run, tmp_path, flags, words):
    with pytest.raises(InputError, match=re.escape(words)):
        short_run(*flags, f"--output_dir={tmp_path}")
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp=bf16", "--clip-mode=norm", "--clip-grad=1"],
        ["--opt=sgd", "--sched=step", "--no-model-ema", "--no-repeated-aug", "--clip-mode=value"],
        ["--mixup=0", "--cutmix=0", "--ThreeAugment", "--sched=plateau", "--batch-size=15", "--cooldown-epochs=1"],
        ["--mixup-mode=elem", "--set_bn_eval", "--sched=poly", "--memory-format=nchw", "--drop=0.1", "--drop-path=0.1", "--lr-noise", "0.1", "0.9"],
        ["--mixup-mode=pair", "--cutmix-minmax", "0.2", "0.8", "--sched=tanh", "--model-ema-force-cpu", "--input-size=48", "--start_epoch=1"],
        ["--batch-size=512", "--mix-group-size=256", "--mix-lanes=8", "--sched=multistep"],
    ],
)
def test_settings_train(short_run, tmp_path, flags):
    short_run(*flags, f"--output_dir={tmp_path}")
    log = read_log(tmp_path)
    assert all(math.isfinite(record["train_loss"]) for record in log)
    assert ("test_ema_acc1" in log[0]) == ("--no-model-ema" not in flags)
    saved = checkpoint.read(str(tmp_path / "checkpoint_last.pth"))
    assert saved["epoch"] == 1


def test_errors_reach_the_user_as_one_line(tmp_path):
    done = run_command("main.py", "--data-path", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    done = run_command("main.py", "--epoch", "3")
    assert done.returncode == 1 and done.stderr == "error: unknown flag --epoch; did you mean --epochs?\n"


def test_unreadable_image_in_a_worker_is_one_line_where_none_is_borne(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    victim = next((tmp_path / "data" / "train" / "2").iterdir())
    victim.write_bytes(victim.read_bytes()[:200])
    done = run_command(
        "main.py",
        *TINY_RUN,
        "--num_workers=2",
        "--max-bad-images=0",
        "--no-repeated-aug",
        f"--data-path={tmp_path / 'data'}",
        f"--output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"error: {victim} cannot be read as an image" in done.stderr


@pytest.mark.parametrize("below_a_file", [True, False])
def test_unwritable_output_folder_is_named_before_training(short_run, tmp_path, below_a_file):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "run" if below_a_file else tmp_path / "file"
    with pytest.raises(InputError, match=r"--output_dir .* cannot be written"):
        short_run(f"--output_dir={target}")


def test_full_disk_keeps_the_earlier_checkpoint(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "checkpoint_last.pth", tmp_path)
    before = (tmp_path / "checkpoint_last.pth").read_bytes()

    def no_space(saved, file):
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(InputError, match=r"not saved .*No space left on device.*Earlier checkpoints are intact"):
        checkpoint.save({}, tmp_path, ["checkpoint_last.pth"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_last.pth"]
    assert (tmp_path / "checkpoint_last.pth").read_bytes() == before


def test_digits_demo_recipes_are_the_default_of_the_demo():
    teacher_cfg, student_cfg = (config.parse(["--config", str(ROOT / "recipes" / name)])[0] for name in ("demo_teacher.yaml", "demo.yaml"))
    assert student_cfg.teacher_model == teacher_cfg.model and student_cfg.distillation == "hard"
    assert (student_cfg.aa, student_cfg.repeated_aug, student_cfg.reprob, student_cfg.mixup, student_cfg.cutmix) == (
        "rand-m9-mstd0.5-inc1",
        True,
        0.25,
        0.8,
        1.0,
    )


def test_log_keys_for_numbers_that_are_not_finite(tmp_path):
    cfg, _ = config.parse(["--data-set", "DIGITS"])
    run_records = records.Records(cfg, tmp_path, 0)
    run_records.write({"epoch": 0, "train_loss": float("nan")})
    run_records.close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0, "train_loss": null}\n'
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_half_precision_teacher_is_neutral_on_a_cpu():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    plan = keys.build_plan(6, repeated_aug=False, group_size=6, lanes=1, data_seed=0)
    batch = Batch(torch.randn(6, 3, 2, 2), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert torch.equal(teacher.Teacher(net, answer=teacher.AllLogits(), plan=plan)(batch.images, batch, 0), net(batch.images).detach())
    assert torch.equal(teacher.Teacher(net, answer=teacher.HardLabels(), plan=plan)(batch.images, batch, 0), net(batch.images).argmax(1))


def test_evaluation_sums_are_exact():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 6))
    images, targets = torch.randn(11, 1, 2, 2), torch.randint(0, 6, (11,))
    parts = engine.EvalParts(rank=utils.Rank(0, 1, 0, 1, torch.device("cpu")))
    result = engine.evaluate(net, list(zip(images.split(4), targets.split(4), strict=True)), parts)
    logits = net(images)
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert result["acc5"] == pytest.approx(100 * (logits.topk(5).indices == targets[:, None]).any(1).double().mean().item())
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
