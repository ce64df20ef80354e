"""Predictions of a network that knows the digits: right classes, names, files of any kind, and files that are none."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

import predict
from deployment import prediction
from deployment.weights import load_trained
from loading import augment
from loading.images import open_file
from sources.sets import load_digits
from tests.conftest import run_forked
from tools.export_digits import export

NUM_TRAIN = 400


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """100 validation digits as JPEGs of 64x64 pixels, in a folder per class."""
    folder = tmp_path_factory.mktemp("val")
    export(load_digits()[1].part(range(100)), folder, size=64)
    return folder


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory) -> Path:
    """A small convolutional network whose head was fitted to the digits by least squares, in a file with all a checkpoint tells."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10).eval()
    images = load_digits()[0].part(range(NUM_TRAIN))
    transform = augment.eval_transform(32, 1.0)
    with torch.no_grad():
        inputs = torch.stack([transform(images[i][0]) for i in range(NUM_TRAIN)])
        features = net.forward_head(net.forward_features(inputs), pre_logits=True).double()
        mean, scale = features.mean(0), features.std(0) + 1e-6
        design = torch.cat(((features - mean) / scale, torch.ones(NUM_TRAIN, 1)), 1)
        targets = 10 * torch.nn.functional.one_hot(torch.tensor([images[i][1] for i in range(NUM_TRAIN)]), 10).double()
        fit = torch.linalg.solve(design.T @ design + 3 * torch.eye(design.shape[1]), design.T @ targets)
        weight = fit[:-1] / scale[:, None]
        net.fc.weight.copy_(weight.T)
        net.fc.bias.copy_(fit[-1] - mean @ weight)
    path = tmp_path_factory.mktemp("net") / "digits.pth"
    names = [f"digit {name}" for name in images.classes]
    facts = {"class_names": names, "input_size": 32, "mean": augment.MEAN, "std": augment.STD, "crop_pct": 1.0}
    torch.save({"model": net.state_dict(), "args": {"model": "test_resnet"}, **facts}, path)
    return path


def changed(path: Path, target: Path, **entries) -> Path:
    """A copy of a checkpoint with other entries; None leaves one out."""
    saved = {**torch.load(path), **entries}
    torch.save({key: value for key, value in saved.items() if value is not None}, target)
    return target


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the answers -----------------------------------------------------------------------------------------------------------------------


def test_the_right_digits_come_out_on_top(trained_file, digits, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert predict.main([str(digits), f"--resume={trained_file}", f"--csv={out}", "--batch-size=16", "--num-workers=0"]) == 0
    rows = read_rows(out)
    assert list(rows[0]) == ["file", "rank", "class", "probability", "index", "label"]
    best = [row for row in rows if row["rank"] == "1"]
    assert [row["file"] for row in best] == sorted(str(path) for path in digits.rglob("*.jpg"))
    right = [row["class"] == f"digit {Path(row['file']).parent.name}" for row in best]
    assert sum(right) >= 85
    assert all(row["class"] == row["label"] == f"digit {row['index']}" for row in rows)
    assert "100 of 100 images predicted, 0 could not be read" in capsys.readouterr().err


def test_five_classes_by_falling_probability_as_the_network_gives_them(trained_file, digits, tmp_path):
    image = next(digits.rglob("*.jpg"))
    assert predict.main([str(image), f"--resume={trained_file}", f"--csv={tmp_path / 'a.csv'}"]) == 0
    trained = load_trained(None, str(trained_file))
    expected = trained.net(augment.eval_transform(32, 1.0)(open_file(str(image)))[None]).softmax(1)[0].sort(descending=True)
    rows = read_rows(tmp_path / "a.csv")
    assert [int(row["index"]) for row in rows] == expected.indices[:5].tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.values[:5].tolist(), abs=1e-4)
    assert [row["rank"] for row in rows] == list("12345")


def test_predictions_are_printed_without_a_csv_file(trained_file, digits):
    image = str(sorted(digits.rglob("*.jpg"))[0])
    result = run_forked("predict.py", image, "--model", "test_resnet", "--resume", str(trained_file), "--batch_size", "4")
    assert result.returncode == 0, result.stderr
    name, *lines = result.stdout.splitlines()
    assert name == image
    assert [line.split()[0] for line in lines] == list("12345")
    assert lines[0].endswith("digit 0")
    assert result.stderr.splitlines() == ["1 of 1 images predicted, 0 could not be read"]


