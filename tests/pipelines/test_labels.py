"""Which classes a validation store may have, and what is said of others."""

import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kamim import KamimError
from pipelines.labels import check_labels

CAFE = unicodedata.normalize("NFC", "café")


def store(name: str, *classes: str) -> SimpleNamespace:
    images = SimpleNamespace(labels=np.zeros(3, np.int64))
    return SimpleNamespace(path=Path(name), images=images, manifest=SimpleNamespace(classes=classes))


@pytest.mark.parametrize(
    ("train", "val", "reason"),
    [
        (("ant", "bee"), ("ant", "bee", "cat"), "'cat' is in val only"),
        (("ant", "bee", "cat"), ("ant", "bee"), "'cat' is in train only"),
        (("ant", "bee", "cat"), ("ant", "cat", "bee"), "in another order, class 1 is 'bee' in train and 'cat' in val"),
        (
            ("ant", CAFE),
            ("ant", unicodedata.normalize("NFD", CAFE)),
            r"'cafe\u0301' in val and 'caf\xe9' in train are one name in two Unicode forms",
        ),
        (("0", "1"), ("0", "1", "2"), "'2' is in val only"),
        (("0", "1", "2"), ("0", "2"), "'1' is in train only"),
        (("0", "1", "10", "2"), ("0", "1"), "'10' is in train only"),  # class 2 is "10": names
    ],
)
def test_what_differs_is_named(train: tuple[str, ...], val: tuple[str, ...], reason: str) -> None:
    with pytest.raises(KamimError) as raised:
        check_labels(store("t", *train), store("v", *val))
    assert reason in str(raised.value)


def test_of_classes_that_are_numbers_val_may_lack_the_last() -> None:
    check_labels(store("t", "0", "1", "2"), store("v", "0", "1"))
    check_labels(store("t", "0", "1", "2"), store("v", "0"))
