"""Write scikit-learn's handwritten digits as JPEG folders in the ImageNet layout: `python tools/export_digits.py DIR`.

DIR/train/<digit>/*.jpg and DIR/val/<digit>/*.jpg, the same images and split as `--data-set DIGITS`, enlarged to --size pixels."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from PIL import Image

from loading.images import Images
from sources.sets import load_digits


def export(images: Images, folder: Path, size: int) -> None:
    """One JPEG per image, in a folder per class."""
    for i, target in enumerate(images.targets):
        path = folder / images.classes[target] / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[i][0].resize((size, size), Image.Resampling.BICUBIC).save(path, quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("dir", type=Path, help="folder to fill")
    parser.add_argument("--size", type=int, default=64, help="side of the JPEGs, pixels [64]")
    args = parser.parse_args()
    for name, images in zip(("train", "val"), load_digits(), strict=True):
        export(images, args.dir / name, args.size)
        print(f"{args.dir / name}: {len(images)} images of {len(images.classes)} classes")


if __name__ == "__main__":
    main()
