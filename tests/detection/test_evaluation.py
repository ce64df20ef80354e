"""COCO's average precision: by hand, against pycocotools' recorded figures, per class, gathered from any number of processes."""

import numpy as np
import pytest
import torch

from detection import coco, evaluation, networks
from detection.batches import Batch, build_val_loader
from tests.detection import made
from tests.loading.alone import share_of
from utils import Rank


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> coco.CocoData:
    folder = tmp_path_factory.mktemp("made")
    return coco.read(made.write(folder), folder, has_masks=True)


class Oracle(torch.nn.Module):
    """Stands for a detector: finds every image's objects, at the image's scale in the batch, `shift` pixels off."""

    def __init__(self, data: coco.CocoData, shift: float = 0.0):
        super().__init__()
        self.data, self.shift, self.queue = data, shift, []

    def forward(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
        (index,), (size,) = self.queue.pop(0), sizes
        target = self.data.target(index, has_masks=False)
        height, width = self.data.sizes[index].tolist()
        boxes = (target["boxes"] + self.shift) * torch.tensor([size[1] / width, size[0] / height] * 2)
        masks = torch.ones(len(boxes), 1, 28, 28)
        return [{"boxes": boxes, "labels": target["labels"], "scores": torch.full((len(boxes),), 0.9), "masks": masks}]


def entries_of(data: coco.CocoData, *, world_size: int = 1, shift: float = 0.0) -> list[dict]:
    """What all processes' shares give, one after the other."""
    entries, net = [], Oracle(data, shift)
    for index in range(world_size):
        loader = build_val_loader(data, Rank(index, world_size, 0, 1, torch.device("cpu")), settings={"num_workers": 0, "collate_fn": lambda one: one})

        def queued(batches=loader):
            for batch in share_of(batches):
                net.queue.append(batch.indices)
                yield batch

        entries += evaluation.detect(net, queued(), data)
    return entries


def test_perfect_boxes_score_1_in_the_coordinates_of_the_file(data):
    entries = entries_of(data)
    assert entries[0]["image_id"] == 10
    assert entries[0]["category_id"] == 3
    np.testing.assert_allclose(entries[0]["bbox"], [4, 8, 20, 16], atol=1e-4)
    figures, per_class = evaluation.evaluate(data, entries, ("bbox", "segm"))
    assert figures["bbox_mAP"] == 1.0
    assert figures["bbox_mAP_l"] == -1  # no object is large
    assert per_class["bbox"] == {"square": 1.0, "triangle": 1.0}
    assert per_class["segm"]["square"] > 0.9  # a square fills its box, a triangle half of it
    assert per_class["segm"]["triangle"] < 0.2


def test_overlap_decides_which_thresholds_count(data):
    """Squares of 20 x 16, 2 off both ways, overlap by 18 * 14 / (2 * 320 - 18 * 14) = 0.649: right at 0.5, 0.55 and 0.6; triangles' boxes of 16 x 16
    by 14 * 14 / (2 * 256 - 14 * 14) = 0.620, also at three of the ten thresholds."""
    figures, per_class = evaluation.evaluate(data, entries_of(data, shift=2.0))
    assert figures["bbox_mAP"] == pytest.approx(0.3)
    assert (figures["bbox_mAP_50"], figures["bbox_mAP_75"]) == (1.0, 0.0)
    assert per_class["bbox"] == pytest.approx({"square": 0.3, "triangle": 0.3})


def test_any_number_of_processes_gives_the_same_figures(data):
    alone = evaluation.evaluate(data, entries_of(data, shift=1.0), ("bbox", "segm"))
    assert evaluation.evaluate(data, entries_of(data, world_size=3, shift=1.0), ("bbox", "segm")) == alone


def test_detections_in_crowds_are_no_mistakes_and_nothing_found_scores_0(data):
    entries = entries_of(data)
    in_crowd = {"image_id": 17, "category_id": 3, "bbox": [1, 10, 6, 6], "score": 0.99}
    elsewhere = in_crowd | {"bbox": [30, 30, 6, 6]}
    assert evaluation.evaluate(data, [*entries, in_crowd])[1]["bbox"]["square"] == 1.0
    assert evaluation.evaluate(data, [*entries, elsewhere])[1]["bbox"]["square"] < 0.95
    figures, per_class = evaluation.evaluate(data, [])
    assert figures["bbox_mAP"] == 0.0
    assert per_class["bbox"] == {"square": 0.0, "triangle": 0.0}


# What pycocotools 2.0.11 says of `drawn`, recorded: AP, AP50, AP75, small, medium, large.
RECORDED = {
    "bbox": [0.391064, 0.593679, 0.593679, 0.434945, -1.0, -1.0],
    "segm": [0.206309, 0.311754, 0.306042, 0.206356, -1.0, -1.0],
}


def drawn(data: coco.CocoData) -> list[dict]:
    """Each object with a box and mask somewhat off, and as many false ones, with scores in no order."""
    rng = np.random.RandomState(0)
    entries = []
    for index in range(len(data)):
        target = data.target(index, has_masks=False)
        height, width = data.sizes[index].tolist()
        for box, label in zip(target["boxes"].numpy(), target["labels"].tolist(), strict=True):
            for spread in (2, 12):
                x1, y1, x2, y2 = np.round(box + rng.uniform(-spread, spread, 4)).clip(0, [width - 3, height - 3, width, height])
                x2, y2 = max(x2, x1 + 2), max(y2, y1 + 2)
                mask = np.zeros((height, width), np.uint8)
                mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
                found = {"image_id": int(data.image_ids[index]), "category_id": data.category_ids[label], "score": round(rng.uniform(), 3)}
                entries.append(
                    found | {"bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)], "segmentation": coco.mask_api().encode(np.asfortranarray(mask))}
                )
    return entries


@pytest.mark.parametrize("metric", ["bbox", "segm"])
def test_figures_are_pycocotools(data, metric):
    figures, _ = evaluation.evaluate(data, drawn(data), (metric,))
    assert list(figures.values()) == pytest.approx(RECORDED[metric], abs=1e-5)


def test_a_real_detectors_entries_are_plain_values(data):
    torch.manual_seed(0)
    net = networks.build("mask_rcnn", "recnext_m0", 2, channels=8, rois_per_image=8)
    net.roi_heads.score_thresh = 0.0
    batch = Batch(torch.randn(1, 3, 64, 96), [(64, 90)], [(64, 96)], [0])
    entries = evaluation.detect(net, [batch], data)
    assert 0 < len(entries) <= 100
    assert {type(value) for entry in entries for value in entry["bbox"]} == {float}
    assert max(entry["bbox"][0] + entry["bbox"][2] for entry in entries) <= 96.001
    figures, _ = evaluation.evaluate(data, entries, ("bbox", "segm"))
    assert set(figures) == {f"{metric}_{name}" for metric in ("bbox", "segm") for name in evaluation.METRICS}
