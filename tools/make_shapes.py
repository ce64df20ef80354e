"""Write a made data set in COCO's format: circles, squares and triangles over photographs and textures.

    python tools/make_shapes.py --out data/shapes
    python -m detection --config recipes/detection/demo.yaml --data-path data/shapes --output_dir checkpoints/shapes

Among them are tiny ones, ones that the image's edge cuts off, ones behind others, and crowds: many small ones marked as one. Of each only
what is visible is marked, by a polygon where that is all of it, else run-length encoded. With `--semantic` the same images lie once more in
ADE20K's layout, with label images: 0 for crowds, which are not learnt, 1 for the ground, then the shapes in their order."""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from run.command import positive_int, run_command, spellings
from run.disk import writing
from sources.progress import Progress

SHAPES = ("circle", "square", "triangle")
CORNERS = {"circle": 40, "square": 4, "triangle": 3}
SIDES = (96, 112, 128, 144, 160)  # of images, pixels
FINE = 4  # lines are drawn at this many times the image's size, for smooth edges
MIN_VISIBLE = 0.25  # of a shape, less of which is no object
GROUND, FIRST_SHAPE = 1, 2  # of label images, where 0 is ignored
SPLITS = {"train2017": "training", "val2017": "validation"}  # COCO's folders, ADE20K's


