"""What is seen in pictures: label images that can be read again, colours, names of files; and the checkpoints they come from."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export_onnx
import predict
from deployment import formats, verify
from features import pictures
from run.command import run_command
from run.errors import InputError
from segmentation import data, exporting, names, networks, painting, saved
from segmentation.classes import Classes, numbered
from segmentation.networks import IGNORED
from segmentation.saved import Saved
from tests.segmentation import made

CPU = torch.device("cpu")


class Bright(torch.nn.Module):
    """Stands for a segmenter: class 1 where the image is bright, at a quarter of its size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True) - 0.8, 4)
        return torch.cat([-bright, bright], dim=1)


def opened(net: torch.nn.Module, num_classes: int = 2, *, skips_zero: bool = False) -> Saved:
    return Saved(net.eval(), "resnet18", numbered(num_classes), (160, 80), skips_zero)


def test_labels_are_found_at_the_pictures_own_size(tmp_path):
    """The bright square of the made pictures is where its label image says, but for its edge."""
    root = made.write(tmp_path)
    for index, (width, height) in enumerate(made.SIZES):
        picture, labels = painting.find_labels(Bright(), str(root / f"images/training/{index}.jpg"), (160, 80), CPU)
        expected = made.labels_of(width, height) == 1
        assert picture.shape == (height, width, 3)
        assert labels.shape == (height, width)
        assert labels[8:20, 12:24].all()
        assert ((labels == 1) == expected).mean() > 0.9


def test_label_images_are_read_again_as_they_were_found(tmp_path):
    labels = np.array([[0, 1], [1, 0]])
    for skips_zero in (False, True):
        one = opened(Bright(), skips_zero=skips_zero)
        image = painting.label_image(labels, one)
        image.save(tmp_path / "found.png")
        assert image.mode == "P"
        assert data.to_labels(data.read_values(str(tmp_path / "found.png")), skips_zero=skips_zero).tolist() == labels.tolist()
        with Image.open(tmp_path / "found.png") as again:
            assert np.asarray(again.convert("RGB"))[0, 1].tolist() == one.classes.palette[1].tolist()


@pytest.mark.parametrize(("num_classes", "skips_zero", "mode"), [(255, False, "P"), (255, True, "I;16"), (256, False, "I;16"), (254, True, "P")])
def test_many_classes_take_16_bits(tmp_path, num_classes, skips_zero, mode):
    """255 is no class in 8 bits: it marks what is ignored."""
    labels = np.array([[0, num_classes - 1]])
    image = painting.label_image(labels, opened(Bright(), num_classes, skips_zero=skips_zero))
    image.save(tmp_path / "found.png")
    assert image.mode == mode
    assert data.to_labels(data.read_values(str(tmp_path / "found.png")), skips_zero=skips_zero).tolist() == labels.tolist()


def test_overlays_and_shares_by_hand():
    palette = np.array([[0, 0, 0], [255, 101, 0]], np.uint8)
    picture = np.full((1, 2, 3), 100, np.uint8)
    assert painting.overlay(picture, np.array([[0, 1]]), palette).tolist() == [[[50, 50, 50], [178, 101, 50]]]
    assert painting.overlay(picture, np.array([[0, IGNORED]]), palette).tolist() == [[[50, 50, 50], picture[0, 1].tolist()]]
    assert list(painting.shares(np.array([[2, 0], [2, 2]]), 5)) == [(2, 0.75), (0, 0.25)]


def test_results_lie_as_the_pictures_do(tmp_path):
    files = [str(tmp_path / name) for name in ("a/x.jpg", "b/x.jpg", "b/c/y.png")]
    assert pictures.targets(files, Path("out")) == [Path("out/a/x.png"), Path("out/b/x.png"), Path("out/b/c/y.png")]
    assert pictures.targets(files[:1], Path("out")) == [Path("out/x.png")]
    with pytest.raises(InputError, match="x.bmp and .*x.jpg would both be .*x.png"):
        pictures.targets([files[0], files[0].replace("jpg", "bmp")], Path("out"))


