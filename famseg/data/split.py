"""Dividing samples into training and validation so that no subject is on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from famseg.data.sample import Sample
from famseg.files.errors import DataError


def subjects_of(samples: Sequence[Sample] | Sequence[str]) -> list[str]:
    """The subject of every sample; a sequence of names is taken as it is.

    Data sets that know their subjects offer them as `subjects`; otherwise every sample is read.
    """
    known = getattr(samples, "subjects", None)
    if known is not None:
        return list(known)
    return [item if isinstance(item, str) else item.subject for item in samples]


def split_by_subject(
    samples: Sequence[Sample] | Sequence[str], fraction: float = 0.2, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices (training, validation), subject-disjoint, both in ascending order.

    Subjects, drawn in a random order fixed by `seed`, go to validation until it holds `fraction` of the
    images; it may exceed that by the last subject's images. The order does not depend on the order of the
    samples.

    Raises:
        DataError: `fraction` is not between 0 and 1, or there are fewer than two subjects.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation fraction: expected a number between 0 and 1, found {fraction}")
    subjects = subjects_of(samples)
    order = _shuffled(subjects, seed)
    if len(order) < 2:
        raise DataError(_too_few(len(order), len(subjects), 2))
    held_out: set[str] = set()
    count = 0
    for subject in order[:-1]:  # the last subject always trains
        if count >= fraction * len(subjects):
            break
        held_out.add(subject)
        count += subjects.count(subject)
    return _divide(subjects, held_out)


def k_folds(
    samples: Sequence[Sample] | Sequence[str], folds: int, fold: int, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices (training, validation) of one of `folds` cross-validation folds, `fold` counting from 0.

    Every sample is validated in exactly one fold; a subject's images stay together, and the folds are kept
    equally large in images. The same `seed` must be used for all folds.

    Raises:
        DataError: `folds` is below 2, `fold` is outside 0..folds-1, or there are fewer subjects than folds.
    """
    if folds < 2:
        raise DataError(f"folds: expected 2 or more, found {folds}")
    if not 0 <= fold < folds:
        raise DataError(f"fold: expected 0 to {folds - 1}, found {fold}")
    subjects = subjects_of(samples)
    order = _shuffled(subjects, seed)
    if len(order) < folds:
        raise DataError(_too_few(len(order), len(subjects), folds))
    members: list[set[str]] = [set() for _ in range(folds)]
    sizes = [0] * folds
    # The largest subjects first (the sort is stable, so equals stay shuffled), each to the smallest fold:
    # every fold gets a subject, because an empty fold is always the smallest.
    for subject in sorted(order, key=subjects.count, reverse=True):
        smallest = sizes.index(min(sizes))
        members[smallest].add(subject)
        sizes[smallest] += subjects.count(subject)
    return _divide(subjects, members[fold])


def first_images(
    samples: Sequence[Sample] | Sequence[str], indices: Sequence[int], count: int, seed: int = 0
) -> list[int]:
    """`count` of `indices`, in ascending order: all images of one subject after another, in an order fixed by `seed`.

    The last subject gives as many as are wanted. What a smaller count takes is among what a larger one takes.

    Raises:
        DataError: there are fewer.
    """
    if not 1 <= count <= len(indices):
        raise DataError(f"train_images: expected 1 to {len(indices)}, the images there are to train on, got {count}")
    subjects = subjects_of(samples)
    place = {subject: i for i, subject in enumerate(_shuffled([subjects[i] for i in indices], seed))}
    return sorted(sorted(indices, key=lambda i: (place[subjects[i]], i))[:count])


def _shuffled(subjects: Sequence[str], seed: int) -> list[str]:
    unique = sorted(set(subjects))
    return [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]


def _divide(subjects: Sequence[str], held_out: set[str]) -> tuple[list[int], list[int]]:
    train = [i for i, subject in enumerate(subjects) if subject not in held_out]
    return train, [i for i, subject in enumerate(subjects) if subject in held_out]


def _too_few(found: int, images: int, expected: int) -> str:
    return (
        f"cannot divide {images} images of {found} subject(s): expected at least {expected} subjects, "
        "because images of one subject must stay together; add subjects or ask for fewer parts"
    )
