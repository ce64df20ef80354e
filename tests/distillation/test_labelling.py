"""Stored teacher labels: equal to the teacher's own, refused where they are not for this run, and never half written."""

import json
import os
import shutil
import subprocess
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

import datasets
import engine
import main
import model
import utils
from benchmarks import distill
from distillation import fingerprint, generate, labelling, teacher
from distillation.store import MISSING, Fresh, LabelStore, Merged, Page
from loading import augment, keys
from loading.images import open_file
from run import command, config, signals
from run.errors import InputError
from run.manifest import read_manifest
from sources.sets import load_digits, open_folder
from tests.conftest import ROOT, read_log, run_command, run_forked, run_processes, short_run_with, start, wait_for
from tests.nets import randomise
from tests.test_main import steady
from tests.test_resume import assert_same_run
from tools import inspect_teacher_labels, make_teacher_labels, pack_dataset

CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))
NAME = "resnet10t"


@pytest.fixture(scope="module")
def weights(digits_folder, tmp_path_factory):
    """A teacher that tells the small folder's images apart, in its own way: each of four classes gets about a quarter."""
    images, _ = datasets.open_images(settings(digits_folder))
    transform = augment.eval_transform(32, 1.0)
    batch = torch.stack([transform(images[i][0]) for i in range(len(images))])
    torch.manual_seed(0)
    net = randomise(model.create_model(NAME, num_classes=4)).eval()
    with torch.no_grad():
        net.fc.weight /= net(batch).std(0).unsqueeze(1)
        net.fc.bias.zero_().sub_(net(batch).mean(0))
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


def flags(digits_folder, weights, *more: str) -> list[str]:
    given = [f"--data-path={digits_folder}", "--distillation-type=hard", f"--teacher-model={NAME}", f"--teacher-path={weights}", "--teacher-min-acc1=0"]
    return short_run_with(*given, *more)


def settings(digits_folder, *more: str) -> config.Config:
    return config.parse(flags(digits_folder, "none.pth", *more))[0]


def epoch_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("epoch_*")}


@pytest.fixture(scope="module")
def stored(digits_folder, weights, tmp_path_factory):
    """Labels of two epochs, made without a student; not to be changed."""
    folder = tmp_path_factory.mktemp("labels") / "labels"
    argv = flags(digits_folder, weights, "--epochs=0:2", f"--teacher-labels={folder}", "--num_workers=2", "--batch-size=48")
    assert make_teacher_labels.main(argv) == 0
    return folder


@pytest.fixture
def labels(stored, tmp_path):
    """A copy of them."""
    return shutil.copytree(stored, tmp_path / "labels")


