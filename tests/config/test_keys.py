"""No key is accepted and then ignored: a run reads every key of every section."""

from pathlib import Path
from typing import Any

import pytest
from runs import config, quiet

from kamim.config.pretrain import Pretrain
from kamim.config.schema import Section, document
from kamim.training import pretrain as pretraining

# Every optional section is set, so that its keys have to be used.
ALL_SECTIONS = (
    "method=mae",
    "decoder={width: 32, depth: 1, heads: 2}",
    "mask.patch_size=16",
    "optim.epochs=2",
    "label_free={every_epochs: 1}",
    "plateau={}",
    "panel_epochs=1",
)


def test_a_run_reads_every_key(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = f"probe={{train: '{stores['zarr']}', val: '{stores['zarr']}', every_epochs: 1}}"
    given = config(tmp_path / "run", stores["zarr"], *ALL_SECTIONS, probe)
    prefixes = {id(given): ""} | {
        id(value): f"{name}." for name in Pretrain.model_fields if isinstance(value := getattr(given, name), Section)
    }
    used: set[str] = set()
    plain = Section.__getattribute__

    def recorded(section: Section, name: str) -> Any:
        if id(section) in prefixes and name in type(section).model_fields:
            used.add(prefixes[id(section)] + name)
        return plain(section, name)

    monkeypatch.setattr(pretraining, "_report", lambda config, outcome: None)  # it only shows what was used
    monkeypatch.setattr(Section, "__getattribute__", recorded)
    assert pretraining.pretrain(given, quiet).finished
    monkeypatch.undo()
    assert {key for key, _, _ in document(Pretrain)} - used == set()