def test_the_checkpoint_s_size_crop_and_normalisation_count(trained_file, digits, tmp_path):
    image = open_file(str(next(digits.rglob("*.jpg"))))
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    trained = load_trained(None, str(changed(trained_file, tmp_path / "a.pth", mean=mean, std=std, input_size=48, crop_pct=0.75)))
    seen = prediction.eval_transform(trained)(image)
    pixels = augment.eval_transform(48, 0.75)(image) * torch.tensor(augment.STD).view(3, 1, 1) + torch.tensor(augment.MEAN).view(3, 1, 1)
    torch.testing.assert_close(seen, (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), rtol=1e-5, atol=1e-5)
    crop = {"crop_pct": 0.75, "crop_mode": "border", "interpolation": "lanczos"}
    trained = load_trained(None, str(changed(trained_file, tmp_path / "b.pth", mean=mean, std=std, input_size=48, **crop)))
    oblong = image.resize((90, 60))
    torch.testing.assert_close(prediction.eval_transform(trained)(oblong), create_transform(48, mean=mean, std=std, **crop)(oblong), rtol=1e-5, atol=1e-5)


def test_fewer_than_five_classes_are_all_listed(trained_file, digits, tmp_path):
    net = timm.create_model("test_resnet", num_classes=3)
    path = changed(trained_file, tmp_path / "a.pth", model=net.state_dict(), class_names=["x", "y", "z"])
    assert predict.main([str(next(digits.rglob("*.jpg"))), f"--resume={path}", f"--csv={tmp_path / 'a.csv'}"]) == 0
    rows = read_rows(tmp_path / "a.csv")
    assert sorted(row["class"] for row in rows) == ["x", "y", "z"]
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)


def test_ema_weights_are_used_on_request(trained_file, digits, tmp_path):
    torch.manual_seed(1)
    other = timm.create_model("test_resnet", num_classes=10).state_dict()
    path, image = changed(trained_file, tmp_path / "a.pth", model_ema=other), str(next(digits.rglob("*.jpg")))
    for flags, name in ((["--use-ema"], "ema.csv"), ([], "raw.csv")):
        assert predict.main([image, f"--resume={path}", f"--csv={tmp_path / name}", *flags]) == 0
    assert read_rows(tmp_path / "ema.csv") != read_rows(tmp_path / "raw.csv")


# --- names -----------------------------------------------------------------------------------------------------------------------------


