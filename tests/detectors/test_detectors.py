"""FAST equals OpenCV's bit for bit; plug-ins can be named wherever a detector is named."""

import tomllib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import kamim.detectors
from kamim.cli import app
from kamim.cli.pictures import image_weights
from kamim.config.pretrain import Weighting
from kamim.config.schema import load
from kamim.detectors import DETECTORS, detect_packed, detector, names, opencv
from kamim.method.geometry import whole_views
from kamim.method.keypoints import Group, Rules, quantise
from kamim.storage.store import Store
from pipelines.chunk import Crops, Scratch
from pipelines.counts import OnlineCounts

SHARED = Path(__file__).parents[3] / "shared/data/imagenet-sample/train"
OWN = ("akaze", "harris", "shi_tomasi")
runner = CliRunner()


def opencv_fast(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = cv2.FastFeatureDetector_create().detect(rgb)
    xy = np.array([k.pt for k in found], np.float32).reshape(-1, 2)
    return xy, np.array([k.response for k in found], np.float32)


def assert_fast_is_opencvs(rgb: np.ndarray) -> int:
    xy, response = opencv_fast(rgb)
    for found in (detector("fast").detect(rgb), opencv.fast(rgb)):
        for made, expected in ((found.xy, xy), (found.response, response), (found.group, np.zeros(len(xy), np.int64))):
            assert made.dtype == expected.dtype
            np.testing.assert_array_equal(made, expected)
    return len(xy)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([2, 11, 12, 30, 256]),
    st.sampled_from([0, 0.6, 2]),
    st.integers(0, 2**32 - 1),
)
def test_fast_on_random_images(height: int, width: int, levels: int, blur: float, seed: int) -> None:
    """Few levels make contrasts at the threshold and equal scores; blur makes long arcs."""
    random = np.random.default_rng(seed)
    rgb = (random.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))).astype(np.uint8)
    assert_fast_is_opencvs(cv2.GaussianBlur(rgb, (0, 0), blur) if blur else rgb)


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (6, 6), (7, 7), (7, 300), (300, 8), (64, 64)])
def test_fast_finds_nothing_on_one_colour(value: int, size: tuple[int, int]) -> None:
    assert assert_fast_is_opencvs(np.full((*size, 3), value, np.uint8)) == 0


@pytest.mark.parametrize("contrast", [0, 1, 10, 11, 12, 245, 255])
def test_fast_on_squares_of_a_contrast(contrast: int) -> None:
    for low, high in ((0, contrast), (255, 255 - contrast)):
        rgb = np.full((40, 57, 3), low, np.uint8)
        for top, left, side in ((3, 3, 1), (10, 20, 3), (12, 33, 12), (30, 44, 10)):
            rgb[top : top + side, left : left + side] = high
        assert (assert_fast_is_opencvs(rgb) > 0) == (contrast > 10)


def test_fast_on_photographs(photos: list[np.ndarray]) -> None:
    for photo in photos:
        assert assert_fast_is_opencvs(photo) > 1000
        assert_fast_is_opencvs(photo[::2, ::-3])  # not contiguous


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/imagenet-sample")
def test_fast_on_imagenet() -> None:
    for file in sorted(SHARED.glob("*/*"))[::12]:
        assert_fast_is_opencvs(cv2.resize(cv2.imread(str(file)), (210, 210)))


def packed_rows(name: str, rgb: np.ndarray, headroom: float) -> tuple[np.ndarray, list[int]]:
    """A slow detect_packed, one row at a time."""
    rules, found = detector(name).rules, detector(name).detect(rgb, headroom)
    rows: list[tuple[int, int]] = []
    counts = []
    for number, group in enumerate(rules.groups):
        of_group = [
            (-response if group.cap else 0, max(y, 0), max(x, 0))
            for (x, y), at, response in zip(quantise(found.xy), found.group, found.response, strict=True)
            if at == number
        ]
        ordered = sorted(of_group if group.cap else set(of_group))
        rows += [(x, y) for _, y, x in ordered]
        counts.append(len(ordered))
    return np.array(rows, np.uint16).reshape(-1, 2), counts


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_packed_keypoints_are_sorted(name: str, photos: list[np.ndarray]) -> None:
    for rgb in (photos[0], photos[1][:80, :90], photos[2][:5, :5]):
        positions, counts = detect_packed(name, rgb, 1.5)
        expected, expected_counts = packed_rows(name, rgb, 1.5)
        np.testing.assert_array_equal(positions, expected)
        assert positions.dtype == np.uint16
        assert counts.tolist() == expected_counts


