"""Turn ImageNet-1K's archives into folders: `python tools/extract_imagenet.py --archives DIR --out DIR`.

--archives holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as image-net.org gives them out;
--out gets train/<class>/*.JPEG and val/<class>/*.JPEG. A run that was stopped or killed goes on where it was: start it again."""

import argparse
import contextlib
import gzip
import io
import os
import re
import shlex
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from run.errors import InputError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {TRAIN: "1d675b47d978889d74fa0da5fadfb00e", VAL: "29b22e2961454d5413ddabcf34fc5622", DEVKIT: "fa75699e90414af021442c21a62c3abf"}
META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_TAR = re.compile(r"(n\d{8})\.tar", re.ASCII)
TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG", re.ASCII)
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
NUM_IMAGES = {"train": 1_281_167, "val": 50_000}
BLOCK = 512  # bytes: what a tar is made of, the last of them zeros
REPORT_S = 10  # between lines of progress
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class Progress:
    """Counts the images of one part and prints a line with rate and time left every `REPORT_S` seconds.

    Rates are those of images written since the first was: images that are there already take next to no time."""

    def __init__(self, part: str, total_bytes: int):
        self.part = part
        self.total_bytes = total_bytes
        self.done_bytes = self.written_bytes = self.num_written = self.num_skipped = 0
        self.start = self.reported = time.perf_counter()

    @property
    def num_images(self) -> int:
        return self.num_written + self.num_skipped

    def add(self, size: int, *, is_written: bool) -> None:
        """Count an image that takes `size` bytes of its tar, written now or there already."""
        now = time.perf_counter()
        self.done_bytes += size
        if is_written:
            self.num_written += 1
            self.written_bytes += size
        else:
            self.num_skipped += 1
            self.start = now if self.num_written == 0 else self.start
        if now - self.reported >= REPORT_S:
            self.reported = now
            print(self.line(now - self.start), flush=True)

    def line(self, elapsed_s: float) -> str:
        bytes_per_s = self.written_bytes / max(elapsed_s, 1e-9)
        eta = timedelta(seconds=round((self.total_bytes - self.done_bytes) / bytes_per_s)) if bytes_per_s else "unknown"
        done = f"{self.num_images:,} images  {self.done_bytes / self.total_bytes:.1%}"
        return f"{self.part}: {done}  {self.num_written / max(elapsed_s, 1e-9):,.0f} images/s  ETA {eta}"

    def summary(self, num_classes: int) -> str:
        elapsed_s = max(time.perf_counter() - self.start, 1e-9)
        counts = f"{self.num_images:,} images of {num_classes:,} classes"
        whole = "" if self.num_images == NUM_IMAGES[self.part] else f", where ILSVRC2012 has {NUM_IMAGES[self.part]:,}"
        rate = f"{self.num_written:,} written at {self.num_written / elapsed_s:,.0f} images/s" if self.num_written else "none written"
        return f"{self.part}: {counts}{whole}; {rate}, {self.num_skipped:,} there already"


def damaged(path: Path, why: object) -> InputError:
    """The error for an archive that is cut off or is no tar."""
    return InputError(f"{path} is truncated or damaged ({why}): fetch it again; its MD5 is {MD5[path.name]}")


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """The tar `path`, whose index is read and whose end is there; InputError where it is cut off, damaged or unreadable."""
    try:
        with tarfile.open(path, "r:gz" if path.suffix == ".gz" else "r:") as tar:
            tar.getmembers()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("its end is missing")
            yield tar
    except DAMAGE as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions and disk") from error


def list_files(tar: tarfile.TarFile, where: str, pattern: re.Pattern) -> list[tuple[tarfile.TarInfo, str]]:
    """The regular files of `tar`, each with the part of its name that `pattern` asks for.

    InputError on anything else: as a name must be the pattern and nothing more, none leads to another folder."""
    files = []
    for item in tar.getmembers():
        match = pattern.fullmatch(item.name.removeprefix("./"))
        if not item.isdir():
            if match is None or not item.isreg():
                raise InputError(f"{where} holds {item.name!r}, which is no file of ImageNet's, and is not extracted: fetch the archive from image-net.org")
            files.append((item, match[1]))
    if not files:
        raise InputError(f"{where} is empty: fetch it again")
    return files


