"""What is kept of an image, for images of any size and format: from a file's bytes to the rows of a store."""

import io
from typing import Any

import numpy as np
import pytest
from conftest import plan_job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kamim.method import geometry
from kamim.storage import gaps
from kamim.storage.manifest import Job
from preprocess.decode import decode
from preprocess.record import join, no_rows, record

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "CMYK", "L"),
    "BMP": ("RGB", "L", "P"),
    "GIF": ("P", "L"),
    "PPM": ("RGB", "L"),
}
FORMATS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("one")
    Image.new("RGB", (9, 9)).save(root / "1.png")
    return {
        encoding: plan_job(root, detectors=("fast", "sift", "orb"), encoding=encoding, resolution=32)[0]  # type: ignore[arg-type]
        for encoding in ("jpeg", "raw")
    }


def file_of(height: int, width: int, seed: int, kind: str, mode: str) -> bytes:
    """Smooth noise, so that keypoints are found in some."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4 + seed % 9, 4 + seed % 7, 3)).astype(np.uint8))
    image: Any = small.resize((width, height), Image.Resampling(seed % 3))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    stream = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(stream, kind)
    return stream.getvalue()


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(0, 2**20),
    st.sampled_from(FORMATS),
    st.sampled_from(["jpeg", "raw"]),
)
def test_a_record_is_whole_whatever_the_image(
    jobs: dict[str, Job], height: int, width: int, seed: int, form: tuple[str, str], encoding: str
) -> None:
    job = jobs[encoding]
    rgb = decode(file_of(height, width, seed, *form))
    assert rgb.shape == (height, width, 3)
    made = record(job, rgb, rgb, 3, job.components)
    images = made["images"]
    size = images["size"][0]
    assert tuple(size) == geometry.stored_size(height, width, geometry.stored_area(32, (0.67, 1.0)))
    assert (size <= (height, width)).all()
    assert images["length"].tolist() == [len(images["data"])]
    if encoding == "raw":
        stored = images["data"].reshape(*size, 3)
        if tuple(size) == (height, width):
            np.testing.assert_array_equal(stored, rgb)
    else:
        assert decode(images["data"].tobytes()).shape == (*size, 3)
    for name in job.detectors:
        rows = made[name]
        (frames,), (counts,) = rows["frame"], rows["counts"]
        assert frames.tolist() == list(
            map(list, geometry.canonical_frames(height, width, 32, (0.67, 1.0), len(frames)))
        )
        ends, stored = np.cumsum(counts.sum(axis=1)), rows["gaps" if name == "fast" else "positions"]
        assert ends[-1] == len(stored)
        for frame, part in zip(frames, np.split(stored, ends[:-1]), strict=True):
            positions = gaps.decode(part, *frame.tolist()) if name == "fast" else part
            assert (positions <= 16 * frame[::-1].astype(int)).all()
    again = record(job, rgb, rgb.copy(), 3, ("sift", "images"))  # in any company, in any order
    for component, rows in again.items():
        for name, array in rows.items():
            np.testing.assert_array_equal(array, made[component][name])


def test_rows_of_no_image_have_the_types_of_any(jobs: dict[str, Job]) -> None:
    job = jobs["jpeg"]
    image = np.zeros((50, 60, 3), np.uint8)
    one = record(job, image, image, 1, job.components)
    for component in job.components:
        empty = no_rows(job, component)
        none, two = join([], empty), join([one[component]] * 2, empty)
        for name, array in one[component].items():
            assert len(none[name]) == 0
            assert none[name].dtype == array.dtype
            assert none[name].shape[1:] == array.shape[1:]
            np.testing.assert_array_equal(two[name], np.concatenate([array, array]))
