"""The preprocessing job: equal bytes however it is run, cut short or damaged; and what it refuses."""

import csv
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import BACKENDS, Inline, make_store, plan_job, small_pages
from PIL import Image
from typer.testing import CliRunner

from kamim.cli import RESUMABLE, app
from kamim.detectors import DETECTORS, detect_packed
from kamim.storage.files import checksum
from kamim.storage.manifest import BACKUP, MANIFEST, Job, Manifest, file_checksums
from kamim.storage.store import Store
from preprocess import build as building
from preprocess import executors
from preprocess.assemble import Files
from preprocess.build import Stopped, build
from preprocess.plan import BuildPlan, make_job
from preprocess.record import record
from preprocess.shards import ShardTask
from preprocess.sources import Item, Source, list_source
from preprocess.sources.base import MAX_FILE_BYTES

runner = CliRunner()


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards run in this process."""
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Inline)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pages(monkeypatch)


def run(job: Job, source: Source, out: Path, *, workers: int = 1, strict: bool = False, progress: Any = None) -> bool:
    return build(job, source, out, workers=workers, strict=strict, progress=progress or (lambda done, total: None))


def content(out: Path) -> dict[str, str]:
    """Checksums of a whole store, its manifest among them."""
    files = (MANIFEST, BACKUP)
    return {**file_checksums(out), **{name: checksum(out / name) for name in files}}


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def stop_after_one(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


def marks(files: Sequence[Path]) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def rejects(out: Path) -> dict[str, str]:
    with (out / "rejects.csv").open(newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What an undisturbed build gives, by backend."""
    out = tmp_path_factory.mktemp("whole")
    return {backend: content(make_store(folder, out / backend, backend)) for backend in BACKENDS}


class Ran:
    """Which shards are computed, and which files they are joined from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made: list[tuple[int, tuple[str, ...]]] = []
        self.joined: dict[str, tuple[int, int]] = {}
        run_shard, assemble = executors.run_shard, building.assemble

        def counted(task: ShardTask) -> dict[str, str]:
            self.made.append((task.number, tuple(task.folders)))
            return run_shard(task)

        def marked(plan: BuildPlan, shards: Files, *rest: Any) -> Manifest:
            self.joined = marks([file for files in shards.values() for file in files])
            return assemble(plan, shards, *rest)

        monkeypatch.setattr(executors, "run_shard", counted)
        monkeypatch.setattr(building, "assemble", marked)

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.made]


def shard_files(out: Path) -> list[Path]:
    return sorted((partial(out) / "shards").glob("*/*.safetensors"), key=lambda file: (file.name[:6], str(file)))


# Equal bytes


@pytest.mark.parametrize(("backend", "workers"), [("zarr", 1), ("ffcv", 2)])
def test_the_number_of_workers_does_not_matter(
    backend: str, workers: int, folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    job, source = plan_job(folder, backend)
    seen: list[tuple[int, int]] = []
    assert run(job, source, tmp_path / "out", workers=workers, progress=lambda *counts: seen.append(counts))
    assert content(tmp_path / "out") == whole[backend]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out.log"]
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)
    assert seen == sorted(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_job_goes_on_where_it_was(
    backend: str,
    folder: Path,
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    inline: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, source = plan_job(folder, backend)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(job, source, out, progress=stop_after_one)
    assert not out.exists()
    kept = marks(shard_files(out))
    assert kept
    (shard_files(out)[0].parent / ".000002-0.safetensors.5").write_bytes(b"half a shard")
    ran = Ran(monkeypatch)
    assert run(job, source, out)
    assert sorted([*ran.numbers, *{int(name[:6]) for name in kept}]) == [0, 1, 2]
    assert kept.items() <= ran.joined.items()
    assert content(out) == whole[backend]
    assert not partial(out).exists()


def test_a_damaged_shard_is_noticed_and_redone(
    folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, source = plan_job(folder)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(building, "assemble", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(job, source, out)
    _, _, fast, images, _, cut = shard_files(out)
    damaged = bytearray(fast.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    fast.write_bytes(damaged)
    cut.write_bytes(cut.read_bytes()[:100])
    before = marks([images])
    ran = Ran(monkeypatch)
    assert run(job, source, out)
    assert sorted(ran.made) == [(1, ("fast",)), (2, ("images",))]
    assert before.items() <= ran.joined.items()
    assert content(out) == whole["zarr"]


def test_a_finished_job_touches_nothing(folder: Path, tmp_path: Path, inline: None) -> None:
    job, source = plan_job(folder)
    out = tmp_path / "out"
    assert run(job, source, out)
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (out, *out.rglob("*"))}
    partial(out).mkdir()  # as after a crash between the rename and the clean-up
    assert not run(job, source, out)
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (out, *out.rglob("*"))} == before
    assert not partial(out).exists()


def test_shards_of_an_unknown_job_are_not_touched(folder: Path, tmp_path: Path, inline: None) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(*plan_job(folder, quality=20), out, progress=stop_after_one)
    (partial(out) / "job.json").unlink()
    before = file_checksums(partial(out))
    with pytest.raises(ValueError, match=r"out\.partial: is not this job's; remove it"):
        run(*plan_job(folder), out)
    assert file_checksums(partial(out)) == before


def test_a_clean_up_that_is_killed_leaves_the_job_to_the_last(
    folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its job, a folder would not show whose it is."""
    out, rmtree = tmp_path / "out", shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if path == partial(out):
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run(*plan_job(folder), out)
    assert sorted(file.name for file in partial(out).iterdir()) == ["job.json", "stamps.npy"]
    assert not run(*plan_job(folder), out)
    assert content(out) == whole["zarr"] and not partial(out).exists()


