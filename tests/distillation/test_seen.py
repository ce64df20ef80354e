"""What tools/show_batch.py shows is what training sees: its images, bit for bit but for the rounding to colours, its draws and its teacher's labels."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import datasets
from distillation import seen
from loading import augment
from reporting.batch_page import batch_page, described, draw_batch
from run import config
from tests.browsing import browsed, read_page
from tests.nets import randomise
from tools import make_teacher_labels, show_batch
from utils import Rank

RANK = Rank(0, 1, 0, 1, torch.device("cpu"))
FLAGS = ["--input-size=40", "--batch-size=16", "--mix-group-size=16", "--mix-lanes=2", "--epochs=2", "--num_workers=0", "--no-repeated-aug"]


def parsed(folder, *flags: str) -> config.Config:
    return config.parse([*FLAGS, f"--data-path={folder}", *(flags or ["--distillation-type=none"])])[0]


def trained_on(cfg: config.Config, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, distributions and positions of the step, as training's loader and mixing give them."""
    images, _ = datasets.open_images(cfg)
    loader = datasets.build_train_loader(cfg, images, RANK)
    batch = next(iter(loader.batches(epoch, step)))
    return *augment.build_mixing(cfg, loader.plan, len(images.classes))(batch.images, batch.targets, epoch, batch.positions), batch.positions


