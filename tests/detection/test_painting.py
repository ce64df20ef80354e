"""What is found in pictures: boxes and masks in the picture's own pixels, drawn and told; and the checkpoints that it comes from."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import export_onnx
import predict
from detection import names, networks, painting, saved
from features.pictures import made_palette
from run import command
from run.errors import InputError
from tests.detection import made

CPU = torch.device("cpu")


class Bright(torch.nn.Module):
    """Stands for a detector: one object where the image is bright, as `detection.networks.build` describes; and a doubtful one over everything."""

    def forward(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
        rows, columns = torch.where(images[0].mean(0) > 2)
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        (height, width), masks = sizes[0], torch.ones(2, 1, 28, 28)
        boxes = torch.stack([box, torch.tensor([0.0, 0.0, width, height])])
        return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.3]), "labels": torch.tensor([1, 0]), "masks": masks}]


def found_objects() -> dict[str, torch.Tensor]:
    """One object of class 1 whose mask fills its box, from (2, 3) to (58, 49)."""
    return {"boxes": torch.tensor([[2.0, 3, 58, 49]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1]), "masks": torch.ones(1, 1, 28, 28)}


def test_objects_are_found_in_the_pictures_own_pixels(tmp_path):
    """The bright part of the made pictures reaches from (4, 8) to (24, 24), whatever size the detector sees them at."""
    made.write(tmp_path)
    for max_size in ((160, 80), (96, 64)):
        picture, found = painting.find_objects(Bright(), str(tmp_path / "0.jpg"), max_size, CPU)
        assert picture.shape == (64, 96, 3)
        assert found["scores"].tolist() == pytest.approx([0.9])
        assert found["boxes"][0].tolist() == pytest.approx([4, 8, 24, 24], abs=1.5)
    assert len(painting.find_objects(Bright(), str(tmp_path / "0.jpg"), (96, 64), CPU, min_score=0.2)[1]["scores"]) == 2


def test_masks_are_laid_over_and_boxes_drawn_in_their_classes_colour():
    picture, colour = np.full((60, 90, 3), 100, np.uint8), made_palette(2)[1].astype(int)
    drawn = painting.overlay(picture, found_objects(), ["cat", "dog"]).astype(int)
    assert (drawn[49, 2:59] == colour).all() and (drawn[3:50, 58] == colour).all()
    assert np.abs(drawn[40:48, 4:56] - (100 + colour) / 2).max() <= 1  # below the text
    untouched = np.ones((60, 90), bool)
    untouched[3:50, 2:59] = False
    assert (drawn[untouched] == 100).all()
    without_masks = painting.overlay(picture, {name: value for name, value in found_objects().items() if name != "masks"}, ["cat", "dog"])
    assert (without_masks[40:48, 4:56] == 100).all() and (without_masks[49, 2:59] == colour).all()
    nothing = {name: value[:0] for name, value in found_objects().items()}
    assert (painting.overlay(picture, nothing, ["cat", "dog"]) == picture).all()


# ---- checkpoints


def test_published_checkpoints_of_80_classes_are_cocos(tmp_path):
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet"):
        net = networks.build(detector, "recnext_m0", 80, channels=8)
        torch.save({"state_dict": names.to_published(net)}, tmp_path / "published.pth")
        opened = saved.open_checkpoint(str(tmp_path / "published.pth"), model="recnext_m0")
        assert (opened.detector, opened.model, opened.max_size, opened.net.training) == (detector, "recnext_m0", (1333, 800), False)
        assert (len(opened.class_names), opened.class_names[0], opened.class_names[-1]) == (80, "person", "toothbrush")


def test_other_numbers_of_names_than_classes_are_refused():
    assert saved.class_names({}, 2, where="x.pth") == ["0", "1"]
    assert saved.class_names({"class_names": ["a"]}, 1, where="x.pth") == ["a"]
    with pytest.raises(InputError, match="x.pth names 1 classes, its network has 2"):
        saved.class_names({"class_names": ["a"]}, 2, where="x.pth")


# ---- the command


def test_predict_tells_and_draws_what_a_checkpoint_finds(whole, shapes, tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name, place in (("000001.jpg", folder), ("000002.jpg", folder / "deep")):
        (place / name).write_bytes((shapes / "val2017" / name).read_bytes())
    (folder / "torn.jpg").write_bytes(b"nothing")
    out, table = tmp_path / "seen", tmp_path / "seen.csv"
    common = [str(folder), f"--resume={whole / 'checkpoint_last.pth'}", "--device=cpu", "--min-score=0.06"]
    assert predict.main([*common, f"--out={out}", f"--csv={table}"]) == 0
    said = capsys.readouterr().err
    assert "torn.jpg cannot be read as an image" in said and "2 of 3 images predicted, 1 could not be read" in said
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "rank", "class", "score", "x1", "y1", "x2", "y2", "index"]
    opened = saved.open_checkpoint(str(whole / "checkpoint_last.pth"))
    for file in (folder / "000001.jpg", folder / "deep/000002.jpg"):
        picture, found = painting.find_objects(opened.net, str(file), opened.max_size, CPU, min_score=0.06)
        own = [row for row in rows if row["file"] == str(file)]
        assert [int(row["index"]) for row in own] == found["labels"].tolist()
        assert [[float(row[side]) for side in ("x1", "y1", "x2", "y2")] for row in own] == pytest.approx(np.array(found["boxes"].tolist()), abs=0.01)
        with Image.open((out / file.relative_to(folder)).with_name(f"{file.stem}_overlay.jpg")) as image:
            assert image.size == picture.shape[1::-1]
    assert len(list(out.rglob("*.*"))) == 2
    assert predict.main(common) == 0
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[:5] == [f"{100 * float(rows[0]['score']):.2f}", "%", rows[0]["class"], "box", f"{float(rows[0]['x1']):.1f}"]


def test_what_a_detector_alone_takes_is_refused_elsewhere(shapes, tmp_path, capsys):
    torch.save({"model": {"head.weight": torch.zeros(2)}}, tmp_path / "classifier.pth")
    pictures = str(shapes / "val2017")
    assert predict.main([pictures, f"--resume={tmp_path / 'classifier.pth'}", "--min-score=0.3", "--device=cpu"]) == 1
    assert "--min-score is for what a detector finds" in capsys.readouterr().err


def test_a_detector_has_no_ema_weights(whole, shapes, capsys):
    detector = str(whole / "checkpoint_last.pth")
    assert predict.main([str(shapes / "val2017"), f"--resume={detector}", "--use-ema", "--device=cpu"]) == 1
    assert command.run_command(export_onnx.run, ["--ckpt", detector, "--use-ema"]) == 1
    assert capsys.readouterr().err.count("--use-ema is for classifiers") == 2


def test_a_detector_that_has_diverged_is_named():
    net = networks.build("faster_rcnn", "recnext_m0", 2, channels=8).eval()
    net.backbone.fpn.layer_blocks[0][0].bias.data[3] = float("nan")
    one = saved.Saved(net, "faster_rcnn", "recnext_m0", ["a", "b"], (96, 64))
    with pytest.raises(InputError, match="weights are not finite"):
        painting.predict_files(one, ["x.jpg"], CPU, min_score=0.5, out=None, write=print)
