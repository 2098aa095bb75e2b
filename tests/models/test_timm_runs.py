"""A ViT of timm with registers through every command: pretraining, every evaluation, analysis, export and import."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from kamim.cli import app
from kamim.models import interop
from kamim.training import checkpoint

NAME = "test_vit2"  # timm's smallest: 8 blocks of width 64, a register and no class token
SHORT = [
    *(
        f"{mode}.optim.{key}"
        for mode in ("linprobe", "finetune", "sweep")
        for key in ("batch_size=8", "micro_batch=8", "epochs=1", "warmup_epochs=0")
    ),
    "knn.k=[1]",
    "sweep.lrs=[0.1]",
    "compute.device=cpu",
    "workers=1",
]


def kamim(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_command_takes_a_model_of_timm(stores: dict[str, Path], tmp_path: Path) -> None:
    run, store = tmp_path / "run", str(stores["zarr"])
    kamim(
        "pretrain",
        f"data.store={store}",
        "data.resolution=64",
        "data.workers=1",
        f"model.name={NAME}",
        f"out={run}",
        "model.drop_path=0.1",
        "optim.batch_size=24",
        "optim.micro_batch=24",
        "optim.epochs=2",
        "optim.warmup_epochs=0",
        "compute.device=cpu",
        "panel_epochs=2",
    )
    results = tmp_path / "r.json"
    given = ["--checkpoint", f"A={run}", "--train", store, "--val", store, "--json", str(results)]
    kamim("eval", "--mode", "all", *given, *SHORT)
    modes = [result["mode"] for result in json.loads(results.read_text())]
    assert {"linprobe", "knn", "finetune", "reconstruct", "probe-sweep"} <= set(modes)
    poolings = {row["pooling"] for result in json.loads(results.read_text()) for row in result.get("rows", ())}
    assert poolings == {"mean", "max"}  # a register is no class token
    kamim(
        "analyze",
        "--checkpoint",
        f"A={run}",
        "--store",
        store,
        "--images",
        "4",
        "--figures",
        "2,3,5",
        "--out",
        str(tmp_path / "figures"),
    )
    exported, again = tmp_path / "e.safetensors", tmp_path / "again"
    kamim("export", str(run), "--out", str(exported))
    assert kamim("import", str(exported), "--out", str(again)) == f"{again}: {NAME} at 64 px, encoder alone\n"
    model = checkpoint.read(run).build_model()
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in checkpoint.read(again).model_state().items()
    )
    kamim("eval", "--mode", "knn", "--checkpoint", f"E={exported}", "--train", store, "--val", store, "knn.k=[1]")
    assert interop.load(exported).architecture == NAME