def outline(shape: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape that a circle of that radius around (x, y) encloses, in pixels."""
    angles = [angle + 2 * math.pi * i / CORNERS[shape] for i in range(CORNERS[shape])]
    return [(x + radius * math.cos(one), y + radius * math.sin(one)) for one in angles]


def coverage(corners: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """(H, W), from 0 to 1: how much of each pixel lies inside the corners."""
    height, width = size
    drawn = Image.new("L", (width * FINE, height * FINE))
    ImageDraw.Draw(drawn).polygon([(x * FINE - 0.5, y * FINE - 0.5) for x, y in corners], fill=255)  # between pixels' centres
    return np.asarray(drawn.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def ground(rng: np.random.RandomState, photographs: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32, 0 to 255: a part of a photograph, or a texture of waves and noise."""
    height, width = size
    if rng.rand() < 0.7:
        photograph = photographs[rng.randint(len(photographs))]
        scale = rng.uniform(1.0, min(photograph.shape[0] / height, photograph.shape[1] / width))
        high, wide = int(height * scale), int(width * scale)
        top, left = rng.randint(photograph.shape[0] - high + 1), rng.randint(photograph.shape[1] - wide + 1)
        part = Image.fromarray(photograph[top : top + high, left : left + wide]).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(part, dtype=np.float32)[:, :: rng.choice([-1, 1])] * rng.uniform(0.6, 1.1)
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(rows * rng.uniform(-0.4, 0.4) + columns * rng.uniform(-0.4, 0.4) + rng.uniform(0, 6))
    colours = rng.uniform(30, 220, (2, 3))
    return colours[0] + (colours[1] - colours[0]) * (waves[..., None] + 1) / 2 + rng.normal(0, 12, (height, width, 3))


def painted(image: np.ndarray, cover: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """The image with a shape of some colour, shaded and grained, where `cover` (H, W) is not 0; its rim is dark, or bright on dark shapes."""
    colour = rng.uniform(0, 255, 3)
    rows, columns = np.mgrid[-1 : 1 : cover.shape[0] * 1j, -1 : 1 : cover.shape[1] * 1j]
    shade = 40 * (rows * rng.uniform(-1, 1) + columns * rng.uniform(-1, 1))
    inside = np.asarray(Image.fromarray(cover).filter(ImageFilter.MinFilter(3)))[..., None]
    rim = np.full(3, 20.0 if colour.mean() > 100 else 235.0)
    surface = rim + (colour + shade[..., None] - rim) * inside + rng.normal(0, 6, image.shape)
    return image + (surface - image) * cover[..., None]


def run_lengths(mask: np.ndarray) -> dict:
    """A mask (H, W) in COCO's run-length encoding: column by column, the lengths of zeros and ones in turn."""
    flat = np.concatenate([[0], mask.flatten(order="F").astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts[:-1] if edges[-1] == mask.size else counts}


def entry(mask: np.ndarray, shape: str, corners: list[tuple[float, float]] | None, *, is_crowd: bool) -> dict:
    """COCO's annotation of what is visible, (H, W) bool; `corners` where that is all of one shape."""
    rows, columns = np.where(mask)
    box = [int(columns.min()), int(rows.min()), int(columns.max() - columns.min() + 1), int(rows.max() - rows.min() + 1)]
    polygon = None if corners is None else [[round(float(value), 2) for corner in corners for value in corner]]
    return {
        "category_id": SHAPES.index(shape) + 1,
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": int(is_crowd),
        "segmentation": polygon or run_lengths(mask),
    }


def draw_shapes(rng: np.random.RandomState, size: tuple[int, int]) -> list[tuple[str, list[list[tuple[float, float]]]]]:
    """Names of the image's objects from back to front, and the corners of the shapes that each consists of: of one but for crowds."""
    height, width = size
    objects = []
    if rng.rand() < 0.1:
        x, y, shape = rng.uniform(30, width - 30), rng.uniform(30, height - 30), SHAPES[rng.randint(len(SHAPES))]
        places = rng.uniform(-26, 26, (rng.randint(12, 20), 2)) + (x, y)
        objects.append((shape, [outline(shape, *place, rng.uniform(3, 5), rng.uniform(0, 6.3)) for place in places]))
    for _ in range(rng.randint(2, 6)):
        shape, kind = SHAPES[rng.randint(len(SHAPES))], rng.rand()
        radius = rng.uniform(4, 7) if kind < 0.08 else rng.uniform(14, 36)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if kind > 0.88:  # at an edge
            x = rng.choice([0.0, width]) + rng.uniform(-radius, radius) / 3
        objects.append((shape, [outline(shape, x, y, radius, rng.uniform(0, 6.3))]))
    return objects


def make_image(rng: np.random.RandomState, photographs: list[np.ndarray]) -> tuple[np.ndarray, list[dict], np.ndarray]:
    """An image (H, W, 3) uint8, its annotations, and its labels (H, W) uint8."""
    size = tuple(int(side) for side in rng.choice(SIDES, 2))
    image, labels = ground(rng, photographs, size), np.full(size, GROUND, np.uint8)
    masks = []
    for shape, parts in draw_shapes(rng, size):
        cover = np.max([coverage(corners, size) for corners in parts], axis=0)
        image, mask = painted(image, cover, rng), cover >= 0.5
        masks = [(name, corners, whole, visible & ~mask) for name, corners, whole, visible in masks]
        masks.append((shape, parts, mask, mask))
        labels[mask] = 0 if len(parts) > 1 else FIRST_SHAPE + SHAPES.index(shape)
    entries = []
    for shape, parts, whole, visible in masks:
        is_inside = all(0 <= x <= size[1] and 0 <= y <= size[0] for x, y in parts[0])
        if visible.sum() > max(MIN_VISIBLE * whole.sum(), 4):
            is_whole = len(parts) == 1 and is_inside and visible.sum() == whole.sum()
            entries.append(entry(visible, shape, parts[0] if is_whole else None, is_crowd=len(parts) > 1))
        else:
            labels[visible] = 0
    return np.clip(image, 0, 255).astype(np.uint8), entries, labels


def make(out: Path, *, num_train: int, num_val: int, seed: int = 0, is_semantic: bool = False) -> None:
    """Write the data set into the folder `out`: a function of the numbers of images and the seed. InputError where it cannot be written."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    progress = Progress(num_train + num_val, print)
    with writing(f"--out {out}", "choose another folder"):
        (out / "annotations").mkdir(parents=True, exist_ok=True)
        for number, (split, count) in enumerate((("train2017", num_train), ("val2017", num_val))):
            (out / split).mkdir(exist_ok=True)
            images, annotations = [], []
            for i in range(count):
                image, entries, labels = make_image(np.random.RandomState([seed, number, i]), photographs)
                name = f"{i + 1:06d}.jpg"
                Image.fromarray(image).save(out / split / name, quality=92)
                images.append({"id": i + 1, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
                annotations += [{"id": len(annotations) + j, "image_id": i + 1, **one} for j, one in enumerate(entries, 1)]
                if is_semantic:
                    _write_labels(out, SPLITS[split], name, image=out / split / name, labels=labels)
                progress.add()
            categories = [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _write_labels(out: Path, split: str, name: str, *, image: Path, labels: np.ndarray) -> None:
    """The image and its labels once more, as ADE20K has them."""
    for kind in ("images", "annotations"):
        (out / kind / split).mkdir(parents=True, exist_ok=True)
    shutil.copy(image, out / "images" / split / name)
    Image.fromarray(labels).save(out / "annotations" / split / Path(name).with_suffix(".png").name)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tools/make_shapes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument(*spellings("train"), type=positive_int, default=600, metavar="N", help="training images [600]")
    parser.add_argument(*spellings("val"), type=positive_int, default=60, metavar="N", help="validation images [60]")
    parser.add_argument(*spellings("seed"), type=int, default=0, help="of everything that is drawn [0]")
    parser.add_argument(*spellings("semantic"), action="store_true", help="write label images for semantic segmentation too")
    args = parser.parse_args(argv)
    make(args.out, num_train=args.train, num_val=args.val, seed=args.seed, is_semantic=args.semantic)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
