"""A detector's run: settings, schedule, recipes, logs, evaluation, resume to the bit, and that it learns."""

import ast
import csv
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from detection import __main__ as command
from detection import config, names, networks, saved, training
from detection.config import Config
from features import running, weights
from run import checkpoint, optim, signals
from run.config import RunConfig
from run.errors import InputError
from tests.browsing import read_page
from tests.conftest import ROOT, finish, read_log, run_processes, start, wait_for
from tests.detection.conftest import SHORT_RUN
from tests.test_main import states_equal, steady
from tests.test_resume import StopAt
from tools import make_shapes

RECIPES = sorted((ROOT / "recipes" / "detection").glob("*.yaml"))
PUBLISHED = {  # boxes and masks at all overlaps
    "mask_rcnn_recnext_m3": (41.7, 38.6), "mask_rcnn_recnext_m4": (43.5, 39.7), "mask_rcnn_recnext_m5": (44.6, 40.6),
    "mask_rcnn_recnext_a3": (42.1, 38.8), "mask_rcnn_recnext_a4": (43.5, 39.8), "mask_rcnn_recnext_a5": (44.4, 40.3),
    "mask_rcnn_repnext_m3": (40.8, 37.8), "mask_rcnn_repnext_m4": (42.9, 39.1), "mask_rcnn_repnext_m5": (44.7, 40.7),
    "mask_rcnn_lsnet_t": (35.0, 32.7), "mask_rcnn_lsnet_s": (37.4, 34.8), "mask_rcnn_lsnet_b": (40.8, 37.8),
    "retinanet_lsnet_t": (34.2, None), "retinanet_lsnet_s": (36.5, None), "retinanet_lsnet_b": (39.2, None),
}  # fmt: skip
LOSSES = ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "acc", "loss_bbox", "loss_mask", "loss"]


# ---- settings and recipes


def test_every_setting_is_read():
    """No dead flag: each field is an attribute that some file reads from a `cfg`."""
    read = set()
    for path in [path for pattern in ("run/*.py", "features/*.py", "detection/*.py", "loading/*.py", "engine.py") for path in ROOT.glob(pattern)]:
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cfg", "self.cfg")}
    read |= {node.attr for node in ast.walk(ast.parse(inspect.getsource(Config))) if isinstance(node, ast.Attribute)}
    assert [field.name for field in dataclasses.fields(Config) if field.name not in read] == []
    assert {field.name for field in dataclasses.fields(RunConfig)} <= {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_rows(name):
    path = ROOT / "recipes" / "detection" / f"{name}.yaml"
    cfg, _ = config.parse(["--config", str(path)])
    detector, model = re.fullmatch(r"(mask_rcnn|retinanet)_(\w+)", name).groups()
    is_lsnet = model.startswith("lsnet")
    assert (cfg.detector, cfg.model, cfg.backbone_weights) == (detector, model, f"pretrain/{model}_distill_300e.pth")
    assert (cfg.opt, cfg.lr, cfg.weight_decay, cfg.warmup_steps) == ("adamw", 1e-4 if is_lsnet else 2e-4, 0.05, 500)
    assert (cfg.warmup_ratio, cfg.epochs, cfg.decay_after, cfg.decay_rate) == (1e-3 if is_lsnet else 1e-6, 12, (8, 11), 0.1)
    assert (cfg.batch_size, cfg.recipe_batch, cfg.max_size, cfg.clip_grad, cfg.amp) == (2, 16, (1333, 800), None, "none")
    boxes, masks = PUBLISHED[name]
    text = path.read_text()
    assert f"boxes {boxes}" in text and (masks is None or f"masks {masks}" in text) and "# Not reproduced here." in text


def test_every_row_has_a_recipe_and_every_recipe_a_row():
    assert {path.stem for path in RECIPES} == {*PUBLISHED, "demo"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "configs/mask_rcnn_recnext_m3_fpn_1x_coco.py"],
        ["--config=mask_rcnn_recnext_m3.py"],
        ["--config", "recipes/detection/mask_rcnn_recnext_m3.yaml"],
    ],
)
def test_published_command_lines(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg, _ = config.parse([*argv, "--resume", "x.pth", "--eval", "bbox", "segm", "--num_workers", "3"])
    assert (cfg.model, cfg.eval, cfg.metrics, cfg.resume, cfg.num_workers) == ("recnext_m3", True, ("bbox", "segm"), "x.pth", 3)
    assert config.parse(argv)[0].scored == ("bbox", "segm") and not config.parse(argv)[0].eval


def test_shell_wrappers_start_the_processes_of_a_published_name():
    env = {name: value for name, value in os.environ.items() if name not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")} | {"PYTHON": "echo"}
    for script, args, wanted in (
        ("dist_train.sh", ["mask_rcnn_recnext_m3.py", "3", "--seed", "1"], "-m detection --config mask_rcnn_recnext_m3.py --seed 1"),
        (
            "dist_test.sh",
            ["mask_rcnn_recnext_m3.py", "a b.pth", "3", "--eval", "bbox", "segm"],
            "-m detection --config mask_rcnn_recnext_m3.py --resume a b.pth --eval bbox segm",
        ),
    ):
        said = subprocess.run(["bash", str(ROOT / "detection" / script), *args], cwd="/", env=env, capture_output=True, text=True, check=True).stdout
        assert "--nproc_per_node 3 " in said and said.endswith(wanted + "\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--detector=yolo"], "yolo"),
        (["--eval"], "--eval needs weights"),
        (["--metrics", "segm", "--detector=faster_rcnn"], "finds none"),
        (["--metrics", "boxes"], "choose from bbox, segm"),
        (["--max-size", "800"], "takes two numbers"),
        (["--max-size", "800", "1333"], "the long side first"),
        (["--finetune=x", "--pretrained"], "drop the others"),
        (["--config=mask_rcnn_nothing.py"], "mask_rcnn_nothing"),
        (["--epoch=3"], "did you mean --epochs"),
    ],
)
def test_bad_command_lines_are_refused_with_the_reason(flags, words):
    with pytest.raises(InputError, match=words):
        config.parse(flags)


