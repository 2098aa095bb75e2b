"""Decodes all files of folder trees, of any type, and prints a table of the outcomes.

    python benchmarks/decode_corpus.py DIR...

Files are decoded one by one in a separate process with limits on memory and time. Outcomes of preprocess.decode:

    decoded   its pixels equal Pillow's, in RGB
    refused   it raised Undecodable
    escaped   it raised another exception, killed the process, or took too long
    differs   its pixels differ from Pillow's, or Pillow could not decode the file
"""

import argparse
import io
import multiprocessing
import resource
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.decode import Undecodable, decode

OUTCOMES = ("decoded", "refused", "escaped", "differs")
MEMORY = 4 << 30  # bytes of address space
SECONDS = 60


def outcome(data: bytes) -> tuple[str, str]:
    """Decodes the bytes of a file and returns (outcome, reason)."""
    try:
        pixels = decode(data)
    except Undecodable as error:
        return "refused", str(error)
    except BaseException as error:  # noqa: BLE001 - this script looks for any other exception
        return "escaped", repr(error)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            expected, mode = np.asarray(image.convert("RGB")), image.mode
    except Exception as error:  # noqa: BLE001 - as above
        return "differs", f"Pillow: {error!r}"
    same = expected.shape == pixels.shape and np.array_equal(expected, pixels)
    return ("decoded", "") if same else ("differs", f"{image.format} of mode {mode}")


def serve(connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while file := connection.recv():
        connection.send(outcome(Path(file).read_bytes()))


def outcomes(files: list[Path]) -> Iterator[tuple[Path, str, str, float]]:
    """Yields (file, outcome, reason, seconds) of each file."""
    context = multiprocessing.get_context("spawn")
    process = None
    for file in files:
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
        start = time.perf_counter()
        ours.send(file)
        try:
            result, reason = ours.recv() if ours.poll(SECONDS) else ("escaped", f"more than {SECONDS} s")
        except EOFError:
            process.join()
            result, reason = "escaped", f"exit code {process.exitcode}"
        yield file, result, reason, time.perf_counter() - start
        if result == "escaped":
            process.kill()
            process = None
    if process is not None:
        ours.send(None)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Decodes all files of folder trees and prints a table of outcomes.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    folders: list[Path] = parser.parse_args().folders
    rows = []
    for folder in folders:
        counts: Counter[str] = Counter()
        slowest = 0.0
        for file, result, reason, seconds in outcomes(sorted(file for file in folder.rglob("*") if file.is_file())):
            counts[result] += 1
            slowest = max(slowest, seconds)
            if result in ("escaped", "differs"):
                print(f"{result}: {file}: {reason}", flush=True)
        rows.append((folder.name, counts.total(), *(counts[name] for name in OUTCOMES), f"{slowest:.1f}"))
    print("\n| folder | files |", " | ".join(OUTCOMES), "| slowest, s |")
    print("| --- " * 7 + "|")
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
