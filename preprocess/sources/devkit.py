"""Prints the classes in meta.mat of ImageNet's devkit: a JSON object from ILSVRC2012_ID to WordNet id.

The module `imagenet` runs this script in a separate process, as scipy's reader of MATLAB files crashes on damaged
ones. The classes are the synsets without children (the devkit's readme).
"""

import io
import json
import sys


def main() -> None:
    """Reads meta.mat from standard input."""
    from scipy.io.matlab import loadmat

    synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
    print(json.dumps({int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}))


if __name__ == "__main__":
    main()
