"""ImageNet in each of its layouts: the same images, the same labels."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import listing
from PIL import Image
from scipy.io import savemat
from test_source_tars import packed

from preprocess.decode import decode
from preprocess.sources import Source, list_source

# ILSVRC2012_ID n is the n-th of these; sorted they are the classes. The fourth has children, so it is none.
WNIDS = ["n02", "n03", "n01", "n09"]
TRAIN = {f"{wnid}/{wnid}_{n}.JPEG": f"{wnid}{n}".encode() for wnid in WNIDS[:3] for n in (10, 2)}
VAL_IDS = [3, 1, 1, 2]
VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": f"val{n}".encode() for n in range(1, 5)}
VAL_LABELS = [0, 1, 1, 2]


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def train_tar(files: dict[str, bytes]) -> bytes:
    """A tar of a tar per class, in an order that is not sorted."""
    inner = {
        wnid: packed({name.partition("/")[2]: data for name, data in files.items() if name.startswith(wnid)})
        for wnid in WNIDS[:3]
    }
    return packed({f"{wnid}.tar": data for wnid, data in inner.items()})


def devkit(compressed: bool = True) -> dict[str, bytes]:
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    synsets = np.array([(n, wnid, "w", "g", 2 * (wnid == "n09")) for n, wnid in enumerate(WNIDS, 1)], kinds)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)}, do_compression=compressed)
    truth = "".join(f"{n}\n" for n in VAL_IDS).encode()
    return {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": truth}


def devkit_archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in devkit().items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def kaggle_truth() -> bytes:
    rows = (
        f"ILSVRC2012_val_{n:08d},{WNIDS[i - 1]} 1 2 3 4 {WNIDS[i - 1]} 5 6 7 8 \n" for n, i in enumerate(VAL_IDS, 1)
    )
    return ("ImageId,PredictionString\n" + "".join(rows)).encode()


def complaint(root: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as raised:
        list_source("imagenet", root, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def read(source: Source) -> dict[str, tuple[int, bytes]]:
    """Label and content of every image by its key, read as a worker process would."""
    reader, items = pickle.loads(pickle.dumps((source.read, source.items)))
    assert len(pickle.dumps(source.read)) < 1000
    return {item.key: (item.label, reader(item)) for item in items}


def test_train_is_class_folders_or_a_tar_of_tars(tmp_path: Path) -> None:
    write(tmp_path / "folders/train", TRAIN)
    write(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train", TRAIN)
    write(tmp_path / "tar", {"ILSVRC2012_img_train.tar": train_tar(TRAIN)})
    listed = [list_source("imagenet", tmp_path / name, "train") for name in ("folders", "kaggle", "tar")]
    for source in listed:
        assert source.classes == ("n01", "n02", "n03")
        assert read(source) == {name: (source.classes.index(name[:3]), data) for name, data in TRAIN.items()}
    assert [item.key for item in listed[0].items] == sorted(TRAIN)
    assert len({listing(source) for source in listed}) == 1


VAL_LAYOUTS = {
    "class folders": {f"val/{WNIDS[i - 1]}/{name}": data for i, (name, data) in zip(VAL_IDS, VAL.items(), strict=True)},
    "flat, devkit folder": {f"val/{name}": data for name, data in VAL.items()}
    | {f"ILSVRC2012_devkit_t12/{name}": data for name, data in devkit().items()},
    "flat, devkit archive": {f"val/{name}": data for name, data in VAL.items()}
    | {"ILSVRC2012_devkit_t12.tar.gz": devkit_archive()},
    "Kaggle's": {f"ILSVRC/Data/CLS-LOC/val/{name}": data for name, data in VAL.items()}
    | {"LOC_val_solution.csv": kaggle_truth()},
    "tar, devkit archive": {
        "ILSVRC2012_img_val.tar": packed(dict(reversed(VAL.items()))),
        "ILSVRC2012_devkit_t12.tar.gz": devkit_archive(),
    },
    "tar, Kaggle's truth": {"ILSVRC2012_img_val.tar": packed(VAL), "LOC_val_solution.csv": kaggle_truth()},
}


@pytest.mark.parametrize("layout", VAL_LAYOUTS)
def test_val_has_the_labels_of_train_in_every_layout(tmp_path: Path, layout: str) -> None:
    write(tmp_path, VAL_LAYOUTS[layout])
    source = list_source("imagenet", tmp_path, "val")
    assert source.classes == ("n01", "n02", "n03")
    found = {Path(name).name: labelled for name, labelled in read(source).items()}
    assert found == {name: (label, VAL[name]) for name, label in zip(VAL, VAL_LABELS, strict=True)}
    assert [item.key for item in source.items] == sorted(item.key for item in source.items)


def test_an_empty_class_folder_is_a_class(tmp_path: Path) -> None:
    write(tmp_path / "val", {"n01/1.JPEG": b"x", "n03/1.JPEG": b"y", "notes/1.JPEG": b"z"})
    (tmp_path / "val/n02").mkdir()
    source = list_source("imagenet", tmp_path, "val")
    assert source.classes == ("n01", "n02", "n03")
    assert [item.label for item in source.items] == [0, 2]


def test_what_was_looked_for_is_said(tmp_path: Path) -> None:
    assert "none of train, ILSVRC/Data/CLS-LOC/train, ILSVRC2012_img_train.tar" in complaint(tmp_path)
    write(tmp_path, {"train/1.JPEG": b"x", "val/ILSVRC2012_val_00000009.JPEG": b"x"})
    assert f"{tmp_path / 'train'}: has no class folders <wnid>" in complaint(tmp_path)
    assert "none of LOC_val_solution.csv, ILSVRC2012_devkit_t12 and" in complaint(tmp_path, "val")
    write(tmp_path, {"LOC_val_solution.csv": kaggle_truth()})
    assert "LOC_val_solution.csv does not know ILSVRC2012_val_00000009.JPEG" in complaint(tmp_path, "val")
    write(tmp_path, {"LOC_val_solution.csv": b"a,b\nc,d\n"})
    assert "not the lines ImageId,PredictionString" in complaint(tmp_path, "val")


def test_a_devkit_that_crashes_scipys_reader_is_named(tmp_path: Path) -> None:
    held = devkit(compressed=False)
    number = b"\x09\0\0\0\x08\0\0\0"  # an element of one double; there is none of type 127
    assert number in held["data/meta.mat"]
    held["data/meta.mat"] = held["data/meta.mat"].replace(number, b"\x7f" + number[1:])
    write(tmp_path / "ILSVRC2012_devkit_t12", held)
    write(tmp_path, {f"val/{name}": data for name, data in VAL.items()})
    assert "are not the devkit's" in complaint(tmp_path, "val")


@pytest.mark.parametrize(
    "damage",
    [{"data/meta.mat": b"junk"}, {"data/meta.mat": b""}, {"data/ILSVRC2012_validation_ground_truth.txt": b"1\n7\n"}],
)
def test_a_damaged_devkit_is_named(tmp_path: Path, damage: dict[str, bytes]) -> None:
    write(tmp_path / "ILSVRC2012_devkit_t12", devkit() | damage)
    write(tmp_path / "val", VAL)
    assert "are not the devkit's" in complaint(tmp_path, "val")


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    whole = train_tar(TRAIN)
    write(tmp_path, {"ILSVRC2012_img_train.tar": whole[: len(whole) // 2]})
    assert "ILSVRC2012_img_train.tar: " in (reason := complaint(tmp_path))
    assert "truncated" in reason
    inner = packed({"n01_1.JPEG": b"x" * 600})
    write(tmp_path, {"ILSVRC2012_img_train.tar": packed({"n01.tar": inner[:1024], "n02.tar": inner})})
    assert "truncated" in complaint(tmp_path)  # a class's tar ends at its own end, not at the next one's
    write(tmp_path, {"ILSVRC2012_img_train.tar": packed({"readme.txt": b"x"})})
    assert "holds no <wnid>.tar" in complaint(tmp_path)
    write(tmp_path, VAL_LAYOUTS["flat, devkit archive"])
    write(tmp_path, {"ILSVRC2012_devkit_t12.tar.gz": devkit_archive()[:300]})
    assert "ILSVRC2012_devkit_t12.tar.gz: cannot be unpacked" in complaint(tmp_path, "val")


def test_names_in_tars_lead_nowhere(tmp_path: Path) -> None:
    inner = packed({"../../n01_1.JPEG": b"one", "/n01_2.JPEG": b"two", "n01_3.JPEG": b"old", "caf\udce9.JPEG": b"four"})
    inner = inner[: inner.rindex(b"four") + 512] + packed({"n01_3.JPEG": b"new"})
    write(tmp_path, {"ILSVRC2012_img_train.tar": packed({"n01.tar": inner})})
    source = list_source("imagenet", tmp_path, "train")
    assert [content for _, content in read(source).values()] == [b"one", b"two", b"four", b"new"]
    assert [path.name for path in tmp_path.iterdir()] == ["ILSVRC2012_img_train.tar"]


def test_its_odd_files_come_out_as_rgb(tmp_path: Path) -> None:
    """n02105855_2933.JPEG is a PNG; some of the JPEGs are CMYK."""
    photo = Image.fromarray(np.indices((40, 60)).sum(0).astype(np.uint8)[..., None].repeat(3, 2))
    png, cmyk = io.BytesIO(), io.BytesIO()
    photo.save(png, "PNG")
    photo.convert("CMYK").save(cmyk, "JPEG", quality=95)
    write(tmp_path / "train/n02105855", {"n02105855_1.JPEG": cmyk.getvalue(), "n02105855_2933.JPEG": png.getvalue()})
    source = list_source("imagenet", tmp_path, "train")
    first, second = (decode(source.read(item)) for item in source.items)
    assert np.abs(first.astype(int) - np.asarray(photo)).max() <= 4
    np.testing.assert_array_equal(second, np.asarray(photo))
