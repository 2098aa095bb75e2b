"""Listing data sets: what is an image, whose label it has, and what to say where there is none."""

import io
import os
import pickle
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from sys import getsizeof

import numpy as np
import pytest
from conftest import listing
from PIL import Image

from preprocess.sources import Source, base, list_source, printable, sample
from preprocess.sources.base import MAX_FILE_BYTES


def image(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file)
    return file


def keys(source: Source) -> list[str]:
    return [item.key for item in source.items]


def complaint(dataset: str, source: Path | None, split: str = "train") -> str:
    with pytest.raises(ValueError) as raised:
        list_source(dataset, source, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_classes_are_the_folders_sorted(tmp_path: Path) -> None:
    for name in ("zebra/2.jpg", "ant/b.png", "zebra/10.jpg", "ant/a.png", "Bee/x.jpg"):
        image(tmp_path / name)
    listed = list_source("imagefolder", tmp_path, "train")
    assert listed.classes == ("Bee", "ant", "zebra")
    assert keys(listed) == ["Bee/x.jpg", "ant/a.png", "ant/b.png", "zebra/10.jpg", "zebra/2.jpg"]
    assert [item.label for item in listed.items] == [0, 1, 1, 2, 2]
    assert [item.size for item in listed.items] == [(tmp_path / key).stat().st_size for key in keys(listed)]
    assert all(listed.read(item) == (tmp_path / item.key).read_bytes() for item in listed.items)


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ("..", []),  # the root, and so every class
        ("../..", []),
        (".", []),  # the class itself, of which nothing is listed twice
        ("../b", []),
        ("../b/deep", []),
        ("../../else", ["a/link/1.jpg", "a/link/deep/2.jpg"]),
        ("../../linked", ["a/link/own.jpg"]),  # holds the folder that c is a link to
    ],
)
def test_a_link_in_a_class_brings_no_image_of_another_class(target: str, taken: list[str], tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a/1.jpg", "b/1.jpg", "b/deep/2.jpg", "../else/1.jpg", "../else/deep/2.jpg", "../linked/own.jpg"):
        image(root / name)
    image(tmp_path / "linked/c/1.jpg")
    (root / "c").symlink_to(tmp_path / "linked/c")
    (root / "a/link").symlink_to(target)
    listed = list_source("imagefolder", root, "train")
    expected = {"a/1.jpg": 0, **dict.fromkeys(taken, 0), "b/1.jpg": 1, "b/deep/2.jpg": 1, "c/1.jpg": 2}
    assert {item.key: item.label for item in listed.items} == expected
    assert len(listed.items) == len(expected)
    assert listed.skipped.get("links to folders of other classes", 0) == (target not in (".", "../../else"))


def test_folders_within_a_class_belong_to_it(tmp_path: Path) -> None:
    for name in ("a/3.jpg", "a/deep/er/1.jpg", "a/deep/2.jpg", "b/1.jpg"):
        image(tmp_path / name)
    listed = list_source("imagefolder", tmp_path, "train")
    assert listed.classes == ("a", "b")
    assert keys(listed) == ["a/3.jpg", "a/deep/2.jpg", "a/deep/er/1.jpg", "b/1.jpg"]
    assert [item.label for item in listed.items] == [0, 0, 0, 1]
    assert listed.summary() == [
        f"{tmp_path}: 4 images, 2 classes (a, b)",
        "2 images lie in folders within a class folder, such as a/deep; their class is the outer folder, such as a",
    ]
    assert not list_source("imagefolder", tmp_path / "a/deep", "train").remark
    (tmp_path / "b/1.jpg").unlink()
    alone = list_source("imagefolder", tmp_path, "train").remark
    assert alone.endswith(f"such as a; if its folders are the classes, take {tmp_path}/a as the source")


@pytest.mark.parametrize(
    ("splits", "split", "chosen"),
    [
        (("train",), "train", "train"),
        (("test", "train", "val"), "train", "train"),
        (("test", "train", "val"), "val", "val"),
        (("test", "training"), "val", "test"),
        (("test", "training"), "train", "training"),
        (("valid", "testing"), "val", "valid"),
    ],
)
def test_of_folders_of_splits_one_is_listed(splits: tuple[str, ...], split: str, chosen: str, tmp_path: Path) -> None:
    for name in splits:
        for item in ("ant/a.jpg", "bee/b.jpg"):
            image(tmp_path / name / item)
    (tmp_path / "annotations").mkdir()  # no images in it
    listed = list_source("imagefolder", tmp_path, split)
    assert (listed.location, listed.classes) == (str(tmp_path / chosen), ("ant", "bee"))
    assert listed.items == list_source("imagefolder", tmp_path / chosen, split).items
    image(tmp_path / "ant/a.jpg")
    assert f"source={tmp_path / chosen}; " in complaint("imagefolder", tmp_path, split)


@pytest.mark.parametrize(
    ("folders", "train", "val"),
    [
        (("Training", "Test"), "Training", "Test"),
        (("Training", "Test", "test-multiple_fruits"), "Training", "Test"),
        (("TRAIN", "Val", "test"), "TRAIN", "Val"),
        (("trainval", "test"), "trainval", "test"),
        (("train2017", "val2017"), "train2017", "val2017"),
        (("seg_train", "seg_test"), "seg_train", "seg_test"),
        (("train", "No_Rotation_Validation", "test"), "train", "No_Rotation_Validation"),
        (("train", "eval"), "train", "eval"),
        (("train", "__MACOSX", ".git", "dev"), "train", "dev"),
    ],
)
@pytest.mark.parametrize("classes", [("ant", "bee"), ()], ids=["of classes", "flat"])
def test_splits_are_told_by_their_names(
    folders: tuple[str, ...], train: str, val: str, classes: tuple[str, ...], tmp_path: Path
) -> None:
    for name in folders:
        for file in [f"{each}/{name}.jpg" for each in classes] or ["1.jpg"]:
            image(tmp_path / name / file)
    for split, chosen in (("train", train), ("val", val)):
        listed = list_source("imagefolder", tmp_path, split)
        assert (listed.location, listed.classes) == (str(tmp_path / chosen), classes)


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test", "unlabeled"),
        ("train", "val", "docs"),
        ("Training", "Test", "papers"),
        ("train", "docs"),
        ("seg_train", "seg_test", "seg_pred"),
        ("train", "extra", "more"),
    ],
)
def test_folders_of_which_some_are_splits_are_never_classes(folders: tuple[str, ...], tmp_path: Path) -> None:
    for name in folders:
        image(tmp_path / name / "ant/1.jpg")
    assert f"source={tmp_path / folders[0]}; " in (reason := complaint("imagefolder", tmp_path))
    assert folders[-1] in reason
    complaint("imagefolder", tmp_path, "val")