# ---- schedule and optimiser


def test_rates_by_hand():
    """1000 steps per epoch: the warm-up's line, the logged rate at iteration 50, and drops at the first step of the ninth and twelfth epoch."""
    cfg, _ = config.parse(["--lr=2e-4"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    scheduler = training.build_scheduler(cfg, optimizer, 1000)

    def rate(step: int) -> float:
        scheduler.step_update(step)
        return optimizer.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(2e-10)
    assert rate(49) == pytest.approx(2e-10 + 49 / 500 * (2e-4 - 2e-10)) and round(rate(49), 5) == 2e-5  # as the published logs round it
    assert [rate(step) for step in (500, 7999)] == pytest.approx([2e-4, 2e-4])
    assert [rate(step) for step in (8000, 10999, 11000, 11999)] == pytest.approx([2e-5, 2e-5, 2e-6, 2e-6])


def test_all_decays_but_lsnets_attention_biases():
    net = networks.build("retinanet", "lsnet_t", 3, channels=8)
    cfg, _ = config.parse([])
    spared = weights.no_weight_decay(net)
    optimizer = optim.build_dense_optimizer(cfg, net, lr=1e-4, weight_decay=0.05, spared=spared)
    by_id = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    found = {name: by_id[id(one)] for name, one in net.named_parameters()}
    assert spared and {name for name, decay in found.items() if decay == 0} == spared
    assert {decay for name, decay in found.items() if name not in spared} == {0.05} and all(name.endswith("attention_biases") for name in spared)


# ---- a run and what it leaves


def step_lines(folder: Path) -> list[dict]:
    """train_log.txt without what a clock says."""
    lines = [json.loads(line) for line in (folder / "train_log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_logs_have_the_published_keys(whole):
    lines = [json.loads(line) for line in (whole / "train_log.txt").read_text().splitlines()]
    num_steps = max(line["iter"] for line in lines if line["mode"] == "train") // 2 * 2
    train = [line for line in lines if line["mode"] == "train"]
    assert [list(line) for line in train] == [["mode", "epoch", "iter", "lr", *LOSSES, "time"]] * len(train)
    assert [(line["epoch"], line["iter"]) for line in train] == [(epoch, step) for epoch in (1, 2) for step in range(2, num_steps + 1, 2)]
    for line in train:
        assert line["loss"] == pytest.approx(sum(line[name] for name in LOSSES if name.startswith("loss_")))
        assert 0 <= line["acc"] <= 100
    val = [line for line in lines if line["mode"] == "val"]
    assert [line["epoch"] for line in val] == [1, 2]
    log = read_log(whole)
    for line, record in zip(val, log, strict=True):
        assert {"bbox_mAP", "bbox_mAP_50", "bbox_mAP_75", "segm_mAP", "segm_mAP_50"} <= set(line)
        assert line["segm_mAP_50"] == record["segm_mAP_50"] and record["epoch"] == line["epoch"] - 1
    assert log[-1]["train_lr"] == pytest.approx(1e-4) and log[0]["train_lr"] == pytest.approx(1e-3)
    assert (whole / "args.yaml").read_text().startswith("# python -m detection --config <this file>")


def assert_same_run(folder: Path, expected: Path) -> None:
    assert [steady(record) for record in read_log(folder)] == [steady(record) for record in read_log(expected)]
    assert step_lines(folder) == step_lines(expected)
    ours, theirs = (torch.load(path / "checkpoint_last.pth", weights_only=True) for path in (folder, expected))
    for key in ("model", "optimizer", "lr_scheduler", "best_bbox_mAP", "epoch", "step"):
        assert states_equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("calls", [2, 9])
def test_stopped_inside_an_epoch_and_resumed(whole, shapes, tmp_path, monkeypatch, calls):
    """Between two lines of train_log.txt, in the first epoch and in the second."""
    flags = [*SHORT_RUN, f"--data-path={shapes}", f"--output_dir={tmp_path}"]
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(calls))
    assert command.main(flags) == 85
    found = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)
    assert found["step"] % 2 == 1 and sum(found["tallies"]["steps"]) == 1
    monkeypatch.setattr(signals, "StopRequest", lambda: StopAt(1000))
    assert command.main([*flags, "--resume=auto"]) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_and_resumed(whole, shapes, tmp_path):
    flags = ["-m", "detection", *SHORT_RUN, f"--data-path={shapes}", f"--output_dir={tmp_path}", "--checkpoint-steps=3", "--num_workers=2"]
    process = start(*flags)
    wait_for(tmp_path / "train_log.txt", process)
    process.kill()
    finish(process, -9)
    finish(start(*flags, "--resume=auto"), 0)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_are_one(shapes, tmp_path):
    """The first step to rounding; the second, too, but for the heads' classes, for one proposal more or less may pass a near tie."""
    flags = [*SHORT_RUN, f"--data-path={shapes}", "--epochs=1", "--log-steps=1"]
    assert command.main([*flags, f"--output_dir={tmp_path / 'one'}"]) == 0
    ((codes, errors, _),) = run_processes((2, "detection.__main__", [*flags, "--batch-size=2", f"--output_dir={tmp_path / 'two'}"]))
    assert codes == [0, 0], errors
    one, two = (step_lines(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    assert [one[0][name] for name in LOSSES] == pytest.approx([two[0][name] for name in LOSSES], rel=1e-5)
    names_here = [name for name in LOSSES if name not in ("loss_cls", "acc", "loss")]
    assert [one[1][name] for name in names_here] == pytest.approx([two[1][name] for name in names_here], rel=1e-5)
    assert one[1]["loss"] == pytest.approx(two[1]["loss"], rel=1e-3)
    assert read_log(tmp_path / "two")[0]["n_parameters"] == read_log(tmp_path / "one")[0]["n_parameters"]


def test_a_step_that_is_not_finite_is_left_out_of_network_and_logs(short_run, tmp_path, monkeypatch):
    real, calls = networks.total, []

    def spoil(losses: dict) -> torch.Tensor:
        calls.append(losses)
        return real(losses) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(networks, "total", spoil)
    _, said = short_run(f"--output_dir={tmp_path}", "--epochs=1")
    assert "1 step of epoch 0 left out so far, the last was step 1" in said
    (record,) = read_log(tmp_path)
    train = [line for line in step_lines(tmp_path) if line["mode"] == "train"]
    assert record["skipped_steps"] == 1 and train[0]["loss"] == pytest.approx(real(calls[0]).item())
    assert all(isinstance(line[name], float) for line in train for name in LOSSES)


# ---- evaluation and checkpoints


def test_evaluation_reports_the_last_epochs_figures_of_ours_and_of_the_published_form(whole, short_run, tmp_path):
    record = read_log(whole)[-1]
    report, page = tmp_path / "classes.csv", tmp_path / "classes.html"
    _, said = short_run("--eval", f"--resume={whole / 'checkpoint_last.pth'}", f"--report={page}")
    wanted = f"on the 6 test images: bbox mAP {record['bbox_mAP']:.4f}"
    assert wanted in said and f"segm mAP {record['segm_mAP']:.4f}" in said
    opened = saved.open_checkpoint(str(whole / "checkpoint_last.pth"))
    assert (opened.class_names, opened.max_size, opened.net.training) == (["circle", "square", "triangle"], (96, 64), False)
    torch.save({"state_dict": names.to_published(opened.net)}, tmp_path / "published.pth")
    _, said = short_run("--eval", "bbox", f"--resume={tmp_path / 'published.pth'}", f"--report={report}")
    assert wanted in said and "segm" not in said
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["circle", "square", "triangle"] and len(rows[0]) == 4
    for column in ("bbox_mAP", "bbox_mAP_50", "bbox_mAP_75"):
        assert sum(float(row[column]) for row in rows) / 3 == pytest.approx(record[column], abs=1e-5)
    shown = read_page(page)
    classes = {row[0]: row[2:5] for row in shown.rows if len(row) == 8}
    assert [classes[row["class"]] for row in rows] == [[f"{100 * float(row[column]):.2f}" for column in list(row)[1:]] for row in rows]
    assert len(shown.all("img")) == 2 * 6 and shown.all("img")[0]["alt"].endswith(": what is there")
    assert ["mask AP75", f"{100 * record['segm_mAP_75']:.2f}"] in shown.rows
    with pytest.raises(InputError, match="classes.html cannot be written"):  # before anything is evaluated
        short_run("--eval", f"--resume={whole / 'checkpoint_last.pth'}", f"--report={tmp_path / 'no' / 'classes.html'}")

    again = saved.open_checkpoint(str(tmp_path / "published.pth"), model="recnext_m0")
    assert states_equal(again.net.state_dict(), opened.net.state_dict()) and again.class_names == ["0", "1", "2"]
    with pytest.raises(InputError, match="does not say what backbone its detector has: add --model"):
        saved.open_checkpoint(str(tmp_path / "published.pth"))
    assert not saved.is_detector({"model": {"head.weight": torch.zeros(2)}})


def test_fine_tuning_drops_the_heads_of_other_classes(whole, shapes, tmp_path, caplog):
    cfg, _ = config.parse([*SHORT_RUN, f"--data-path={shapes}", f"--finetune={whole / 'checkpoint_last.pth'}"])
    source = checkpoint.read(str(whole / "checkpoint_last.pth"))["model"]
    same, other = (running.build_net(cfg, training, num_classes, is_new=True).state_dict() for num_classes in (3, 5))
    assert states_equal(same, source)
    assert {name for name in other if other[name].shape != source[name].shape} == {
        f"roi_heads.{module}.{part}"
        for module in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        for part in ("weight", "bias")
    }
    assert torch.equal(other["backbone.fpn.inner_blocks.0.0.weight"], source["backbone.fpn.inner_blocks.0.0.weight"])


def test_missing_backbone_weights_are_explained(shapes, tmp_path):
    with pytest.raises(InputError, match=r"--backbone-weights pretrain/nothing.pth: there is no such file: .* --backbone-weights none"):
        command.main([*SHORT_RUN, f"--data-path={shapes}", f"--output_dir={tmp_path}", "--backbone-weights=pretrain/nothing.pth"])


# ---- bad input


def broken(content: dict, kind: str) -> dict:
    if kind == "absent image":
        content["images"][3]["file_name"] = "gone.jpg"
    elif kind == "box outside":
        content["annotations"][0]["bbox"] = [10, 10, 4000, 20]
    elif kind == "no objects":
        content["annotations"] = []
    elif kind == "unknown category":
        content["annotations"][2]["category_id"] = 77
    elif kind == "other categories":
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "cow"), 1)]
    return content


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing file", r"instances_train2017.json: the annotation file cannot be read .* give the path"),
        ("absent image", r"1 of 24 images that .* lists are not in .*, first gone.jpg: put them there"),
        ("box outside", r"annotations cannot be used, first that with id 1: bbox \[10, 10, 4000, 20\] lies outside its image"),
        ("no objects", r"has no objects at all"),
        ("unknown category", r"category_id 77 is not among the categories \(1, 2, 3\)"),
        ("other categories", r"instances_val2017.json has other categories than .*: 1 circle, .* and 1 cat, 2 dog, 3 cow; give both files the same"),
    ],
)
def test_hostile_annotation_files_get_one_message_and_leave_nothing(shapes, tmp_path, kind, message):
    for name in ("train2017", "val2017"):
        (tmp_path / name).symlink_to(shapes / name)
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train2017.json", "instances_val2017.json"):
        content = json.loads((shapes / "annotations" / name).read_text())
        if not (kind == "missing file" and "train" in name):
            (tmp_path / "annotations" / name).write_text(json.dumps(broken(content, kind) if "train" in name else content))
    with pytest.raises(InputError, match=message) as error:
        command.main([*SHORT_RUN, f"--data-path={tmp_path}", f"--output_dir={tmp_path / 'out'}"])
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "checkpoint_last.pth").exists()