def die(item: Item) -> bytes:
    os._exit(9)


def test_a_dead_worker_ends_the_job_which_then_continues(
    folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, source = plan_job(folder)
    deadly = Source(source.location, source.classes, source.items, die)
    with pytest.raises(Stopped, match=r"worker process died.*rerun the command to resume"):
        run(job, deadly, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Inline)
    assert run(job, source, tmp_path / "out")
    assert content(tmp_path / "out") == whole["zarr"]


# What is refused


def test_another_data_set_is_refused_with_what_differs(folder: Path, tmp_path: Path, inline: None) -> None:
    out = tmp_path / "out"
    job, source = plan_job(folder)
    other = job.model_copy(update={"dataset": "imagenet", "split": "val", "quality": 50})
    with pytest.raises(KeyboardInterrupt):
        run(job, source, out, progress=stop_after_one)
    for _ in ("while it is partial", "when it is finished"):
        with pytest.raises(ValueError, match="dataset 'imagefolder', requested 'imagenet'") as raised:
            run(other, source, out)
        said = str(raised.value)
        assert "split 'train', requested 'val'" in said
        assert str(out) in said
        assert "quality" not in said
        assert "\n" not in said
        run(job, source, out)


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_folder_that_is_no_store_is_refused_and_left_alone(
    name: str, folder: Path, tmp_path: Path, inline: None
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=f"{name}: "):
        run(*plan_job(folder), tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == [name, "thesis.tex"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"detectors": ("fast", "fast")}, "detectors = fast,fast"),
        ({"detectors": ("surf",)}, "surf"),
        ({"container": "lmdb"}, "container = lmdb"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale = 0.0,1.0"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale = 0.9,0.5"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale = 0.5,1.5"),
        ({"crop_scale": (float("nan"), 1.0)}, "crop_scale = nan"),
        ({"resolution": 15}, "resolution = 15"),
        ({"resolution": 1025}, "resolution = 1025"),
        ({"quality": 0}, "quality = 0"),
        ({"quality": 101}, "quality = 101"),
        ({"pixels": "png"}, "pixels = png: must be one of jpeg, raw, yuv420, original"),
        ({"pixels": "raw", "resolution": 1024, "crop_scale": (0.2, 1.0)}, "pixels = raw"),
    ],
)
def test_wrong_parameters_are_named(wrong: dict[str, Any], named: str, folder: Path) -> None:
    right: dict[str, Any] = {
        "detectors": ("fast",),
        "container": "zarr",
        "pixels": "jpeg",
        "quality": 90,
        "resolution": 64,
        "crop_scale": (0.67, 1.0),
    }
    with pytest.raises(ValueError) as raised:
        make_job("imagefolder", "train", list_source("imagefolder", folder, "train"), **right | wrong)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


# Unreadable images


