"""A made data set of shapes, and a short run of a small detector on it, shared by the tests."""

from pathlib import Path

import pytest

from detection import __main__ as command
from tools import make_shapes

# Two epochs of seven steps of four images.
SHORT_RUN = [
    "--model=recnext_m0", "--channels=16", "--rois-per-image=16", "--max-size", "96", "64", "--batch-size=4", "--epochs=2", "--lr=1e-3",
    "--warmup-steps=5", "--decay-after=1", "--num_workers=0", "--device=cpu", "--log-steps=2",
]  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """24 training and 6 validation images."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes.make(folder, num_train=24, num_val=6)
    return folder


@pytest.fixture
def short_run(shapes, capsys):
    """Run the command in this process on the small data set; its exit code, and what it printed. Flags given override those of the short run."""

    def run(*flags: str) -> tuple[int, str]:
        code = command.main([*SHORT_RUN, f"--data-path={shapes}", *flags])
        return code, capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def whole(shapes, tmp_path_factory) -> Path:
    """The folder of a run that never stopped."""
    folder = tmp_path_factory.mktemp("detector") / "whole"
    assert command.main([*SHORT_RUN, f"--data-path={shapes}", f"--output_dir={folder}"]) == 0
    return folder
