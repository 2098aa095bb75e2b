"""Recognises exports, and files that are given as weights but are something else, without torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from kamim import KamimError

ARCHITECTURE, DECODER_HEADS = "kamim.architecture", "kamim.decoder_heads"  # keys of the metadata of an exported file
WEIGHTS = "weights are .safetensors files, or state dicts that torch.save wrote"
_KINDS = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"<": "a web page or XML",
    b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched (git lfs pull)",
}


def check_weights(path: Path) -> None:
    """Raises KamimError, which says what it is, for a file that begins as no file of weights does."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(64)
    for magic, kind in _KINDS.items():
        if start.startswith(magic):
            raise KamimError(f"{path}: is {kind}; {WEIGHTS}")


def is_export(file: Path) -> bool:
    """Returns whether a file was written by `kamim export` in the layout of timm or MAE."""
    try:
        with safe_open(file, "numpy") as opened:
            return ARCHITECTURE in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def named(spec: str) -> tuple[str, str]:
    """Splits [NAME=]CHECKPOINT into a name and the checkpoint; by default the name is the last part of its path.

    Raises KamimError if one of them is empty.
    """
    name, equals, source = spec.partition("=") if "=" in spec else ("", "", spec)
    if not source or (equals and not name):
        raise KamimError(f"checkpoint = {spec}: must be [NAME=]CHECKPOINT, such as KAMIM=runs/demo/kamim")
    kind = next((kind for kind in ("random", "pixels", "timm") if source.startswith(f"{kind}:")), "")
    path = Path(source.removeprefix(f"{kind}:"))
    return name or (path.name if kind == "timm" else f"{kind} {path.resolve().name}".strip()), source