def test_a_network_of_1000_unnamed_classes_is_imagenet_s(trained_file, digits, tmp_path, capsys):
    state = timm.create_model("test_resnet", num_classes=1000).state_dict()
    state["fc.bias"][281] = 50.0
    path = changed(trained_file, tmp_path / "a.pth", model=state, class_names=None)
    assert predict.main([str(next(digits.rglob("*.jpg"))), f"--resume={path}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split(maxsplit=3)[3] == "n02123045  tabby, tabby cat"
    assert "holds no class names: those of ImageNet-1k take their place" in printed.err


def test_folders_of_imagenet_get_their_words_and_other_unnamed_classes_numbers(trained_file, tmp_path):
    named = load_trained(None, str(changed(trained_file, tmp_path / "a.pth", class_names=ImageNetInfo().label_names()[:10])))
    assert prediction.name_classes(named)[0] == ("n01440764", "tench, Tinca tinca")
    unnamed = load_trained(None, str(changed(trained_file, tmp_path / "b.pth", class_names=None)))
    assert prediction.name_classes(unnamed)[3] == ("3", "3")


def test_names_that_do_not_fit_the_network_are_refused(trained_file, digits, tmp_path, capsys):
    path = changed(trained_file, tmp_path / "a.pth", class_names=["x", "y"])
    assert predict.main([str(digits), f"--resume={path}"]) == 1
    assert "names 2 different classes, its network has 10" in capsys.readouterr().err


# --- files -----------------------------------------------------------------------------------------------------------------------------


def test_images_of_any_mode_give_the_same_digit(trained_file, digits, tmp_path):
    original = Image.open(sorted((digits / "4").glob("*.jpg"))[0]).convert("L")
    original.save(tmp_path / "grey.png")
    original.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    original.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(original).astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    assert predict.main([str(tmp_path), f"--resume={trained_file}", f"--csv={tmp_path / 'a.csv'}"]) == 0
    best = {Path(row["file"]).name: row for row in read_rows(tmp_path / "a.csv") if row["rank"] == "1"}
    assert {name: row["class"] for name, row in best.items()} == dict.fromkeys(("cmyk.jpg", "grey.png", "palette.png", "sixteen.png"), "digit 4")
    assert float(best["sixteen.png"]["probability"]) == pytest.approx(float(best["grey.png"]["probability"]), abs=0.01)


def test_unreadable_files_are_named_counted_and_passed_over(trained_file, digits, tmp_path, capsys):
    source = sorted((digits / "7").glob("*.jpg"))[0]
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(source, tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(source.read_bytes()[:300])
    (tmp_path / "d.png").write_text("no image")
    assert predict.main([str(tmp_path), f"--resume={trained_file}", f"--csv={tmp_path / 'a.csv'}", "--batch-size=2"]) == 0
    first, second, last = capsys.readouterr().err.splitlines()
    assert "b.jpg cannot be read as an image" in first
    assert "d.png cannot be read as an image" in second
    assert last.startswith("2 of 4 images predicted, 2 could not be read")
    assert [Path(row["file"]).name for row in read_rows(tmp_path / "a.csv") if row["rank"] == "1"] == ["a.jpg", "c.jpg"]


def test_nothing_readable_is_an_error_and_leaves_the_csv_file_as_it_was(trained_file, tmp_path, capsys):
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "a.csv").write_text("earlier")
    assert predict.main([str(tmp_path / "a.png"), f"--resume={trained_file}", f"--csv={tmp_path / 'a.csv'}"]) == 1
    assert capsys.readouterr().err.endswith("error: none of 1 images could be read\n")
    assert (tmp_path / "a.csv").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.png"]


def test_folders_are_searched_sorted_and_each_file_once(tmp_path):
    for name in ("b/2.jpg", "b/10.PNG", "a/.hidden.jpg", ".git/1.jpg", "a/notes.txt", "z.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    named = str(tmp_path / "b" / "2.jpg")
    found = [str(Path(path).relative_to(tmp_path)) for path in prediction.find_images([named, str(tmp_path), str(tmp_path / "a" / "notes.txt")])]
    assert found == ["b/2.jpg", "z.jpeg", "b/10.PNG", "a/notes.txt"]


def test_loader_processes_change_nothing(trained_file, digits, tmp_path):
    for count in (0, 2):
        assert predict.main([str(digits / "1"), f"--resume={trained_file}", f"--csv={tmp_path / str(count)}", "--batch-size=4", f"--num-workers={count}"]) == 0
    assert (tmp_path / "0").read_text() == (tmp_path / "2").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.jpg"], "none.jpg: there is no such file or folder"),
        (["{tmp}"], "no image there"),
        (["{image}", "--csv={tmp}/none/a.csv"], "--csv {tmp}/none/a.csv cannot be written (No such file or directory)"),
        (["{image}", "--num-workers=-1"], "--num-workers -1 is no number of processes"),
        (["{image}", "--resume={tmp}/none.pth"], "there is no such file"),
        (["{image}", "--model=recnext_m0"], "does not fit"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, message, trained_file, digits, tmp_path, capsys):
    places = {"tmp": tmp_path, "image": next(digits.rglob("*.jpg"))}
    assert predict.main([f"--resume={trained_file}", *(flag.format(**places) for flag in flags)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message.format(**places) in line


@pytest.mark.parametrize(("value", "message"), [(math.nan, "fc.bias is not finite: use another checkpoint"), (3e38, "the network's output is not finite")])
def test_a_network_that_diverged_is_refused(trained_file, digits, tmp_path, capsys, value, message):
    state = torch.load(trained_file)["model"]
    state["fc.bias"][0], state["fc.weight"][0] = value, 3e38
    path = changed(trained_file, tmp_path / "a.pth", model=state)
    assert predict.main([str(digits / "1"), f"--resume={path}", f"--csv={tmp_path / 'a.csv'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()
