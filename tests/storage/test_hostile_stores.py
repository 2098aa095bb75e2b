"""Malicious stores are rejected with a clear message, and nothing is executed or written for them.

Each is a small store in which one thing was changed and all checksums were updated. It is read in a separate process
(tests/isolated.py).
"""

import collections
import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import BACKENDS, make_store
from isolated import Outcome, outcomes
from mutations import Change, array, both, edited, element, field, linked, metadata, mutate, number, piped, resized
from typer.testing import CliRunner

from kamim.cli import app
from kamim.storage import beton, manifest
from kamim.storage.manifest import Encoding, seal
from kamim.storage.store import Store
from preprocess.assemble import _take_over

STEPS = ("load", "preview", "verify", "repair")
FAST, IMAGES, BETON = "keypoints.zarr/fast", "images.zarr", "images.beton"
START, COUNTS, FRAME, GAPS = (f"{FAST}/{name}" for name in ("start", "counts", "frame", "gaps"))
POSITIONS = "keypoints.zarr/sift/positions"
GROUP, OUTSIDE, NOT_OURS = "rules.fast.groups.0", "lies outside its file", "is no file of such a store"
SAMPLE, SAMPLES = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize, "each of the 12 samples once"
MODE, WIDTH, POINTER = (SAMPLE + beton.IMAGE.fields[name][1] for name in ("mode", "width", "data_ptr"))  # type: ignore[index]
LABEL = SAMPLE + beton.SAMPLE.fields["label"][1]  # type: ignore[index]
SAMPLE_ID, LENGTH = -24, -8  # of the last image
EXECUTED = Path(tempfile.gettempdir(), f"kamim-test-{os.getpid()}")


class Executed:
    """Creates a folder if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(EXECUTED),)


def version_2(path: Path) -> None:
    """Labels in zarr's old format, whose objects are pickled."""
    folder = path / IMAGES / "label"
    shutil.rmtree(folder)
    folder.mkdir()
    about = {
        "zarr_format": 2,
        "shape": [12],
        "chunks": [12],
        "dtype": "|O",
        "fill_value": 0,
        "order": "C",
        "compressor": None,
        "filters": [{"id": "pickle", "protocol": 5}],
    }
    (folder / ".zarray").write_text(json.dumps(about))
    (folder / "0").write_bytes(pickle.dumps(Executed()))


def image_of_another(path: Path) -> None:
    """The first image becomes the second."""
    for name in ("start", "length", "size"):
        element(f"{IMAGES}/{name}", 0, zarr.open_array(path / IMAGES / name, mode="r")[1])(path)


def keypoint_moved(path: Path) -> None:
    """A keypoint of the first image moves by one pixel, and those after it stay."""
    code = np.asarray(zarr.open_array(path / GAPS, mode="r")[:100]).astype(int)
    at = next(k for k in range(10, 90) if 0 < code[k] < 255 and code[k + 1] < 254)
    element(GAPS, slice(at, at + 2), code[at : at + 2] + np.array([-1, 1]))(path)


def codec(name: str, **configuration: Any) -> list[dict[str, Any]]:
    return [{"name": name, "configuration": configuration}]


SHARDS_IN_CHUNKS = codec(
    "sharding_indexed",
    chunk_shape=[1],
    codecs=[{"name": "bytes"}],
    index_codecs=[{"name": "bytes"}, {"name": "crc32c"}],
)

# What is changed, and how a line about it reads, whichever of loading, preview and `verify --deep` prints it.

