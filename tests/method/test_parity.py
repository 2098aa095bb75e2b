"""Equal to the reference: keypoints, maps F, weights W and losses, on golden values.

The fixture in the repository always runs. The larger set of values computed by the released code itself lies
in ../shared beside a developer's checkout; where that is absent its tests are skipped.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from kamim.detectors import DETECTORS, detector
from kamim.method import keypoints as kp
from kamim.method.loss import masked_l1
from kamim.method.weighting import counts_to_weights
from pipelines.batch import normalise

Golden = Mapping[str, np.ndarray]
OWN = Path(__file__).parents[1] / "fixtures/parity.npz"
SHARED = Path(__file__).parents[3] / "shared/data/reference_weights.npz"


@pytest.fixture(scope="module", params=["own", "shared"])
def golden(request: pytest.FixtureRequest) -> Golden:
    path = OWN if request.param == "own" else SHARED
    if not path.exists():
        pytest.skip("needs ../shared/data/reference_weights.npz")
    return dict(np.load(path))


def rings(golden: Golden, name: str) -> np.ndarray:
    return np.unpackbits(golden[f"{name}_ring_bits"], axis=2).astype(bool)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_keypoints(golden: Golden, name: str) -> None:
    offsets = golden[f"{name}_offsets"]
    for i, image in enumerate(golden["images"]):
        found = detector(name).detect(image)
        expected = golden[f"{name}_xy"][offsets[i] : offsets[i + 1]]
        assert found.xy.shape == expected.shape
        np.testing.assert_allclose(found.xy, expected, atol=1e-3 if name == "sift" else 0, rtol=0)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_ring_maps_bit_for_bit(golden: Golden, name: str) -> None:
    expected = rings(golden, name)
    for i, image in enumerate(golden["images"]):
        made = kp.keypoint_map(detector(name).detect(image).xy, 192, 192, "ring")
        np.testing.assert_array_equal(made, expected[i])


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_weights(golden: Golden, name: str) -> None:
    settings = [key for key in golden if key.startswith(f"{name}_weights_ps")]
    assert len(settings) >= 3
    for key in settings:
        patch, temperature = key.removeprefix(f"{name}_weights_ps").split("_T")
        counts = np.stack([kp.map_counts(ring, int(patch)) for ring in rings(golden, name)])
        made = counts_to_weights(torch.from_numpy(counts), int(patch), float(temperature))
        np.testing.assert_allclose(made.numpy(), golden[key], rtol=1e-5)


def losses(golden: Golden) -> list[str]:
    return [key for key in golden if "_loss" in key]


def test_losses(golden: Golden) -> None:
    x = normalise(torch.from_numpy(golden["images"]))
    if "reconstruction" in golden:
        made, mask = torch.from_numpy(golden["reconstruction"]), torch.from_numpy(golden["mask_16"]).bool()
    else:
        made, mask = x.flip(-1), torch.from_numpy(golden["masks"])
    n = len(made)
    assert len(losses(golden)) == 10
    for key in losses(golden):
        w = None
        if key != "simmim_loss":
            w = torch.from_numpy(golden[key.replace("_loss_", "_weights_")])[:n]
        assert float(masked_l1(x[:n], made, mask[:n], w)) == pytest.approx(float(golden[key]), rel=1e-4)