def test_a_picture_and_its_labels_are_written(tmp_path):
    labels = np.zeros((4, 6), np.int64)
    pictures.write_images(tmp_path / "out/deep/x.png", np.zeros((4, 6, 3), np.uint8), painting.label_image(labels, opened(Bright())))
    assert sorted(path.name for path in (tmp_path / "out/deep").iterdir()) == ["x.png", "x_overlay.jpg"]
    with Image.open(tmp_path / "out/deep/x_overlay.jpg") as image:
        assert image.size == (6, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        pictures.write_images(tmp_path / "file/x.png", np.zeros((4, 6, 3), np.uint8), None)


def test_overlays_on_one_sheet_stand_in_rows_of_four(tmp_path):
    painter = pictures.Painter(["a", "b"], tmp_path / "deep/sheet.png")
    palette = opened(Bright()).classes.palette
    for i, size in enumerate([(10, 6), (8, 12), (5, 5), (5, 5), (7, 7)]):
        painter.add(str(i), painting.overlay(np.full((*size, 3), 40 * i, np.uint8), np.zeros(size, np.int64), palette))
    painter.end()
    with Image.open(tmp_path / "deep/sheet.png") as image:
        assert image.size == (4 * 16 - 4, 2 * 14 - 4)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    tint = palette[0].astype(int)
    for i, (top, left) in enumerate([(0, 0), (0, 16), (0, 32), (0, 48), (14, 0)]):
        assert np.abs(pixels[top, left] - (40 * i + tint) / 2).max() <= 4
    assert pixels[12, 0].tolist() == [255, 255, 255]


def test_a_network_that_has_diverged_is_named(tmp_path):
    class Broken(Bright):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * float("nan")

    with pytest.raises(InputError, match="0.jpg: the network's output is not finite"):
        painting.find_labels(Broken(), str(made.write(tmp_path) / "images/training/0.jpg"), (160, 80), CPU)


# ---- checkpoints


def test_published_checkpoints_of_150_classes_are_ade20ks(tmp_path):
    torch.save({"state_dict": names.to_published(networks.build("recnext_m0", 150))}, tmp_path / "published.pth")
    with pytest.raises(InputError, match="does not say what backbone its segmenter has: add --model"):
        saved.open_checkpoint(str(tmp_path / "published.pth"))
    one = saved.open_checkpoint(str(tmp_path / "published.pth"), model="recnext_m0")
    assert (one.classes.names[0], one.max_size, one.skips_zero, one.net.training) == ("wall", (2048, 512), True, False)


def test_checkpoints_that_hold_no_segmenter_or_other_names_are_refused():
    assert not saved.is_segmenter({"model": {"head.weight": torch.zeros(2)}})
    with pytest.raises(InputError, match="holds no segmenter"):
        saved.classes_of({"model": {"head.weight": torch.zeros(2)}}, where="other.pth")
    held = {"model": {"head.conv_seg.bias": torch.zeros(3)}}
    assert saved.classes_of(held, where="x").names == ["0", "1", "2"]
    assert isinstance(saved.classes_of(held | {"class_names": list("abc"), "palette": [[1, 2, 3]] * 3}, where="x"), Classes)
    with pytest.raises(InputError, match="names 2 classes, its network has 3"):
        saved.classes_of(held | {"class_names": list("ab"), "palette": [[1, 2, 3]] * 2}, where="x")


# ---- commands


def test_predict_paints_what_a_checkpoint_sees(whole, shapes, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("000001.jpg", "000002.jpg"):
        (folder / name).write_bytes((shapes / "images/validation" / name).read_bytes())
    (folder / "torn.jpg").write_bytes(b"nothing")
    out, table = tmp_path / "seen", tmp_path / "seen.csv"
    common = [str(folder), f"--resume={whole / 'checkpoint_last.pth'}", "--device=cpu"]
    assert predict.main([*common, f"--out={out}", f"--csv={table}"]) == 0
    said = capsys.readouterr().err
    assert "torn.jpg cannot be read as an image" in said
    assert "2 of 3 images predicted, 1 could not be read" in said
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class", "share", "index"]
    for name in ("000001", "000002"):
        labels = data.to_labels(data.read_values(str(out / f"{name}.png")), skips_zero=True)
        with Image.open(folder / f"{name}.jpg") as picture:
            assert labels.shape == picture.size[::-1]
        told = {int(row["index"]): float(row["share"]) for row in rows if row["file"].endswith(f"{name}.jpg")}
        assert told == {index: pytest.approx((labels == index).mean(), abs=1e-6) for index in np.unique(labels)}
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}{end}" for name in ("000001", "000002") for end in (".png", "_overlay.jpg"))
    predict.main(common)
    assert "%  ground" in capsys.readouterr().out


def test_out_is_refused_where_there_is_nothing_to_paint(shapes, tmp_path, capsys):
    torch.save({"model": {"head.weight": torch.zeros(2)}}, tmp_path / "classifier.pth")
    assert predict.main([str(shapes / "images/validation"), f"--resume={tmp_path / 'classifier.pth'}", f"--out={tmp_path}", "--device=cpu"]) == 1
    assert "--out is for what a detector or segmenter sees" in capsys.readouterr().err


def test_the_whole_network_is_exported_and_compared(whole, tmp_path):
    trained = exporting.load_trained(None, str(whole / "checkpoint_last.pth"))
    assert (trained.name, trained.input_size, trained.num_classes) == ("fpn_test_resnet", 64, 4)
    described = verify.write_verified(trained, tmp_path / "net.onnx", formats.ONNX)
    assert described["verified"]["top1_of"] == f"{8 * 16 * 16} places in images"
    assert described["verified"]["largest_relative_difference"] < 1e-4
    assert described["class_names"][0] == "ground"
    session = formats.require("onnxruntime").InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 64, 64)
    (logits,) = session.run(None, {"image": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), trained.net(images), rtol=1e-3, atol=1e-4)


def test_feature_maps_are_timed_by_name_and_classifiers_take_squares(tmp_path):
    trained = exporting.load_named("features_test_resnet", None, use_ema=False, img_size=(64, 96))
    assert (trained.name, trained.image_size) == ("features_test_resnet", (64, 96))
    figures = verify.write_verified(trained, tmp_path / "net.onnx", formats.ONNX)["verified"]
    assert figures["largest_relative_difference"] < 1e-5
    with pytest.raises(InputError, match="measured with random weights"):
        exporting.load_named("features_test_resnet", "x.pth", use_ema=False, img_size=None)
    with pytest.raises(InputError, match="--img-size 64x96: classifiers take square images"):
        exporting.load_named("recnext_m0", None, use_ema=False, img_size=(64, 96))


def test_segmenters_are_timed_by_name():
    trained = exporting.load_named("fpn_recnext_m0", None, use_ema=False, img_size=64)
    assert (trained.num_classes, trained.which, trained.net.head.conv_seg.out_channels) == (150, "random", 150)
    assert exporting.load_named("recnext_m0", None, use_ema=False, img_size=64).name == "recnext_m0"


def test_a_segmenter_is_not_quantised(whole, capsys):
    path = whole / "checkpoint_best.pth"
    assert run_command(export_onnx.run, [f"--ckpt={path}", "--int8"]) == 1
    assert f"--int8 is for classifiers, and {path} holds none" in capsys.readouterr().err
