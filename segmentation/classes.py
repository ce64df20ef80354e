"""Class names and colours: ADE20K's, those of a file, or made ones.

`ade20k.txt` holds the 150 classes of the MIT scene parsing benchmark (http://sceneparsing.csail.mit.edu) in its order, with the colours that
its `color150.mat` gives them; two of them, road and skyscraper, share one there."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.pictures import made_palette
from run.errors import InputError

ADE20K = Path(__file__).parent / "ade20k.txt"
MAX_CLASSES = 4096  # whose logits and confusion matrix fit into memory


@dataclass(frozen=True)
class Classes:
    """Names by number, and colours (C, 3) uint8."""

    names: list[str]
    palette: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def numbered(num_classes: int) -> Classes:
    """Classes that have numbers for names, and made colours."""
    return Classes([str(i) for i in range(num_classes)], made_palette(num_classes))


def read_classes(path: str | Path) -> Classes:
    """The classes of a text file, one a line: its name, and `#rrggbb` after it where it has a colour; others get a made one.

    InputError where the file cannot be read, has an empty line between others, or a name twice."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--classes {path} cannot be read ({getattr(error, 'strerror', None) or error}): name a text file of class names, a line each"
        ) from error
    names, palette = [], made_palette(len(lines))
    for i, line in enumerate(lines):
        name, hex_colour = re.fullmatch(r"\s*(.*?)(?:\s+#([0-9a-fA-F]{6}))?\s*", line).groups()
        if not name:
            raise InputError(f"--classes {path}, line {i + 1} has no name: write a class a line, in the order of their numbers")
        if name in names:
            raise InputError(f"--classes {path}, line {i + 1}: '{name}' is already class {names.index(name)}: give each class its own name")
        names.append(name)
        if hex_colour:
            palette[i] = list(bytes.fromhex(hex_colour))
    if not 1 <= len(names) <= MAX_CLASSES:
        raise InputError(f"--classes {path} has {len(names)} names: it needs from 1 to {MAX_CLASSES}")
    return Classes(names, palette)
