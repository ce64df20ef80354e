"""A segmenter's run: settings, schedule, recipes, logs, evaluation, resume to the bit, processes, and that it learns."""

import ast
import csv
import dataclasses
import inspect
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from features import running
from run import checkpoint, signals
from run.errors import InputError
from segmentation import __main__ as command
from segmentation import config, names, networks, training
from segmentation.config import Config
from tests.browsing import read_page
from tests.conftest import ROOT, finish, read_log, run_processes, start, wait_for
from tests.detection.test_training import step_lines
from tests.segmentation import made
from tests.segmentation.conftest import NAMES, SHORT_RUN
from tests.test_main import states_equal, steady
from tests.test_resume import StopAt
from tools import make_shapes

RECIPES = sorted((ROOT / "recipes" / "segmentation").glob("*.yaml"))
PUBLISHED = {
    "recnext_m3": 41.0, "recnext_m4": 43.6, "recnext_m5": 46.0, "recnext_a3": 41.9, "recnext_a4": 43.0, "recnext_a5": 46.5, "repnext_m3": 40.6,
    "repnext_m4": 43.3, "repnext_m5": 45.0, "lsnet_t": 40.1, "lsnet_s": 41.6, "lsnet_b": 43.1,
}  # fmt: skip


# ---- settings and recipes


def test_every_setting_is_read():
    """No dead flag: each field is an attribute that some file reads from a `cfg`; which of the published figures are named changes nothing."""
    read = {"metrics"}
    for path in [path for pattern in ("run/*.py", "features/*.py", "segmentation/*.py", "loading/*.py", "engine.py") for path in ROOT.glob(pattern)]:
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cfg", "self.cfg")}
    read |= {node.attr for node in ast.walk(ast.parse(inspect.getsource(Config))) if isinstance(node, ast.Attribute)}
    assert [field.name for field in dataclasses.fields(Config) if field.name not in read] == []


@pytest.mark.parametrize("model", PUBLISHED)
def test_recipes_are_the_published_rows(model):
    path = ROOT / "recipes" / "segmentation" / f"fpn_{model}.yaml"
    cfg, _ = config.parse(["--config", str(path)])
    is_lsnet = model.startswith("lsnet")
    assert (cfg.model, cfg.backbone_weights) == (model, f"pretrain/{model}_distill_300e.pth")
    assert (cfg.opt, cfg.opt_betas, cfg.lr, cfg.weight_decay) == ("adamw", None, *((2e-4, 1e-4) if is_lsnet else (1e-4, 0.05)))
    assert (cfg.iterations, cfg.eval_interval, cfg.epochs) == ((40_000, 4_000, 10) if is_lsnet else (80_000, 8_000, 10))
    assert (cfg.min_lr, cfg.poly_power, cfg.batch_size, cfg.recipe_batch) == (1e-6, 0.9, 4, 32)
    assert (cfg.max_size, cfg.crop_size, cfg.skips_zero, cfg.clip_grad, cfg.amp) == ((2048, 512), 512, True, None, "none")
    text = path.read_text()
    assert f"mIoU, of the last iteration: {PUBLISHED[model]}." in text
    assert "# Not reproduced here." in text


def test_every_row_has_a_recipe_and_every_recipe_a_row():
    assert {path.stem for path in RECIPES} == {*(f"fpn_{model}" for model in PUBLISHED), "demo"}


