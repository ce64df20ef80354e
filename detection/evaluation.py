"""Detections in COCO's format, and COCO's average precision of them, over all classes and for each.

Each process makes the entries of its share of the images; gathered from all (`utils.gather_objects`), one process scores them."""

import contextlib
import io
from collections.abc import Callable, Collection, Iterable

import numpy as np
import torch
from torch import nn

from detection.batches import Batch
from detection.coco import CocoData, mask_api, parse
from detection.networks import pasted, restored

METRICS = {"mAP": 0, "mAP_50": 1, "mAP_75": 2, "mAP_s": 3, "mAP_m": 4, "mAP_l": 5}  # published names, by place among COCO's figures
OVERLAPS = {"": slice(None), "_50": 0, "_75": 5}  # of a class's figures: all ten from 0.5 to 0.95, and two of them by their place


@torch.no_grad()
def detect(net: nn.Module, batches: Iterable[Batch], data: CocoData, *, after_image: Callable[[], None] = lambda: None) -> list[dict]:
    """COCO's entries of what `net` finds, in coordinates of the images as they are; `net` is left in evaluation mode."""
    net.eval()
    entries = []
    for batch in batches:
        found = net(batch.images, batch.sizes)
        for index, one, size, original_size in zip(batch.indices, found, batch.sizes, batch.original_sizes, strict=True):
            entries += coco_entries(restored(one, size, original_size), data, index)
            after_image()
    return entries


def coco_entries(detection: dict[str, torch.Tensor], data: CocoData, index: int) -> list[dict]:
    """A `restored` detection of image `index` as plain values: image_id, category_id, bbox [x, y, width, height], score, and
    where there are masks segmentation, run-length encoded."""
    detection = {name: value.cpu() for name, value in detection.items()}
    corners = detection["boxes"].double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    categories = [data.category_ids[label] for label in detection["labels"].tolist()]
    image_id = int(data.image_ids[index])
    entries = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(categories, boxes, detection["scores"].tolist(), strict=True)
    ]
    if "masks" in detection:
        for entry, mask in zip(entries, pasted(detection, tuple(data.sizes[index].tolist())), strict=True):
            entry["segmentation"] = mask_api().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return entries


def evaluate(
    data: CocoData, entries: list[dict], metrics: tuple[str, ...] = ("bbox",), *, left_out: Collection[str] = ()
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Average precision of the `entries` of all processes, by published name (`bbox_mAP`, `segm_mAP_50`, ...), and per class (`bbox`, `segm_50`, ...).

    Fractions of 1; -1 where the data has no object of that size; 0 where nothing was found at all. The second is by metric, with `_50` and
    `_75` at that overlap, and class name. `left_out`: files of images that do not count. InputError where faster-coco-eval is missing."""
    mask_api()
    from faster_coco_eval import COCO, COCOeval_faster

    figures, per_class = {}, {}
    if not entries:  # which faster-coco-eval does not take
        empty = dict.fromkeys(data.class_names, 0.0)
        return {f"{metric}_{name}": 0.0 for metric in metrics for name in METRICS}, {metric + place: empty for metric in metrics for place in OVERLAPS}
    truth = COCO(_complete(parse(data.path)))
    for metric in metrics:
        # Copies, for they are added to; masks are counted small or large by their own area, not their box's.
        scored = [{key: value for key, value in one.items() if metric != "segm" or key != "bbox"} for one in entries]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval_faster(truth, truth.loadRes(scored), metric)
            evaluation.params.imgIds = [int(key) for i, key in enumerate(data.image_ids) if data.file(i) not in left_out]
            evaluation.run()
        figures |= {f"{metric}_{name}": round(float(evaluation.stats[place]), 6) for name, place in METRICS.items()}
        per_class |= {metric + place: _per_class(evaluation, data, overlaps) for place, overlaps in OVERLAPS.items()}
    return figures, per_class


def _complete(content: dict) -> dict:
    """The annotations with what COCO's files have and others may lack: ids from 1 on, areas, crowd marks."""
    for number, entry in enumerate(content["annotations"], 1):
        entry |= {"id": number, "iscrowd": entry.get("iscrowd", 0), "area": entry.get("area", entry["bbox"][2] * entry["bbox"][3])}
    return content


def _per_class(evaluation, data: CocoData, overlaps: slice | int) -> dict[str, float]:
    """Average precision at the `overlaps` by class name; classes without objects are left out."""
    precision = evaluation.eval["precision"][overlaps, ..., 0, -1]  # overlaps, recalls, classes, of all sizes, with the most detections
    means = {data.class_names[label]: precision[..., place] for place, label in enumerate(_labels(evaluation, data))}
    return {name: float(values[values > -1].mean()) for name, values in means.items() if (values > -1).any()}


def _labels(evaluation, data: CocoData) -> list[int]:
    return [data.category_ids.index(key) for key in evaluation.params.catIds]