@pytest.fixture
def hurt(shapes, tmp_path) -> Path:
    """The data set with a training and a validation image that are cut short."""
    folder = tmp_path / "hurt"
    shutil.copytree(shapes, folder)
    for name in ("train2017/000003.jpg", "val2017/000002.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    return folder


def test_damaged_images_are_named_and_others_of_their_shape_stand_in(hurt, short_run, tmp_path):
    _, said = short_run(f"--data-path={hurt}", f"--output_dir={tmp_path / 'a'}", "--epochs=1", "--skip-bad-images")
    assert said.count(f"damaged: {hurt / 'train2017/000003.jpg'} cannot be read") == 1 and "others of its shape stand in for it" in said
    assert f"damaged: {hurt / 'val2017/000002.jpg'} cannot be read" in said and "evaluation leaves it out" in said
    (record,) = read_log(tmp_path / "a")
    assert record["bad_images"] == 1 and record["test_bad_images"] == 1
    _, said = short_run(f"--data-path={hurt}", "--eval", f"--resume={tmp_path / 'a' / 'checkpoint_last.pth'}", "--skip-bad-images")
    assert f"on the 5 test images: bbox mAP {record['bbox_mAP']:.4f}" in said and "damaged images left out: 1" in said
    with pytest.raises(InputError, match="1 of 6 validation images are damaged"):
        short_run(f"--data-path={hurt}", "--eval", f"--resume={tmp_path / 'a' / 'checkpoint_last.pth'}")
    with pytest.raises(InputError, match=r"1 training images are damaged, more than --max-bad-images 0|000003.jpg cannot be read as an image"):
        short_run(f"--data-path={hurt}", f"--output_dir={tmp_path / 'b'}", "--epochs=1", "--max-bad-images=0")


# ---- learning


@pytest.mark.slow
def test_a_small_detector_learns_shapes(tmp_path):
    """Far above chance, which is 0 to two digits: boxes of three classes at half overlap."""
    make_shapes.make(tmp_path / "data", num_train=120, num_val=16)
    flags = ["--config", str(ROOT / "recipes/detection/demo.yaml"), f"--data-path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}"]
    flags += ["--model=resnet10t", "--channels=32", "--max-size", "96", "96", "--epochs=4", "--decay-after=3", "--warmup-steps=15"]
    flags += ["--num_workers=0", "--device=cpu"]
    assert command.main(flags) == 0
    log = read_log(tmp_path / "out")
    assert log[-1]["bbox_mAP_50"] > 0.1 and log[-1]["train_loss"] < 0.8 * log[0]["train_loss"]
