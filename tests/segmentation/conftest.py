"""A made data set of shapes with label images, and a short run of a small segmenter on it, shared by the tests."""

from pathlib import Path

import pytest

from segmentation import __main__ as command
from tools import make_shapes

NAMES = "ground\ncircle #ff0000\nsquare\ntriangle\n"

# Two stretches of three iterations of four pictures.
SHORT_RUN = [
    "--model=test_resnet", "--channels=16", "--max-size", "128", "64", "--crop-size=64", "--batch-size=4", "--iterations=6", "--eval-interval=3", "--lr=1e-3",
    "--num_workers=0", "--device=cpu", "--log-steps=2", "--data-set=own", "--reduce-zero-label",
]  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """16 training and 5 validation pictures, and a file of class names beside them."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes.make(folder, num_train=16, num_val=5, is_semantic=True)
    (folder / "names.txt").write_text(NAMES)
    return folder


@pytest.fixture
def short_run(shapes, capsys):
    """Run the command in this process on the small data set; its exit code, and what it printed. Flags given override those of the short run."""

    def run(*flags: str) -> tuple[int, str]:
        code = command.main([*SHORT_RUN, f"--data-path={shapes}", f"--classes={shapes / 'names.txt'}", *flags])
        return code, capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def whole(shapes, tmp_path_factory) -> Path:
    """The folder of a run that never stopped."""
    folder = tmp_path_factory.mktemp("segmenter") / "whole"
    assert command.main([*SHORT_RUN, f"--data-path={shapes}", f"--classes={shapes / 'names.txt'}", f"--output_dir={folder}"]) == 0
    return folder
