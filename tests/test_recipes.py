"""Every recipe says what it claims and where from, and trains: two optimiser steps of each on a small folder, in this process."""

import csv
import dataclasses
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing

import main
import model
from loading import augment, keys
from model.recconv import MIXERS, build_mixer
from run import checkpoint, config, network
from run.config import Config
from run.errors import InputError
from run.optim import scaled_lr
from tests.conftest import ROOT, read_log

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if not path.stem.startswith("demo")]
NUM_CIFAR, NUM_IMAGENET = 50_000, 1_281_167
GLOBAL_BATCH = re.compile(r"^# Global batch: (\d+) = (\d+) process(?:es)? x (\d+)\b", re.M)

# What makes each recipe what it is, as its source states it; `absolute_lr` is the peak at the recipe's own global batch.
FACTS = {
    "recnext_300e": {"epochs": 300, "recipe_batch": 1024, "absolute_lr": 2e-3, "distillation": "hard", "input_size": 224},
    "recnext_300e_no_distill": {"epochs": 300, "recipe_batch": 1024, "absolute_lr": 2e-3, "distillation": "none", "input_size": 224},
    "lsnet_like_300e": {"model": "recnext_t", "epochs": 300, "recipe_batch": 1024, "absolute_lr": 2e-3, "distillation": "hard", "input_size": 224},
    "repnext_300e": {"model": "repnext_m1", "epochs": 300, "recipe_batch": 2048, "absolute_lr": 4e-3, "distillation": "hard", "input_size": 224},
    "ablation_m1_120e_224": {"model": "recnext_m1", "epochs": 120, "absolute_lr": 2e-3, "input_size": 224},
    "ablation_m1_120e_384": {"model": "recnext_m1", "epochs": 120, "absolute_lr": 2e-3, "input_size": 384},
    "rexnet_400e": {
        "model": "rexnetv1_1_0", "epochs": 400, "recipe_batch": 512, "absolute_lr": 0.5, "opt": "sgd", "weight_decay": 1e-5, "sched": "cosine", "drop": 0.2,
        "aa": "rand-m9-mstd0.5", "reprob": 0.2, "remode": "pixel", "is_mixing": False, "repeated_aug": False, "model_ema": False, "clip_grad": None,
        "distillation": "none",
    },
    "cifar100": {
        "data_set": "CIFAR", "model": "recnext_m0", "epochs": 100, "recipe_batch": 2048, "absolute_lr": 4e-3, "input_size": 224, "distillation": "none",
    },
    "finetune": {"recipe_batch": 256, "absolute_lr": 5e-4, "distillation": "none"},
    "fixres": {
        "recipe_batch": 256, "absolute_lr": 5e-4, "distillation": "none", "input_size": 288, "crop_pct": 1.0, "train_crop_mode": "rkrc",
        "freeze": ("stem", "stages"), "is_mixing": False, "aa": None, "reprob": 0, "smoothing": 0,
    },
}  # fmt: skip
STARNET = {
    "model": "repnext_m0", "epochs": 300, "input_size": 224, "seed": 42, "opt": "adamw", "absolute_lr": 3e-3, "weight_decay": 0.025, "warmup_epochs": 5,
    "warmup_lr": 1e-5, "min_lr": 1e-6, "mixup": 0.8, "cutmix": 0.2, "aa": "rand-m1-mstd0.5-inc1", "color_jitter": 0, "train_interpolation": "random",
    "reprob": 0.25, "smoothing": 0.1, "model_ema": False, "clip_grad": None, "crop_pct": 0.9,
}  # fmt: skip
FACTS["starnet_300e"] = {**STARNET, "recipe_batch": 2048, "batch_size": 512, "distillation": "none"}
FACTS["starnet_300e_distill"] = {**STARNET, "recipe_batch": 1024, "batch_size": 256, "distillation": "hard"}


def header(path: Path) -> str:
    """The comment that a recipe begins with."""
    return re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]