def write_file(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all. InputError where the disk is full or the folder cannot be written."""
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror}): make room or choose another --out, then start again: it goes on from here") from error


def extract_file(tar: tarfile.TarFile, item: tarfile.TarInfo, folder: Path, progress: Progress) -> None:
    """Bring one image into `folder`, unless a file of its name and size is there."""
    path = folder / Path(item.name).name
    try:
        is_there = path.stat().st_size == item.size
    except OSError:
        is_there = False
    if not is_there:
        write_file(path, tar.extractfile(item).read())
    progress.add(BLOCK + -(-item.size // BLOCK) * BLOCK, is_written=not is_there)


def extract_train(archives: Path, out: Path) -> None:
    """The training images: a tar per class inside one tar."""
    path = archives / TRAIN
    with open_archive(path) as tar:
        classes = list_files(tar, str(path), CLASS_TAR)
        progress = Progress("train", sum(item.size for item, _ in classes))
        for item, wnid in classes:
            where = f"{path}: {item.name}"
            with tarfile.open(fileobj=tar.extractfile(item), mode="r:") as class_tar:
                for image, _ in list_files(class_tar, where, TRAIN_IMAGE):
                    extract_file(class_tar, image, out / "train" / wnid, progress)
    print(progress.summary(len(classes)), flush=True)


def extract_val(archives: Path, out: Path) -> None:
    """The validation images: one flat tar, whose classes the devkit lists by the images' numbers."""
    labels = read_labels(archives / DEVKIT)
    path = archives / VAL
    with open_archive(path) as tar:
        images = list_files(tar, str(path), VAL_IMAGE)
        if sorted(int(number) for _, number in images) != list(range(1, len(labels) + 1)):
            raise InputError(
                f"{archives / DEVKIT} has ground truth of {len(labels):,} lines, for images 1 to {len(labels):,}; {path} holds {len(images):,} images, "
                f"not exactly those: fetch both again; their MD5s are {MD5[DEVKIT]} and {MD5[VAL]}"
            )
        progress = Progress("val", sum(item.size for item, _ in images))
        for item, number in images:
            extract_file(tar, item, out / "val" / labels[int(number) - 1], progress)
    print(progress.summary(len(set(labels))), flush=True)


def read_labels(path: Path) -> list[str]:
    """The class (WordNet id) of each validation image, in the order of their numbers, from the devkit. InputError where it does not say."""
    with open_archive(path) as tar:
        files = {item.name: item for item in tar.getmembers() if item.isreg()}
        meta, ground_truth = (next((files[name] for name in files if name.endswith(f"/{wanted}")), None) for wanted in (META, GROUND_TRUTH))
        if meta is None or ground_truth is None:
            raise InputError(f"{path} has no {META if meta is None else GROUND_TRUTH}: it must be the devkit of ILSVRC2012's tasks 1 and 2")
        wnids = read_classes(tar.extractfile(meta).read(), f"{path}: {META}")
        lines = tar.extractfile(ground_truth).read().decode("ascii", "replace").split()
    for i, line in enumerate(lines, start=1):
        if line not in wnids:
            raise InputError(f"{path}: line {i} of {GROUND_TRUTH} is '{line}', which is no class of {META}: fetch the devkit again; its MD5 is {MD5[DEVKIT]}")
    return [wnids[line] for line in lines]


def read_classes(data: bytes, where: str) -> dict[str, str]:
    """WordNet id by ILSVRC2012 id, as text, of the synsets in a .mat file that have none below them: the classes."""
    import numpy as np
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError, OSError) as error:
        raise InputError(f"{where} is not the devkit's table of synsets ({error}): fetch the devkit again; its MD5 is {MD5[DEVKIT]}") from error


def require_archives(folder: Path, names: list[str]) -> None:
    """InputError naming every archive that is missing, and where to put it."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"--archives {folder} lacks {', '.join(missing)}: log in at https://image-net.org, download ILSVRC2012, and put what is missing there "
            f"(--train-only needs {TRAIN} alone, --val-only {VAL} and {DEVKIT})"
        )


def next_command(out: Path) -> str:
    """What to do with the folder as it is now."""
    has_train, has_val = (out / "train").is_dir(), (out / "val").is_dir()
    path = shlex.quote(str(out))
    if has_train and has_val:
        return f"train with: torchrun --nproc_per_node=4 main.py --config recipes/recnext_300e.yaml --data-path {path}"
    if has_val:
        return f"evaluate with: python main.py --eval --model recnext_m1 --pretrained --distillation-type none --data-path {path}"
    return f"the validation images are still missing: python tools/extract_imagenet.py --val-only --archives DIR --out {path}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--archives", type=Path, required=True, metavar="DIR", help="folder of the three archives")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to fill; takes about 155 GB")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", "--train_only", action="store_true", help="leave the validation images and the devkit alone")
    only.add_argument("--val-only", "--val_only", action="store_true", help="leave the training images alone")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 with one message where something is missing or at fault, 130 if interrupted."""
    args = build_parser().parse_args(argv)
    archives, out = args.archives.expanduser(), args.out.expanduser()
    needed = ([] if args.train_only else [DEVKIT, VAL]) + ([] if args.val_only else [TRAIN])
    try:
        require_archives(archives, needed)
        if VAL in needed:
            extract_val(archives, out)
        if TRAIN in needed:
            extract_train(archives, out)
    except InputError as error:
        print(f"extract_imagenet.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("extract_imagenet.py: interrupted; start again to go on", file=sys.stderr)
        return 130
    print(next_command(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