@pytest.fixture(scope="module")
def online(digits_folder, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "run"
    assert main.main(flags(digits_folder, weights, f"--output_dir={folder}")) == 0
    return folder


@pytest.fixture
def train(digits_folder, weights, tmp_path, capsys):
    """A run with the teacher, in this process; returns what it printed. Its folder is tmp_path / "run"."""

    def run(*more: str, code: int = 0) -> str:
        output = [] if any("--output" in flag for flag in more) else [f"--output_dir={tmp_path / 'run'}"]
        assert main.main(flags(digits_folder, weights, *output, *more)) == code
        return capsys.readouterr().out

    return run


def refuse_teacher(*args, **kwargs):
    raise AssertionError("the teacher was built")


@pytest.fixture
def no_teacher_allowed(monkeypatch):
    monkeypatch.setattr(teacher, "_create", refuse_teacher)


# ---- the same run, whoever says the labels


@pytest.mark.parametrize("mode", ["auto", "read"])
def test_run_on_stored_labels_is_the_online_run(online, stored, train, no_teacher_allowed, tmp_path, mode):
    out = train(f"--teacher-labels={stored}", f"--teacher-labels-mode={mode}")
    assert f"teacher labels: 2 of 2 epochs stored in {stored}; the teacher is not built" in out
    assert_same_run(tmp_path / "run", online)


def test_a_schedule_of_sizes_has_labels_of_its_own(digits_folder, weights, stored, train, monkeypatch, tmp_path):
    """Made without a student, and read by a run that ends as the one with the teacher does."""
    more = ["--image-size-schedule=24:0,32:0.5", "--vflip=0.5", "--mean=0.5", "--train-crop-mode=rkrr", "--mixup-off-epoch=1"]
    argv = flags(digits_folder, weights, *more, "--epochs=0:2", f"--teacher-labels={tmp_path / 'labels'}", "--batch-size=48")
    assert make_teacher_labels.main(argv) == 0
    train(*more, f"--output_dir={tmp_path / 'online'}")
    monkeypatch.setattr(teacher, "_create", refuse_teacher)
    train(*more, f"--teacher-labels={tmp_path / 'labels'}", "--teacher-labels-mode=read")
    assert_same_run(tmp_path / "run", tmp_path / "online")
    with pytest.raises(InputError, match=r"field augmentation.size_starts: the store has \[\[0, 24\], \[1, 32\]\], this run has \[\[0, 24\], \[2, 32\]\]"):
        train(*more, f"--teacher-labels={tmp_path / 'labels'}", "--teacher-labels-mode=read", "--epochs=3", "--overwrite")
    assert read_manifest(tmp_path / "labels")["fingerprint"]["augmentation.mean"] == [0.5, 0.5, 0.5]
    assert epoch_files(tmp_path / "labels") != epoch_files(stored)


def test_labels_tell_the_images_apart(stored):
    """Else the tests of equality would be blind: the teacher uses all classes, and not only those of the images."""
    codes = np.fromfile(stored / "epoch_00000.u16", "<u2")
    assert np.bincount(codes, minlength=4).min() >= 5
    assert 0.2 < json.loads((stored / "epoch_00000.json").read_text())["num_agree"] / 96 < 0.9
    assert (stored / "epoch_00001.u16").read_bytes() != codes.tobytes()


@pytest.mark.parametrize("how", [["--batch-size=32", "--num_workers=2", "--model=resnet10t"], ["--batch-size=8", "--grad-accum-steps=2", "--epochs=3"]])
def test_any_student_batch_and_schedule_writes_the_same_files(stored, train, tmp_path, how):
    train(f"--teacher-labels={tmp_path / 'new'}", *how)
    ours, expected = epoch_files(tmp_path / "new"), epoch_files(stored)
    assert {name: ours[name] for name in expected} == expected
    assert len(ours) == (9 if "--epochs=3" in how else 6)
    assert read_manifest(tmp_path / "new") == read_manifest(stored)


def test_auto_asks_the_teacher_for_what_is_missing_alone(stored, labels, train, monkeypatch):
    """A longer schedule, an epoch whose writer was killed, and one with a group missing."""
    (labels / "epoch_00000.json").unlink()
    store = open_store(labels)
    page = store.read(1)
    page.codes[store_groups(store) == 2] = MISSING
    page.checks[2] = (0, 0)
    rewrite(store, 1, page)
    asked, real = [], teacher.Teacher.logits
    monkeypatch.setattr(teacher.Teacher, "logits", lambda self, images: asked.append(len(images)) or real(self, images))
    out = train(f"--teacher-labels={labels}", "--epochs=3")
    assert f"teacher labels: 0 of 3 epochs stored in {labels}; the teacher labels what is missing" in out
    assert asked == [16] * (6 + 1 + 6)
    expected = epoch_files(stored)
    assert {name: content for name, content in epoch_files(labels).items() if name in expected} == expected


def test_a_shorter_schedule_reads_part(stored, train, no_teacher_allowed):
    assert "1 of 1 epochs stored" in train(f"--teacher-labels={stored}", "--epochs=1", "--batch-size=48", "--teacher-labels-mode=read")


@pytest.mark.parametrize(("batch_size", "sizes"), [(32, [16, 16] * 3), (8, [8] * 12), (16, [16] * 6)])
def test_teacher_sees_whole_mix_groups_in_inference_mode(train, monkeypatch, batch_size, sizes):
    seen, real = [], teacher.Teacher.__init__

    def look(self, net, **kwargs):
        real(self, net, **kwargs)
        net.register_forward_hook(lambda module, inputs, output: seen.append((len(output), torch.is_inference_mode_enabled(), torch.is_grad_enabled())))

    monkeypatch.setattr(teacher.Teacher, "__init__", look)
    train(f"--batch-size={batch_size}", "--epochs=1")
    assert seen == [(size, True, False) for size in sizes]


@pytest.mark.slow
def test_killed_while_writing_and_resumed(online, stored, digits_folder, weights, tmp_path):
    """kill -9 inside the second epoch; what it had not stored is made again, by the same run and by the next one."""
    argv = flags(digits_folder, weights, f"--output_dir={tmp_path / 'run'}", f"--teacher-labels={tmp_path / 'labels'}", "--checkpoint-steps=1")
    process = start("main.py", *argv)
    wait_for(tmp_path / "labels" / "epoch_00000.json", process)
    last = tmp_path / "run" / "checkpoint_last.pth"
    while process.poll() is None and (not last.exists() or torch.load(last, weights_only=True)["epoch"] < 0):
        pass
    process.kill()
    process.communicate()
    assert main.main([*argv, "--resume=auto"]) == 0
    assert_same_run(tmp_path / "run", online)
    assert main.main([*argv, f"--output_dir={tmp_path / 'next'}"]) == 0
    assert_same_run(tmp_path / "next", online)
    assert epoch_files(tmp_path / "labels") == epoch_files(stored)


def test_told_to_stop_stores_the_part_and_goes_on_from_it(online, stored, train, tmp_path, monkeypatch):
    calls = iter([False] * 3 + [True] * 10)
    monkeypatch.setattr(signals, "StopRequest", lambda: type("Stop", (), {"is_made": property(lambda self: next(calls))})())
    train(f"--teacher-labels={tmp_path / 'new'}", code=command.STOPPED)
    status = json.loads((tmp_path / "new" / "epoch_00000.json").read_text())
    assert status["num_filled"] == 64
    monkeypatch.setattr(signals, "StopRequest", lambda: type("Stop", (), {"is_made": False})())
    train(f"--teacher-labels={tmp_path / 'new'}", "--resume=auto")
    assert epoch_files(tmp_path / "new") == epoch_files(stored)
    assert_same_run(tmp_path / "run", online)


@pytest.mark.slow
def test_several_processes_read_and_write_groups_that_they_share(stored, digits_folder, weights, tmp_path):
    """Two processes with half a group each: online, writing, and reading what one process wrote; then the generator with four."""
    argv = flags(digits_folder, weights, "--batch-size=8")
    store = open_store(shutil.copytree(stored, tmp_path / "wrong"))
    page = store.read(1)
    page.checks["pixels"][3] += 1
    rewrite(store, 1, page)
    *fine, stopped, generated = run_processes(
        (2, "main", [*argv, f"--output_dir={tmp_path / 'online'}"]),
        (2, "main", [*argv, f"--output_dir={tmp_path / 'auto'}", f"--teacher-labels={tmp_path / 'a'}"]),
        (2, "main", [*argv, f"--output_dir={tmp_path / 'read'}", f"--teacher-labels={stored}", "--teacher-labels-mode=read"]),
        (2, "main", [*argv, f"--output_dir={tmp_path / 'stopped'}", f"--teacher-labels={tmp_path / 'wrong'}"]),
        (4, "tools.make_teacher_labels", [*argv, "--epochs=0:2", f"--teacher-labels={tmp_path / 'b'}"]),
    )
    assert [codes for codes, *_ in (*fine, generated)] == [[0] * 2] * 3 + [[0] * 4], (fine, generated)
    for name in ("auto", "read"):
        assert_same_run(tmp_path / name, tmp_path / "online")
    assert epoch_files(tmp_path / "a") == epoch_files(tmp_path / "b") == epoch_files(stored)
    assert 0 not in stopped[0] and "epoch 1, group 3: field pixels: the store has" in stopped[1]
    assert steady(read_log(tmp_path / "stopped")[0]) == steady(read_log(tmp_path / "online")[0])


def test_generator_goes_on_where_it_was_stopped_and_leaves_the_rest_alone(stored, labels, digits_folder, weights, monkeypatch, capsys):
    shutil.rmtree(labels)
    argv = flags(digits_folder, weights, f"--teacher-labels={labels}")
    calls = iter([False, False, True, True])
    monkeypatch.setattr(signals, "StopRequest", lambda: type("Stop", (), {"is_made": property(lambda self: next(calls))})())
    assert make_teacher_labels.main([*argv, "--epochs", "1:2"]) == command.STOPPED
    assert "told to stop: stored what was made by epoch 1" in capsys.readouterr().out
    assert json.loads((labels / "epoch_00001.json").read_text())["num_filled"] == 48
    asked, real = [], teacher.Teacher.logits
    monkeypatch.setattr(teacher.Teacher, "logits", lambda self, images: asked.append(len(images)) or real(self, images))
    monkeypatch.setattr(signals, "StopRequest", lambda: type("Stop", (), {"is_made": False})())
    monkeypatch.setattr(generate, "REPORT_EVERY_S", 0.0)
    assert make_teacher_labels.main([*argv, "--epochs", "0:2"]) == 0
    assert asked == [16] * 9
    assert "144 of 144 labels" in capsys.readouterr().out
    assert epoch_files(labels) == epoch_files(stored)
    monkeypatch.setattr(teacher, "_create", None)
    assert make_teacher_labels.main([*argv, "--epochs=0:2"]) == 0 and "the teacher is not built" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3", "a:b", "2:2", "3:1", "1:", "-1:2"])
def test_generator_refuses_epochs_that_make_no_sense(text):
    with pytest.raises(InputError, match="write the first epoch, a colon"):
        make_teacher_labels.parse(["--data-set=DIGITS", "--teacher-labels=x", f"--epochs={text}"])


def test_generator_needs_a_folder_and_a_recipe_that_distils():
    with pytest.raises(InputError, match="--teacher-labels is missing"):
        make_teacher_labels.parse(["--data-set=DIGITS"])
    with pytest.raises(InputError, match="add --distillation-type hard"):
        make_teacher_labels.parse(["--data-set=DIGITS", "--teacher-labels=x", "--distillation-type=none"])


# ---- modes


def test_read_says_at_the_start_what_is_missing(stored, labels, train, no_teacher_allowed, tmp_path):
    with pytest.raises(InputError, match=r"read: .* lacks labels of 3 epochs, first 2, 3, 4: make them with tools/make_teacher_labels.py"):
        train(f"--teacher-labels={stored}", "--teacher-labels-mode=read", "--epochs=5")
    with pytest.raises(InputError, match="lacks labels of 2 epochs, first 0, 1"):
        train(f"--teacher-labels={tmp_path / 'nowhere'}", "--teacher-labels-mode=read")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "run" / "log.txt").exists()