def test_folders_of_which_several_are_one_split_are_named(tmp_path: Path) -> None:
    for name in ("train_a", "train_b", "test"):
        image(tmp_path / name / "ant/1.jpg")
    assert "the folders train_a, train_b are all for split = train" in complaint("imagefolder", tmp_path)


@pytest.mark.parametrize(
    "classes",
    [("airplane", "train", "truck"), ("bullet_train", "freight_train"), ("car", "train_station", "train_interior")],
)
def test_classes_may_be_named_as_a_split(classes: tuple[str, ...], tmp_path: Path) -> None:
    for name in classes:
        image(tmp_path / name / "1.jpg")
    assert list_source("imagefolder", tmp_path, "train").classes == tuple(sorted(classes))


def test_hidden_files_and_those_of_a_system_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("ant/1.jpg", "bee/1.jpg"):
        image(tmp_path / name)
    expected = list_source("imagefolder", tmp_path, "train").items
    hidden = (
        ".ipynb_checkpoints/1-checkpoint.jpg",
        "ant/.ipynb_checkpoints/1-checkpoint.jpg",
        "__MACOSX/ant/._1.jpg",
        "ant/._1.jpg",
        "@eaDir/1.jpg",
        "bee/@eaDir/1.jpg@SynoEAStream.jpg",
        "bee/.thumbnails/deep/1.png",
        "._cover.jpg",
    )
    for name in hidden:
        image(tmp_path / name)
    listed = list_source("imagefolder", tmp_path, "train")
    assert listed.items == expected
    assert listed.summary()[1] == "skipped 8 other files: 8 hidden or of the system"
    assert list_source("imagefolder", tmp_path / ".ipynb_checkpoints", "train").classes == ()  # asked for by name


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("test", "val"):
        image(tmp_path / name / "ant/a.jpg")
    assert complaint("imagefolder", tmp_path) == (
        f"source = {tmp_path}: its folders (test, val) are splits, none of them for split = train; "
        "give another split=..., or one of the folders as source=..."
    )