@pytest.mark.parametrize("argv", [["--config", "configs/sem_fpn/fpn_recnext_m3_ade20k_80k.py"], ["--config=fpn_recnext_m3.py"]])
def test_published_command_lines(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg, _ = config.parse([*argv, "--resume", "x.pth", "--eval", "mIoU", "--num_workers", "3"])
    assert (cfg.model, cfg.eval, cfg.metrics, cfg.resume, cfg.num_workers) == ("recnext_m3", True, ("mIoU",), "x.pth", 3)


def test_shell_wrappers_start_the_processes_of_a_published_name():
    env = {name: value for name, value in os.environ.items() if name not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")} | {"PYTHON": "echo"}
    for script, args, wanted in (
        ("dist_train.sh", ["fpn_recnext_m3.py", "3", "--seed", "1"], "-m segmentation --config fpn_recnext_m3.py --seed 1"),
        ("dist_test.sh", ["fpn_lsnet_t.py", "a b.pth", "3", "--eval", "mIoU"], "-m segmentation --config fpn_lsnet_t.py --resume a b.pth --eval mIoU"),
    ):
        path = str(ROOT / "segmentation" / "tools" / script)
        said = subprocess.run(["bash", path, *args], cwd="/", env=env, capture_output=True, text=True, check=True).stdout
        assert "--nproc_per_node 3 " in said
        assert said.endswith(wanted + "\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval"], "--eval needs weights"),
        (["--metrics", "mDice"], "choose from mIoU, mAcc, aAcc"),
        (["--max-size", "512", "2048"], "the long side first"),
        (["--crop-size=500"], "no multiple of 32: use 480"),
        (["--iterations=10", "--eval-interval=4"], "does not divide the 10 iterations"),
        (["--num-classes=5"], "for --data-set own"),
        (["--min-lr=1"], "above --lr"),
        (["--scales", "2", "0.5"], "the smaller one first"),
        (["--scales", "1"], "two numbers"),
        (["--finetune=x", "--pretrained"], "drop the others"),
        (["--config=fpn_nothing.py"], "fpn_nothing"),
        (["--crop-side=64"], "did you mean --crop-size"),
    ],
)
def test_bad_command_lines_are_refused_with_the_reason(flags, words):
    with pytest.raises(InputError, match=words):
        config.parse(flags)


def test_rates_by_hand():
    """Down from 1e-4 to 1e-6 with the power 0.9 of what is left of 80,000 iterations."""
    cfg, _ = config.parse([])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    scheduler = training.build_scheduler(cfg, optimizer, cfg.eval_interval)
    for step, expected in ((0, 1e-4), (20_000, 99e-6 * 0.771887 + 1e-6), (40_000, 99e-6 * 0.535887 + 1e-6), (79_999, 99e-6 * 3.86e-5 + 1e-6)):
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-5)
        scheduler.step(step // 8000, 0.4)  # as after an evaluation: nothing changes
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-5)


# ---- a run and what it leaves


def test_logs_have_the_published_keys(whole):
    lines = [json.loads(line) for line in (whole / "train_log.txt").read_text().splitlines()]
    train, val = ([line for line in lines if line["mode"] == mode] for mode in ("train", "val"))
    assert [list(line) for line in train] == [["mode", "epoch", "iter", "lr", "decode.loss_ce", "decode.acc_seg", "loss", "time"]] * 2
    assert [(line["epoch"], line["iter"]) for line in train] == [(1, 2), (2, 5)]  # within each stretch the second of three
    for line in train:
        assert line["loss"] == line["decode.loss_ce"]
        assert 0 <= line["decode.acc_seg"] <= 100
    assert [(line["epoch"], line["iter"]) for line in val] == [(1, 3), (2, 6)]
    for line, record in zip(val, read_log(whole), strict=True):
        assert list(record)[:3] == ["epoch", "iter", "train_lr"]
        assert {name: line[name] for name in config.METRICS} == {name: record[name] for name in config.METRICS}
        assert all(0 < record[name] < 1 for name in config.METRICS)
    assert (whole / "args.yaml").read_text().startswith("# python -m segmentation --config <this file>")
    saved = torch.load(whole / "checkpoint_last.pth", weights_only=True)
    assert saved["class_names"] == NAMES.split("\n")[0:1] + ["circle", "square", "triangle"]
    assert saved["palette"][1] == [255, 0, 0]


def assert_same_run(folder: Path, expected: Path) -> None:
    assert [steady(record) for record in read_log(folder)] == [steady(record) for record in read_log(expected)]
    assert step_lines(folder) == step_lines(expected)
    ours, theirs = (torch.load(path / "checkpoint_last.pth", weights_only=True) for path in (folder, expected))
    for key in ("model", "optimizer", "lr_scheduler", "best_mIoU", "epoch", "step"):
        assert states_equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("calls", [0, 4])