# Other packages' detectors.


@pytest.fixture(autouse=True)
def forget() -> None:
    kamim.detectors.detector.cache_clear()


def install(site: Path, distribution: str, registered: dict[str, str], code: str = "") -> None:
    """Installs a package of one module into a site directory, as pip does."""
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in registered.items()]
    (info / "entry_points.txt").write_text("\n".join(["[kamim.detectors]", *lines]) + "\n")
    if code:
        (site / f"{distribution}.py").write_text(code)


CENTRE = """
import numpy as np

class Centre:
    border, grey, snap = 2.5, True, True

    def detect(self, grey):
        assert grey.dtype == np.uint8 and grey.ndim == 2
        self.seen = grey
        return np.array([[7, 4], [grey.shape[1] / 2, 3], [7, 4]]), [1, 2, 1]

class Colour:
    def detect(self, rgb):
        assert rgb.shape[2] == 3
        return np.empty((0, 2)), np.empty(0)

centre, colour = Centre(), Colour()
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def own(site: Path) -> None:
    """Registers the entry points of this project's pyproject.toml, installed or not."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["kamim.detectors"]
    assert set(registered) == set(OWN)
    install(site, "kamim", registered)


def test_an_object_becomes_a_detector(site: Path) -> None:
    install(site, "middling", {"centre": "middling:centre", "colour": "middling:colour"}, CENTRE)
    assert names()[:3] == ("fast", "sift", "orb")
    assert {"centre", "colour"} <= set(names())
    centre = detector("centre")
    assert centre.rules == Rules((Group(border=2.5),), snap=True)
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    found = centre.detect(rgb)
    np.testing.assert_array_equal(found.xy, np.array([[7, 4], [15, 3], [7, 4]], np.float32))
    assert (found.xy.dtype, found.response.dtype, found.group.tolist()) == (np.float32, np.float32, [0, 0, 0])
    weighed = rgb @ np.array([0.114, 0.587, 0.299])
    assert np.abs(__import__("middling").centre.seen - weighed).max() <= 0.51
    positions, counts = detect_packed("centre", rgb, 1.5)
    assert (positions.tolist(), counts.tolist()) == ([[15 * 16, 3 * 16], [7 * 16, 4 * 16]], [2])
    assert detector("colour").rules == Rules((Group(border=0),))
    assert detect_packed("colour", rgb, 1.5)[0].shape == (0, 2)