def colours(images: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.MEAN, augment.STD))
    return ((images * std + mean).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("num_images", [16, 5])
@pytest.mark.parametrize("alphas", [["--mixup=0"], ["--cutmix=0"]])
def test_the_images_are_those_of_training(digits_folder, num_images, alphas):
    cfg = parsed(digits_folder, "--distillation-type=none", *alphas)
    images, targets, positions = trained_on(cfg, 1, 2)
    step, shown = seen.see(cfg, RANK, epoch=1, step=2, num_images=num_images)
    assert len(shown) == num_images + num_images % 2 and (step.num_steps, step.global_batch) == (6, 16)
    place = {position: i for i, position in enumerate(positions.tolist())}
    for one in shown:
        i = place[one.position]
        assert np.abs(one.pixels - colours(images[i : i + 1])[0]).max() <= 0.5001
        assert [share for _, share in one.target] == pytest.approx([targets[i][int(label)].item() for label, _ in one.target])
        assert (one.mix.box is None) == ("--cutmix=0" in alphas) and shown[one.mix.partner].mix.partner == one.number
        if shown[one.mix.partner].label != one.label:
            assert dict(one.target)[one.label] == pytest.approx(one.mix.lam * (1 - cfg.smoothing) + cfg.smoothing / 4, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--aug-splits=3", "--mixup=0", "--cutmix=0", "--resplit"],
        ["--image-size-schedule=32:0,48:0.5", "--vflip=0.5"],
        ["--train-crop-mode=rkrr", "--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"],
        ["--mixup-off-epoch=1"],
    ],
)
def test_views_sizes_crops_and_epochs_without_mixing_are_those_of_training(digits_folder, tmp_path, flags):
    cfg = parsed(digits_folder, "--distillation-type=none", *flags)
    images, _, positions = trained_on(cfg, 1, 2)
    _, shown = seen.see(cfg, RANK, epoch=1, step=2, num_images=16)
    mean, std = augment.tensors_of(augment.statistics(cfg), images.device)
    expected = ((images * std + mean).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    place = {position: i for i, position in enumerate(positions.tolist())}
    for one in shown:
        views = [one.pixels, *one.further]
        assert len(views) == max(1, cfg.aug_splits) == 1 + len(one.drawn["splits"])
        for k, view in enumerate(views):
            assert np.abs(view - expected[k * len(positions) + place[one.position]]).max() <= 0.5001
        assert (one.mix is None) == (not cfg.is_mixing or cfg.mixup_off_epoch == 1) and one.crops_source == (cfg.train_crop_mode is None)
        assert one.pixels.shape[0] == (48 if cfg.image_size_schedule else 40)
    step, (one, other) = seen.see(cfg, RANK, epoch=1, step=2, num_images=2)
    assert len(batch_page(step, [one, other])) > 1000
    painted = [np.full_like(one.pixels, (255, 0, shade)) for shade in range(1 + len(one.further))]
    draw_batch(step, [dataclasses.replace(one, pixels=painted[0], further=painted[1:])], tmp_path / "batch.png")
    found = {colour[:3] for _, colour in Image.open(tmp_path / "batch.png").getcolors(10**6)}
    assert {(255, 0, shade) for shade in range(len(painted))} <= found  # every view


def test_a_run_of_several_processes_has_longer_steps(digits_folder):
    cfg = parsed(digits_folder, "--distillation-type=none", "--batch-size=8")
    of_two = seen.see(cfg, RANK, epoch=0, step=1, num_images=4, num_processes=2)
    alone = seen.see(dataclasses.replace(cfg, batch_size=16), RANK, epoch=0, step=1, num_images=4)
    assert of_two[0].global_batch == 16 and [one.position for one in of_two[1]] == [one.position for one in alone[1]]


def test_the_crop_is_where_the_image_comes_from(digits_folder):
    cfg = parsed(digits_folder, "--distillation-type=none", "--mixup=0", "--cutmix=0", "--aa=none", "--color-jitter=0", "--reprob=0", "--loader=reference")
    for one in seen.see(cfg, RANK, epoch=0, step=0, num_images=6)[1]:
        top, left, height, width = one.drawn["box"]
        crop = one.source.crop((left, top, left + width, top + height)).resize((40, 40), resample=2 if cfg.train_interpolation == "bilinear" else 3)
        crop = np.asarray(crop)[:, ::-1] if one.drawn["flip"] else np.asarray(crop)
        assert np.abs(crop.astype(int) - one.pixels).max() <= 1 and one.mix is None and one.target == []


@pytest.fixture
def teacher(digits_folder, tmp_path) -> list[str]:
    """Flags of distillation from a network with random weights, which tells these images apart in its own way."""
    torch.manual_seed(0)
    net = randomise(timm.create_model("test_resnet", num_classes=4)).eval()
    with torch.no_grad():
        net.fc.bias.sub_(net(trained_on(parsed(digits_folder), 1, 1)[0]).mean(0))
    torch.save({"model": net.state_dict()}, tmp_path / "teacher.pth")
    return ["--teacher-model=test_resnet", f"--teacher-path={tmp_path / 'teacher.pth'}", "--teacher-min-acc1=0"]


def test_the_labels_are_the_teachers_stored_or_asked_and_nothing_is_stored(digits_folder, tmp_path, teacher):
    labels = f"--teacher-labels={tmp_path / 'labels'}"
    asked = seen.see(parsed(digits_folder, *teacher, labels), RANK, epoch=1, step=1, num_images=16)
    assert asked[0].teacher == "test_resnet, asked now" and not (tmp_path / "labels").exists()
    assert make_teacher_labels.main([*FLAGS, f"--data-path={digits_folder}", *teacher, labels, "--device=cpu", "--epochs=1:2"]) == 0
    stored = seen.see(parsed(digits_folder, *teacher, labels), RANK, epoch=1, step=1, num_images=16)
    assert stored[0].teacher.startswith("labels stored in")
    said = [one.teacher[0][0] for one in asked[1]]
    assert [one.teacher[0][0] for one in stored[1]] == said and len(set(said)) > 1
    soft = seen.see(parsed(digits_folder, *teacher, "--distillation-type=soft"), RANK, epoch=1, step=1, num_images=16)[1]
    assert [one.teacher[0][0] for one in soft] == said and 0.25 <= soft[0].teacher[0][1] <= 1
    assert "teacher: " + said[0] in described(stored[1][0])


def test_page_and_picture_show_every_image_and_damaged_ones_are_named(digits_folder, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(digits_folder, root)
    flags = [*FLAGS, f"--data-path={root}", "--distillation-type=none", "--num-images=8"]
    first = seen.see(parsed(root), RANK, epoch=0, step=0, num_images=8)[1][0]
    Path(first.name).write_bytes(b"no image")
    assert show_batch.main([*flags, "--out", str(tmp_path / "batch.html")]) == 0
    page = read_page(tmp_path / "batch.html")
    assert len(page.all("img")) == 8 and len(page.all("image")) == 8 and len(page.all("rect")) == 16
    assert f"in place of a damaged one, {first.name}" in page.text and "to learn: " in page.text and "crop " in page.text
    assert show_batch.main([*flags, "--out", str(tmp_path / "batch.png")]) == 0 and (tmp_path / "batch.png").read_bytes()[1:4] == b"PNG"
    capsys.readouterr()
    for extra, said in (
        (["--step=9"], "epochs 0 to 1 of steps 0 to 5"),
        (["--out", "x.pdf"], "end the name in .html or .png"),
        (["--eval", "--resume=x"], "drop it"),
    ):
        assert show_batch.main([*flags, "--out", str(tmp_path / "b.html"), *extra]) == 1 and said in capsys.readouterr().err
    assert len(browsed(tmp_path / "batch.html", tmp_path).all("figure")) == 8