IN_MANIFEST: dict[str, tuple[Change, str]] = {
    "border-below-zero": (field(f"{GROUP}.border", -1e6), rf"{GROUP}: border = -1000000\.0: must be 0 px or more"),
    "border-nan": (field(f"{GROUP}.border", float("nan")), rf"{GROUP}\.border"),
    "border-infinite": (field(f"{GROUP}.border", 1e400), rf"{GROUP}\.border"),
    "cap-of-10^30": (field(f"{GROUP}.cap", 10**30), rf"{GROUP}: cap = 10{{30}}: must be 0 \(no cap\) to 2147483647"),
    "cap-below-zero": (field(f"{GROUP}.cap", -1), rf"{GROUP}: cap = -1: must be"),
    "four-groups": (field("rules.fast.groups", [{"border": 3.0}] * 4), r"counts/zarr\.json: .*\[12, 2, 4\]"),
    "no-whole-pixels": (field("rules.fast.snap", False), r"positions/zarr\.json: is missing"),
    "positions-for-gaps": (field("job.whole_pixels", "positions"), r"positions/zarr\.json: is missing"),
    "unknown-array": (field("job.whole_pixels", "../x"), "job.whole_pixels: Input should be 'positions' or 'gaps'"),
    "no-groups": (field("rules.fast.groups", []), "rules.fast: groups: are 0, must be 1 to 256"),
    "groups-of-10^5": (field("rules.fast.groups", [{"border": 3.0}] * 10**5), "groups: are 100000, must be 1 to 256"),
    "count-of-1000": (field("count", 1000), "count: is 1000; with 0 rejects of 12 items, and 12 in shards"),
    "count-of-10^11": (field("count", 10**11), "count: is 100000000000; with"),
    "all-counts-of-10^11": (
        edited(
            lambda manifest: manifest.update(
                count=10**11,
                shard_counts=[10**11],
                job=manifest["job"] | {"items": 10**11, "shard_size": 10**11},
                shards={name: hashes[:1] for name, hashes in manifest["shards"].items()},
            )
        ),
        r"images\.zarr: holds 12 images, but manifest\.json has count 100000000000",
    ),
    "shards-of-nothing": (field("job.shard_size", 0), "job.shard_size: Input should be greater than 0"),
    "detector-that-leads-out": (field("job.detectors", ["../x"]), "job.detectors: '../x' is not a detector name"),
    "checksum-that-leads-out": (field("checksums", {"../../x": "0" * 64}), f"'../../x' {NOT_OURS}"),
    "checksum-of-a-root": (field("checksums", {"/etc/passwd": "0" * 64}), f"'/etc/passwd' {NOT_OURS}"),
    "checksum-of-no-component": (
        edited(lambda manifest: manifest["checksums"].update({"keypoints.zarr/orb/zarr.json": "0" * 64})),
        f"'keypoints.zarr/orb/zarr.json' {NOT_OURS}",
    ),
    "no-stamps": (edited(lambda manifest: manifest["checksums"].pop("stamps.npy")), "checksums: has no stamps.npy"),
    "nested": (lambda path: seal(path, b"[" * 10**6), "not a manifest: maximum recursion depth"),
    "encoding-of-pixels": (field("job.encoding", "raw"), "its images are jpeg, but manifest.json says raw"),
}

