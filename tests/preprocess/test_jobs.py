"""Stores that are extended and changed, jobs that are shared, what is noticed before and while they run."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, Inline, make_store, plan_job, small_pages
from PIL import Image
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import RESUMABLE, app
from kamim.storage.store import Store
from preprocess import build as building
from preprocess import estimate, executors
from preprocess.build import Stopped, build, build_share, publish_shares
from preprocess.fingerprint import source_hashes
from preprocess.plan import plan_build
from preprocess.shards import ShardTask, run_shard
from preprocess.sources import Item, Source
from preprocess.verify import problems
from preprocess.workspace import Workspace

runner = CliRunner()


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards run in this process, on small pages."""
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Inline)
    small_pages(monkeypatch)


def tree(path: Path) -> dict[str, bytes]:
    """Every file's content by its path, except logs."""
    files = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".log")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def make(source: Path, out: Path, backend: str = "zarr", **options: Any) -> list[str]:
    """Builds; returns what was said, except of the source."""
    said: list[str] = []
    job, listed = plan_job(source, backend, **options)
    build(job, listed, out, workers=1, strict=False, progress=lambda done, total: None, say=said.append)
    return [line for line in said if line not in listed.summary()]


class Made:
    """Counts images that are stored and detected on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.components: list[tuple[str, ...]] = []

        def counted(task: ShardTask) -> dict[str, str]:
            self.components.append(tuple(task.folders))
            return run_shard(task)

        monkeypatch.setattr(executors, "run_shard", counted)


# Extended and changed


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_detector_is_added_and_nothing_else_is_made(
    backend: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = make_store(folder, tmp_path / "at_once", backend, detectors=("fast", "sift"))
    out = make_store(folder, tmp_path / "out", backend)
    kept = [file for file in out.rglob("*") if file.is_file() and "manifest" not in file.name]
    inodes = [file.stat().st_ino for file in kept]
    made = Made(monkeypatch)
    assert make(folder, out, backend, detectors=("sift",)) == [
        "makes sift of 12 images in 3 shards; keeps images, fast"
    ]
    assert made.components == [("sift",)] * 3
    assert tree(out) == tree(at_once)
    assert [file.stat().st_ino for file in kept] == inodes
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["at_once", "at_once.log", "out", "out.log"]


@pytest.mark.parametrize(
    ("before", "now", "made", "said"),
    [
        ({}, {"quality": 40}, ("images",), "quality 90 becomes 40: makes images of 12 images in 3 shards; keeps fast"),
        ({}, {"encoding": "raw"}, ("images",), "encoding jpeg becomes raw: makes images of"),
        ({}, {"resolution": 48}, ("images", "fast"), "resolution 64 becomes 48: makes images, fast of"),
        ({"encoding": "raw"}, {"encoding": "raw", "quality": 40}, None, ""),
    ],
)
def test_changed_parameters_remake_what_depends_on_them_and_say_so(
    before: dict[str, Any],
    now: dict[str, Any],
    made: tuple[str, ...] | None,
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = make_store(folder, tmp_path / "out", **before)
    counted = Made(monkeypatch)
    lines = make(folder, out, **now)
    assert counted.components == ([made] * 3 if made else [])
    assert "".join(lines).startswith(said)
    if made:
        assert tree(out) == tree(make_store(folder, tmp_path / "at_once", **now))


def test_the_image_format_can_be_changed(folder: Path, tmp_path: Path) -> None:
    out = make_store(folder, tmp_path / "out", "zarr")
    make(folder, out, "ffcv")
    assert tree(out) == tree(make_store(folder, tmp_path / "at_once", "ffcv"))


def test_a_begun_job_that_is_changed_reuses_what_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(building, "assemble", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(folder, out)
    made = Made(monkeypatch)
    make(folder, out, quality=40, detectors=("sift",))
    assert made.components == [("images", "sift")] * 3
    assert tree(out) == tree(make_store(folder, tmp_path / "at_once", quality=40, detectors=("fast", "sift")))


def test_options_not_given_stay_what_they_were(folder: Path, tmp_path: Path) -> None:
    out = make_store(folder, tmp_path / "out", quality=77)
    result = runner.invoke(app, ["preprocess", "imagefolder", "--source", str(folder), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "complete already" in result.stdout
    assert Store(out).manifest.job.quality == 77


def test_damage_of_what_is_kept_is_not_blessed(folder: Path, tmp_path: Path) -> None:
    out = make_store(folder, tmp_path / "out")
    file = out / "images.zarr/data/c/0"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    make(folder, out, detectors=("sift",))
    assert [problem.where for problem in problems(out)] == ["images.zarr/data/c/0"]


@pytest.mark.parametrize("name", ["stamps.npy", "rejects.csv"])
def test_a_store_whose_plan_cannot_be_trusted_is_not_extended(name: str, folder: Path, tmp_path: Path) -> None:
    out = make_store(folder, tmp_path / "out")
    (out / name).write_bytes((out / name).read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"damaged; put it right with `kamim store verify .* --repair`"):
        make(folder, out, detectors=("sift",))


def test_a_store_that_lacks_a_file_is_not_extended(folder: Path, tmp_path: Path) -> None:
    out = make_store(folder, tmp_path / "out")
    (out / "keypoints.zarr/fast/frame/zarr.json").unlink()
    with pytest.raises(ValueError, match=r"fast/frame/zarr.json: is missing; put it right with `kamim store verify"):
        make(folder, out, detectors=("sift",))
    assert not out.with_name("out.partial").exists()


def test_a_link_stays_one_and_its_target_is_the_store(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk/store")
    for detectors in (("fast",), ("sift",)):
        make(folder, link, detectors=detectors)
    assert link.is_symlink()
    assert sorted(entry.name for entry in (tmp_path / "disk").iterdir()) == ["store", "store.log"]
    assert Store(link).detectors == ("fast", "sift")


@pytest.mark.parametrize("place", ["file", "folder", "file/below"])
def test_a_place_that_is_taken_is_said_in_one_line(place: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "folder").mkdir()
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(tmp_path / place)]
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: --out {tmp_path / place}: ")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_shards_of_another_version_of_a_detector_are_not_taken_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, listed = plan_job(folder, detectors=("harris",))
    space = Workspace(tmp_path / "out")
    before = plan_build(job, listed, space).folders(space)
    monkeypatch.setattr("preprocess.plan.origin", lambda name: f"{name} 2.0")
    after = plan_build(job, listed, space).folders(space)
    assert before["images"] == after["images"]
    assert before["harris"] != after["harris"]


def test_a_job_of_another_kamim_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/job.json").write_text('{"dataset": "cifar"}')
    with pytest.raises(ValueError, match=r"^[^\n]*job\.json: damaged, or of another kamim; remove .*out\.partial$"):
        make(folder, tmp_path / "out")


def test_files_that_cannot_be_linked_are_copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_store(folder, tmp_path / "out")
    link = os.link

    def not_of_others(source: Path, target: Path) -> None:
        if source.is_relative_to(out):
            raise PermissionError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", not_of_others)
    make(folder, out, detectors=("sift",))
    assert problems(out, deep=True) == []


# Sources that change


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def rewrite(file: Path) -> None:
    found = file.stat()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(found.st_mtime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("state", ["begun", "finished"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: touch(root / "b/1.png"), "number 5, b/1.png"),
        (lambda root: (root / "a/0.jpg").unlink(), r"\(12 items then, 11 now\); the first .* number 0, a/1.png"),
        (lambda root: (root / "c/3.jpg").unlink(), r"number 11, which is gone"),
        (lambda root: shutil.copy(root / "a/0.jpg", root / "c/9.jpg"), "number 12, c/9.jpg"),
        (lambda root: (root / "b").rename(root / "d"), "number 4, c/0.jpg"),
    ],
)
def test_a_changed_source_is_noticed_and_named(
    change: Callable[[Path], object],
    said: str,
    state: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = shutil.copytree(folder, tmp_path / "source"), tmp_path / "out"
    if state == "finished":
        make(source, out)
    else:
        monkeypatch.setattr(building, "assemble", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(source, out)
    change(source)
    with pytest.raises(ValueError, match=said) as raised:
        make(source, out, detectors=("fast", "sift"))
    assert "\n" not in str(raised.value)


def with_content(source: Path, out: Path) -> None:
    job, listed = plan_job(source)
    job = job.model_copy(update={"fingerprint": "content"})
    build(job, listed, out, workers=1, strict=False, progress=lambda done, total: None)


def test_with_content_a_copy_is_the_same_source_and_a_changed_byte_is_not(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for file in folder.rglob("*.*"):
        (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
    with_content(folder, tmp_path / "out")
    with_content(copy, tmp_path / "of_copy")
    assert tree(tmp_path / "out") == tree(tmp_path / "of_copy")
    with_content(copy, tmp_path / "out")
    rewrite(copy / "b/0.jpg")
    assert (
        source_hashes(plan_job(copy)[1], "stat", 1).tolist() != source_hashes(plan_job(folder)[1], "stat", 1).tolist()
    )
    with pytest.raises(ValueError, match=r"number 4, b/0\.jpg"):
        with_content(copy, tmp_path / "out")


def test_content_stamps_tell_arrays_files_and_what_cannot_be_read_apart() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    given = {"a": pixels, "b": pixels.reshape(3, 2, 3), "c": pixels.tobytes(), "d": None}

    def read(item: Item) -> Any:
        if given[item.key] is None:
            raise FileNotFoundError
        return given[item.key]

    made = [
        source_hashes(Source("", (), [Item("x", 0, 0)], lambda item, key=key: read(Item(key, 0, 0))), "content", 1)[0]
        for key in given
    ]
    assert len(set(made)) == 4


def test_components_that_disagree_on_what_is_readable_are_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file could not be read for a moment."""
    out = make_store(folder, tmp_path / "out")
    expected = tree(make_store(folder, tmp_path / "at_once", detectors=("fast", "sift")))
    job, listed = plan_job(folder, detectors=("sift",))

    def fails(item: Item) -> bytes | np.ndarray:
        if item.key == "b/1.png":
            raise OSError("stale file handle")
        return listed.read(item)

    source = Source(listed.location, listed.classes, listed.items, fails)
    with pytest.raises(Stopped, match=r"b/1.png: could be read for one component and not for another"):
        build(job, source, out, workers=1, strict=False, progress=lambda done, total: None)
    made = Made(monkeypatch)
    make(folder, out, detectors=("sift",))
    assert made.components == [("sift",)]
    assert tree(out) == expected