@pytest.fixture
def hurt(folder: Path, tmp_path: Path) -> Path:
    """The folder, with unreadable files among its images."""
    root = shutil.copytree(folder, tmp_path / "hurt")
    (root / "a/00.jpg").write_bytes((root / "a/0.jpg").read_bytes()[:500])
    (root / "a/empty.png").touch()
    (root / "b/page.jpg").write_text("<html>")
    (root / "c/gone.jpg").symlink_to("nowhere.jpg")
    (root / os.fsdecode(b"c/\xe9.jpg")).write_text("no image")
    return root


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreadable_images_are_listed_and_the_rest_is_kept(
    backend: str, hurt: Path, folder: Path, tmp_path: Path
) -> None:
    made, expected = (
        Store(make_store(source, tmp_path / name, backend)) for name, source in (("out", hurt), ("whole", folder))
    )
    listed = rejects(made.path)
    assert set(listed) == {"a/00.jpg", "a/empty.png", "b/page.jpg", "c/gone.jpg", "c/\\xe9.jpg"}
    assert listed["a/empty.png"] == "empty file"
    assert listed["b/page.jpg"] == "not an image, or of a kind that cannot be read"
    assert "No such file" in listed["c/gone.jpg"]
    assert "truncated" in listed["a/00.jpg"].lower()
    assert made.manifest.rejects == 5
    assert made.images.labels.tolist() == expected.images.labels.tolist()
    for index in range(12):
        assert made.images.data(index).tobytes() == expected.images.data(index).tobytes()
        for ours, theirs in zip(*(s.keypoints("fast").image(index) for s in (made, expected)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_shard_of_unreadable_images_is_fine(folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "hurt")
    for i in range(7):
        (root / f"a/00{i}.jpg").write_text("no image")
    made = Store(make_store(root, tmp_path / "out", shard_size=3))
    assert len(made) == 12
    assert len(rejects(made.path)) == 7


def test_strict_stops_at_an_unreadable_image_and_names_it(hurt: Path, tmp_path: Path, inline: None) -> None:
    with pytest.raises(ValueError, match=r"(a/00.jpg|a/empty.png|b/page.jpg|c/gone.jpg|c/\\xe9.jpg): .*\(--strict\)"):
        run(*plan_job(hurt), tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_without_a_readable_image_there_is_no_store(tmp_path: Path, inline: None) -> None:
    (tmp_path / "source/a").mkdir(parents=True)
    for i in range(3):
        (tmp_path / f"source/a/{i}.jpg").write_text("no image")
    with pytest.raises(ValueError, match="none of its 3 files is a readable image"):
        run(*plan_job(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_vanishes_after_listing_is_rejected(folder: Path, tmp_path: Path, inline: None) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    job, listed = plan_job(source)
    (source / "b/1.png").unlink()
    assert run(job, listed, tmp_path / "out")
    assert rejects(tmp_path / "out") == {"b/1.png": "cannot be read: No such file or directory"}
    assert Store(tmp_path / "out").images.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4


def test_a_file_too_large_to_be_an_image_is_not_read(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    with (source / "a/huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file, of no bytes on the disk
    assert rejects(make_store(source, tmp_path / "out")) == {
        "a/huge.png": f"cannot be read: {1 << 40} bytes are more than the limit of {MAX_FILE_BYTES}"
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_has_the_final_name_after_a_failure(
    backend: str,
    folder: Path,
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    inline: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, source = plan_job(folder, backend)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    for place in (
        "preprocess.shards.write_whole",
        "preprocess.assemble.write_keypoints",
        "preprocess.assemble.file_checksums",
        "preprocess.build.seal",
        "preprocess.workspace.make_durable",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(Stopped, match="disk is full; free some space and rerun the command to resume"):
                run(job, source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert run(job, source, tmp_path / "out")
    assert content(tmp_path / "out") == whole[backend]


# What is stored


def test_a_flat_folder_has_no_labels(photos: list[np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo[:60, :80]).save(tmp_path / f"flat/{i}.png")
    for backend in BACKENDS:
        made = Store(make_store(tmp_path / "flat", tmp_path / backend, backend))
        assert made.images.labels.tolist() == [-1, -1, -1]
        assert made.manifest.classes == ()


def test_classes_of_any_name_are_stored(photos: list[np.ndarray], tmp_path: Path) -> None:
    odd = tmp_path / "source" / os.fsdecode(b"\xe9t\xe9")
    odd.mkdir(parents=True)
    Image.fromarray(photos[0][:60, :80]).save(odd / "1.png")
    assert Store(make_store(tmp_path / "source", tmp_path / "out")).manifest.classes == ("\\xe9t\\xe9",)


def test_content_counts_not_the_suffix(photos: list[np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    Image.fromarray(photos[0][:60, :80]).save(tmp_path / "source/a.jpg", "PNG")
    Image.fromarray(photos[0][:60, :80]).save(tmp_path / "source/b.png", "JPEG")
    assert len(Store(make_store(tmp_path / "source", tmp_path / "out"))) == 2


def test_images_are_never_enlarged(folder: Path, tmp_path: Path) -> None:
    made = Store(make_store(folder, tmp_path / "out"))
    files = sorted(folder.glob("*/*"))
    smaller = 0
    for size, file in zip(made.images.sizes, files, strict=True):
        with Image.open(file) as image:
            source = image.size[::-1]
        assert (size <= source).all()
        smaller += (size < source).all()
        assert size.prod() <= made.manifest.stored_area * 1.05
        assert size.prod() >= min(source[0] * source[1], made.manifest.stored_area * 0.95)
    assert 0 < smaller < len(files)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


SHAPES = [(1, 1), (3, 5), (1, 30_000), (30_000, 1), (2, 70_000), (70_000, 2), (40, 4000)]


@pytest.mark.parametrize(
    ("resolution", "shape"),
    [(16, SHAPES[0]), *((64, shape) for shape in SHAPES), *((1024, shape) for shape in SHAPES[2:])],
)
def test_images_of_any_shape_are_stored(resolution: int, shape: tuple[int, int], folder: Path) -> None:
    job, _ = plan_job(folder, detectors=("fast", "sift", "orb"), resolution=resolution)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    made = record(job, pixels, pixels, 7, job.components)
    images = made.pop("images")
    assert images["label"].tolist() == [7]
    assert images["length"].tolist() == [len(images["data"])]
    assert all(1 <= stored <= min(side, 4095) for stored, side in zip(images["size"][0], shape, strict=True))
    assert list(made) == ["fast", "sift", "orb"]
    for name, rows in made.items():
        assert len(rows["gaps" if name == "fast" else "positions"]) == rows["counts"].sum()
        assert ((rows["frame"] >= 1) & (rows["frame"] <= 4095)).all()


def test_keypoints_of_capped_groups_are_strongest_first(photos: list[np.ndarray]) -> None:
    orb = DETECTORS["orb"]
    frame = np.ascontiguousarray(photos[0][:300, :300])
    found = orb.detect(frame, 2.0)
    positions, counts = detect_packed("orb", frame, 2.0)
    ends = np.cumsum(counts)
    assert (counts[:4] > 50).all()
    for group, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        of_group = found.group == group
        strength: dict[tuple[int, int], list[float]] = {}
        for xy, response in zip(np.rint(found.xy[of_group] * 16).astype(int), found.response[of_group], strict=True):
            strength.setdefault(tuple(xy), []).append(response)
        stored = [max(strength[tuple(xy)]) for xy in positions[start:end].astype(int)]
        assert sorted(stored, reverse=True) == stored


def test_keypoints_of_uncapped_groups_are_distinct_and_sorted(photos: list[np.ndarray]) -> None:
    for name in ("fast", "sift"):
        positions, counts = detect_packed(name, np.ascontiguousarray(photos[0][:200, :200]), 1.5)
        ends = np.cumsum(counts)
        assert counts.sum() > 50
        for start, end in zip(ends - counts, ends, strict=True):
            rows = [(y, x) for x, y in positions[start:end].tolist()]
            assert rows == sorted(set(rows))


# The command


def test_the_command_builds_stops_and_continues(folder: Path, tmp_path: Path, inline: None) -> None:
    out = tmp_path / "deep/er/out"
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(out), "--resolution", "64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "assemble", lambda *arguments: signal.raise_signal(signal.SIGTERM))
        stopped = runner.invoke(app, command)
    assert stopped.exit_code == RESUMABLE
    assert stopped.stderr.splitlines()[-1] == "stopped; rerun the command to resume"
    done = runner.invoke(app, command)
    assert done.exit_code == 0
    assert "12 images of 3 classes" in done.stdout
    again = runner.invoke(app, command)
    assert again.exit_code == 0
    assert "is complete already" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers", "-1"], "--workers -1"),
        (["--crop-scale", "0.67"], "--crop-scale 0.67: must be two numbers"),
        (["--crop-scale", "a,b"], "--crop-scale a,b"),
        (["--detectors", "surf"], "surf"),
        (["--split", "test"], "--split test"),
        (["--source", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_the_command_says_a_mistake_in_one_line(arguments: list[str], named: str, folder: Path, tmp_path: Path) -> None:
    asked = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(tmp_path / "out"), *arguments]
    result = runner.invoke(app, asked)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert named in result.stderr
    assert not list(tmp_path.iterdir())
