"""A dry run tells all that stands in a run's way, at once, and leaves nothing behind."""

import os
import shutil

import pytest
import timm
import torch

import main
import utils
from preflight import cost, room
from run import checkpoint, config
from run.command import run_process
from run.errors import Faults, InputError
from tests.conftest import SHORT_RUN, TINY_RUN, read_log

DRY = "--dry-run"


def files_below(*folders) -> dict:
    return {path: path.is_file() and path.read_bytes() for folder in folders for path in folder.rglob("*")}


def faults_of(*flags: str) -> list[str]:
    with pytest.raises(InputError) as error:
        main.main([*flags, DRY])
    return str(error.value).split("\nerror: ")


@pytest.fixture(scope="module")
def untrained(digits_folder, tmp_path_factory):
    """A checkpoint of the small network before its first step."""
    folder = tmp_path_factory.mktemp("untrained")
    assert main.main([*TINY_RUN, f"--data-path={digits_folder}", "--epochs=0", f"--output_dir={folder}"]) == 0
    return folder / checkpoint.LAST


def as_teacher(path, num_classes: int = 4) -> list[str]:
    """Flags that distil from a small network that has learnt nothing, which is written there."""
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("resnet10t", num_classes=num_classes).state_dict()}, path)
    return ["--teacher-model=resnet10t", f"--teacher-path={path}", "--distillation-type=hard"]