BROKEN = """
import numpy as np
one_array = type("D", (), {"detect": lambda self, rgb: np.zeros((3, 2))})()
flat = type("D", (), {"detect": lambda self, rgb: (np.zeros(6), np.zeros(3))})()
unequal = type("D", (), {"detect": lambda self, rgb: (np.zeros((3, 2)), np.zeros(2))})()
nowhere = type("D", (), {"detect": lambda self, rgb: (np.full((3, 2), np.nan), np.zeros(3))})()
scalar = type("D", (), {"detect": lambda self, rgb: (np.zeros((1, 2)), 1.0)})()
wide = type("D", (), {"detect": lambda self, rgb: None, "border": "wide"})()

def fail(self, rgb):
    raise ArithmeticError("two\\nlines")

failing = type("D", (), {"detect": fail})()
half = type("D", (), {"detect": lambda self, rgb: ([[1, 2], [3.5, 2]], [1, 1]), "snap": True})()
beyond = type("D", (), {"detect": lambda self, rgb: ([[1, 2], [3, 9]], [1, 1]), "snap": True})()
kind = type("D", (), {"detect": lambda self, rgb: None})
number = 3
"""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("broken:number", "broken:number is not an object with detect"),
        ("broken:kind", "broken:kind is not an object with detect"),
        ("broken:absent", "cannot be used: AttributeError"),
        ("absent_module:d", "cannot be used: ModuleNotFoundError"),
        ("broken:one_array", "failed: ValueError"),
        ("broken:flat", r"gave xy [6] and response [3]"),
        ("broken:unequal", r"gave xy [3, 2] and response [2]"),
        ("broken:nowhere", "needs finite xy"),
        ("broken:scalar", "response []"),
        ("broken:wide", "cannot be used: ValueError: could not convert"),
        ("broken:failing", "failed: ArithmeticError: two lines"),
        ("broken:half", "has snap, but gave xy that are not whole pixels of the array"),
        ("broken:beyond", "has snap, but gave xy that are not whole pixels of the array"),
    ],
)
def test_a_broken_one_is_told_in_a_line_with_its_distribution(site: Path, value: str, said: str) -> None:
    install(site, "broken", {"odd": value}, BROKEN)
    with pytest.raises(ValueError, match="detector 'odd' of broken: ") as told:
        detector("odd").detect(np.zeros((9, 9, 3), np.uint8))
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_one_name_of_two_packages_is_refused(site: Path) -> None:
    for distribution in ("centrist", "middling"):
        install(site, distribution, {"centre": "middling:centre"}, CENTRE)
    assert names().count("centre") == 1
    with pytest.raises(ValueError, match=r"'centre' of (centrist and of middling|middling and of centrist): one name"):
        detector("centre")


def test_a_built_in_name_stays_the_built_in(site: Path) -> None:
    install(site, "middling", {"fast": "middling:centre"}, CENTRE)
    assert names().count("fast") == 1
    assert detector("fast") is DETECTORS["fast"]


def test_an_unknown_name_lists_all(own: None) -> None:
    listed = "must be one of fast, sift, orb, akaze, harris, shi_tomasi"
    with pytest.raises(ValueError, match=f"detector = 'surf': {listed}"):
        detector("surf")
    with pytest.raises(ValueError, match=f"detector = 'surf': {listed}"):
        load(Weighting, None, ["detector=surf"])
    told = runner.invoke(app, ["preprocess", "sample", "--out", "x", "--detectors", "surf"])
    assert told.exit_code == 1
    assert listed in told.stderr


@pytest.mark.parametrize("name", OWN)
def test_own_plug_ins_find_what_is_there(own: None, name: str) -> None:
    """Bright squares, each alone: corners at its four corners, blobs within it."""
    rgb = np.zeros((100, 140, 3), np.uint8)
    squares = [(20, 25), (60, 90), (70, 40)]
    for top, left in squares:
        rgb[top : top + 10, left : left + 10] = 255
    xy = detector(name).detect(rgb).xy
    owner = [[max(abs(x - left - 4.5), abs(y - top - 4.5)) < 8 for top, left in squares] for x, y in xy]
    assert (np.sum(owner, axis=1) == 1).all()
    corners = np.sum(owner, axis=0)
    assert (corners >= (4 if name != "akaze" else 1)).all()
    np.testing.assert_array_equal(xy, detector(name).detect(rgb).xy)


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_own_plug_ins_take_any_image(name: str, height: int, width: int, flat: bool) -> None:
    entry = {"akaze": "akaze", "harris": "corners", "shi_tomasi": "corners"}[name]
    plug_in = getattr(__import__(f"kamim.detectors.{entry}", fromlist=[name]), name)
    image = np.random.default_rng(height * 41 + width).integers(0, 1 if flat else 256, (height, width)).astype(np.uint8)
    xy, response = plug_in.detect(image)
    assert xy.shape == (len(response), 2)
    assert np.isfinite(xy).all() and np.isfinite(response).all()
    assert not flat or len(xy) == 0
    if len(xy):  # AKAZE moves a maximum by a pixel of its octave at most
        assert (xy > -1).all() and (xy < (width, height)).all()