def test_stopped_inside_a_stretch_and_resumed(whole, short_run, tmp_path, monkeypatch, calls):
    flags = [f"--output_dir={tmp_path}"]
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(calls))
    assert short_run(*flags)[0] == 85
    saved = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) == {0: (-1, 1), 4: (0, 2)}[calls]
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(1000))
    assert short_run(*flags, "--resume=auto")[0] == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_and_resumed(whole, shapes, tmp_path):
    flags = ["-m", "segmentation", *SHORT_RUN, f"--data-path={shapes}", f"--classes={shapes / 'names.txt'}", f"--output_dir={tmp_path}"]
    flags += ["--checkpoint-steps=1", "--num_workers=2"]
    process = start(*flags)
    wait_for(tmp_path / "train_log.txt", process)
    process.kill()
    finish(process, -9)
    finish(start(*flags, "--resume=auto"), 0)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_are_one(whole, shapes, tmp_path):
    """Losses before rounding errors grow; and an evaluation by two is that by one, to the last pixel."""
    common = [*SHORT_RUN, f"--data-path={shapes}", f"--classes={shapes / 'names.txt'}"]
    one, two, report = tmp_path / "one", tmp_path / "two", tmp_path / "two.csv"
    assert command.main([*common, "--log-steps=1", f"--output_dir={one}"]) == 0
    results = run_processes(
        (2, "segmentation.__main__", [*common, "--log-steps=1", "--batch-size=2", f"--output_dir={two}"]),
        (2, "segmentation.__main__", [*common, "--eval", f"--resume={whole / 'checkpoint_last.pth'}", f"--report={report}"]),
    )
    assert [codes for codes, _, _ in results] == [[0, 0], [0, 0]], results
    ours, theirs = ([line["loss"] for line in step_lines(folder) if line["mode"] == "train"] for folder in (two, one))
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-3)
    assert told(results[1][2]) == [f"{read_log(whole)[-1][name]:.4f}" for name in config.METRICS]


def told(said: str) -> list[str]:
    """The figures in the line that ends an evaluation."""
    return list(re.search(r"test pictures: mIoU ([\d.]+)  mAcc ([\d.]+)  aAcc ([\d.]+)", said).groups())


# ---- evaluation and checkpoints


def test_evaluation_reports_the_last_figures_of_ours_and_of_the_published_form(whole, short_run, tmp_path):
    record = read_log(whole)[-1]
    report, page, numbers = (tmp_path / f"classes.{ending}" for ending in ("csv", "html", "json"))
    _, said = short_run("--eval", f"--resume={whole / 'checkpoint_last.pth'}", f"--report={report}")
    assert "Segmentation of the 5 test pictures" in said
    assert told(said) == [f"{record[name]:.4f}" for name in config.METRICS]
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["ground", "circle", "square", "triangle"]
    overlaps = [float(row["IoU"]) for row in rows if row["IoU"]]
    assert sum(overlaps) / len(overlaps) == pytest.approx(record["mIoU"], abs=1e-5)
    net = networks.build("test_resnet", 4, channels=16)
    names.load(net, checkpoint.read(str(whole / "checkpoint_last.pth")), where="ours")
    torch.save({"state_dict": names.to_published(net)}, tmp_path / "published.pth")
    assert told(short_run("--eval", "mIoU", f"--resume={tmp_path / 'published.pth'}", f"--report={page}")[1]) == told(said)
    shown = read_page(page)
    classes = {row[0]: row[1:] for row in shown.rows if len(row) == 4}
    assert [classes[row["class"]][1] for row in rows] == [f"{100 * float(row['IoU']):.2f}" if row["IoU"] else "-" for row in rows]
    assert len(shown.all("img")) == 2 * 5
    matrix = [[int(count) for count in row[1:]] for row in shown.rows[-4:]]
    assert [sum(row) for row in matrix] == [int(classes[row["class"]][0]) for row in rows]
    assert sum(matrix[k][k] for k in range(4)) / sum(map(sum, matrix)) == pytest.approx(record["aAcc"], abs=1e-6)
    short_run("--eval", f"--resume={whole / 'checkpoint_last.pth'}", f"--report={numbers}")
    found = json.loads(numbers.read_text())
    assert found["figures"] == {name: record[name] for name in config.METRICS}