def parse(path: Path, *flags: str) -> Config:
    return config.parse(["--config", str(path), *flags])[0]


def parse_alone(path: Path) -> Config:
    """The recipe by itself, with a data path where one must be named."""
    return parse(path, *([] if config.SETTINGS.load(str(path)).get("data_set") == "DIGITS" else ["--data-path=data"]))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_header_states_accuracy_source_and_global_batch(path):
    text = header(path)
    for wanted in (r"^# Published top-1(, with / without distillation| \(top-5\))?: \S", r"^# Source: \S", r"^# Not reproduced here\.$"):
        assert re.search(wanted, text, re.M), wanted
    global_batch, num_processes, batch_size = (int(number) for number in GLOBAL_BATCH.search(text).groups())
    cfg = parse_alone(path)
    assert cfg.recipe_batch == global_batch == num_processes * batch_size and cfg.batch_size == batch_size
    assert cfg.data_path == "data"  # the user's


def test_every_recipe_asked_for_is_there():
    assert {path.stem for path in RECIPES} == {*FACTS, "demo", "demo_progressive", "demo_teacher"}


def test_headers_quote_the_published_logs():
    """Maxima of the published logs, against the figures of the recipes that made them."""
    with (ROOT / "tests" / "golden" / "published_runs.csv").open(encoding="utf-8", newline="") as file:
        top1 = {row["run"]: row["published_top1"] for row in csv.DictReader(file)}
    with_teacher, alone, both = (header(ROOT / "recipes" / f"{name}.yaml") for name in ("recnext_300e", "recnext_300e_no_distill", "lsnet_like_300e"))
    sizes = [run.removeprefix("recnext_").removesuffix("_distill_300e") for run in top1 if run.endswith("_distill_300e") and "without" not in run]
    assert len(sizes) == 18
    for size in sizes:
        distilled, plain = top1[f"recnext_{size}_distill_300e"], top1[f"recnext_{size}_without_distill_300e"]
        if size[0] in "ma":
            assert re.search(rf"\b{size} {distilled}\b", with_teacher) and re.search(rf"\b{size} {plain}\b", alone), size
        else:
            assert re.search(rf"\s{size} {distilled} / {plain}\b", both), size


@pytest.mark.parametrize("name", FACTS)
def test_settings_are_the_sources(name):
    cfg = parse_alone(ROOT / "recipes" / f"{name}.yaml")
    found = {**{key: getattr(cfg, key) for key in FACTS[name] if key != "absolute_lr"}, "absolute_lr": scaled_lr(cfg.lr, cfg.recipe_batch)}
    assert found == {**FACTS[name], "absolute_lr": pytest.approx(FACTS[name]["absolute_lr"], rel=1e-12)}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_batch_fits_the_mix_groups(path):
    cfg = parse_alone(path)
    num_images = NUM_CIFAR if cfg.data_set == "CIFAR" else NUM_IMAGENET
    plan = keys.build_plan(num_images, repeated_aug=cfg.repeated_aug, group_size=cfg.mix_group_size, lanes=cfg.mix_lanes, data_seed=0)
    num_processes = cfg.recipe_batch // cfg.batch_size
    fitted = keys.fit_batch_size(plan, cfg.batch_size, num_shares=num_processes, group_size=cfg.mix_group_size, is_mixing=cfg.is_mixing)
    assert fitted == cfg.batch_size


def test_starnet_augments_and_evaluates_as_published():
    cfg = parse_alone(ROOT / "recipes" / "starnet_300e.yaml")
    transform = augment.train_transform(cfg)
    parts = [*transform.parts.transforms, transform.erasing]
    (rand_augment,) = [part for part in parts if isinstance(part, RandAugment)]
    assert {(op.magnitude, op.magnitude_std) for op in rand_augment.ops} == {(1, 0.5)}
    assert [part.probability for part in parts if isinstance(part, RandomErasing)] == [0.25]
    assert len(parts[0].interpolation) == 2  # drawn per image
    resize, crop, *_ = augment.eval_transform(cfg.input_size, augment.crop_pct(cfg), "reference").parts.transforms
    assert (resize.size, crop.size) == (248, (224, 224))


