"""Reads all metadata of parquet files, whose names come from standard input, and prints a dot for each.

The module `huggingface` first runs this script in a separate process, as pyarrow aborts on some damaged metadata.
"""

import contextlib
import os
import sys


def main() -> None:
    """Reads the names, which are separated by zero bytes."""
    import pyarrow.parquet as pq

    for file in sys.stdin.buffer.read().split(b"\0"):
        with contextlib.suppress(Exception):  # raised again when the file is listed
            metadata = pq.ParquetFile(os.fsdecode(file)).metadata
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in range(group.num_columns):
                    group.column(column)
        print(".", end="", flush=True)


if __name__ == "__main__":
    main()
