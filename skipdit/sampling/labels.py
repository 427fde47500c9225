"""Which class each sample of a set shows: a function of the seed and the sample's index, or of data."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.files import find_clips, find_images
from ..errors import UserError
from .loading import ModelSource, resolve_classes

__all__ = ["apportion", "count_labels", "draw_labels", "plan_labels", "spread"]

NEEDED = "a class, or a class and a count, is needed in each line."
COUNTED = re.compile(r"(.*[^\s,])[\s,]+(\d+)")


def plan_labels(
    word: str, classes: Sequence[str], source: ModelSource, total: int, seed: int
) -> tuple[int, ...] | None:
    """Class of each of `total` samples; None for an unconditional model.

    Args:
        word: "uniform": the classes in turn, so that each comes equally often, to within one; "random": drawn
            independently by a hash of (seed, index); or a path: as often as in data (see `count_labels`).
        classes: Of "uniform" and "random": names, indices, or "all".
        source: The model, for its classes and their names.
        total: Number of samples.
        seed: Of "random".

    Raises:
        UserError: An unknown class, or data that cannot be read or are of other classes.
    """
    chosen = resolve_classes(classes, source.class_names, source.num_classes)
    if word in ("uniform", "random"):
        if chosen is None:
            return None
        if word == "uniform":
            return tuple(chosen[index % len(chosen)] for index in range(total))
        return tuple(chosen[number] for number in draw_labels(len(chosen), total, seed))
    if chosen is None:
        raise UserError(f"labels={word}: this model is unconditional; leave labels out.")
    if list(classes) != ["all"]:
        raise UserError(f"labels={word} says how often each class comes: leave classes=[{', '.join(classes)}] out.")
    counts = count_labels(Path(word), source)
    numbers = apportion(list(counts.values()), total)
    return tuple(spread(dict(zip(counts, numbers, strict=True))))


def draw_labels(num_classes: int, total: int, seed: int) -> list[int]:
    """Independent uniform draws 0..num_classes - 1; draw i depends on (seed, i) alone."""
    words = (np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] for index in range(total))
    return [int(word) % num_classes for word in words]  # 2**64 is so large that no class is favoured


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to weights that add up to exactly `total`: the largest remainders are rounded up.

    Equal remainders: the earlier first.
    """
    whole = sum(weights)
    shares = [divmod(weight * total, whole) for weight in weights]
    numbers = [share for share, _ in shares]
    by_remainder = sorted(range(len(weights)), key=lambda place: -shares[place][1])
    for place in by_remainder[: total - sum(numbers)]:
        numbers[place] += 1
    return numbers


def spread(counts: Mapping[int, int]) -> list[int]:
    """Labels by their counts in an order of which every part has nearly the proportions of the whole."""
    places = [((number + 0.5) / count, label) for label, count in counts.items() for number in range(count)]
    return [label for _, label in sorted(places)]


def count_labels(path: Path, source: ModelSource) -> dict[int, int]:
    """How often each class occurs in data.

    Args:
        path: A folder with one folder a class, named like the classes or in their sorted order, of videos, frame
            folders or (for a model of pictures) pictures; or a text file with a line for each sample, its class or
            "Class/name.avi" as in UCF101's split lists, or with lines "class count".
        source: The model.

    Returns:
        Class index -> count, by class; at least one is positive.

    Raises:
        UserError: It is not there, holds nothing, or holds classes that the model has not.
    """
    if path.is_dir():
        counted = _count_folder(path, source.is_video)
        names = sorted(counted)
        in_order = not source.class_names and not all(name.isdecimal() for name in names)
        if in_order and len(names) == source.num_classes:
            return {index: counted[name] for index, name in enumerate(names)}
    elif path.is_file():
        counted = _count_lines(path)
    else:
        raise UserError(f"labels={path} is not there: choose uniform, random, a folder of classes or a text file.")
    counts: Counter[int] = Counter()
    for name, number in counted.items():
        try:
            counts[resolve_classes([name], source.class_names, source.num_classes)[0]] += number
        except UserError as error:
            raise UserError(f"labels={path}: {error}") from error
    return dict(sorted(counts.items()))


def _count_folder(root: Path, is_video: bool) -> Counter[str]:
    what = "videos or folders of frames" if is_video else "pictures"
    try:
        paths = (find_clips if is_video else find_images)(root)
    except UserError as error:
        raise UserError(f"labels={root} holds no {what}: pass a folder with one folder a class.") from error
    parts = [path.relative_to(root).parts for path in paths]
    if any(len(part) < 2 for part in parts):
        raise UserError(f"labels={root} holds {what} outside of folders: pass a folder with one folder a class.")
    return Counter(part[0] for part in parts)


def _count_lines(path: Path) -> Counter[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"labels={path} is no text: a class, or a class and a count, is needed in each line."
        ) from error
    counted: Counter[str] = Counter()
    for line in lines:
        if "/" in line:
            counted[line.split("/")[0]] += 1
        elif match := COUNTED.fullmatch(line):
            counted[match[1]] += int(match[2])
        else:
            counted[line] += 1
    if not counted.total():
        raise UserError(f"labels={path} counts nothing: {NEEDED}")
    return counted
