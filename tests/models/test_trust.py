"""Weights, checkpoints and runs that others made: whatever is wrong with them is one line that names the file."""

import io
import json
import pickletools
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from kamim.cli import app
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.models import architectures, interop, presets
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.storage.files import checksum
from kamim.training import checkpoint, metrics
from kamim.training.pretrain import pretrain as pretrain_run
from kamim.training.run_folder import NONFINITE
from preprocess.sources import list_source

runner = CliRunner()
State = dict[Any, Any]
SMALL = {**presets.ARCHITECTURES, "vit_demo": presets._vit("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2)}


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """A model that is made in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", SMALL)
        yield


def one_line(*arguments: str) -> str:
    """What a command that must fail says: a line on stderr, and exit code 1."""
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    said = result.stderr.splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert "weights_only" not in said[0] and "add_safe_globals" not in said[0]
    return said[0]


# Files of weights


@pytest.fixture(scope="module")
def vit(small: None) -> State:
    return build_encoder("vit_demo", 64).state_dict()


def authors(state: State) -> State:
    """A layer's query, key and value apart, as in the authors' files."""
    wide = state["blocks.0.attn.qkv.weight"]
    parts = dict(zip(("query", "key", "value"), wide.chunk(3), strict=True))
    apart = {f"encoder.layer.0.attention.attention.{name}.weight": part.clone() for name, part in parts.items()}
    return {**{name: value for name, value in state.items() if value is not wide}, **apart}


QUERY = "encoder.layer.0.attention.attention.query.weight"
WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "scalars": (lambda s: {**s, "patch_embed.proj.weight": torch.tensor(1.0)}, "patch_embed.proj.weight is []"),
    "rows": (lambda s: {name: value.flatten() for name, value in s.items()}, "a ViT's or Swin's has 4 dimensions"),
    "positions-row": (lambda s: {**s, "pos_embed": torch.zeros(17)}, "encoder.pos_embed is [17], must be"),
    "positions-odd": (lambda s: {**s, "pos_embed": torch.zeros(1, 18, 32)}, "encoder.pos_embed is [1, 18, 32], must"),
    "positions-wide": (lambda s: {**s, "pos_embed": torch.zeros(1, 5, 8)}, "encoder.pos_embed is (1, 5, 8)"),
    "positions-many": (lambda s: {**s, "pos_embed": torch.zeros(1, 1, 32).expand(1, 4001**2, 32)}, "holds a part"),
    "integer-keys": (lambda s: dict(enumerate(s.values())), "holds no state dict"),
    "int8": (lambda s: {name: value.to(torch.int8) for name, value in s.items()}, "cls_token is int8; must be one of"),
    "sparse": (lambda s: {**s, "pos_embed": s["pos_embed"].to_sparse()}, "pos_embed is sparse_coo on cpu"),
    "meta": (lambda s: {**s, "pos_embed": s["pos_embed"].to("meta")}, "pos_embed is strided on meta"),
    "no-key": (lambda s: {n: v for n, v in authors(s).items() if ".key." not in n}, "key missing"),
    "query-scalar": (lambda s: {**authors(s), QUERY: torch.tensor(1.0)}, "must be of one shape (query []"),
    "list": (lambda s: list(s.values()), "holds no state dict"),
    "function": (lambda s: {**s, "a": print}, "it calls print"),
}


@pytest.mark.parametrize(
    ("name", "legacy"), [*((name, False) for name in WRONG), ("function", True), ("int8", True), ("list", True)]
)
def test_wrong_weights_are_one_line(name: str, legacy: bool, vit: State, tmp_path: Path) -> None:
    make, said = WRONG[name]
    file = tmp_path / f"{name}.pth"
    torch.save(make(vit), file, _use_new_zipfile_serialization=not legacy)
    line = one_line("import", str(file), "--out", str(tmp_path / "x"))
    assert line.startswith(f"error: {file}: ")
    assert said in line
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_are_no_weights_are_one_line(vit: State, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "script.pth"))
    save_file({"a": torch.zeros(2)}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    recwarn.clear()
    for name, content in {
        "empty.pth": b"",
        "text.pth": b"hello",
        "zip.pth": b"PK\3\4" + bytes(100),
        "cut.safetensors": whole[:-1],
        "deep.pth": b"\x80\x02" + b"]" * 10**5 + b".",
        "name.pth": b"\x80\x02cos\nsystem\n.",
        "empty.safetensors": b"",
        "type.safetensors": whole.replace(b"F32", b"F4X"),
    }.items():
        (tmp_path / name).write_bytes(content)
    for file in sorted(tmp_path.iterdir()):
        assert one_line("import", str(file), "--out", str(tmp_path / "x")).startswith(f"error: {file}: "), file
    assert "a TorchScript program" in one_line("import", str(tmp_path / "script.pth"), "--out", str(tmp_path / "x"))
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_names_and_numbers_of_tensors_are_limited(suffix: str, vit: State, tmp_path: Path) -> None:
    """A name that takes a quadratic expression minutes, one with spaces, and more tensors than any encoder has."""
    long = ".attention." * 20_000
    states = {
        "long": ({**vit, long: torch.zeros(1)}, f"a tensor's name of {len(long):,} characters; must be at most 500"),
        "words": ({**vit, "a " * 20_000: torch.zeros(1)}, "a tensor's name of 40,000 characters; must be at most 500"),
        "many": ({**vit, **{str(i): torch.zeros(0) for i in range(10_000)}}, "tensors; must be at most 10,000"),
    }
    for name, (state, said) in states.items():
        file = tmp_path / f"{name}.{suffix}"
        torch.save(state, file) if suffix == "pth" else save_file(state, file)
        line = one_line("import", str(file), "--out", str(tmp_path / "x"))
        assert line.startswith(f"error: {file}: ") and line.endswith(said)
        assert len(line) < 5000


def test_renaming_takes_time_in_proportion_to_a_name() -> None:
    """With a quadratic expression this takes hours."""
    for part in (".attention.", ".attention.a.", "blocks.1", "module."):
        assert len(interop._rename({part * 200_000: torch.zeros(1)})) == 1


def test_an_archive_that_inflates_is_refused_before_it_does(
    vit: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, packed = io.BytesIO(), tmp_path / "bomb.pth"
    torch.save({**vit, "head.weight": torch.zeros(1 << 22)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    monkeypatch.setattr(torch, "load", None)
    line = one_line("import", str(packed), "--out", str(tmp_path / "x"))
    assert f"{packed}: " in line and "bytes that inflate to 16," in line


def test_a_storage_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    """torch itself compares them, from the version that pyproject.toml asks for."""
    stored, file = io.BytesIO(), tmp_path / "long.pth"
    torch.save({"a": torch.zeros(16)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert sum(argument == 16 for _, argument, _ in pickletools.genops(content)) == 2
                content = content.replace(b"K\x10", b"J" + (1 << 28).to_bytes(4, "little"))
            target.writestr(entry.filename, content)
    assert str(file) in one_line("import", str(file), "--out", str(tmp_path / "x"))


def test_damaged_pickles_are_one_line(vit: State, tmp_path: Path) -> None:
    """As many again by hand: 4,500 with one to four damages, none of which did anything else."""
    draw, file, content = random.Random(0), tmp_path / "damaged.pth", io.BytesIO()
    torch.save(dict(list(vit.items())[:3]), content)
    with zipfile.ZipFile(content) as source:
        parts = {entry.filename: source.read(entry) for entry in source.infolist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    for _ in range(60):
        damaged = bytearray(parts[pickled])
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.choice((0, 1))] = draw.randbytes(draw.choice((0, 1, 1, 4)))
        with zipfile.ZipFile(file, "w") as target:
            for name, part in parts.items():
                target.writestr(name, bytes(damaged) if name == pickled else part)
        try:
            interop.read_file(file)
        except ValueError as error:
            assert str(error).startswith(f"{file}: ") and "weights_only" not in str(error)


# Checkpoints


@pytest.fixture(scope="module")
def finished(small: None, stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "run"
    pretrain_run(of(out, stores["zarr"]), lambda *_: None)
    return out


def of(out: Path, store: Path) -> Pretrain:
    given = (
        f"data.store={store}",
        "data.resolution=64",
        "data.workers=1",
        "model.name=vit_demo",
        f"out={out}",
        "optim.batch_size=24",
        "optim.micro_batch=24",
        "optim.epochs=2",
        "optim.warmup_epochs=0",
        "compute.device=cpu",
        "checkpoint_epochs=1",
        "panel_epochs=1",
    )
    return load(Pretrain, None, given)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


NEWEST = "checkpoints/step-00000002"
SHA = "0" * 64
FIELDS: dict[str, tuple[Any, ...]] = {
    "format": (None, 2, "1", 1.5, [1]),
    "kamim": (None, 3, {}),
    "torch": (None, 3, []),
    "kind": (None, "", "other", 3, ["pretrain"]),
    "step": (None, -1, 1.5, "2", True, 10**30, [2], {}),
    "config": (None, [], "x", 3, {}, {"data": 3}),
    "has_head": (None, 1, "true", []),
    "checksums": (
        None,
        [],
        "x",
        {},
        {"model.safetensors": 3},
        {"model.safetensors": SHA, "../x": SHA},
        {"model.safetensors": SHA, "/dev/zero": SHA},
        {"optimizer.safetensors": SHA},
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_state_json_that_is_wrong_is_one_line(field: str, run: Path) -> None:
    folder = run / NEWEST
    state = json.loads((folder / "state.json").read_text())
    for value in FIELDS[field]:
        (folder / "state.json").write_text(json.dumps({**state, field: value}))
        with pytest.raises(ValueError, match=r"state\.json: not a checkpoint's state: ") as caught:
            checkpoint.read(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert field.removesuffix("s") in str(caught.value) or field == "config"
    if field != "kind":  # which older checkpoints lack
        (folder / "state.json").write_text(json.dumps({key: value for key, value in state.items() if key != field}))
        with pytest.raises(ValueError, match=f"{field}: Field required"):
            checkpoint.read(folder)


@pytest.mark.parametrize(
    "key",
    [
        ("data", "resolution", 63),
        ("data", "resolution", 10**9),
        ("data", "resolution", "x"),
        ("data", "store", 3),
        ("model", "name", "vit_huge"),
        ("optim", "lr", float("nan")),
        ("optim", "epochs", -1),
        ("mask", "ratio", 2),
        ("model", "name", ["vit"] * 10**5),
        ("seed", None, 2**63),
        ("out", None, None),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_one_line(key: tuple[str, str | None, Any], run: Path) -> None:
    section, name, value = key
    folder = run / NEWEST
    state = json.loads((folder / "state.json").read_text())
    state["config"][section] = value if name is None else {**state["config"][section], name: value}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json: not a checkpoint's state: ") as caught:
        checkpoint.read(folder)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**5, b'{"format": ' + b"9" * 5000 + b"}"])
def test_a_state_that_is_no_json_is_one_line(content: bytes, run: Path) -> None:
    (run / NEWEST / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json: not a checkpoint's state: "):
        checkpoint.read(run / NEWEST)
    assert checkpoint.read(run).step == 1  # the one before


def resealed(folder: Path, name: str, tensors: dict[str, Tensor] | bytes, **state: Any) -> None:
    """Other content for a file of a checkpoint, with the checksum of it."""
    if isinstance(tensors, bytes):
        (folder / name).write_bytes(tensors)
    else:
        save_file(tensors, folder / name)
    held = {**json.loads((folder / "state.json").read_text()), **state}
    held["checksums"][name] = checksum(folder / name)
    (folder / "state.json").write_text(json.dumps(held))


Change = Callable[[dict[str, Tensor]], dict[str, Tensor] | bytes]
WEIGHTS: dict[str, Change] = {
    "less": lambda t: {name: value for name, value in t.items() if name != "mask_token"},
    "more": lambda t: {**t, "more": torch.zeros(1)},
    "none": lambda t: {},
    "shape": lambda t: {**t, "mask_token": torch.zeros(31)},
    "scalar": lambda t: {**t, "encoder.pos_embed": torch.tensor(1.0)},
    "int8": lambda t: {**t, "mask_token": torch.zeros(32, dtype=torch.int8)},
    "bytes": lambda t: b"no tensors",
}
STATES: dict[str, Change] = {
    "less": lambda t: {name: value for name, value in t.items() if not name.startswith("mask_token")},
    "more": lambda t: {**t, "more.exp_avg": torch.zeros(1)},
    "shape": lambda t: {**t, "mask_token.exp_avg": torch.zeros(31)},
    "step": lambda t: {**t, "mask_token.step": torch.zeros(32)},
    "int8": lambda t: {**t, "mask_token.exp_avg": torch.zeros(32, dtype=torch.int8)},
    "name": lambda t: {**t, "mask_token": torch.zeros(32)},
    "bytes": lambda t: b"no tensors",
}


@pytest.mark.parametrize("has_head", [True, False], ids=["whole", "encoder"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights_than_the_models_are_one_line(name: str, has_head: bool, run: Path) -> None:
    folder = run / NEWEST
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if has_head or key.startswith("encoder.")}
    resealed(folder, "model.safetensors", tensors, has_head=has_head)
    checkpoint.read(folder).build_model()
    resealed(folder, "model.safetensors", WEIGHTS[name](tensors))
    if name == "less" and not has_head:
        return  # an encoder lacks it anyway
    with pytest.raises(ValueError, match=str(folder)) as caught:
        checkpoint.read(folder).build_model()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", STATES)
def test_another_optimisers_state_is_one_line(name: str, run: Path) -> None:
    folder = run / NEWEST
    resealed(folder, "optimizer.safetensors", STATES[name](load_file(folder / "optimizer.safetensors")))
    model = MaskedImageModel("vit_demo", 64)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors"):
        checkpoint.restore(checkpoint.read(folder), model, torch.optim.AdamW(model.parameters()))


def test_a_step_that_is_not_the_folders_or_not_the_runs(run: Path, stores: dict[str, Path]) -> None:
    state = json.loads((run / NEWEST / "state.json").read_text())
    (run / NEWEST / "state.json").write_text(json.dumps({**state, "step": 1}))
    with pytest.raises(ValueError, match="is of step 1, its folder of step 2"):
        checkpoint.at(run, 2)
    (run / NEWEST / "state.json").write_text(json.dumps({**state, "step": 9}))
    (run / NEWEST).rename(run / "checkpoints/step-00000009")
    with pytest.raises(ValueError, match="its newest checkpoint is of step 9, but the run has 2 steps"):
        pretrain_run(of(run, stores["zarr"]), lambda *_: None)
    (run / "checkpoints/step-²").mkdir()
    assert checkpoint.saved(run) == [1, 9]


# Other files of a run


@pytest.mark.parametrize(
    "content",
    [
        b"a: [",
        b"\xff",
        b"3",
        b"a: 2026-99-99",
        b"? [1]\n: 2",
        b"[" * 500,
        b"1: 2",
        b"data: &a [*a]",
        b"data: {store: &a [x,x], crop_scale: &b [*a,*a], resolution: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]}",
    ],
)
def test_a_config_yaml_that_cannot_be_is_one_line(content: bytes, run: Path) -> None:
    (run / "config.yaml").write_bytes(content)
    for command in ("report", "replay"):
        assert len(one_line(command, str(run))) < 2000


LINES = (
    b"3",
    b"[]",
    b'"x"',
    b'{"step": "0"}',
    b'{"step": 1.5}',
    b'{"step": 0, "loss": "x"}',
    b'{"step": 0, "loss": [1]}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 0, "lr": 1' + b"0" * 400 + b"}",
    b"[" * 10**5,
    b"\xff",
    b"{",
    b"",
)


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_lines_of_a_run_that_are_none_end_it_or_are_left_out(line: bytes, run: Path) -> None:
    for name in ("metrics.jsonl", "starts.jsonl"):
        (run / name).write_bytes((run / name).read_bytes() + line + b"\n")
    assert len(metrics.read(run)) == 2
    assert runner.invoke(app, ["report", str(run)]).exit_code == 0
    (run / "metrics.jsonl").write_bytes(line + b"\n")
    assert "holds no run with a step done" in one_line("report", str(run))


def test_a_page_shows_a_runs_pictures_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for name in ("step-00000001.png", "step-x.png"):
        (run / "panels" / name).unlink(missing_ok=True)
        (run / "panels" / name).symlink_to(tmp_path / "secret")
    (run / "panels/step-3.png").mkdir()
    result = runner.invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "report.html").read_text().count("data:image/png;base64,") == 2  # curves and the other panel


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'{"ranks": 3}', b"[" * 10**5, b"\xff"])
def test_records_that_are_none_are_one_line(content: bytes, run: Path) -> None:
    (run / NONFINITE).mkdir()
    (run / NONFINITE / "step-00000001.json").write_bytes(content)
    assert "step-00000001.json: not the record of a step" in one_line("replay", str(run))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"3",
        b"{}",
        b"[3]",
        b'[{"mode": "linprobe"}]',
        b"[" * 10**5,
        b"\xff",
        b'[{"mode": "linprobe", "block": 1, "top1": 3.0}]',
        b'[{"mode": "linprobe", "block": 1, "top1": 3.0, "checkpoint": 3}]',
    ],
)
def test_probes_that_are_none_are_one_line(content: bytes, stores: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    arguments = ["--checkpoint", f"a={tmp_path}", "--store", str(stores["zarr"]), "--out", str(tmp_path / "out")]
    assert f"--probe {tmp_path / 'p.json'}: " in one_line("analyze", *arguments, "--probe", str(tmp_path / "p.json"))


def test_timm_weights_of_another_type_are_one_line(stores: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    save_file({"pos_embed": torch.zeros(2, dtype=torch.int8)}, file)
    arguments = ["--store", str(stores["zarr"]), "--out", str(tmp_path / "out")]
    line = one_line("analyze", "--checkpoint", f"a=timm:vit_tiny_patch16_224@{file}", *arguments)
    assert f"{file}: not the weights of a timm model: pos_embed is int8" in line


# Hugging Face's metadata


def features(**label: Any) -> bytes:
    return json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()


METADATA = (
    b"3",
    b"[]",
    b"{",
    b"\xff",
    b"[" * 10**5,
    b'{"info": 3}',
    b'{"info": [1]}',
    b'{"info": {"features": [1]}}',
    b'{"info": {"features": "image"}}',
    features(_type="ClassLabel", names="ab"),
    features(_type="ClassLabel", names=[1, 2]),
    features(_type="ClassLabel", names={"a": 0}),
)


@pytest.mark.parametrize("metadata", METADATA, ids=range(len(METADATA)))
def test_hugging_faces_metadata_of_another_form_is_one_line(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"image": [b"a"], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError) as caught:
        list_source("huggingface", tmp_path, "train")
    assert str(caught.value).startswith(f"{tmp_path / 'train.parquet'}: ")
    assert "metadata" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["3", 1.5, True, [1], {"a": 1}, 10**12, -2], ids=str)
def test_hugging_faces_labels_of_another_type_are_one_line(label: Any, tmp_path: Path) -> None:
    table = pa.table({"image": [b"a"], "label": pa.array([label])})
    for metadata in (features(_type="ClassLabel", names=["a"]), b"{}"):
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train.parquet")
        if label == "3" and metadata == b"{}":
            continue  # the name of a class
        with pytest.raises(ValueError, match=f"source = {tmp_path}: ") as caught:
            list_source("huggingface", tmp_path, "train")
        assert "\n" not in str(caught.value)
