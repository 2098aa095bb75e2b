"""A run's folder: it holds one run, of one configuration."""

from kamim import KamimError
from kamim.storage.store import MANIFEST, write_whole
from kamim.training.config import Pretrain
from kamim.training.settings import dump, load

CONFIG = "config.yaml"


def check_free(config: Pretrain, fresh: bool) -> None:
    """Raises ValueError where another run lives in config.out, or any, if it must be fresh, or a store."""
    file = config.out / CONFIG
    if (config.out / MANIFEST).is_file():
        raise KamimError(f"out = {config.out}: is a store; choose another out=...")
    if not file.is_file():
        return
    if fresh:
        raise KamimError(
            f"out = {config.out}: holds a run already; choose another out=..., or --resume auto to continue it"
        )
    if difference := _difference(load(Pretrain, file), config):
        raise KamimError(
            f"out = {config.out}: holds a run of another configuration ({difference}); choose another out=..., "
            "or remove it"
        )


def claim(config: Pretrain) -> None:
    """Writes the configuration into config.out."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / CONFIG, dump(config).encode())


# What a resumed run may change: none of it says which samples are trained on, or how.
_FREE = {"out": True, "checkpoint_epochs": True, "keep_checkpoints": True, "keep_every_epochs": True, "compute": True,
         "on_nonfinite": True, "log": True, "panel_epochs": True, "probe": True,
         "data": {"workers"}, "optim": {"micro_batch"}}  # fmt: skip


def _difference(there: Pretrain, asked: Pretrain) -> str:
    """The first key on which the runs differ, with both values, or nothing."""
    old, new = (dump(config, exclude=_FREE).splitlines() for config in (there, asked))
    pairs = zip(old, new, strict=False)
    changed = next((f"{a.strip()} there, {b.strip()} asked for" for a, b in pairs if a != b), "")
    return changed or ("other keys" if len(old) != len(new) else "")