def test_arrays_are_as_good_as_files(photos: list[np.ndarray], folder: Path, tmp_path: Path) -> None:
    job, listed = plan_job(folder, encoding="raw")
    ready = Source(
        listed.location,
        listed.classes,
        listed.items,
        lambda item: np.asarray(Image.open(folder / item.key).convert("RGB")),
    )
    build(job, ready, tmp_path / "out", workers=1, strict=True, progress=lambda done, total: None)
    assert tree(tmp_path / "out") == tree(make_store(folder, tmp_path / "files", encoding="raw"))


# Shares of a batch queue, and who may work at the same time


def test_shares_made_in_any_order_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    job, listed = plan_job(folder, shard_size=2)
    out = tmp_path / "out"

    def share(number: int) -> None:
        build_share(job, listed, out, share=(number, 4), workers=1, strict=False, progress=lambda done, total: None)

    with pytest.raises(Stopped, match="6 of 6 shards are missing, number 1, 2, 3, 4, 5, 6;"):
        publish_shares(job, listed, out)
    share(3)
    share(2)
    share(2)
    with pytest.raises(Stopped, match="3 of 6 shards are missing, number 1, 4, 5; "):
        publish_shares(job, listed, out)
    share(4)
    share(1)
    assert publish_shares(job, listed, out)
    assert tree(out) == tree(make_store(folder, tmp_path / "at_once", shard_size=2))
    assert not publish_shares(job, listed, out)
    share(1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        ".out.kamim-lock",
        "at_once",
        "at_once.log",
        "out",
        "out.log",
    ]


