"""Checks the labels of the stores of a classifier, without torch."""

from kamim import KamimError
from kamim.storage.store import Store


def check_labels(train: Store | None, val: Store | None) -> None:
    """Raises KamimError unless every image of both stores has a label, and both have the same two or more classes."""
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
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        raise KamimError(
            f"val = {val.path}: its {len(theirs)} classes are not the {len(ours)} of {train.path} ("
            + (f"for one, {odd[0]!r} is in one of them only)" if odd else "they are in another order)")
        )