def test_labels_that_vanish_while_a_run_reads_are_named(labels, train, monkeypatch):
    real = engine.train_one_epoch

    def train_then_lose(*args, **kwargs):
        (labels / "epoch_00001.json").unlink(missing_ok=True)
        return real(*args, **kwargs)

    monkeypatch.setattr(engine, "train_one_epoch", train_then_lose)
    with pytest.raises(InputError, match=r"epoch 1, group \d+: its labels are gone since the run began"):
        train(f"--teacher-labels={labels}")


def test_off_leaves_the_folder_alone(online, labels, train, tmp_path):
    before = {path.name: path.read_bytes() for path in labels.iterdir()}
    train(f"--teacher-labels={labels}", "--teacher-labels-mode=off")
    assert_same_run(tmp_path / "run", online)
    assert {path.name: path.read_bytes() for path in labels.iterdir()} == before


def test_write_asks_the_teacher_everywhere_and_reports_what_differs(online, labels, train, tmp_path):
    """Two labels of epoch 0 were stored otherwise by somebody else: those stay, the run uses its own."""
    store = open_store(labels)
    page = store.read(0)
    page.codes[[5, 50]] = (page.codes[[5, 50]] + 1) % 4
    rewrite(store, 0, page)
    out = train(f"--teacher-labels={labels}", "--teacher-labels-mode=write")
    assert "epoch 0: 2 of 96 labels differ from those that were stored first, which stay" in out and "epoch 1:" not in out
    assert_same_run(tmp_path / "run", online)
    assert np.array_equal(store.read(0).codes, page.codes)


def test_verify_asks_again_and_finds_a_wrong_label(labels, train, monkeypatch):
    monkeypatch.setattr(labelling, "VERIFY_ONE_IN", 3)
    monkeypatch.setattr(labelling.secrets, "randbits", lambda num_bits: 5)
    chosen = [3 * block + keys.draw_words("verify", 5, 0, block)[0] % 3 for block in range(2)]
    out = train(f"--teacher-labels={labels}", "--teacher-labels-mode=verify")
    assert f"epoch 0: {16 * len(chosen)} labels verified, 0 differ, all near ties" in out and "about one group in 3" in out
    store = open_store(labels)
    page = store.read(0)
    position = int(np.flatnonzero(store_groups(store) == chosen[0])[3])
    page.codes[position] = (page.codes[position] + 1) % 4
    rewrite(store, 0, page, recount=True)
    with pytest.raises(InputError, match=rf"epoch 0, group {chosen[0]}: the teacher does not give the stored class to 1 of 16 images"):
        train(f"--teacher-labels={labels}", "--teacher-labels-mode=verify", "--overwrite")


def test_every_epoch_has_groups_that_verify_asks_again_about_and_every_run_others(stored, digits_folder):
    chosen = set()
    for _ in range(40):
        reader = open_labels(stored, digits_folder, mode="verify")
        for epoch in (0, 1):
            reader.start_epoch(epoch)
            due = [group for group in range(6) if reader._is_verified(group)]
            assert len(due) == 1
            chosen.add((epoch, *due))
    assert len(chosen) > 6


def test_a_damaged_canary_or_plan_is_named(labels, train):
    path = labels / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"pixels"', '"qixels"', 1))
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        train(f"--teacher-labels={labels}")
    for group_size in (0, -16, "x", 95):
        manifest = json.loads(whole)
        manifest["fingerprint"]["plan.group_size"] = group_size
        path.write_text(json.dumps(manifest))
        done = run_forked("tools/inspect_teacher_labels.py", str(labels))
        assert done.returncode == 1 and "manifest.json is damaged (plan." in done.stderr and len(done.stderr.splitlines()) == 1


def test_verify_accepts_near_ties_and_counts_them(stored, digits_folder):
    reader = open_labels(stored, digits_folder, mode="verify")
    reader.start_epoch(0)
    logits = torch.tensor([[1.0, 1.0 - 4e-6, 0.0], [1.0, 0.9, 0.0], [0.0, 2.0, 1.0]])
    reader._verify(logits, torch.tensor([[1], [0], [1]], dtype=torch.int16), torch.tensor([True, True, True]), group=0)
    assert (reader.num_verified, reader.num_near_ties) == (3, 1)
    reader._verify(logits, torch.tensor([[1], [1], [1]], dtype=torch.int16), torch.tensor([True, False, True]), group=0)
    with pytest.raises(InputError, match=r"class 0, the store 1, 0\.1 of a logit below"):
        reader._verify(logits, torch.tensor([[1], [1], [1]], dtype=torch.int16), torch.tensor([True, True, True]), group=0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--teacher-labels-mode=read"], "needs a folder: add --teacher-labels DIR"),
        (["--teacher-labels=x", "--distillation-type=none"], "does not distil"),
        (["--teacher-labels=x", "--distillation-type=soft"], "say how many with --teacher-topk"),
        (["--teacher-topk=3"], "--teacher-topk is for --distillation-type soft"),
    ],
)
def test_settings_that_contradict_each_other(argv, words):
    with pytest.raises(InputError, match=words):
        config.parse(["--data-set=DIGITS", *argv])


def test_off_may_be_written_as_yaml_reads_it(tmp_path):
    (tmp_path / "a.yaml").write_text("teacher_labels_mode: off\nteacher_labels: x\n")
    assert config.parse(["--data-set=DIGITS", "--config", str(tmp_path / "a.yaml")])[0].labels_mode == "off"


def test_order_of_the_store_is_adopted_unless_given(stored, digits_folder, train, tmp_path):
    argv = [flag for flag in flags(digits_folder, "x.pth", f"--teacher-labels={stored}") if not flag.startswith("--mix-")]
    cfg, notes = config.parse(argv)
    assert (cfg.mix_group_size, cfg.mix_lanes, cfg.repeated_aug) == (16, 2, True)
    assert notes == [f"--mix-group-size 16, as in {stored}", f"--mix-lanes 2, as in {stored}"]
    cfg, notes = config.parse([*argv, "--mix-lanes=4"])
    assert (cfg.mix_group_size, cfg.mix_lanes, len(notes)) == (16, 4, 1)
    (tmp_path / "recipe.yaml").write_text("mix_group_size: 32\n")
    assert config.parse([*argv, f"--config={tmp_path / 'recipe.yaml'}"])[0].mix_group_size == 32
    assert config.parse([*argv, "--teacher-labels-mode=off"])[0].mix_group_size == 256
    with pytest.raises(InputError, match=r"field plan.lanes: the store has 2, this run has 3\. Train with the data"):
        train(f"--teacher-labels={stored}", "--mix-lanes=3")


def test_one_class_too_many_for_16_bits(stored, digits_folder):
    cfg = settings(digits_folder, f"--teacher-labels={stored}")
    plan = keys.build_plan(96, repeated_aug=True, group_size=16, lanes=2, data_seed=0)
    assert labelling.open_store(cfg, plan, 65535).width == 1
    with pytest.raises(InputError, match="at most 65535 classes; the data has 65536"):
        labelling.open_store(cfg, plan, 65536)


# ---- what labels are for


def open_store(folder) -> LabelStore:
    return LabelStore(folder, num_positions=96, num_groups=6, width=1)


def store_groups(store: LabelStore) -> np.ndarray:
    plan = keys.build_plan(96, repeated_aug=True, group_size=16, lanes=2, data_seed=0)
    return plan.groups_and_members(np.arange(store.num_positions))[0]