def test_a_share_of_other_parameters_is_refused_while_others_are_unfinished(folder: Path, tmp_path: Path) -> None:
    for quality in (90, 50):
        job, listed = plan_job(folder, quality=quality)
        try:
            build_share(
                job, listed, tmp_path / "out", share=(1, 2), workers=1, strict=False, progress=lambda done, total: None
            )
        except ValueError as error:
            assert quality == 50
            assert "other parameters" in str(error)
    assert quality == 50


def test_the_command_runs_shares_and_publishes(folder: Path, tmp_path: Path) -> None:
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(tmp_path / "out")]
    command += ["--resolution", "64", "--container", "zarr"]
    early = runner.invoke(app, [*command, "--publish"])
    assert early.exit_code == RESUMABLE
    assert early.stderr.startswith("stopped: 1 of 1 shards are missing")
    made = runner.invoke(app, [*command, "--shard", "1/1"])
    assert made.exit_code == 0
    assert "with --publish instead of --shard" in made.stdout
    assert runner.invoke(app, [*command, "--publish"]).exit_code == 0
    assert len(Store(tmp_path / "out")) == 12


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/2/3", "-1/2"])
def test_a_share_that_is_none_is_said_in_one_line(shard: str, folder: Path, tmp_path: Path) -> None:
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*command, f"--shard={shard}"])
    assert result.exit_code == 1
    assert f"--shard {shard}: must be I/N" in result.stderr
    assert not list(tmp_path.iterdir())