def test_evaluation_without_names_takes_the_checkpoints(whole, shapes, capsys):
    command.main([*SHORT_RUN, f"--data-path={shapes}", "--eval", f"--resume={whole / 'checkpoint_last.pth'}"])
    said = capsys.readouterr().out
    assert told(said) == [f"{read_log(whole)[-1][name]:.4f}" for name in config.METRICS]
    assert "other class_names" not in said


def test_without_names_their_number_is_found_with_a_warning(shapes, tmp_path, capsys):
    command.main([*SHORT_RUN, f"--data-path={shapes}", "--iterations=0", f"--output_dir={tmp_path}"])
    assert "4 classes, from the highest value in 21 label images: give --num-classes or --classes" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)["class_names"] == ["0", "1", "2", "3"]


def test_fine_tuning_drops_the_head_of_other_classes(whole, shapes):
    cfg, _ = config.parse([*SHORT_RUN, f"--data-path={shapes}", f"--finetune={whole / 'checkpoint_last.pth'}"])
    source = checkpoint.read(str(whole / "checkpoint_last.pth"))["model"]
    same, other = (running.build_net(cfg, training, num_classes, is_new=True).state_dict() for num_classes in (4, 7))
    assert states_equal(same, source)
    assert {name for name in other if other[name].shape != source[name].shape} == {"head.conv_seg.weight", "head.conv_seg.bias"}
    assert all(torch.equal(other[name], source[name]) for name in other if not name.startswith("head.conv_seg"))


# ---- bad input


def write_colours(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "annotations/training/000001.png")


def write_other_size(root: Path) -> None:
    Image.new("L", (8, 8)).save(root / "annotations/training/000001.png")


def write_high(root: Path) -> None:
    path = root / "annotations/training/000001.png"
    with Image.open(path) as image:
        size = image.size
    Image.new("L", size, 77).save(path)


def remove_label(root: Path) -> None:
    (root / "annotations/training/000001.png").unlink()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_colours, "000001.png is no label image, its pixels are RGB"),
        (write_other_size, "000001.png is 8x8 pixels, its picture .*000001.jpg"),
        (write_high, "000001.png has pixels of value 77, beyond the 4 classes"),
        (remove_label, "1 of 4 pictures in .* have no label image of that name"),
    ],
)
def test_hostile_label_files_get_one_message(tmp_path, spoil, message, num_workers):
    make_shapes.make(tmp_path, num_train=4, num_val=1, is_semantic=True)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        command.main([*SHORT_RUN, f"--data-path={tmp_path}", "--num-classes=4", f"--num_workers={num_workers}", f"--output_dir={tmp_path / 'out'}"])
    assert "\n" not in str(error.value)


# ---- learning


def test_a_small_segmenter_learns_to_tell_colours(tmp_path, monkeypatch):
    """A bright square and a dark stripe on grey, with a stop and a resume between: far above ground alone, which gives a third of its share."""
    made.write(tmp_path / "data")
    flags = [*SHORT_RUN, f"--data-path={tmp_path / 'data'}", "--no-reduce-zero-label", "--num-classes=3", f"--output_dir={tmp_path / 'out'}"]
    flags += ["--iterations=60", "--eval-interval=30", "--lr=4e-3"]
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(40))
    assert command.main(flags) == 85
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(1000))
    assert command.main([*flags, "--resume=auto"]) == 0
    log = read_log(tmp_path / "out")
    assert log[-1]["mIoU"] > 0.6
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]
