import pytest

from deployment.weights import load_trained
from measuring import timing


@pytest.fixture(scope="module")
def tiny():
    return load_trained("test_resnet", None, img_size=32, num_classes=7)


@pytest.fixture(autouse=True)
def _short_slices(monkeypatch):
    monkeypatch.setattr(timing, "SLICE_S", 0.001)