IN_KEYPOINTS: dict[str, tuple[Change, str]] = {
    "counts-that-wrap": (
        array(COUNTS, "uint64", np.tile(np.array([[2**64 - 10], [20]], np.uint64), (12, 1, 1))),
        f"{COUNTS}/.*uint64",
    ),
    "counts-below-zero": (array(COUNTS, "int64", np.full((12, 2, 1), -5)), f"{COUNTS}/zarr.json: 'data_type' is"),
    "counts-of-2^31": (element(COUNTS, (4, 0, 0), 2**31), f"fast: image 4 {OUTSIDE}"),
    "counts-of-2^32": (element(COUNTS, 4, 2**32 - 1), f"fast: image 4 {OUTSIDE}"),
    "start-below-zero": (element(START, (3, 1), -7), f"fast: image 3 {OUTSIDE}"),
    "start-beyond": (element(START, (3, 1), 2**63 - 1), f"fast: image 3 {OUTSIDE}"),
    "frame-of-zero": (element(FRAME, (5, 1, 0), 0), "fast: image 5 has a frame that is not 1 to 4095 px a side"),
    "frame-too-large": (element(FRAME, (5, 1), 4096), "fast: image 5 has a frame that is not 1 to 4095 px a side"),
    "frames-of-floats": (array(FRAME, "float64"), f'{FRAME}/zarr.json: \'data_type\' is "float64", must be "uint16"'),
    "frames-of-11": (array(FRAME, "uint16", np.full((11, 2, 2), 64)), rf"{START}/zarr.json: .*\[11, 2\]"),
    "shape-of-10^15": (metadata(FRAME, shape=[10**15, 2, 2]), f"{FRAME}/zarr.json: 'chunk_grid' is"),
    "shape-of-text": (metadata(FRAME, shape=["12", 2, 2]), f"{FRAME}/zarr.json: gives no shape of 3 axes"),
    "gaps-of-words": (metadata(GAPS, data_type="uint16"), f"{GAPS}/zarr.json: 'data_type' is"),
    "page-cut": (resized(f"{GAPS}/c/0", -4), "gaps/c/0: has 2044 bytes, must have 2048"),
    "page-longer": (resized(f"{GAPS}/c/0", 4096), "gaps/c/0: has 6144 bytes, must have 2048"),
    "chunk-cut": (resized(f"{START}/c/0/0", -8), "start/c/0/0: has 184 bytes, must have 192"),
    "chunk-longer": (resized(f"{COUNTS}/c/0/0/0", 8), "counts/c/0/0/0: has 104 bytes, must have 96"),
    "chunk-gone": (lambda path: (path / f"{COUNTS}/c/0/0/0").unlink(), "counts/c/0/0/0: (is )?missing"),
    "consolidated": (metadata("keypoints.zarr", consolidated_metadata={}), "zarr.json: 'consolidated_metadata' is"),
    "link": (linked(f"{GAPS}/c/0"), "gaps/c/0: (is )?a link or a special file"),
    "linked-folder": (linked("keypoints.zarr"), "keypoints.zarr: (is a link or a special file|not in the manifest)"),
    "pipe": (piped(f"{COUNTS}/c/0/0/0"), "counts/c/0/0/0: (is )?a link or a special file"),
}

IN_POSITIONS: dict[str, tuple[Change, str]] = {
    "positions-of-bytes": (metadata(POSITIONS, data_type="uint8"), f"{POSITIONS}/zarr.json: 'data_type' is"),
    "page-cut": (resized(f"{POSITIONS}/c/0/0", -4), "positions/c/0/0: has 8188 bytes, must have 8192"),
    "page-longer": (resized(f"{POSITIONS}/c/0/0", 4096), "positions/c/0/0: has 12288 bytes, must have 8192"),
}