@pytest.fixture(scope="module")
def small_folder(digits_folder, tmp_path_factory) -> Path:
    """Sixteen training images, two batches, and eight for validation."""
    folder = tmp_path_factory.mktemp("small")
    for part, count in (("train", 4), ("val", 2)):
        for class_folder in sorted((digits_folder / part).iterdir()):
            (folder / part / class_folder.name).mkdir(parents=True)
            for file in sorted(class_folder.iterdir())[:count]:
                shutil.copy(file, folder / part / class_folder.name)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Files that recipes need: a teacher of the folder's four classes, and weights of the fine-tuned network with seven."""
    folder = tmp_path_factory.mktemp("weights")
    files = {"teacher": folder / "teacher.pth", "finetune": folder / "seven.pth"}
    torch.manual_seed(0)
    torch.save({"model": model.create_model("resnet10t", num_classes=4).state_dict()}, files["teacher"])
    torch.save({"model": model.create_model("recnext_m1", num_classes=7).state_dict()}, files["finetune"])
    return files


def small_flags(path: Path, small_folder: Path, weights: dict[str, Path], output_dir: Path) -> list[str]:
    """What makes two steps of the recipe fast, and possible with a few images of four classes."""
    cfg = parse_alone(path)
    input_size = 32 if cfg.model != "recnext_t" and cfg.input_size <= 224 else 64
    flags = ["--data-set=IMNET", f"--data-path={small_folder}", f"--input-size={input_size}", "--batch-size=8", "--mix-group-size=8", "--mix-lanes=1"]
    flags += ["--epochs=1", "--num_workers=0", "--device=cpu", f"--output_dir={output_dir}"]
    if path.stem in ("finetune", "fixres"):
        flags += [f"--finetune={weights['finetune']}"]
    if cfg.distillation != "none":
        flags += ["--teacher-model=resnet10t", f"--teacher-path={weights['teacher']}", "--teacher-min-acc1=0"]
    return flags


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_two_steps(path, small_folder, weights, tmp_path, capsys):
    flags = small_flags(path, small_folder, weights, tmp_path)
    main.main(["--config", str(path), *flags])
    out = capsys.readouterr().out
    assert "steps 2 (0 views left over)" in out
    (record,) = read_log(tmp_path)
    assert math.isfinite(record["train_loss"]) and math.isfinite(record["test_loss"])

    recipe, ran = parse_alone(path), parse(tmp_path / "args.yaml")
    overridden = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags}
    assert {name for name in config.SETTINGS.fields if getattr(ran, name) != getattr(recipe, name)} <= overridden
    assert f"the recipe was made for a global batch of {recipe.recipe_batch}, this run's is 8" in out

    saved = checkpoint.read(str(tmp_path / "checkpoint_last.pth"))
    groups = saved["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0, recipe.weight_decay]
    assert {group["initial_lr"] for group in groups} == {scaled_lr(recipe.lr, 8)} and record["train_lr"] == recipe.warmup_lr
    moments = {name for state in saved["optimizer"]["state"].values() for name in state}
    assert moments == ({"momentum_buffer"} if recipe.opt == "sgd" else {"step", "exp_avg", "exp_avg_sq"})
    assert (saved["model_ema"] is not None) == ("test_ema_acc1" in record) == recipe.model_ema
    assert saved["crop_pct"] == augment.crop_pct(ran)


@pytest.mark.parametrize("size", [224, 384])
def test_ablation_recipes_take_every_mixer_that_they_name_at_their_size(size):
    path = ROOT / "recipes" / f"ablation_m1_120e_{size}.yaml"
    named = set(re.findall(r"\b((?:rec_)?\w*\dx\d\w*)(?: \(their bxb\))? \d\d\.\d\d\b", header(path))) - {"rec_7x7_nearest_ssm"}
    assert named <= set(MIXERS) and len(named) == (7 if size == 224 else 10)
    shallow = ["--data-path=data", "--model-kwargs", "depths=[1, 1, 1, 1]"]
    for mixer in named:
        net = network.build(parse(path, *shallow, f"mixer={mixer}"), 4, distillation=False)
        assert type(net.stages[0].blocks[0].token_mixer) is type(build_mixer(mixer, 48, level=4))
    if size == 224:
        with pytest.raises(InputError, match=r"does not take images of --input-size 224 .*multiples of 64"):
            network.build(parse(path, *shallow, "mixer=rec_convtrans_7x7_basic"), 4, distillation=False)


@pytest.mark.parametrize("mixer", ["rec_7x7_unpool", "rec_convtrans_7x7_split"])
def test_ablation_trains_and_its_checkpoint_is_evaluated(mixer, small_folder, weights, tmp_path, capsys):
    path = ROOT / "recipes" / "ablation_m1_120e_384.yaml"
    flags = [*small_flags(path, small_folder, weights, tmp_path), "--model-kwargs", f"mixer={mixer}", "depths=[1, 1, 1, 1]"]
    main.main(["--config", str(path), *flags])
    (record,) = read_log(tmp_path)
    assert math.isfinite(record["train_loss"])
    capsys.readouterr()
    main.main(["--config", str(path), *flags, "--eval", f"--resume={tmp_path / 'checkpoint_last.pth'}"])
    assert f"{record['test_acc1']:.3f}" in capsys.readouterr().out


def test_finetuning_drops_the_heads_of_other_classes(small_folder, weights, tmp_path, capsys):
    path = ROOT / "recipes" / "finetune.yaml"
    main.main(["--config", str(path), *small_flags(path, small_folder, weights, tmp_path), "--epochs=0"])
    assert "fine-tuning: new heads in place of head.head.linear.weight, head.head.linear.bias, head.head_dist.linear" in capsys.readouterr().out


def test_fixres_teaches_the_classifiers_and_the_norm_before_them_and_crops_as_evaluation_does(small_folder, weights, tmp_path):
    path = ROOT / "recipes" / "fixres.yaml"
    main.main(["--config", str(path), *small_flags(path, small_folder, weights, tmp_path), "--warmup-lr=1e-3"])
    before, after = (checkpoint.read(str(file))["model"] for file in (weights["finetune"], tmp_path / "checkpoint_last.pth"))
    learnt = {name for name, value in after.items() if not name.endswith("num_batches_tracked") and not torch.equal(value, before.get(name))}
    assert learnt >= {"head.head.norm.running_mean", "head.head.norm.weight"}
    assert {name.partition(".")[0] for name in learnt} == {"head"}
    cfg = dataclasses.replace(parse_alone(path), hflip=0, loader="reference")
    image = Image.effect_noise((400, 330), 64).convert("RGB")
    torch.testing.assert_close(augment.train_transform(cfg)(image), augment.recipe_eval_transform(cfg)(image))


def test_cifar_script_starts_four_processes_of_its_recipe():
    script = ["sh", "dist_train_cifar.sh", "--data-path", "a b", "--epochs", "1"]
    env = {name: value for name, value in os.environ.items() if name not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE")}
    said = subprocess.run(script, cwd=ROOT, env={**env, "PYTHON": "echo"}, capture_output=True, text=True, check=True).stdout
    assert "--nnodes 1 --node_rank 0 --nproc_per_node 4 " in said
    assert said.endswith("main.py --config recipes/cifar100.yaml --data-path a b --epochs 1\n")
    several = {"PYTHON": "echo", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "NPROC_PER_NODE": "3"}
    said = subprocess.run(script, cwd=ROOT, env={**env, **several}, capture_output=True, text=True, check=True).stdout
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 3 --master_addr host0 " in said