def test_akaze_finds_a_disc_at_its_centre_wherever_it_is(own: None) -> None:
    for x, y in ((60, 50), (71, 34), (40, 90)):
        image = np.zeros((120, 130), np.uint8)
        cv2.circle(image, (x, y), 6, 255, -1)
        xy = detector("akaze").detect(np.dstack([cv2.GaussianBlur(image, (0, 0), 1)] * 3)).xy
        assert len(xy)
        np.testing.assert_allclose(xy, np.broadcast_to((x, y), xy.shape), atol=0.05)


def test_a_plug_in_goes_wherever_a_name_goes(own: None, folder: Path, tmp_path: Path) -> None:
    store = Store(make_store(folder, tmp_path / "store", detectors=("akaze", "harris")))
    assert store.detectors == ("akaze", "harris")
    assert sum(len(store.keypoints("harris").image(i)[0]) for i in range(len(store))) > 0
    counts = np.empty((1, 12, 12), np.int16)
    crop = cv2.resize(cv2.imread(str(next(folder.glob("*/*.png")))), (96, 96))
    size = np.array([[96, 96]])
    crops = Crops(np.array([0]), size, whole_views(size), crop[None])
    OnlineCounts("akaze", "ring", 8).count(crops, Scratch(96, room=0, rows=0), counts)
    assert counts.sum() > 0
    image = str(next(folder.glob("*/*.png")))
    for command in (
        ["weights", image, "--detector", "akaze"],
        ["store", "preview", str(store.path), "--out", str(tmp_path / "p.png"), "--detector", "akaze"],
        ["bench", "fidelity", "--source", str(folder), "--detectors", "akaze,shi_tomasi", "--images", "4"],
    ):
        told = runner.invoke(app, command)
        assert told.exit_code == 0, told.output
        assert "akaze" in told.output or "p.png" in told.output


DOCS = (Path(__file__).parents[2] / "docs/detectors.md").read_text()


def test_edges_are_a_detector_as_the_docs_say(site: Path, folder: Path, tmp_path: Path) -> None:
    """The docs' own lines: F of an image is its edges, and a store's counts are of its edges."""
    _, _, rest = DOCS.partition("<!-- tested: edges -->\n```python\n")
    code = rest.partition("```")[0]
    assert code.count("\n") <= 16
    install(site, "outlines", {"edges": "outlines:edges"}, code)
    image = next(folder.glob("*/*.png"))
    rgb = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
    edges = cv2.Canny(cv2.cvtColor(rgb, cv2.COLOR_BGR2GRAY), 100, 200) > 0  # kamim's grey takes RGB for BGR
    np.testing.assert_array_equal(image_weights(rgb, Weighting(detector="edges", footprint="point")).bitmap, edges)
    store = Store(make_store(folder, tmp_path / "store", detectors=("edges",)))
    positions, counts = store.keypoints("edges").image(0)
    assert len(positions) == counts.sum() > 50
    assert (positions % 16 == 0).all()


def test_a_plug_in_is_given_the_key_if_it_asks_for_it(site: Path, folder: Path, tmp_path: Path) -> None:
    """A detector that puts a keypoint where the file's name says."""
    code = """
class Named:
    def detect(self, rgb, key):
        number = int(key[-5]) if key else 9
        return [[number, 2 * number]], [1]

named = Named()
"""
    install(site, "namesakes", {"named": "namesakes:named"}, code)
    for name in "0123":
        (tmp_path / "source").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"source/{name}.png"), np.zeros((64, 64, 3), np.uint8))
    store = Store(make_store(tmp_path / "source", tmp_path / "store", detectors=("named",)))
    assert [store.keypoints("named").image(i)[0].tolist() for i in range(4)] == [[[16 * i, 32 * i]] for i in range(4)]
    assert detector("named").detect(np.zeros((64, 64, 3), np.uint8)).xy.tolist() == [[9, 18]]


def test_worker_processes_find_plug_ins(site: Path) -> None:
    install(site, "middling", {"centre": "middling:centre"}, CENTRE)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        positions, _ = pool.submit(detect_packed, "centre", np.zeros((20, 30, 3), np.uint8), 1.5).result()
    assert positions.tolist() == [[240, 48], [112, 64]]