IN_IMAGES: dict[str, tuple[Change, str]] = {
    "version-2": (version_2, "label/(zarr.json|c/0): (is )?missing"),
    "version-2-resealed": (
        both(
            version_2,
            edited(
                lambda manifest: manifest.update(
                    checksums={name: sha for name, sha in manifest["checksums"].items() if "label" not in name}
                )
            ),
        ),
        "label/zarr.json: is missing|label/.zarray: not in the manifest",
    ),
    "codec-of-pickles": (metadata(f"{IMAGES}/label", codecs=codec("numcodecs.pickle")), "'codecs' is .*pickle"),
    "codec-of-shards": (metadata(f"{IMAGES}/label", codecs=SHARDS_IN_CHUNKS), "'codecs' is .*sharding_indexed"),
    "codec-big-endian": (metadata(f"{IMAGES}/label", codecs=codec("bytes", endian="big")), "'codecs' is .*big"),
    "codec-zstd": (metadata(f"{IMAGES}/data", codecs=[{"name": "bytes"}, {"name": "zstd"}]), "'codecs' is .*zstd"),
    "transformer": (metadata(f"{IMAGES}/size", storage_transformers=[{"name": "x"}]), "'storage_transformers' is"),
    "pages-of-nothing": (
        metadata(f"{IMAGES}/data", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0]}}),
        r"data/zarr.json: \d+ rows are no whole pages of 0",
    ),
    "pages-in-part": (metadata(f"{IMAGES}/data", shape=[40_000]), "data/zarr.json: 40000 rows are no whole pages"),
    "pages-of-2^60": (metadata(f"{IMAGES}/data", shape=[2**60]), r"data/c/\d+: is missing"),
    "labels-of-10^12": (metadata(f"{IMAGES}/label", shape=[10**12]), r"'shape' is \[10{12}\], must be \[12\]"),
    "labels-of-floats": (array(f"{IMAGES}/label", "float64"), "label/zarr.json: 'data_type' is"),
    "label-beyond": (element(f"{IMAGES}/label", 5, 3), "image 5 has a label without a class"),
    "label-below": (element(f"{IMAGES}/label", 5, -2), "image 5 has a label without a class"),
    "size-of-0x0": (element(f"{IMAGES}/size", 3, 0), "image 3 is of no size that images have"),
    "size-of-65535x65535": (element(f"{IMAGES}/size", 3, 65535), "image 3 is of no size that images have"),
    "start-below-zero": (element(f"{IMAGES}/start", 3, -5), f"image 3 {OUTSIDE}"),
    "start-beyond": (element(f"{IMAGES}/start", 3, 2**62), f"image 3 {OUTSIDE}"),
    "length-zero": (element(f"{IMAGES}/length", 3, 0), f"image 3 {OUTSIDE}"),
    "length-below-zero": (element(f"{IMAGES}/length", 3, -(2**63)), f"image 3 {OUTSIDE}"),
    "length-beyond": (element(f"{IMAGES}/length", 3, 2**62), f"image 3 {OUTSIDE}"),
    "pixels-of-jpegs": (
        both(metadata(IMAGES, attributes={"encoding": "raw"}), field("job.encoding", "raw")),
        "image 0 has another number of bytes than its size needs",
    ),
}

IN_BETON: dict[str, tuple[Change, str]] = {
    "samples-of-10^10": (number(BETON, 8, "<u8", 10**10), "truncated or damaged"),
    "samples-of-2^64": (number(BETON, 8, "<u8", 2**64 - 1), "truncated or damaged"),
    "no-samples": (number(BETON, 8, "<u8", 0), "truncated or damaged"),
    "table-beyond": (number(BETON, 16, "<u8", 2**63 + 8), "truncated or damaged"),
    "table-among-images": (number(BETON, 16, "<u8", 10_000), "truncated or damaged"),
    "fields-of-65535": (number(BETON, 2, "<u2", 65535), "fields of types"),
    "pages-of-nothing": (number(BETON, 4, "<u4", 0), f"image 0 {OUTSIDE}"),
    "pointer-of-2^63": (number(BETON, POINTER, "<u8", 2**63), f"image 0 {OUTSIDE}"),
    "pointer-elsewhere": (number(BETON, POINTER, "<u8", 0), f"image 0 {OUTSIDE}"),
    "mode-of-9": (number(BETON, MODE, "<u1", 9), r"images of modes \[0, 9\]"),
    "size-of-0x0": (number(BETON, WIDTH, "<u4", 0), "image 0 is of no size that images have"),
    "label-beyond": (number(BETON, LABEL, "<i8", 10**9), "image 0 has a label without a class"),
    "sample-id-beyond": (number(BETON, SAMPLE_ID, "<u8", 2**40), SAMPLES),
    "sample-id-twice": (number(BETON, SAMPLE_ID, "<u8", 0), SAMPLES),
    "length-beyond": (number(BETON, LENGTH, "<u8", 2**63), f"image 11 {OUTSIDE}"),
    "length-zero": (number(BETON, LENGTH, "<u8", 0), f"image 11 {OUTSIDE}"),
}

# Sound stores that are not what preprocessing made: `verify --deep` alone can tell.
SOUND: dict[str, tuple[Change, str]] = {
    "keypoint-moved": (keypoint_moved, "fast: shard 1 does not hold what the store was made of"),
    "keypoint-dropped": (element(COUNTS, (7, 0, 0), 1), "fast: shard 2 does not hold what the store was made of"),
    "frame-of-another-size": (element(FRAME, (2, 0), 4000), "fast: shard 1 does not hold what the store was made of"),
    "label-of-another": (element(f"{IMAGES}/label", 11, 0), "images: shard 3 does not hold what the store was made of"),
    "image-of-another": (image_of_another, "images: shard 1 does not hold what the store was made of"),
}

