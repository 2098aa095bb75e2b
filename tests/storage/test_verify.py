"""Damage to a store is detected, and repaired bit for bit from the source; irreparable damage is reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import BACKENDS, Inline, make_store, plan_job, small_pages
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.storage.manifest import agreed_manifest, component_of, file_checksums, seal
from kamim.storage.store import Store
from preprocess import executors, fingerprint
from preprocess.assemble import take_apart
from preprocess.build import build
from preprocess.repair import _salvage, repair
from preprocess.shards import ShardTask, run_shard
from preprocess.verify import problems

runner = CliRunner()


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards run in this process, on small pages."""
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Inline)
    small_pages(monkeypatch)


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with a file that is no image."""
    root = shutil.copytree(folder, tmp_path_factory.mktemp("source") / "images")
    (root / "b/page.jpg").write_text("<html>")
    return root


@pytest.fixture(scope="module", params=BACKENDS)
def path(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(source, tmp_path_factory.mktemp("store") / request.param, request.param, shard_size=3)


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(path, tmp_path / "copy")


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip(file: Path, at: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def mend(path: Path, source: Path) -> list[str]:
    """Repairs the store and returns the output."""
    said: list[str] = []
    listed = plan_job(source, shard_size=3)[1]
    repair(path, lambda job: listed, workers=1, progress=lambda done, total: None, say=said.append)
    return said


def test_a_store_can_be_taken_apart_into_the_shards_it_was_made_of(path: Path, source: Path, tmp_path: Path) -> None:
    opened = Store(path)
    job, listed = plan_job(source, shard_size=3)
    for component in job.components:
        (tmp_path / component).mkdir()
        shard = take_apart(opened, component)
        for number in range(job.shards):
            items = listed.items[3 * number : 3 * number + 3]
            names = run_shard(ShardTask(job, number, items, listed.read, {component: tmp_path / component}, False))
            assert (tmp_path / component / names[component]).read_bytes() == shard(number)
            assert names[component] == f"{number:06d}-{opened.manifest.shards[component][number]}.safetensors"


def test_verifying_takes_the_rules_of_the_manifest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered detector may be missing, or have other rules by now."""

    def missing(name: str) -> None:
        raise AssertionError(name)

    for module in ("preprocess.record", "preprocess.assemble"):
        monkeypatch.setattr(f"{module}.detector", missing)
    assert problems(path, deep=True) == []


def test_a_flipped_bit_in_any_file_is_found_and_repaired(path: Path, copy: Path, source: Path) -> None:
    whole = tree(path)
    assert len(whole) > 12
    for number, (name, content) in enumerate(sorted(whole.items())):
        if (copy / "images.beton").exists() and not name.startswith(("images", "manifest")):
            continue  # as with zarr
        flip(copy / name, len(content) * (number + 1) // (len(whole) + 2), number % 8)
        assert [problem.where for problem in problems(copy)] == [name]
        mend(copy, source)
        assert tree(copy) == whole, name
    assert problems(copy, deep=True) == []


def test_only_the_damaged_shards_are_made_anew(
    path: Path, copy: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, tuple[str, ...]]] = []

    def counted(task: ShardTask) -> dict[str, str]:
        made.append((task.number, tuple(task.folders)))
        return run_shard(task)

    monkeypatch.setattr(executors, "run_shard", counted)
    data = Store(copy).images.data(7).tobytes()  # of shard 2: item 5 of the source is no image
    images = next(file for file in (copy / "images.beton", copy / "images.zarr/data/c/0") if file.exists())
    flip(images, images.read_bytes().index(data) + 30)
    flip(copy / "keypoints.zarr/fast/start/c/0/0", 8 * 2 * 11)  # of shard 3 or 4
    said = mend(copy, source)
    assert said[0] == "images: 4 of 5 shards are whole; the others are rebuilt from the source"
    assert [components for _, components in sorted(made)] == [("images",), ("fast",)]
    assert tree(copy) == tree(path)


@pytest.mark.parametrize("name", ["images", "keypoints.zarr", "manifest.json", "manifest.backup", "stamps.npy"])
def test_missing_files_are_found_and_repaired(name: str, path: Path, copy: Path, source: Path) -> None:
    for gone in copy.glob(f"{name}*"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert all(problem.what == "missing" for problem in problems(copy))
    mend(copy, source)
    assert tree(copy) == tree(path)


def test_files_cut_short_or_of_zeros_are_repaired(path: Path, copy: Path, source: Path) -> None:
    for number, file in enumerate(
        sorted(file for file in copy.rglob("*") if file.is_file() and "manifest" not in file.name)
    ):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if number % 2 else bytes(len(content)))
    mend(copy, source)
    assert tree(copy) == tree(path)