def rewrite(store: LabelStore, epoch: int, page: Page, *, recount: bool = False) -> None:
    """Store a changed page with right checksums; with `recount`, and as if its labels agreed as often as they are said to."""
    order = store.status(epoch)["order"]
    if recount:  # the run would find the count wrong before it verifies
        page.checks["num_agree"][:] = np.array(agreement(store, page, epoch))
    store._write(epoch, page, order)


def agreement(store: LabelStore, page: Page, epoch: int) -> list[int]:
    """Per group, labels that are the class of their image or its partner, computed from the folder's order alone."""
    plan = keys.build_plan(96, repeated_aug=True, group_size=16, lanes=2, data_seed=0)
    targets = np.repeat(np.arange(4), COUNTS)[plan.permutation(epoch).numpy()[np.arange(96) // 3]]
    groups, members = plan.groups_and_members(np.arange(96))
    partner = {(g, m): t for g, m, t in zip(groups, members, targets, strict=True)}
    is_agreeing = [code in (target, partner[g, 15 - m]) for code, target, g, m in zip(page.codes[:, 0], targets, groups, members, strict=True)]
    return np.bincount(groups, weights=is_agreeing, minlength=6).astype(int).tolist()


COUNTS = [26, 27, 27, 16]


def test_stored_counts_are_those_of_the_images_and_their_partners(stored, digits_folder):
    assert [len(list(folder.iterdir())) for folder in sorted((digits_folder / "train").iterdir())] == COUNTS
    store = open_store(stored)
    for epoch in range(2):
        page = store.read(epoch)
        assert page.checks["num_agree"].tolist() == agreement(store, page, epoch)


def open_survey(folder, digits_folder, *more: str) -> labelling.Survey:
    cfg = settings(digits_folder, f"--teacher-labels={folder}", *more)
    images, _ = datasets.open_images(cfg)
    loader = datasets.build_train_loader(cfg, images, CPU)
    return labelling.Survey(cfg, labelling.open_store(cfg, loader.plan, 4), loader, num_classes=4, rank=CPU)


def open_labels(folder, digits_folder, *, mode: str) -> labelling.StoredLabels:
    survey = open_survey(folder, digits_folder)
    plan, answer = survey.loader.plan, teacher.HardLabels()
    return labelling.StoredLabels(
        survey.store, plan=plan, answer=answer, teacher=None, mode=mode, is_mixing=True, is_spread=False, rank=CPU, claim=lambda: None
    )


def change(value):
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [0.5] * 3 if isinstance(value, list) else value + "x"


def test_every_field_is_refused_by_name_when_it_differs(labels, digits_folder, weights):
    manifest = read_manifest(labels)
    fields = manifest["fingerprint"]
    assert {name.partition(".")[0] for name in fields} == {"labels", "data", "plan", "augmentation", "teacher"} and len(fields) > 35
    survey = open_survey(labels, digits_folder, f"--teacher-path={weights}")
    assert survey.needs_teacher(range(2)) is False
    for name, value in fields.items():
        changed = {**manifest, "fingerprint": {**fields, name: change(value)}}
        (labels / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(InputError) as error:
            survey.needs_teacher(range(2))
        assert f"field {name}: the store has {change(value)}, this run has {value}" in str(error.value) and str(error.value).count("field ") == 1
    fields.pop("plan.lanes")
    (labels / "manifest.json").write_text(json.dumps({**manifest, "format": "of tomorrow"}))
    with pytest.raises(InputError, match="field format: the store has of tomorrow"):
        survey.needs_teacher(range(2))
    (labels / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="field plan.lanes: the store has None, this run has 2"):
        survey.needs_teacher(range(2))


@pytest.mark.parametrize(("kind", "value"), [("pixels", 1), ("erased", [[0, 0, 1, 1, 0.0, 0.0]]), ("mixing", [0.5, 1, 0, 1, 0, 1])])
def test_canaries_are_refused_by_name(labels, digits_folder, kind, value):
    manifest = read_manifest(labels)
    manifest["canary"][7][kind] = value
    (labels / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=rf"field canary.{kind}: 1 of 64 views are not those of the store .* positions \[{manifest['canary'][7]['position']}\]"
    ):
        open_survey(labels, digits_folder).needs_teacher(range(2))


def test_canaries_forgive_the_last_digits_of_noise(stored, digits_folder):
    drawn = read_manifest(stored)["canary"]
    assert any(canary["erased"] for canary in drawn) and {canary["mixing"][1] for canary in drawn} == {0, 1}
    nudged = json.loads(json.dumps(drawn))
    for canary in nudged:
        canary["erased"] = [[*box[:4], box[4] + 1e-5, box[5]] for box in canary["erased"]]
    assert fingerprint.canary_differences(drawn, nudged) == []


FLAGS = {  # flags that give each compared setting another value
    "input_size": ["--input-size=40"],
    "loader": ["--loader=reference"],
    "three_augment": ["--ThreeAugment"],
    "color_jitter": ["--color-jitter=0.3"],
    "aa": ["--aa=rand-m5-mstd0.5-inc1"],
    "hflip": ["--hflip=0.25"],
    "train_interpolation": ["--train-interpolation=bilinear"],
    "reprob": ["--reprob=0.5"],
    "remode": ["--remode=rand"],
    "recount": ["--recount=2"],
    "mixup": ["--mixup=0.5"],
    "cutmix": ["--cutmix=0.5"],
    "cutmix_minmax": ["--cutmix-minmax", "0.2", "0.8"],
    "mixup_prob": ["--mixup-prob=0.5"],
    "mixup_switch_prob": ["--mixup-switch-prob=0.25"],
    "mixup_mode": ["--mixup-mode=pair"],
}
FLAGS_SINCE = {  # of settings that stores know of where they are not the usual ones
    "train_crop_mode": ["--train-crop-mode=rkrc"],
    "vflip": ["--vflip=0.5"],
    "mixup_off_epoch": ["--mixup-off-epoch=1"],
    "scale": ["--scale", "0.3", "1"],
    "ratio": ["--ratio", "1", "1"],
    "size_starts": ["--image-size-schedule=24:0,32:0.5"],
    "mean": ["--mean=0.5"],
    "std": ["--std", "0.5", "0.5", "0.4"],
    "exif_transpose": ["--exif-transpose"],
}


@pytest.mark.parametrize("name", [*fingerprint.COMPARED, *FLAGS_SINCE])
def test_other_settings_are_refused_by_name(stored, digits_folder, name):
    with pytest.raises(InputError, match=rf"field augmentation\.{name}: the store has"):
        open_survey(stored, digits_folder, *(FLAGS | FLAGS_SINCE)[name]).needs_teacher(range(2))


def test_usual_values_that_are_given_are_those_of_a_store_that_does_not_tell(stored, digits_folder):
    """As those stores do not that are from before there were these settings. The padded crops of small images are none of timm's."""
    assert [name for name in read_manifest(stored)["fingerprint"] if name.removeprefix("augmentation.") in set(FLAGS_SINCE) - {"mean", "std"}] == []
    given = ["--vflip=0", "--mixup-off-epoch=0", "--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225", "--image-size-schedule=32:0"]
    assert open_survey(stored, digits_folder, *given).needs_teacher(range(2)) is False
    with pytest.raises(InputError, match=r"field augmentation.train_crop_mode: the store has None, this run has \['rrc'\]\. Train"):
        open_survey(stored, digits_folder, "--scale", "0.08", "1").needs_teacher(range(2))
    larger = [config.parse(["--data-path=x", *more])[0] for more in ([], ["--train-crop-mode=rrc", "--scale", "0.08", "1"])]
    assert fingerprint._since(larger[0]) == fingerprint._since(larger[1]) == {}


def test_a_schedule_of_sizes_is_compared_by_epochs(stored, digits_folder):
    flags = ["--image-size-schedule=24:0,32:0.5"]
    short, long = (fingerprint._since(config.parse(["--data-path=x", *flags, f"--epochs={epochs}"])[0])["augmentation.size_starts"] for epochs in (2, 10))
    assert (short, long) == ([(0, 24), (1, 32)], [(0, 24), (5, 32)])


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--data-seed=1"], ["plan.data_seed", "plan.permutations"]),
        (["--no-repeated-aug"], ["plan.repeats"]),
        (["--mix-lanes=3"], ["plan.lanes"]),
        (["--mix-group-size=8"], ["plan.group_size"]),
        (["--val-split=0.5"], ["data.num_images", "data.listing", "plan.num_positions"]),
        (["--teacher-model=resnet18"], ["teacher.model"]),
        (["--distillation-type=soft", "--teacher-topk=2"], ["labels.kind", "labels.topk"]),
    ],
)
def test_another_order_or_teacher_is_refused_by_name(stored, digits_folder, tmp_path, more, names):
    folder = digits_folder
    if "val-split" in more[0]:
        folder = tmp_path
        shutil.copytree(digits_folder / "train", tmp_path / "train")
    with pytest.raises(InputError) as error:
        open_survey(stored, folder, *more).needs_teacher(range(2))
    assert [name for name in names if f"field {name}: the store has" not in str(error.value)] == []


def test_what_is_the_students_own_is_not_compared(stored, digits_folder):
    more = ["--model=resnet10t", "--seed=7", "--opt=sgd", "--lr=1", "--epochs=1", "--smoothing=0.2", "--distillation-alpha=0.9", "--drop=0.1", "--amp=bf16"]
    assert open_survey(stored, digits_folder, *more, "--batch-size=48", "--memory-format=nchw").needs_teacher(range(2)) is False


def test_no_setting_of_augmentation_or_mixup_is_forgotten():
    names = list(config.SETTINGS.fields)
    starts = [*config.GROUPS.values()]
    groups = {
        title: names[names.index(first) : (names.index(starts[i + 1]) if i + 1 < len(starts) else None)]
        for i, (title, first) in enumerate(config.GROUPS.items())
    }
    known = set(fingerprint.COMPARED) | set(fingerprint.COMPARED_SINCE) | set(fingerprint.NOT_COMPARED)
    assert [name for title in ("augmentation", "mixup") for name in groups[title] if name not in known] == []
    assert set(fingerprint.COMPARED_SINCE) < set(FLAGS_SINCE)
    assert set(fingerprint.COMPARED) == set(FLAGS) and not set(fingerprint.COMPARED) & set(fingerprint.NOT_COMPARED)


def test_another_teachers_weights_are_refused_wherever_they_are_at_hand(stored, train, digits_folder, tmp_path):
    torch.save({"model": randomise(model.create_model(NAME, num_classes=4)).state_dict()}, tmp_path / "other.pth")
    for mode in ("auto", "read", "verify"):
        with pytest.raises(InputError, match="field teacher.weights: the store has"):
            train(f"--teacher-labels={stored}", f"--teacher-labels-mode={mode}", f"--teacher-path={tmp_path / 'other.pth'}")
    out = train(f"--teacher-labels={stored}", "--teacher-labels-mode=read", "--teacher-path=/nowhere/at/all.pth", "--epochs=1")
    assert "its weights are not compared (--teacher-path is no local file)" in out


def test_weights_are_the_same_in_another_order_but_not_under_each_others_names():
    state = model.create_model(NAME, num_classes=4).state_dict()
    reordered = dict(reversed(state.items()))
    crossed = {**state, "conv1.1.weight": state["conv1.1.bias"], "conv1.1.bias": state["conv1.1.weight"]}
    assert not torch.equal(state["conv1.1.weight"], state["conv1.1.bias"])
    assert teacher.hash_weights(state) != teacher.hash_weights(crossed)
    changed = {name: value + 1e-7 if name == "fc.bias" else value for name, value in state.items()}
    counted = {name: value + 1 if name.endswith("num_batches_tracked") else value for name, value in state.items()}
    assert teacher.hash_weights(state) == teacher.hash_weights(reordered) == teacher.hash_weights(counted) != teacher.hash_weights(changed)


def test_other_libraries_widen_the_canary_and_warn(labels, digits_folder, caplog, monkeypatch):
    manifest = read_manifest(labels)
    manifest["versions"]["timm"] = "0.9"
    manifest["canary"][80]["pixels"] += 1  # beyond the first 64
    (labels / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(utils.log, "propagate", True)
    with pytest.raises(InputError, match="field canary.pixels: 1 of 96 views"):
        open_survey(labels, digits_folder).needs_teacher(range(2))
    assert "field timm: the store has 0.9" in caplog.text and "looking at 1024 views instead of 64" in caplog.text


def test_a_tar_lists_the_same_as_its_folder_and_a_changed_size_does_not(digits_folder, tmp_path):
    subprocess.run(["tar", "-cf", str(tmp_path / "train.tar"), "-C", str(digits_folder), "train"], check=True)
    subprocess.run(["tar", "-cf", str(tmp_path / "val.tar"), "-C", str(digits_folder), "val"], check=True)
    folder, (tar, _) = open_folder(digits_folder / "train"), datasets.open_images(settings(tmp_path))
    assert fingerprint._listing(folder) == fingerprint._listing(tar)
    moved = shutil.copytree(digits_folder / "train", tmp_path / "elsewhere")
    assert fingerprint._listing(open_folder(moved)) == fingerprint._listing(tar)
    file = sorted((moved / "2").iterdir())[0]
    file.write_bytes(file.read_bytes() + b"x")
    listing = fingerprint._listing(open_folder(moved))
    assert listing["data.num_bytes"] == fingerprint._listing(tar)["data.num_bytes"] + 1
    file.rename(file.with_name("renamed.jpg"))
    assert fingerprint._listing(open_folder(moved))["data.listing"] != listing["data.listing"]


@pytest.mark.parametrize("kind", ["packed", "shards", "parquet"])
def test_labels_made_from_folders_serve_other_sources_of_the_same_bytes(stored, layouts, kind):
    assert open_survey(stored, layouts(kind)).needs_teacher(range(2)) is False


def test_labels_made_from_folders_do_not_serve_what_was_encoded_anew(stored, digits_folder, tmp_path):
    pack_dataset.main([str(digits_folder), str(tmp_path), "--max-side=47", "--num-workers=1"])
    with pytest.raises(InputError, match=r"field data\.num_bytes: .*field data\.listing: the store has"):
        open_survey(stored, tmp_path).needs_teacher(range(2))


def test_labels_from_before_images_were_known_by_content_serve_the_same_files(labels, digits_folder, tmp_path):
    manifest = json.loads((labels / "manifest.json").read_text())
    manifest["fingerprint"]["data.listing"] = fingerprint.listing_by_path(open_folder(digits_folder / "train"))
    (labels / "manifest.json").write_text(json.dumps(manifest))
    assert open_survey(labels, digits_folder).needs_teacher(range(2)) is False
    subprocess.run(["tar", "-cf", str(tmp_path / "train.tar"), "-C", str(digits_folder), "train"], check=True)
    subprocess.run(["tar", "-cf", str(tmp_path / "val.tar"), "-C", str(digits_folder), "val"], check=True)
    assert open_survey(labels, tmp_path).needs_teacher(range(2)) is False
    moved = shutil.copytree(digits_folder, tmp_path / "moved")
    file = sorted((moved / "train" / "2").iterdir())[0]
    file.rename(file.with_name("0000_renamed.jpg"))
    with pytest.raises(InputError, match=r"field data\.listing: the store has"):
        open_survey(labels, moved).needs_teacher(range(2))


def test_images_in_memory_are_listed_by_their_pixels():
    images, _ = load_digits()
    assert fingerprint._listing(images) == fingerprint._listing(images.part(range(len(images))))
    swapped = images.part([1, 0, *range(2, len(images))])
    assert fingerprint._listing(swapped)["data.listing"] != fingerprint._listing(images)["data.listing"]


# ---- damage


@pytest.mark.parametrize("extension", ["u16", "chk", "json"])
def test_a_flipped_byte_is_caught_and_the_file_named(labels, train, extension):
    path = labels / f"epoch_00000.{extension}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"epoch_00000\.\w+ is damaged .*delete epoch_00000\.\*"):
        train(f"--teacher-labels={labels}")
    assert inspect_teacher_labels.main([str(labels)]) == 1


@pytest.mark.parametrize(("extension", "num_bytes"), [("u16", 191), ("u16", 0), ("chk", 60), ("json", 20)])
def test_a_truncated_file_is_caught_and_named(labels, train, extension, num_bytes):
    path = labels / f"epoch_00001.{extension}"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match=rf"epoch_00001\.{extension} is damaged"):
        train(f"--teacher-labels={labels}")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_damaged_manifest_is_named(labels, train, text):
    (labels / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is damaged: restore it"):
        train(f"--teacher-labels={labels}")
    (labels / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds labels but no manifest\.json"):
        train(f"--teacher-labels={labels}")


def recode(path, digits_folder) -> None:
    """Another JPEG of as many bytes."""
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x10
    path.write_bytes(content)
    assert not torch.equal(*(augment.eval_transform(32, 1.0)(open_file(str(file))) for file in (path, digits_folder / path.relative_to(path.parents[2]))))


def test_a_changed_file_of_the_same_size_is_caught_at_its_first_group(stored, digits_folder, train, tmp_path, monkeypatch):
    copy = shutil.copytree(digits_folder, tmp_path / "data")
    recode(sorted((copy / "train" / "1").iterdir())[5], digits_folder)
    sample = COUNTS[0] + 5
    plan = keys.build_plan(96, repeated_aug=True, group_size=16, lanes=2, data_seed=0)
    (place,) = np.flatnonzero(plan.permutation(0)[:32].numpy() == sample).tolist() or [None]
    epoch, position = (0, 3 * place) if place is not None else (1, None)
    argv = [f"--teacher-labels={stored}", f"--data-path={copy}"]
    with pytest.raises(InputError, match=r"field canary.pixels"):
        train(*argv)
    monkeypatch.setattr(labelling, "NUM_CANARIES", 0)
    group = min(plan.groups_and_members(np.arange(position, position + 3))[0]) if position is not None else r"\d+"
    with pytest.raises(InputError, match=rf"epoch {epoch}, group {group}: field pixels: the store has -?\d+, this run has -?\d+ .*a file, the decoder"):
        train(*argv)


@pytest.fixture(scope="module")
def noisy(digits_folder, tmp_path_factory):
    """The small folder, where one training image that both epochs show became noise of its name and size; and that file."""
    folder = shutil.copytree(digits_folder, tmp_path_factory.mktemp("noisy") / "data")
    plan = keys.build_plan(96, repeated_aug=True, group_size=16, lanes=2, data_seed=0)
    (sample, *_) = set.intersection(*(set(plan.permutation(epoch)[:32].tolist()) for epoch in (0, 1)))
    path = Path(open_folder(folder / "train").samples[sample])
    path.write_bytes(np.random.RandomState(0).bytes(path.stat().st_size))
    return folder, path


@pytest.fixture(scope="module")
def noisy_online(noisy, weights, tmp_path_factory):
    """A run on that folder with the teacher online."""
    folder = tmp_path_factory.mktemp("noisy") / "run"
    assert main.main(flags(noisy[0], weights, f"--output_dir={folder}")) == 0
    return folder


def missing(folder) -> np.ndarray:
    """(2, 96) whether each position of two epochs lacks a label."""
    return np.stack([np.fromfile(folder / f"epoch_{epoch:05d}.u16", "<u2") == MISSING for epoch in (0, 1)])


def test_labels_of_sound_images_are_not_read_for_what_stands_in_for_them(noisy, noisy_online, labels, train, tmp_path):
    """Labels were stored before the file was damaged: without the teacher they are refused, with it made anew, and not stored."""
    before = epoch_files(labels)
    argv = [f"--teacher-labels={labels}", f"--data-path={noisy[0]}"]
    with pytest.raises(InputError, match=rf"epoch 0, group \d: {noisy[1]} is damaged .*which the stored label is not for, .*restore the file, or"):
        train(*argv)
    out = train(*argv, "--teacher-labels-mode=verify", "--overwrite")
    assert_same_run(tmp_path / "run", noisy_online)
    assert epoch_files(labels) == before and "epoch 0: 6 labels are neither read nor stored, for damaged images were replaced" in out


def test_labels_of_what_stands_in_are_not_stored_for_the_sound_images(noisy, noisy_online, online, stored, digits_folder, train, tmp_path):
    """Labels were stored while the file was damaged: all but those of its views and their partners; once it is sound they are added."""
    argv = [f"--teacher-labels={tmp_path / 'new'}", f"--data-path={noisy[0]}"]
    train(*argv)
    assert_same_run(tmp_path / "run", noisy_online)
    assert missing(tmp_path / "new").sum(1).tolist() == [6, 6]  # three views and whom they are mixed with
    codes = [np.fromfile(folder / "epoch_00000.u16", "<u2")[~missing(tmp_path / "new")[0]] for folder in (tmp_path / "new", stored)]
    assert np.array_equal(*codes)
    train(*argv, "--overwrite")  # the next student reads what there is
    assert_same_run(tmp_path / "run", noisy_online)
    assert missing(tmp_path / "new").sum() == 12
    assert [steady(record)["bad_images"] for record in read_log(tmp_path / "run")] == [3, 3]
    train(f"--data-path={digits_folder}", argv[0], "--overwrite")
    assert_same_run(tmp_path / "run", online)
    assert epoch_files(tmp_path / "new") == epoch_files(stored)


def test_the_generator_leaves_labels_of_damaged_images_out_and_says_so(noisy, weights, tmp_path, capsys):
    argv = flags(noisy[0], weights, "--epochs=0:1", f"--teacher-labels={tmp_path / 'new'}")
    assert make_teacher_labels.main(argv) == 0
    out = capsys.readouterr().out
    assert f"damaged: {noisy[1]} cannot be read as an image" in out and "epoch 0: 6 labels are neither read nor stored" in out
    with pytest.raises(InputError, match=rf"^{noisy[1]} cannot be read as an image"):
        make_teacher_labels.main([*argv, "--max-bad-images=0", f"--teacher-labels={tmp_path / 'other'}"])


def test_a_changed_crop_is_caught_at_the_first_step(stored, train, monkeypatch):
    monkeypatch.setattr(labelling, "NUM_CANARIES", 0)
    real, steps = transforms.RandomCrop.get_params, []
    monkeypatch.setattr(transforms.RandomCrop, "get_params", staticmethod(lambda *args: (max(0, (found := real(*args))[0] - 1), *found[1:])))
    monkeypatch.setattr(labelling.StoredLabels, "_classes", lambda self, *args, real=labelling.StoredLabels._classes: steps.append(1) or real(self, *args))
    with pytest.raises(InputError, match="epoch 0, group 0: field pixels"):
        train(f"--teacher-labels={stored}", "--teacher-labels-mode=read")
    assert len(steps) == 1


def test_shifted_labels_and_another_order_are_caught(labels, train):
    store = open_store(labels)
    page = store.read(0)
    page.codes[:] = np.roll(page.codes, 1, axis=0)
    rewrite(store, 0, page)
    with pytest.raises(InputError, match=r"epoch 0, group \d: field num_agree: the store has \d+, this run has \d+"):
        train(f"--teacher-labels={labels}")
    for extension in ("u16", "chk", "json"):
        shutil.copy(labels / f"epoch_00001.{extension}", labels / f"epoch_00000.{extension}")
    with pytest.raises(InputError, match=r"epoch 0, field order: the store has \w+, this run has \w+"):
        train(f"--teacher-labels={labels}", "--overwrite")


def test_in_a_group_stored_in_part_the_stored_labels_stay(labels, digits_folder):
    survey = open_survey(labels, digits_folder)
    batch = next(survey.loader.batches(0))
    store = survey.store
    page, whole = store.read(0), store.read(0)
    lost = batch.positions[3:9].numpy()
    page.codes[lost] = MISSING
    page.checks["pixels"][0] -= np.uint64(int(batch.pixel_hashes[3:9].sum()) % 2**64)
    rewrite(store, 0, page, recount=True)
    reader = open_labels(labels, digits_folder, mode="auto")
    reader.teacher = types.SimpleNamespace(logits=lambda images: torch.eye(4)[3].repeat(len(images), 1))
    expected = whole.codes[:, 0].copy()
    expected[lost] = 3
    assert reader(batch.images, batch, 0).tolist() == expected[batch.positions.numpy()].tolist() != whole.codes[batch.positions.numpy(), 0].tolist()
    reader.end_epoch(0)
    assert np.array_equal(store.read(0).codes[:, 0], expected)


def test_groups_in_parts_are_checked_once_they_are_complete(labels, digits_folder):
    """Four steps of a quarter each; a quarter that was resumed after the first is not checked."""
    survey = open_survey(labels, digits_folder, "--batch-size=4")
    batches = list(survey.loader.batches(0))
    page = survey.store.read(0)
    page.checks["pixels"][1] += 1
    rewrite(survey.store, 0, page)
    reader = open_labels(labels, digits_folder, mode="read")
    for batch in batches[:7]:
        reader(batch.images, batch, 0)
    with pytest.raises(InputError, match="epoch 0, group 1: field pixels"):
        reader(batches[7].images, batches[7], 0)
    reader = open_labels(labels, digits_folder, mode="read")
    for batch in batches[5:]:
        reader(batch.images, batch, 0)
    changed = batches[8]._replace(pixel_hashes=batches[8].pixel_hashes + 1)
    for batch in batches[9:12]:  # what was checked may come again, and is checked again
        reader(batch.images, batch, 0)
    with pytest.raises(InputError, match="epoch 0, group 2: field pixels"):
        reader(changed.images, changed, 0)


# ---- writing


def fresh(store: LabelStore, positions, seed: int = 0) -> Fresh:
    """Labels of `positions`, drawn from a seed and the position."""
    codes = np.full((store.num_positions, store.width), MISSING, np.uint16)
    rng = np.random.RandomState(seed)
    drawn, hashes = rng.randint(0, 4, codes.shape), rng.randint(-(2**62), 2**62, store.num_positions)
    codes[positions] = drawn[positions]
    return Fresh(codes, store_groups(store), codes[:, 0] == 2, hashes)


def test_two_writers_lose_nothing_and_the_first_stays(tmp_path):
    store = open_store(tmp_path)
    assert store.commit(3, fresh(store, range(0, 60)), order="a") == Merged(60, 0, 0)
    other = fresh(store, range(40, 96), seed=1)
    num_different = int((fresh(store, range(96)).codes[40:60] != other.codes[40:60]).sum())
    assert store.commit(3, other, order="a") == Merged(36, 20, num_different) and num_different > 5
    page = store.read(3)
    assert np.array_equal(page.codes[:60], fresh(store, range(96)).codes[:60]) and np.array_equal(page.codes[60:], other.codes[60:])
    first, groups = fresh(store, range(0, 60)), store_groups(store)
    hashes = np.concatenate([first.hashes[:60], other.hashes[60:]])
    for group in range(6):
        assert page.checks["num_agree"][group] == (page.codes[groups == group, 0] == 2).sum()
        assert int(page.checks["pixels"][group]) == sum(int(value) for value in hashes[groups == group]) % 2**64


def test_many_writers_at_once(tmp_path):
    """Eight processes' worth of threads, each with an eighth of every epoch, in any order."""
    store, merged = open_store(tmp_path), []

    def write(i: int) -> None:
        own = open_store(tmp_path)
        for epoch in np.random.RandomState(i).permutation(5):
            merged.append(own.commit(int(epoch), fresh(own, range(i * 12, i * 12 + 12)), order="a"))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert merged == [Merged(12, 0, 0)] * 40
    for epoch in range(5):
        assert np.array_equal(store.read(epoch).codes, fresh(store, range(96)).codes)


def test_killed_at_any_moment_leaves_the_old_the_new_or_nothing(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    outcomes = []
    for moment in range(20):
        folder = tmp_path / str(moment)
        folder.mkdir()
        store = open_store(folder)
        store.commit(0, fresh(store, range(32)), order="a")
        left = iter([False] * moment + [True] * 100)

        def watched(real, left=left):
            def call(*args, **kwargs):
                if next(left):
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, watched(getattr(os, name)))
            try:
                store.commit(0, fresh(store, range(96)), order="a")
                finished = True
            except Killed:
                finished = False
        page = store.read(0)
        outcomes.append(None if page is None else int(page.is_filled.sum()))
        assert not finished or outcomes[-1] == 96
        store.commit(0, fresh(store, range(96)), order="a")
        assert np.array_equal(store.read(0).codes, fresh(store, range(96)).codes)
    assert outcomes[0] == 32 and outcomes[-1] == 96 and set(outcomes) == {32, None, 96}
    assert sorted(outcomes, key=[32, None, 96].index) == outcomes


def test_full_disk_keeps_what_is_stored_and_does_not_stop_the_run(online, train, tmp_path, monkeypatch):
    real = LabelStore._stage

    def no_space(self, path, data):
        if path.name.startswith("epoch_00001.chk"):
            raise OSError(28, "No space left on device")
        return real(self, path, data)

    monkeypatch.setattr(LabelStore, "_stage", no_space)
    out = train(f"--teacher-labels={tmp_path / 'new'}")
    assert "the labels of epoch 1 are not stored (No space left on device;" in out and "Training goes on" in out
    assert_same_run(tmp_path / "run", online)
    store = open_store(tmp_path / "new")
    assert store.read(0).is_filled.all() and store.read(1) is None


def test_a_folder_that_cannot_be_written_is_named_at_the_start(train, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--teacher-labels .*file/labels cannot be written"):
        train(f"--teacher-labels={tmp_path / 'file' / 'labels'}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 1, 99))
    with pytest.raises(InputError, match=r"has 0\.0 MiB free, an epoch takes"):
        train(f"--teacher-labels={tmp_path / 'labels'}")
    assert not (tmp_path / "run" / "log.txt").exists()


def test_a_refused_teacher_leaves_no_claim_on_the_folder(train, tmp_path):
    """Weights that fail the check of accuracy must not be what the folder is for."""
    with pytest.raises(InputError, match="top-1 accuracy"):
        train(f"--teacher-labels={tmp_path / 'labels'}", "--teacher-min-acc1=99")
    assert not (tmp_path / "labels" / "manifest.json").exists()


def test_a_store_may_be_read_only(stored, tmp_path, monkeypatch):
    """No lock file, and none to be made."""
    copy = shutil.copytree(stored, tmp_path / "copy")
    (copy / ".lock").unlink()
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *rest: (_ for _ in ()).throw(PermissionError(13, "no")) if flags & os.O_CREAT else real(path, flags, *rest)
    )
    assert open_store(copy).read(0).is_filled.all() and not (copy / ".lock").exists()


def test_inspection_lists_the_epochs(labels, capsys):
    (labels / "epoch_00000.json").unlink()
    store = open_store(labels)
    assert store.commit(5, fresh(store, range(40)), order="a").num_new == 40
    assert inspect_teacher_labels.main([str(labels)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  teacher.model: resnet10t" in lines and "  plan.num_positions: 96" in lines
    table = [line.split() for line in lines[-4:-1]]
    assert table[0][:2] == ["0", "absent:"] and table[1][:4] == ["1", "96", "complete", "ok"] and table[2][:5] == ["5", "40", "56", "missing", "ok"]
    assert float(table[1][4]) == pytest.approx(100 * json.loads((labels / "epoch_00001.json").read_text())["num_agree"] / 96, abs=0.01)


def test_inspection_needs_labels_and_no_torch(tmp_path, stored):
    done = run_command("tools/inspect_teacher_labels.py", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("error:") and "holds no teacher labels" in done.stderr
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tools import inspect_teacher_labels as tool\nassert tool.main([sys.argv[1]]) == 0\n"
    code += "assert 'torch' not in sys.modules"
    assert run_command("-c", code, str(stored)).returncode == 0


# ---- soft distillation


@pytest.mark.slow
def test_soft_run_from_the_top_logits_is_the_same_online_and_stored(train, tmp_path, monkeypatch):
    soft = ["--distillation-type=soft", "--teacher-topk=2", "--distillation-tau=2"]
    train(*soft, f"--output_dir={tmp_path / 'online'}")
    train(*soft, f"--output_dir={tmp_path / 'auto'}", f"--teacher-labels={tmp_path / 'soft'}")
    train("--distillation-type=soft", "--distillation-tau=2", f"--output_dir={tmp_path / 'exact'}")
    monkeypatch.setattr(teacher, "_create", None)
    train(*soft, f"--output_dir={tmp_path / 'read'}", f"--teacher-labels={tmp_path / 'soft'}", "--teacher-labels-mode=read")
    for name in ("auto", "read"):
        assert_same_run(tmp_path / name, tmp_path / "online")
    exact, ours = ([record["train_loss"] for record in read_log(tmp_path / name)] for name in ("exact", "online"))
    assert exact != ours and exact == pytest.approx(ours, rel=0.05)
    assert (tmp_path / "soft" / "epoch_00000.topk").stat().st_size == 2 * 5 * 96
    assert inspect_teacher_labels.main([str(tmp_path / "soft")]) == 0


def test_top_logits_keep_the_top_and_the_sum_of_the_rest():
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    answer = teacher.TopLogits(4, 40)
    codes = answer.encode(logits)
    assert codes.dtype == torch.int16 and codes.shape == (5, 9)
    p, ours = logits.softmax(1), answer.decode(codes).softmax(1)
    top = p.topk(4, dim=1).indices
    torch.testing.assert_close(ours.gather(1, top), p.gather(1, top), rtol=2e-3, atol=0)
    rest = torch.ones_like(p).scatter(1, top, 0.0).bool()
    assert all(torch.allclose(row[mask], (1 - own[~mask].sum()) / 36, rtol=1e-2) for row, own, mask in zip(ours, p, rest, strict=True))
    torch.testing.assert_close(teacher.TopLogits(99, 40).decode(teacher.TopLogits(99, 40).encode(logits)).softmax(1), p, rtol=5e-3, atol=1e-6)
    certain = answer.decode(answer.encode(torch.eye(40)[:2] * 1e4))
    assert torch.isfinite(certain).all() and certain.argmax(1).tolist() == [0, 1]


def test_class_indices_above_the_signed_range_survive():
    logits = torch.zeros(3, 65535)
    logits[range(3), [0, 40000, 65534]] = 1
    codes = teacher.HardLabels().encode(logits)
    assert (codes != -1).all() and teacher.HardLabels().decode(codes).tolist() == [0, 40000, 65534]
    top = teacher.TopLogits(2, 65535)
    assert top.decode(top.encode(logits)).argmax(1).tolist() == [0, 40000, 65534]


def test_resuming_with_other_soft_labels_is_refused_and_with_another_folder_not():
    from run.checkpoint import FREE_SETTINGS

    assert {"teacher_labels", "teacher_labels_mode"} <= FREE_SETTINGS and "teacher_topk" not in FREE_SETTINGS


# ---- the teacher


@pytest.mark.parametrize("name", ["regnety_002", "resnet10t", "recnext_m0", "efficientnet_b0"])
def test_folding_leaves_no_batchnorm_and_the_logits(name):
    net = randomise(model.create_model(name, num_classes=7)).eval()
    cfg, _ = config.parse(["--data-set=DIGITS", "--input-size=64", f"--teacher-model={name}"])
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        folded = teacher.folded(cfg, utils.replace_batchnorm(net) if name == "recnext_m0" else net)
        assert not [module for module in folded.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


class _TwoUses(nn.Module):
    """A convolution whose output is used besides its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        features = self.conv(images)
        return (self.norm(features) + features).mean((2, 3))


def test_what_folding_would_change_stays_as_it_is(caplog, monkeypatch):
    monkeypatch.setattr(utils.log, "propagate", True)
    net = randomise(_TwoUses()).eval()
    cfg, _ = config.parse(["--data-set=DIGITS", "--input-size=32"])
    assert teacher.folded(cfg, net) is net and "it runs as it is, slower" in caplog.text
    assert teacher._trace(net, torch.zeros(1, 3, 32, 32))[0] == [("conv", "norm")]


def test_benchmark_prints_both_ratios(capsys):
    distill.main(["--models", "resnet10t", "--teacher-model=regnety_002", "--batch-size=2", "--input-size=32", "--rounds=2", "--warm-up=0", "--device=cpu"])
    title, head, line = capsys.readouterr().out.splitlines()
    assert "batch 2 at 32 pixels from regnety_002" in title and "online / stored" in head
    assert line.split()[0] == "resnet10t" and line.count(" to ") == 5


def test_half_weights_leave_what_autocast_computes():
    torch.manual_seed(0)
    net = model.create_model("regnety_002", num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        expected = net(images)
        halved = teacher.with_half_weights(net)
        assert torch.equal(halved(images), expected)
    assert {module.weight.dtype for module in halved.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)} == {torch.float16}