HOLD = """
import sys
from pathlib import Path
from preprocess.workspace import Workspace
with Workspace(Path(sys.argv[1])).locked(shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_jobs_on_one_store_do_not_meet(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job, listed = plan_job(folder)
    quiet = {"workers": 1, "strict": False, "progress": lambda done, total: None}
    for held in ("shared", "alone"):
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(out), held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        if held == "shared":
            build_share(job, listed, out, share=(1, 2), **quiet)  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match="another process is at work on this store"):
                build_share(job, listed, out, share=(1, 2), **quiet)  # type: ignore[arg-type]
        for work in (lambda: build(job, listed, out, **quiet), lambda: publish_shares(job, listed, out)):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="another process is at work on this store"):
                work()
        assert not out.exists()
        other.communicate("")
    assert build(job, listed, out, **quiet)  # type: ignore[arg-type]
    assert problems(out, deep=True) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out.log"]


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "out")
    with space.locked(shared=True):
        space.lock.unlink()  # as by one that was done between our opening and locking it
        with Workspace(tmp_path / "out").locked():
            pass
    assert not list(tmp_path.iterdir())


# Clusters


def test_a_worker_of_a_cluster_may_be_killed(folder: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    killed: list[int] = []
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:

        def kill(done: int, total: int) -> None:
            if done and not killed:
                with distributed.Client(cluster) as client:
                    killed.extend(client.run(os.getpid).values())
                os.kill(killed[0], 9)

        job, listed = plan_job(folder, shard_size=1)
        build(job, listed, tmp_path / "out", workers=1, strict=True, progress=kill, cluster=cluster.scheduler_address)
    assert killed
    assert tree(tmp_path / "out") == tree(make_store(folder, tmp_path / "at_once", shard_size=1))


def test_a_result_that_is_not_what_was_made_stops_the_job(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loses(task: ShardTask) -> dict[str, str]:
        names = run_shard(task)
        if task.number == 1:
            file = task.folders["fast"] / names["fast"]
            file.write_bytes(file.read_bytes()[:-1])
        return names

    with monkeypatch.context() as patch:
        patch.setattr(executors, "run_shard", loses)
        with pytest.raises(Stopped, match=r"000001-.*: was damaged on its way"):
            make(folder, tmp_path / "out")
    make(folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(make_store(folder, tmp_path / "at_once"))


def test_no_more_tasks_are_in_flight_than_asked_for(folder: Path, tmp_path: Path) -> None:
    job, listed = plan_job(folder, shard_size=1)
    begun = 0

    def tasks() -> Any:
        nonlocal begun
        for number, item in enumerate(listed.items):
            begun += 1
            yield ShardTask(job, number, [item], listed.read, {"images": tmp_path}, True)

    with Inline(1, mp_context=None, initializer=None) as executor:
        for done, _ in enumerate(executors.results(executor, 3, tasks()), 1):
            assert begun - done < 3
    assert begun == 12


def test_another_opencv_on_a_worker_is_refused(folder: Path, tmp_path: Path) -> None:
    job, listed = plan_job(folder)
    task = ShardTask(job.model_copy(update={"opencv": "1.0"}), 0, listed.items, listed.read, {"images": tmp_path}, True)
    with pytest.raises(ValueError, match=r"but the job is of OpenCV 1\.0"):
        run_shard(task)


# Disks, plans


Usage = namedtuple("Usage", ("total", "used", "free"))


def test_a_disk_that_is_too_small_is_noticed_before_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 20_000))
        with pytest.raises(
            ValueError, match=r"needs about .* GB more while it is built, and its disk has 0.00 GB free"
        ):
            make(folder, tmp_path / "out")
    assert not made.components
    make(folder, tmp_path / "out")


def test_the_estimate_is_about_what_comes_of_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    needed = building.disk_needed
    monkeypatch.setattr(building, "disk_needed", lambda *given: seen.append(needed(*given)[0]) or (seen[-1], {}))
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.workspace.make_durable", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(folder, tmp_path / "out")
    shards = sum(file.stat().st_size for file in (tmp_path / "out.partial/shards").rglob("*.safetensors"))
    assert seen == [pytest.approx(2 * shards, rel=0.1)]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["preprocess", "imagefolder", "--source", str(folder), "--out", str(out), "--dry-run"]
    first = runner.invoke(app, [*command, "--resolution", "64"])
    assert first.exit_code == 0, first.stderr
    assert "makes images, fast of 12 images in 1 shard" in first.stdout
    assert "make images: 1 of 1 shards are still to be made; about " in first.stdout
    assert "estimate, from 12 images" in first.stdout
    assert not list(tmp_path.iterdir())
    make_store(folder, out)
    before = tree(tmp_path)
    more = runner.invoke(app, [*command, "--detectors", "sift", "--quality", "50"])
    assert "quality 90 becomes 50: makes images, sift" in more.stdout
    assert "keep fast: as it is" in more.stdout
    assert runner.invoke(app, command).stdout == f"{out} is complete already\n"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_counts_whole_pages(
    folder: Path, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real pages, which are larger than all that is in them: the dry run says what the store then takes."""
    monkeypatch.undo()
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Inline)
    job, listed = plan_job(folder, backend, detectors=("fast", "sift"))
    *_, estimated = estimate.describe(job, listed, tmp_path / "out", 1)
    build(job, listed, tmp_path / "out", workers=1, strict=False, progress=lambda done, total: None)
    taken = sum(file.stat().st_blocks * 512 for file in (tmp_path / "out").rglob("*"))
    assert float(estimated.rpartition(", ")[2].split()[0]) == pytest.approx(taken / 1e6, rel=0.1)