# Stores that only reading a sample can tell from sound ones.
UNSOUND: dict[str, tuple[Change, str]] = {
    "gaps-of-255": (
        element(GAPS, slice(None), 255),
        r"sample \d+: .* outside their frame|image 0 has a keypoint outside",
    ),
    "gap-too-wide": (
        element(GAPS, slice(9, 99), 254),
        r"sample \d+: .* outside their frame|image 0 has a keypoint outside",
    ),
}

KINDS = {
    "manifest": IN_MANIFEST,
    "keypoints": IN_KEYPOINTS,
    "positions": IN_POSITIONS,
    "images": IN_IMAGES,
    "sound": SOUND,
    "unsound": UNSOUND,
    "beton": IN_BETON,
}
STORES = {"beton": "ffcv", "positions": "sift"}  # the store that cases of a kind change; of other kinds, "zarr"
CASES = {
    f"{kind}-{name}": case
    for kind, cases in KINDS.items()
    for name, case in cases.items()
    if kind != "beton" or "ffcv" in BACKENDS
}


@pytest.fixture(scope="module")
def stores(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve images in three shards, and their FAST keypoints, by backend; "sift": with those of SIFT, zarr."""
    out = tmp_path_factory.mktemp("whole")
    made = {backend: make_store(folder, out / backend, backend) for backend in BACKENDS}
    return made | {"sift": make_store(folder, out / "sift", detectors=("sift",))}


@pytest.fixture(scope="module")
def ends(
    stores: dict[str, Path], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Outcome]]:
    """Returns the outcome of every step on every case, and on the undamaged stores."""
    root = tmp_path_factory.mktemp("cases") / "stores"
    for name, (change, _) in CASES.items():
        change(shutil.copytree(stores[STORES.get(name.partition("-")[0], "zarr")], root / name))
    for backend, path in stores.items():
        shutil.copytree(path, root / f"whole-{backend}")
    return outcomes(root, STEPS, stores["zarr"], folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_store_is_fine(backend: str, ends: dict[str, dict[str, Outcome]]) -> None:
    assert {step: end["how"] for step, end in ends[f"whole-{backend}"].items()} == dict.fromkeys(STEPS, "fine")
    assert ends[f"whole-{backend}"]["load"] == ends["whole-zarr"]["load"]


@pytest.mark.parametrize("name", CASES)
def test_a_crafted_store_is_refused_in_one_line(name: str, ends: dict[str, dict[str, Outcome]]) -> None:
    for step in ("load", "preview", "verify"):
        end = ends[name][step]
        if name.startswith("sound") and step != "verify":
            assert end["how"] == "fine", (step, end)
            continue
        assert end["how"] == "refused", (step, end)
        assert re.search(CASES[name][1], end["what"]), (step, end["what"])
        assert name in end["what"]  # the store's path
        assert step != "preview" or end["what"].count("\n") == 1


@pytest.mark.parametrize("name", CASES)
def test_repair_puts_things_right_or_says_why_not(name: str, ends: dict[str, dict[str, Outcome]]) -> None:
    end = ends[name]["repair"]
    assert end["how"] != "broken", end
    if end["how"] == "refused":
        assert end["what"].count("\n") == 1
    else:
        assert "repaired" in end["what"] or name.startswith(("sound", "unsound"))


def test_nothing_is_executed(ends: dict[str, dict[str, Outcome]]) -> None:
    assert not EXECUTED.exists()


# Nothing is written elsewhere


@pytest.mark.parametrize(
    "name", ["../victim", "keypoints.zarr/fast/../../../victim", "images.zarr/data/c/../../../../victim"]
)
def test_a_manifest_names_no_file_outside_its_store(
    name: str, stores: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    out, victim = shutil.copytree(stores["zarr"], tmp_path / "out"), tmp_path / "victim"
    victim.write_text("mine")
    edited(lambda manifest: manifest["checksums"].update({name: "0" * 64}))(out)
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(out), "--detectors", "orb"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert NOT_OURS in result.stderr
    assert result.stderr.count("\n") == 1
    assert victim.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [out, victim]


def test_links_are_not_taken_over(stores: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stores["zarr"], tmp_path / "stores/out")
    linked(f"{GAPS}/c/0")(out)
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(out), "--detectors", "orb"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "gaps/c/0: is a link or a special file" in result.stderr


@pytest.mark.parametrize("links", [True, False])
def test_what_is_kept_is_written_over_nothing(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("out", "theirs"), ("folder", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rejects.csv").write_text(content)
    if not links:
        monkeypatch.setattr(os, "link", lambda source, to: (_ for _ in ()).throw(OSError("no links here")))
    plan: Any = SimpleNamespace(store=SimpleNamespace(checksums={"rejects.csv": ""}))
    with pytest.raises(FileExistsError):
        _take_over(plan, manifest.IMAGES, tmp_path / "out", tmp_path / "folder")
    assert (tmp_path / "folder/rejects.csv").read_text() == "mine"


# Random damage

RANDOM_CASES = int(os.environ.get("KAMIM_FUZZ_CASES", "60"))  # set it, and the seed, for a longer run
SEED = int(os.environ.get("KAMIM_FUZZ_SEED", "0"))
AT_ONCE = 400


def fault(path: Path, whole: Path, ends: dict[str, Outcome], sound: Outcome) -> str:
    """Returns what is wrong with the outcome of reading a randomly damaged store, or an empty string.

    Nothing may crash. A store that passes `verify --deep` can be loaded and gives the batches of the undamaged store. A
    manifest that was itself changed and sealed may have other rules, and so other batches: it is another store.
    """
    broken = [f"{step}: {end['what']}" for step, end in ends.items() if end["how"] == "broken"]
    if broken:
        return "; ".join(broken)
    if ends["verify"]["how"] == "refused":
        return ""
    if ends["load"]["how"] == "refused":
        return f"verified, but: {ends['load']['what']}"
    same = ends["load"] == sound or Store(path).manifest.rules != Store(whole).manifest.rules
    return "" if same else "verified, but gives other batches"


def test_random_damage_breaks_nothing_and_is_not_silent(folder: Path, tmp_path: Path) -> None:
    kinds: list[tuple[str, Encoding]] = [(backend, encoding) for backend in BACKENDS for encoding in ("jpeg", "raw")]
    kinds.append(("zarr", "yuv420"))
    wholes = [
        make_store(
            folder, tmp_path / f"whole/{backend}-{encoding}", backend, detectors=("fast", "orb"), encoding=encoding
        )
        for backend, encoding in kinds
    ]
    sound: dict[str, Outcome] = {}
    wrong, ways = {}, collections.Counter[str]()
    for first in range(0, RANDOM_CASES, AT_ONCE):
        root, done = tmp_path / f"from-{first}/stores", {}
        for case in range(first, min(first + AT_ONCE, RANDOM_CASES)):
            whole = wholes[case % len(wholes)]
            done[f"{case}"] = (
                whole,
                mutate(shutil.copytree(whole, root / f"{case}"), np.random.default_rng((SEED, case))),
            )
        for whole in wholes if first == 0 else ():
            shutil.copytree(whole, root / whole.name)
        found = outcomes(root, STEPS, wholes[0], folder)
        sound |= {whole.name: found[whole.name]["load"] for whole in wholes if whole.name in found}
        for name, (whole, changes) in done.items():
            ways[" ".join(end["how"] for end in found[name].values())] += 1
            if said := fault(root / name, whole, found[name], sound[whole.name]):
                wrong[f"seed {SEED}, case {name} of {whole.name}: {changes}"] = said
        shutil.rmtree(root.parent)
    print(dict(ways))
    assert not wrong
    assert len(sound) == len(wholes)
