"""The small folder in every layout, written once for the tests of sources."""

import pytest

from benchmarks import layouts as writers

KINDS = ("folder", *writers.WRITERS)


@pytest.fixture(scope="session")
def layouts(digits_folder, tmp_path_factory):
    """The folder of a layout, by its name; not to be changed."""
    root, made = tmp_path_factory.mktemp("layouts"), {}

    def get(kind: str):
        if kind not in made:
            made[kind] = writers.write(kind, digits_folder, root / kind)
        return made[kind]

    return get
