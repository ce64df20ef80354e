"""A split of a data set as its source gives it, and what becomes of it: numbered classes, several roots as one, subsets."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loading.images import Images, Joined, Selected, open_sample, read_sample
from run.errors import InputError


@dataclass(frozen=True)
class Part:
    """The images of a split.

    `labels`: the class of each, a place in `classes` where those are names that the source orders by itself (`is_numbered` is false), else
    a number that the source gives; `classes` are then the names it has for them, or None. `key(i)` orders images of one class as the
    files of a class folder are ordered. `what` says where the images come from."""

    samples: Sequence
    labels: np.ndarray
    classes: list[str] | None
    is_numbered: bool
    key: Callable[[int], tuple[str, str]]
    what: str

    def num_classes(self) -> int:
        """The classes that there are names for, or numbers."""
        return max(len(self.classes or ()), int(self.labels.max(initial=-1)) + 1)

    def relabelled(self, numbers: Sequence[int], classes: list[str]) -> "Part":
        """The part with class c numbered `numbers[c]`, in the order of the new numbers."""
        labels = np.asarray(numbers, np.int32)[self.labels]
        order = np.argsort(labels, kind="stable")
        if np.array_equal(order, np.arange(len(order))):
            return replace(self, labels=labels, classes=classes)
        return replace(self, samples=Selected(self.samples, order), labels=labels[order], classes=classes, key=lambda i: self.key(int(order[i])))


def join(parts: list[Part]) -> Part:
    """The images of several roots as if they lay in one. InputError where some have named classes and others numbered ones."""
    if len(parts) == 1:
        return parts[0]
    if len({part.is_numbered for part in parts}) > 1:
        named, numbered = (next(part.what for part in parts if part.is_numbered is kind) for kind in (False, True))
        raise InputError(f"--data-path: the classes of {named} have names, those of {numbered} numbers: name both with --class-map, or train from one")
    if parts[0].is_numbered:
        classes = max((part.classes for part in parts if part.classes), key=len, default=None)
    else:
        classes = sorted({name for part in parts for name in part.classes})
        number = {name: i for i, name in enumerate(classes)}
        parts = [part.relabelled([number[name] for name in part.classes], classes) for part in parts]
    labels = np.concatenate([part.labels for part in parts])
    keys = [part.key(i) for part in parts for i in range(len(part.labels))]
    order = np.array(sorted(range(len(keys)), key=lambda i: (labels[i], keys[i])), np.int64)
    samples = Selected(Joined([part.samples for part in parts]), order)
    what = " and ".join(part.what for part in parts)
    return Part(samples, labels[order], classes, parts[0].is_numbered, lambda i: keys[order[i]], what)


def _differences(one: str, other: str, ours: list[str], theirs: list[str]) -> str:
    only_ours, only_theirs = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    return f"Only in {one}: {', '.join(only_ours[:3]) or 'none'}; only in {other}: {', '.join(only_theirs[:3]) or 'none'}"


def _mapped(part: Part, names: list[str], file: str) -> Part:
    """The part with its classes numbered, or named, by a class map. InputError where the two disagree."""
    if part.is_numbered:
        if part.num_classes() > len(names):
            raise InputError(f"--class-map {file} names {len(names)} classes, but {part.what} has images of class {part.labels.max()}: give it all of them")
        return replace(part, classes=names, is_numbered=False)
    if set(part.classes) != set(names):
        raise InputError(
            f"--class-map {file} has {len(names)} classes, {part.what} has {len(part.classes)}, and they must be the same. "
            + _differences("the map", "the images", names, part.classes)
        )
    number = {name: i for i, name in enumerate(names)}
    return part.relabelled([number[name] for name in part.classes], names)


def settle(train: Part | None, val: Part | None, class_map: str | None, *, splits: tuple[str, str]) -> tuple[list[Part | None], list[Images | None]]:
    """Training and validation parts, in the order of their classes' final numbers, and their images with the same classes. InputError where
    their classes differ, or from those of the class map."""
    names = read_class_map(class_map, flag="--class-map") if class_map else None
    parts = [part if names is None or part is None else _mapped(part, names, class_map) for part in (train, val)]
    there = [part for part in parts if part is not None]
    named = next((part.classes for part in there if not part.is_numbered), None)
    if named is None:
        known = max((part.classes for part in there if part.classes), key=len, default=[])
        named = known or [str(i) for i in range(max((part.num_classes() for part in there), default=0))]
    for part in there:
        if part.is_numbered and part.num_classes() > len(named):
            raise InputError(f"{part.what} has images of class {part.labels.max()}, but only {len(named)} classes have names: name all with --class-map")
        if not part.is_numbered and part.classes != named:
            raise InputError(
                f"{there[0].what} has {len(named)} classes, {part.what} has {len(part.classes)}, and their folders must have the same names, for classes are "
                f"numbered by name. " + _differences(f"{splits[0]}/", f"{splits[1]}/", named, part.classes)
            )
    return parts, [None if part is None else Images(part.samples, part.labels, named, open_sample, read_sample) for part in parts]


# ---- subsets


def only_classes(images: Images, file: str) -> Images:
    """The images of the classes that a file names, a line each, numbered in the order that they had. InputError naming what is unknown."""
    wanted = read_class_map(file, flag="--classes")
    unknown = sorted(set(wanted) - set(images.classes))
    if unknown:
        raise InputError(f"--classes {file}: {len(unknown)} of {len(wanted)} are no classes of the data, such as {', '.join(unknown[:3])}")
    kept = [i for i, name in enumerate(images.classes) if name in set(wanted)]
    number = np.full(len(images.classes), -1, np.int32)
    number[kept] = np.arange(len(kept))
    part = images.part(np.flatnonzero(number[images.targets] >= 0))
    part.targets, part.classes = number[part.targets], [images.classes[i] for i in kept]
    return part


def fraction_of(targets: np.ndarray, fraction: float, rng: np.random.RandomState) -> np.ndarray:
    """Sorted indices of that fraction of each class, of one image at least; a smaller fraction's are among a larger one's."""
    chosen = [np.empty(0, np.int64)]
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        chosen.append(rng.permutation(members)[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


# ---- lists of classes


_SYNSET = re.compile(r"(n\d{8})(?:\s.*)?")


def read_class_map(file: str, *, flag: str) -> list[str]:
    """The names of the classes by number: of a text file a line each, in order, or with the number behind; of a JSON file a list, or the
    numbers of names or the names of numbers. A line that begins with a WordNet id is the class of that id. InputError where it is neither."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        pairs = _json_pairs(json.loads(text)) if path.suffix.lower() == ".json" else _text_pairs(text)
    except OSError as error:
        raise InputError(f"{flag} {file} cannot be read ({error.strerror}): name a file with a class per line") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{flag} {file} is no list of classes ({error}): write a class per line, or JSON of names and numbers") from error
    names = dict(pairs)
    if not names or sorted(names.values()) != list(range(len(pairs))):
        raise InputError(f"{flag} {file}: {len(pairs)} entries do not number {len(names)} classes from 0 on, each once: give each name one number")
    return sorted(names, key=names.get)


def _json_pairs(found) -> list[tuple[str, int]]:
    if isinstance(found, list):
        return [(str(name), i) for i, name in enumerate(found)]
    if all(str(key).isdecimal() for key in found) and not all(isinstance(value, int) for value in found.values()):
        return [(value if isinstance(value, str) else value[0], int(key)) for key, value in found.items()]  # torchvision's: {"0": ["n01440764", "tench"]}
    return [(name, int(number)) for name, number in found.items()]


def _text_pairs(text: str) -> list[tuple[str, int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    numbered = [re.fullmatch(r"(.*?)(?:\s*[,\t]\s*|\s+)(\d+)", line) for line in lines]
    if all(numbered) and sorted(int(match[2]) for match in numbered) == list(range(len(lines))):
        return [(match[1], int(match[2])) for match in numbered]
    synsets = [_SYNSET.fullmatch(line) for line in lines]
    return [(match[1] if match else line, i) for i, (line, match) in enumerate(zip(lines, synsets, strict=True))]