def test_what_is_listed_is_told_with_the_files_that_are_skipped(tmp_path: Path) -> None:
    for name in "abcdefg":
        image(tmp_path / name / "1.jpg")
    for name in ("a/2.avif", "b/3.AVIF", "b/4.npy", "c/deep/5.mp4", "LICENSE", "a/notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    image(tmp_path / "cover.png")
    assert list_source("imagefolder", tmp_path, "train").summary() == [
        f"{tmp_path}: 7 images, 7 classes (a, b, c, d, e, ...)",
        "skipped 7 other files: 2 .avif, 2 without suffix, 1 .mp4, 1 .npy, 1 beside the class folders",
    ]
    assert list_source("imagefolder", tmp_path / "d", "train").summary() == [f"{tmp_path / 'd'}: 1 image, no classes"]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png"):
        image(tmp_path / name)
    (tmp_path / "notes").mkdir()
    listed = list_source("imagefolder", tmp_path, "val")
    assert listed.classes == ()
    assert [(item.key, item.label) for item in listed.items] == [("a.png", -1), ("b.jpg", -1)]


def test_images_beside_class_folders_are_left_out(tmp_path: Path) -> None:
    image(tmp_path / "a/1.jpg")
    image(tmp_path / "cover.jpg")
    assert keys(list_source("imagefolder", tmp_path, "train")) == ["a/1.jpg"]


def test_only_image_suffixes_count_in_either_case(tmp_path: Path) -> None:
    for name in ("a/1.JPEG", "a/2.Png", "a/3.jpg"):
        image(tmp_path / name)
    for name in ("a/readme.txt", "a/jpg", "a/4.jpg.part", "a/Thumbs.db"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "a/folder.jpg").mkdir()
    assert keys(list_source("imagefolder", tmp_path, "train")) == ["a/1.JPEG", "a/2.Png", "a/3.jpg"]


def test_names_may_hold_spaces_and_any_bytes(tmp_path: Path) -> None:
    names = ["a class/an image.jpg", os.fsdecode(b"a class/caf\xe9 \n.jpg"), os.fsdecode(b"\xff/1.jpg")]
    for name in names:
        image(tmp_path / name)
    listed = list_source("imagefolder", tmp_path, "train")
    assert keys(listed) == names
    assert listed.classes == ("a class", "\\xff")
    assert all(listed.read(item) for item in listed.items)


def test_a_source_folder_may_have_any_name(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"\xfe")
    image(root / "a/1.jpg")
    listed = list_source("imagefolder", root, "train")
    assert listed.location.endswith("\\xfe")
    assert listed.read(listed.items[0])


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    root = tmp_path / "root"
    image(root / "a/1.jpg")
    (root / "a/again").symlink_to(root / "a", target_is_directory=True)
    (root / "a/self.jpg").symlink_to("self.jpg")
    image(tmp_path / "elsewhere/deep/2.jpg")
    (root / "a/linked").symlink_to(tmp_path / "elsewhere/deep", target_is_directory=True)
    (tmp_path / "elsewhere/deep/back").symlink_to(root / "a", target_is_directory=True)
    assert keys(list_source("imagefolder", root, "train")) == ["a/1.jpg", "a/self.jpg", "a/linked/2.jpg"]


def test_a_dangling_link_is_listed_and_fails_when_read(tmp_path: Path) -> None:
    image(tmp_path / "a/1.jpg")
    (tmp_path / "a/2.jpg").symlink_to("gone.jpg")
    listed = list_source("imagefolder", tmp_path, "train")
    assert [(item.key, item.size > 0) for item in listed.items] == [("a/1.jpg", True), ("a/2.jpg", False)]
    with pytest.raises(FileNotFoundError):
        listed.read(listed.items[1])


def test_a_file_that_changes_after_listing_or_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = image(tmp_path / "a/1.jpg")
    os.utime(file, (0, 0))
    listed = list_source("imagefolder", tmp_path, "train")
    whole = file.read_bytes()

    class Slow(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            file.write_bytes(whole[:-9] + bytes(9))  # in place, of the same size
            return super().read(size)

    with monkeypatch.context() as patch:
        patch.setattr(base, "open", lambda number, mode: Slow(io.FileIO(number)), raising=False)
        with pytest.raises(OSError, match="changed while it was read"):
            listed.read(listed.items[0])
    file.write_bytes(whole + b"more")
    with pytest.raises(OSError, match="changed since it was listed"):
        listed.read(listed.items[0])


def test_a_missing_empty_or_imageless_source_is_named(tmp_path: Path) -> None:
    for dataset in ("imagefolder", "imagenet"):
        assert "needs source=DIR" in complaint(dataset, None)
        assert f"{tmp_path / 'none'}: no such folder" in complaint(dataset, tmp_path / "none")
        assert str(tmp_path) in complaint(dataset, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/readme.txt").write_text("no image")
    assert f"{tmp_path}: holds no images" in complaint("imagefolder", tmp_path)
    file = image(tmp_path / "1.jpg")
    assert f"{file}: no such folder" in complaint("imagefolder", file)


def test_unknown_data_sets_and_splits_are_named(tmp_path: Path) -> None:
    assert "'cifar'" in complaint("cifar", tmp_path)
    assert "split = test" in complaint("sample", None, "test")
    assert str(tmp_path) in complaint("sample", tmp_path)


def test_the_fingerprint_sees_names_labels_and_sizes(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return listing(list_source("imagefolder", tmp_path, "train"))

    image(tmp_path / "b/1.jpg")
    seen = [fingerprint(), fingerprint()]
    image(tmp_path / "b/2.jpg")
    seen.append(fingerprint())
    image(tmp_path / "a/1.jpg")
    seen.append(fingerprint())
    (tmp_path / "a/1.jpg").write_bytes(b"longer" * 1000)
    seen.append(fingerprint())
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4


def test_a_folder_without_images_is_no_class(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "c/1.jpg"):
        image(tmp_path / name)
    (tmp_path / "b/empty").mkdir(parents=True)
    listed = list_source("imagefolder", tmp_path, "train")
    assert listed.classes == ("a", "c")
    assert [item.label for item in listed.items] == [0, 1]


def test_pipes_and_devices_are_left_out_and_never_waited_for(tmp_path: Path) -> None:
    image(tmp_path / "a/1.jpg")
    os.mkfifo(tmp_path / "a/2.jpg")
    (tmp_path / "a/3.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    listed = list_source("imagefolder", tmp_path, "train")
    assert keys(listed) == ["a/1.jpg"]
    (tmp_path / "a/1.jpg").unlink()
    os.mkfifo(tmp_path / "a/1.jpg")
    with pytest.raises(OSError, match="not a plain file"):
        listed.read(listed.items[0])


def test_files_that_vanish_or_grow_out_of_bounds_are_not_read(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg"):
        image(tmp_path / name)
    listed = list_source("imagefolder", tmp_path, "train")
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        listed.read(listed.items[0])
    os.truncate(tmp_path / "a/2.jpg", MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match="more than the limit"):
        listed.read(listed.items[1])


def test_what_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a/1.jpg")

    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "a":  # pathlib lists the folder above it by os.scandir too, since Python 3.13
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert f"{tmp_path / 'a'}: cannot be read: Permission denied" in complaint("imagefolder", tmp_path)


def test_names_are_shown_in_one_line() -> None:
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[2J.jpg")) == r"caf\xe9\n\x1b[2J.jpg"
    assert printable("é 图.jpg") == "é 图.jpg"


def test_a_list_is_small_in_memory_and_what_reads_it_smaller_still(tmp_path: Path) -> None:
    for n in range(64):
        (tmp_path / f"{n:060d}.jpg").write_bytes(b"x")
    listed = list_source("imagefolder", tmp_path, "train")
    item = listed.items[-1]
    assert sum(map(getsizeof, (item, item.key, item.size, item.time))) < 300
    assert len(pickle.dumps(listed.read)) < 1000
    assert len(pickle.dumps(listed.items)) < 64 * 120


@lru_cache(maxsize=1)
def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose every pixel says where it is, 12 bits for y and 12 for x."""
    y, x = np.indices((height, width))
    return np.stack([y >> 4, (y & 15) << 4 | x >> 8, x & 255], axis=2).astype(np.uint8)


def positions(patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c = (patch[..., channel].astype(int) for channel in range(3))
    return a << 4 | b >> 4, (b & 15) << 8 | c


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """Patches of coordinate images of the photographs' shapes, as they are handed to the encoder."""
    shapes = {
        name: sample.photograph(name).shape[:2] for package, names in sample.PHOTOGRAPHS.items() for name in names
    }
    patches: list[np.ndarray] = []
    monkeypatch.setattr(sample, "photograph", lambda name: coordinates(*shapes[name]))
    monkeypatch.setattr(sample.simplejpeg, "encode_jpeg", lambda patch, quality: patches.append(patch) or b"")
    return patches


def test_training_and_validation_patches_share_no_pixel(cut: list[np.ndarray]) -> None:
    train, val = (list_source("sample", None, split) for split in ("train", "val"))
    for label in range(len(train.classes)):
        seen: list[list[np.ndarray]] = []
        for listed in (train, val):
            cut.clear()
            for item in [item for item in listed.items if item.label == label][::2]:
                listed.read(item)
            seen.append(list(cut))
        for patch in [*seen[0], *seen[1]]:
            y, x = positions(patch)
            low, high = sample.PATCH_SIDES
            assert patch.shape[0] == patch.shape[1]
            assert low <= len(patch) <= high
            np.testing.assert_array_equal(y - y[0, 0], np.indices(y.shape)[0])  # one piece, as it lies
            np.testing.assert_array_equal(x - x[0, 0], np.indices(x.shape)[1])
        assert any(  # along one axis training ends before validation starts
            max(positions(patch)[axis].max() for patch in seen[0]) < min(positions(p)[axis].min() for p in seen[1])
            for axis in (0, 1)
        ), train.classes[label]


def test_patches_of_a_photograph_differ(cut: list[np.ndarray]) -> None:
    listed = list_source("sample", None, "train")
    for item in listed.items[:20]:
        listed.read(item)
    assert len({patch.tobytes() for patch in cut}) == 20


def test_sample_is_the_same_every_time() -> None:
    first, second = (list_source("sample", None, "val") for _ in range(2))
    assert listing(first) == listing(second)
    items = first.items[::97]
    read = [first.read(item) for item in items]
    sample.photograph.cache_clear()
    assert [second.read(item) for item in items] == read


def test_sample_counts_and_labels() -> None:
    train, val = (list_source("sample", None, split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert len(set(train.classes)) == 17
    for listed, split in ((train, "train"), (val, "val")):
        labels = np.bincount([item.label for item in listed.items])
        assert labels.tolist() == [sample.PATCHES[split]] * 17
        assert len(set(keys(listed))) == len(listed.items)
        assert keys(listed)[0].startswith(f"{split}/{listed.classes[0]}.")
