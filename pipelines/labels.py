"""Checks the labels of the stores of a classifier, without torch."""

import unicodedata

from kamim import KamimError
from kamim.storage.store import Store


def check_labels(train: Store | None, val: Store | None) -> None:
    """Raises KamimError unless every image of both stores has a label, and both have the same two or more classes.

    If classes are numbers, val may lack the last of those of train.
    """
    if train is None:
        raise KamimError("train: is missing; this mode needs a store to train on")
    if val is None:
        raise KamimError("val: is missing; this mode needs a store to evaluate on")
    for name, store in (("train", train), ("val", val)):
        unlabelled = int((store.images.labels < 0).sum())
        if unlabelled or not store.manifest.classes:
            which = "no labels" if unlabelled == len(store) else f"{unlabelled} images without a label"
            raise KamimError(f"{name} = {store.path}: has {which}; this mode needs the class of every image")
    ours, theirs = train.manifest.classes, val.manifest.classes
    if len(ours) < 2:
        raise KamimError(f"train = {train.path}: has one class; a classifier needs two or more")
    numbered = ours == tuple(map(str, range(len(ours))))
    if theirs != (ours[: len(theirs)] if numbered else ours):
        raise KamimError(
            f"val = {val.path}: its {len(theirs)} classes are not the {len(ours)} of {train.path}: "
            f"{_difference(ours, theirs)}"
        )


def _difference(train: tuple[str, ...], val: tuple[str, ...]) -> str:
    """Returns one difference between the classes of two stores."""
    forms = {unicodedata.normalize("NFC", name): name for name in train}
    for name in val:
        other = forms.get(unicodedata.normalize("NFC", name), name)
        if name not in train and other != name:
            return (
                f"{name!a} in val and {other!a} in train are one name in two Unicode forms (NFC, NFD); rename a folder"
            )
    for here, there, which in ((train, val, "train"), (val, train, "val")):
        if only := sorted({*here} - {*there}):
            return f"for one, {only[0]!r} is in {which} only"
    n = next(n for n, names in enumerate(zip(train, val, strict=True)) if len({*names}) == 2)
    return f"they are in another order, class {n} is {train[n]!r} in train and {val[n]!r} in val"