@pytest.mark.parametrize("scheme", ["s3", "gs", "https", "file"])
@pytest.mark.parametrize("option", ["--dry-run", "--strict"])
def test_a_url_is_no_folder(scheme: str, option: str, folder: Path) -> None:
    done = runner.invoke(
        app, ["preprocess", "imagefolder", "--source", str(folder), "--out", f"{scheme}://bucket/store", option]
    )
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: --out {scheme}://bucket/store: is a URL; kamim writes to local folders only"
    )


def test_a_job_leaves_a_log(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lists and plans, and how it ended; it is beside the store, whose checksums do not depend on it."""
    out = tmp_path / "out"

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(building, "assemble", fails)
        with pytest.raises(Stopped):
            make(folder, out)
    make(folder, out)
    make(folder, out)  # is complete: nothing is logged
    make(folder, out, detectors=("sift",))
    lines = [line[20:] for line in (tmp_path / "out.log").read_text().splitlines()]
    plan, more = (
        "makes images, fast of 12 images in 3 shards",
        "makes sift of 12 images in 3 shards; keeps images, fast",
    )
    stored, shards = "12 images are stored, 0 could not be read", [f"{done} of 12 images" for done in (5, 10, 12)]
    assert [line for line in lines if "begun by" not in line and "12 images, 3 classes" not in line] == [
        *shards,
        f"{plan}: ended by Stopped: out of memory; rerun the command to resume, with fewer workers to need less",
        stored,
        f"{plan}: ended",
        *shards,
        stored,
        f"{more}: ended",
    ]
    assert sum("begun by kamim" in line for line in lines) == 3
    assert not problems(out)


def test_info_is_readable_by_programs(folder: Path, tmp_path: Path) -> None:
    out = make_store(folder, tmp_path / "out")
    said = json.loads(runner.invoke(app, ["store", "info", str(out), "--json"]).stdout)
    assert (said["count"], said["classes"], said["rejects"], said["job"]["quality"]) == (12, 3, 0, 90)
    assert set(said["bytes"]) == set(said["opencv"]) == {"images", "fast"}


def test_a_copy_that_lost_its_times_is_told_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "images")
    out = make_store(copied, tmp_path / "out")
    for file in copied.glob("*/*"):
        os.utime(file, (7, 7))
    with pytest.raises(KamimError) as raised:
        make_store(copied, out, detectors=("fast", "sift"))
    assert "perhaps only the files' times do" in str(raised.value)
    said = runner.invoke(app, ["preprocess", "imagefolder", "--source", str(copied), "--out", str(out)]).output
    assert "choose another --out ... with --fingerprint content" in " ".join(said.split())
    (copied / "a/0.jpg").write_bytes(b"another")
    shutil.copytree(folder, copied, dirs_exist_ok=True)  # copies the times
    make_store(copied, out, detectors=("fast", "sift"))
    os.utime(copied / "a/0.jpg", (7, 7))
    with pytest.raises(KamimError, match=r"number 0, a/0.jpg; restore the source"):
        make_store(copied, out, detectors=("fast", "orb"))


def test_one_image_is_not_several(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(folder / "a/0.jpg", tmp_path / "one")
    job, listed = plan_job(tmp_path / "one")
    assert plan_build(job, listed, Workspace(tmp_path / "out")).summary().endswith("of 1 image in 1 shard")