def test_a_sound_run_is_told_what_it_has_and_costs_and_nothing_is_left_behind(digits_folder, tmp_path, capsys):
    before = files_below(digits_folder, tmp_path)
    assert main.main([*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={tmp_path / 'new' / 'run'}", DRY]) == 0
    out = capsys.readouterr().out
    assert f"train: 96 images of 4 classes, class folders in {digits_folder / 'train'}" in out
    assert "train: 16 to 27 images per class, median 26.5, 96 in all" in out and "val: 6 to 16 images per class" in out
    assert "batch 16 x 1 processes x 1 accumulation = global batch 16" in out
    assert "a step of training: " in out and " (h:mm:ss) on cpu for 2 epochs, 192 views" in out
    assert out.splitlines()[-1] == "dry run: nothing stands in the way of this run"
    assert files_below(digits_folder, tmp_path) == before


def test_steps_of_every_size_are_measured_and_counted(digits_folder, tmp_path, capsys):
    more = ["--image-size-schedule=40:0,48:0.5", "--epochs=3", "--aug-splits=2", "--jsd-loss", "--mixup=0", "--cutmix=0"]
    assert main.main([*TINY_RUN, *more, f"--data-path={digits_folder}", f"--output_dir={tmp_path / 'new'}", DRY]) == 0
    out = capsys.readouterr().out
    assert out.count("a step of training at 40 pixels: ") == out.count("a step of training at 48 pixels: ") == 1
    assert " (h:mm:ss) on cpu for 3 epochs, 288 views" in out
    cfg = config.parse([*TINY_RUN, *more, "--data-path=x", "--image-size-schedule=40:0,48:0.5,32:0.8", "--epochs=10"])[0]
    assert cost.epochs_by_size(cfg, 0) == {40: 5, 48: 3, 32: 2} and cost.epochs_by_size(cfg, 6) == {48: 2, 32: 2} and cost.epochs_by_size(cfg, 10) == {32: 0}


def test_all_faults_are_told_a_line_each(tmp_path):
    (tmp_path / "file").write_text("")
    flags = [*SHORT_RUN, f"--data-path={tmp_path / 'nowhere'}", "--model=recnext_m", "--opt=adamq", "--aa=other", "--device=cuda:7", "--resume=no.pth"]
    distilling = as_teacher(tmp_path / "teacher.pth")
    os.truncate(tmp_path / "teacher.pth", 30_000)
    faults = faults_of(*flags, *distilling, f"--output_dir={tmp_path / 'file' / 'run'}")
    if torch.cuda.is_available():
        faults = [fault for fault in faults if "--device" not in fault] + ["--device"]
    words = [
        "nowhere is no folder",
        "--output_dir",
        "--model recnext_m is no model",
        "--opt adamq is no optimiser",
        "--aa other is no policy",
        "or --distillation-type none for a run without one",
        "no.pth: there is no such file",
        "--device",
    ]
    assert len(faults) == len(words) and not any("\n" in fault for fault in faults)
    assert [word for word in words if not any(word in fault for fault in faults)] == []


def test_contradictions_between_settings_are_all_told():
    faults = faults_of("--data-set=DIGITS", "--report=x.csv", "--use-ema", "--batch-size=5")
    assert [fault.split()[0] for fault in faults] == ["--report", "--use-ema", "--batch-size"]
    faults = faults_of("--epoch=3", "--lr=fast", "--batch-size=0")
    assert ["did you mean --epochs" in faults[0], "'fast'" in faults[1], "less than 1" in faults[2]] == [True] * 3


def test_the_command_ends_with_a_line_per_fault_and_code_1(digits_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_process(main.main, [*TINY_RUN, f"--data-path={digits_folder}", "--opt=adamq", "--aa=other", f"--output_dir={tmp_path}", DRY])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(lines) == 2
    assert lines[0].startswith("error: --aa other") and lines[1].startswith("error: --opt adamq")


def test_classes_with_few_images_and_damaged_ones_are_named(digits_folder, tmp_path, capsys):
    shutil.copytree(digits_folder, tmp_path / "data")
    names = sorted(path.name for path in (tmp_path / "data" / "train").iterdir())
    for path in sorted((tmp_path / "data" / "train" / names[2]).iterdir())[3:]:
        path.unlink()
    for split in ("train", "val"):
        first = min((tmp_path / "data" / split / names[0]).iterdir())
        first.write_bytes(first.read_bytes()[:100])
    faults = faults_of(*TINY_RUN, f"--data-path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}")
    out = capsys.readouterr().out
    assert len(faults) == 1 and str(tmp_path / "data" / "val" / names[0]) in faults[0]  # which an evaluation would stop at
    assert f"train: 1 of 4 classes have fewer than 10 images: {names[2]} (3)" in out
    assert f"train: {tmp_path / 'data' / 'train' / names[0]}" in out  # which training bears


def test_a_folder_with_a_run_and_a_checkpoint_of_another_recipe_are_refused_and_stay(digits_folder, tmp_path):
    flags = [*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={tmp_path}"]
    assert main.main([*flags, "--epochs=1"]) == 0
    before = files_below(tmp_path)
    assert "already holds a run" in faults_of(*flags)[0]
    assert "the recipe changed: weight_decay was 0.025, is 0.5" in faults_of(*flags, "--weight-decay=0.5", "--epochs=1", "--resume=auto")[0]
    assert main.main([*flags, "--epochs=1", "--resume=auto", DRY]) == 0
    assert files_below(tmp_path) == before and len(read_log(tmp_path)) == 1


def test_teachers_are_tried(digits_folder, tmp_path):
    flags = [*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={tmp_path}"]
    assert "the teacher's top-1 accuracy on 40 validation images" in faults_of(*flags, *as_teacher(tmp_path / "teacher.pth"), "--teacher-min-acc1=99")[0]
    assert "knows 7 classes, the data has 4" in faults_of(*flags, *as_teacher(tmp_path / "teacher.pth", 7))[0]


def test_stored_labels_are_counted_read_and_left_alone(digits_folder, tmp_path, capsys):
    flags = [*TINY_RUN, f"--data-path={digits_folder}", "--teacher-min-acc1=0", f"--teacher-labels={tmp_path / 'labels'}"]
    flags += as_teacher(tmp_path / "teacher.pth")
    assert main.main([*flags, f"--output_dir={tmp_path / 'new'}", DRY]) == 0
    assert "0 whole, 0 in part, 2 missing" in capsys.readouterr().out and not (tmp_path / "labels").exists()
    assert main.main([*flags, "--epochs=1", f"--output_dir={tmp_path / 'first'}"]) == 0
    before = files_below(tmp_path)
    capsys.readouterr()
    assert main.main([*flags, f"--output_dir={tmp_path / 'new'}", DRY]) == 0
    out = capsys.readouterr().out
    assert "1 whole, 0 in part, 1 missing" in out and "a step with the teacher: " in out and "a step without the teacher: " in out
    assert files_below(tmp_path) == before
    faults = faults_of(*flags, "--teacher-labels-mode=read", f"--output_dir={tmp_path / 'new'}")
    assert len(faults) == 1 and "lacks labels of 1 epochs, first 1" in faults[0]
    stored = next((tmp_path / "labels").glob("*.u16"))
    stored.write_bytes(b"\0\0" + stored.read_bytes()[2:])
    assert [fault for fault in faults_of(*flags, f"--output_dir={tmp_path / 'new'}") if f"{stored} is damaged" in fault] != []


def test_evaluations_are_tried(digits_folder, tmp_path, untrained, capsys):
    flags = [*TINY_RUN, f"--data-path={digits_folder}", "--eval", f"--resume={untrained}"]
    assert main.main([*flags, DRY]) == 0
    out = capsys.readouterr().out
    assert "(h:mm:ss) for the network on 40 images" in out and "Accuracy" not in out
    faults = faults_of(*flags, "--model-kwargs", "layers=[2,1,1,1]", "--report", str(tmp_path / "no" / "report.csv"))
    assert len(faults) == 2 and "does not fit" in faults[0] and "report.csv" in faults[1]


def test_processes_of_a_launcher_are_counted_and_need_not_be_there(digits_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = [*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={tmp_path}", DRY]
    assert main.main(flags) == 0
    assert "batch 16 x 2 processes x 1 accumulation = global batch 32" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main.main(flags) == 0
    assert capsys.readouterr().out == ""


def test_disks_without_room_are_named_with_what_is_to_be_written(tmp_path, monkeypatch):
    wanted, faults = room.Room(), Faults()
    wanted.add(tmp_path / "run", 2**30, "checkpoints")
    wanted.add(tmp_path / "labels" / "deeper", 2**29, "teacher labels")
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=int(1.6 * 2**30)) if os.path.isdir(path) else None)
    wanted.compare(faults)
    assert faults.texts == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=int(1.4 * 2**30)))
    wanted.compare(faults)
    assert len(faults.texts) == 1 and "1.40 GiB free, the run writes 1.00 GiB" in faults.texts[0] and "0.50 GiB" in faults.texts[0]


def test_as_many_checkpoints_are_counted_as_a_run_leaves(digits_folder, tmp_path):
    """But for the two that are being written."""
    assert main.main([*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={tmp_path}", "--epochs=5"]) == 0
    files = {path.stat().st_ino for path in tmp_path.glob("checkpoint_*.pth")}
    assert len(files) <= room.num_checkpoints(3, has_ema=True) - 2
    assert room._held_bytes(tmp_path) == sum({path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*.pth")}.values()) > 0


def test_rank_is_taken_from_the_environment_alone(monkeypatch):
    from run import process

    monkeypatch.setenv("WORLD_SIZE", "4")
    rank = process.start_process("cpu", 0, is_alone=True)
    assert (rank.world_size, rank.control) == (4, None) and isinstance(rank, utils.Rank)
