"""Places365 by its lists, iNaturalist 2021 by its category folders, and what is said where something is missing."""

from pathlib import Path

import pytest
from conftest import listing
from test_source_tars import packed

from preprocess.sources import Source, list_source

CATEGORIES = {"/a/airfield": 0, "/b/bar": 1, "/a/alley": 2}
TRAIN = {"/b/bar/00000001.jpg": 1, "/a/airfield/00000002.jpg": 0, "/a/alley/00000001.jpg": 2}
VAL = {"Places365_val_00000001.jpg": 2, "Places365_val_00000002.jpg": 0}
BIRD, PLANT = "00000_Animalia_Chordata_Aves_Passeriformes_Turdidae_Sialia_sialis", "00001_Plantae_x_x_x_x_x_x"


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def lines(pairs: dict[str, int]) -> bytes:
    return "".join(f"{path} {label}\n" for path, label in pairs.items()).encode()


def complaint(dataset: str, root: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as raised:
        list_source(dataset, root, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def contents(source: Source) -> dict[str, tuple[int, bytes]]:
    return {item.key: (item.label, bytes(source.read(item))) for item in source.items}


@pytest.fixture
def places(tmp_path: Path) -> Path:
    write(
        tmp_path,
        {
            "categories_places365.txt": lines(CATEGORIES),
            "places365_train_standard.txt": lines(TRAIN),
            "places365_val.txt": lines(VAL),
        },
    )
    return tmp_path


@pytest.mark.parametrize("size", ["256", "large"])
@pytest.mark.parametrize("standard", ["", "_standard"])
def test_places_are_read_by_the_official_lists(places: Path, size: str, standard: str) -> None:
    write(places, {f"data_{size}{standard}{path}": path.encode() for path in TRAIN})
    write(places, {f"val_{size}/{path}": path.encode() for path in VAL})
    for split, listed in (("train", TRAIN), ("val", VAL)):
        source = list_source("places365", places, split)
        assert source.classes == ("a/airfield", "b/bar", "a/alley")
        assert contents(source) == {path.lstrip("/"): (label, path.encode()) for path, label in listed.items()}
        assert [item.key for item in source.items] == [path.lstrip("/") for path in listed]


def test_a_listed_image_that_is_not_there_fails_when_read(places: Path) -> None:
    write(places, {"val_256/Places365_val_00000002.jpg": b"x"})
    source = list_source("places365", places, "val")
    assert [item.size for item in source.items] == [0, 1]
    with pytest.raises(FileNotFoundError):
        source.read(source.items[0])


def test_what_is_wrong_with_places_is_said(places: Path) -> None:
    assert "none of data_256_standard, data_256, data_large_standard" in complaint("places365", places)
    (places / "data_256").mkdir()
    for line in (b"/../../etc/passwd.jpg 1\n", b"/a/x.jpg 3\n", b"/a/x.jpg\n", b"/a/x.jpg -1\n", b""):
        write(places, {"places365_train_standard.txt": line})
        assert "places365_train_standard.txt" in complaint("places365", places)
    write(places, {"categories_places365.txt": lines({"/a/a": 0, "/b/b": 2})})
    assert "without gaps" in complaint("places365", places)
    (places / "categories_places365.txt").unlink()
    assert "categories_places365.txt: cannot be read: No such file" in complaint("places365", places)


@pytest.mark.parametrize("place", ["", "train", "train_mini", "2021_train"])
def test_a_category_is_a_class(tmp_path: Path, place: str) -> None:
    files = {f"{PLANT}/b.jpg": b"b", f"{BIRD}/c.jpg": b"c", f"{BIRD}/a.jpg": b"a"}
    write(tmp_path / place, files)
    source = list_source("inaturalist2021", tmp_path, "train")
    assert source.classes == (BIRD, PLANT)
    assert [item.key for item in source.items] == sorted(files)
    assert contents(source) == {name: (int(name[:5]), data) for name, data in files.items()}


def test_an_uncompressed_archive_is_the_same_source(tmp_path: Path) -> None:
    files = {f"{PLANT}/b.jpg": b"b", f"{BIRD}/c.jpg": b"c", f"{BIRD}/a.jpg": b"a"}
    write(tmp_path / "folder/val", files)
    write(tmp_path / "tar", {"val.tar": packed({f"val/{name}": data for name, data in files.items()})})
    folder, tar = (list_source("inaturalist2021", tmp_path / name, "val") for name in ("folder", "tar"))
    assert folder.classes == tar.classes
    assert listing(folder) == listing(tar)
    assert contents(folder) == contents(tar)


def test_what_is_wrong_with_inaturalist_is_said(tmp_path: Path) -> None:
    assert "train, train.tar, 2021_train, 2021_train.tar, train_mini" in complaint("inaturalist2021", tmp_path)
    write(tmp_path, {"train.tar.gz": b"x"})
    assert f"zcat {tmp_path}/train.tar.gz > {tmp_path}/train.tar" in complaint("inaturalist2021", tmp_path)
    write(tmp_path, {"train.tar": packed({"train/x.jpg": b"x"})})
    assert "no images in category folders" in complaint("inaturalist2021", tmp_path)
    write(tmp_path, {f"train/{PLANT}/1.jpg": b"x"})
    assert "category 00000 is missing" in complaint("inaturalist2021", tmp_path)