def test_whatever_is_damaged_can_be_looked_through_for_whole_shards(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    random = np.random.default_rng(0)
    files = [file for file in sorted(copy.rglob("*")) if file.is_file() and "manifest" not in file.name]
    small = [file for file in files if file.stat().st_size < 20_000]
    for _ in range(60):
        file = small[random.integers(len(small))]
        content = file.read_bytes()
        flip(file, int(random.integers(len(content))), int(random.integers(8)))
        component = component_of(file.relative_to(copy).as_posix())
        assert _salvage(Store(copy), component, tmp_path / "shards") <= 5
        file.write_bytes(content)


def test_two_votes_of_three_decide_on_the_manifest(path: Path, copy: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    main, backup = copy / "manifest.json", copy / "manifest.backup"
    for file, at in ((main, 100), (backup, 10), (backup, 64), (backup, 500)):
        flip(file, at)
        assert agreed_manifest(copy) == content
        flip(file, at)
    flip(main, 100)
    flip(backup, 500)
    assert agreed_manifest(copy) is None
    assert [problem.where for problem in problems(copy)] == ["manifest.json", "manifest.backup"]
    with pytest.raises(ValueError, match="its manifest and the backup are both damaged; preprocess it again"):
        repair(copy, lambda job: pytest.fail("needed"), workers=1, progress=print, say=print)  # type: ignore[arg-type]


def test_a_store_whose_files_are_as_written_may_still_be_wrong(path: Path, tmp_path: Path, source: Path) -> None:
    """Files that were wrong from the start: verify does not trust the manifest about their contents."""
    if (path / "images.beton").exists():
        pytest.skip("zarr arrays are written more easily")

    def wrong(name: str, write: Callable[[zarr.Array], None], deep: bool = False) -> list[str]:
        copy = shutil.copytree(path, tmp_path / "wrong")
        write(zarr.open_array(copy / name, mode="r+"))
        fields = json.loads((copy / "manifest.json").read_text()) | {"checksums": file_checksums(copy)}
        seal(copy, json.dumps(fields).encode())
        found = [f"{problem.where}: {problem.what}" for problem in problems(copy, deep)]
        shutil.rmtree(copy)
        return found

    def to(index: object, value: int) -> Callable[[zarr.Array], None]:
        return lambda array: array.__setitem__(index, value)

    def to_length(rows: int) -> Callable[[zarr.Array], None]:
        return lambda array: array.resize((rows,))

    assert wrong("images.zarr/start", to(3, 1 << 40)) == ["images: image 3 lies outside its file"]
    assert wrong("images.zarr/start", to(3, -5)) == ["images: image 3 lies outside its file"]
    assert wrong("images.zarr/length", to(2, 1 << 20)) == ["images: image 2 lies outside its file"]
    assert wrong("keypoints.zarr/fast/counts", to((4, 0, 0), 1 << 30)) == ["fast: image 4 lies outside its file"]
    assert wrong("images.zarr/label", to(5, 3)) == ["images: image 5 has a label without a class"]
    assert "cannot be opened" in wrong("images.zarr/start", to_length(11))[0]
    assert "label/zarr.json: 'shape' is [11], must be [12]" in wrong("images.zarr/label", to_length(11))[0]
    assert "image 0 is of shape" in wrong("images.zarr/size", to((0, 0), 7), deep=True)[0]
    length = int(Store(path).images.data(6).size)
    assert "image 6" in wrong("images.zarr/length", to(6, length - 40), deep=True)[0]
    assert wrong("keypoints.zarr/fast/frame", to((1, 1), 1), deep=True) == [
        "fast: image 1 has a keypoint outside frame 1"
    ]


def test_a_list_of_source_hashes_is_exactly_what_is_written(tmp_path: Path) -> None:
    source_hashes, file = np.arange(300, dtype=np.uint64), tmp_path / "stamps.npy"
    content = fingerprint.to_bytes(source_hashes)
    file.write_bytes(content)
    np.testing.assert_array_equal(fingerprint.from_file(file), source_hashes)
    for wrong in (
        b"",
        content[:100],
        content[:-1],
        content + b"\0",
        content.replace(b"(300,)", b"(3000000000000,)"),
        content.replace(b"'<u8'", b"'|O'"),
        content.replace(b"<u8", b"<f8"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"stamps\.npy: is damaged"):
            fingerprint.from_file(file)


@pytest.mark.parametrize(
    "content", ["", "file,reason\r\n", "file,reason\r\na,b\r\nc,d\r\n", "file,reason\r\nb/page.jpg\r\n", "x" * 200_000]
)
def test_a_list_of_rejects_that_is_none_is_found(content: str, copy: Path) -> None:
    (copy / "rejects.csv").write_text(content)
    fields = json.loads((copy / "manifest.json").read_text()) | {"checksums": file_checksums(copy)}
    seal(copy, json.dumps(fields).encode())
    (problem,) = problems(copy)
    assert problem.what.startswith("cannot be opened: ")
    assert "rejects.csv" in problem.what


# What cannot be repaired


def test_a_store_that_was_never_right_is_not_called_repaired(path: Path, copy: Path, source: Path) -> None:
    if (path / "images.beton").exists():
        pytest.skip("zarr arrays are written more easily")
    zarr.open_array(copy / "images.zarr/start", mode="r+")[3] = 1 << 40
    fields = json.loads((copy / "manifest.json").read_text()) | {"checksums": file_checksums(copy)}
    seal(copy, json.dumps(fields).encode())
    before = tree(copy)
    with pytest.raises(ValueError, match="image 3 lies outside its file, although the files are as the manifest says"):
        mend(copy, source)
    assert tree(copy) == before


def test_a_link_in_the_place_of_a_file_is_repaired(path: Path, copy: Path, source: Path, tmp_path: Path) -> None:
    page = copy / "keypoints.zarr/fast/gaps/c/0"
    page.rename(tmp_path / "elsewhere")
    page.symlink_to(tmp_path / "elsewhere")
    assert [(problem.where, problem.what) for problem in problems(copy)] == [
        ("keypoints.zarr/fast/gaps/c/0", "a link or a special file")
    ]
    mend(copy, source)
    assert tree(copy) == tree(path)
    assert not page.is_symlink()


def test_a_file_that_is_not_the_stores_is_left_alone(copy: Path, source: Path) -> None:
    (copy / "thesis.tex").write_text("years of work")
    flip(copy / "rejects.csv", 3)
    with pytest.raises(ValueError, match=r"thesis\.tex: is not the store's; move it elsewhere, then repair"):
        mend(copy, source)
    assert (copy / "thesis.tex").exists()


def test_a_source_that_changed_is_named_and_nothing_is_replaced(copy: Path, source: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(source, tmp_path / "changed")
    shutil.copy(changed / "a/1.png", changed / "a/2.JPEG")
    flip(copy / "keypoints.zarr/fast/counts/c/0/0/0", 0)
    before = tree(copy)
    with pytest.raises(ValueError, match=r"the first that differs is number 2, a/2\.JPEG"):
        mend(copy, changed)
    assert tree(copy) == before
    mend(copy, source)
    assert problems(copy) == []


def test_a_copied_source_will_do(path: Path, copy: Path, source: Path, tmp_path: Path) -> None:
    for file in source.rglob("*.*"):
        (tmp_path / "copied" / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copied" / file.relative_to(source)).write_bytes(file.read_bytes())
    flip(copy / "keypoints.zarr/fast/counts/c/0/0/0", 0)
    mend(copy, tmp_path / "copied")
    assert tree(copy) == tree(path)


def test_an_unfinished_job_is_not_thrown_away_for_a_repair(
    copy: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, listed = plan_job(source, Store(copy).manifest.job.images, shard_size=3, detectors=("sift",))
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.build.assemble", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(job, listed, copy, workers=1, strict=False, progress=lambda done, total: None)
    flip(copy / "rejects.csv", 3)
    with pytest.raises(ValueError, match=r"copy\.partial: holds an unfinished job; finish or remove it, then repair"):
        mend(copy, source)


# The command


def test_the_command_lists_what_is_wrong_and_repairs_it(copy: Path, source: Path) -> None:
    command = ["store", "verify", str(copy)]
    assert runner.invoke(app, [*command, "--deep"]).exit_code == 0
    flip(copy / "keypoints.zarr/fast/counts/c/0/0/0", 0)
    flip(copy / "manifest.json", 50)
    found = runner.invoke(app, command)
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        f"{copy / 'manifest.json'}: damaged",
        f"{copy / 'keypoints.zarr/fast/counts/c/0/0/0'}: damaged",
    ]
    needs = runner.invoke(app, [*command, "--repair"])
    assert needs.exit_code == 1
    assert "needs --source" in needs.stderr
    mended = runner.invoke(app, [*command, "--repair", "--source", str(source)])
    assert mended.exit_code == 0, mended.stderr
    assert "counts/c/0/0/0: was damaged, repaired" in mended.stdout
    assert "all as written" in mended.stdout


def test_links_are_no_damage(copy: Path, tmp_path: Path) -> None:
    """A folder of links, as data version control makes them; the copy of what they lead to is intact."""
    links = tmp_path / "links"
    shutil.copytree(copy, links, copy_function=lambda file, link: Path(link).symlink_to(file))
    assert [(problem.where, problem.what.partition(";")[0]) for problem in problems(links)] == [
        ("manifest.json", "a link or a special file"),
        ("manifest.backup", "a link or a special file"),
    ]
    for act in (lambda: Store(links), lambda: repair(links, lambda job: None, workers=1, progress=None, say=None)):
        with pytest.raises(KamimError, match=r"manifest.json: is a link.*`cp -rL` copies") as raised:
            act()
        assert "damaged" not in str(raised.value)
    shutil.copytree(links, tmp_path / "copied")  # follows links, as cp -rL does
    assert problems(tmp_path / "copied", deep=True) == []


def test_a_linked_manifest_is_told_and_put_right(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "manifest.json", tmp_path / "elsewhere.json")
    (copy / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    assert [(problem.where, problem.what) for problem in problems(copy)] == [
        ("manifest.json", "a link or a special file")
    ]
