"""RUN/starts.jsonl: when, where and from which step a run was started."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kamim.runtime.distributed import World
from kamim.runtime.machine import describe
from kamim.storage.ownership import append
from kamim.training.run_folder import STARTS


def log(run: Path, step: int, steps: int, world: World) -> None:
    """Appends a line to RUN/starts.jsonl: time, first step, number of steps, and the machine."""
    run.mkdir(parents=True, exist_ok=True)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "steps": steps,
        "device": world.device.type,
        "processes": world.size,
        **describe(),
    }
    file = run / STARTS
    cut_off = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    append(file, ("\n" if cut_off else "") + json.dumps(start) + "\n")


def read(run: Path) -> list[dict[str, Any]]:
    """Reads RUN/starts.jsonl, oldest first, without damaged lines; returns [] if there is no file."""
    file, records = run / STARTS, []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with suppress(ValueError, RecursionError):  # a crash, a full disk or an untrusted file
            record = json.loads(line)
            if isinstance(record, dict) and all(type(record.get(key)) is int for key in ("step", "steps", "processes")):
                records.append(record)
    return records
