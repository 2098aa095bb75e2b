"""Images and masks: the same crop of both, equal to a slow twin, and a pure function of (seed, epoch, index)."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from kamim import KamimError
from kamim.evaluation.dense import DenseLoader, crop_nearest
from kamim.method import geometry
from pipelines.loader import Crop, SampleError
from pipelines.plan import Plan

SIDE, SEED = 24, 5
SIZES = [(40, 60), (33, 25), (24, 24), (90, 31), (7, 50)]
CROP = Crop((0.25, 1.0))


@dataclass
class Scenes:
    """Random images and masks, as large as their files."""

    damaged: int = -1

    def image(self, index: int, area: float) -> np.ndarray:
        if index == self.damaged:
            raise KamimError("images/x.png: truncated")
        return np.random.default_rng(index).integers(0, 256, (*SIZES[index], 3)).astype(np.uint8)

    def mask(self, index: int) -> np.ndarray:
        return np.random.default_rng(100 + index).integers(-1, 4, SIZES[index]).astype(np.int16)


def plan(**options: int) -> Plan:
    return Plan(len(SIZES), **{"batch_size": 4, "micro_batch": 4, "seed": SEED, **options})  # type: ignore[arg-type]


def slow(array: np.ndarray, view: np.ndarray, mode: str) -> torch.Tensor:
    """[H, W, C] -> the view of it, [C, SIDE, SIDE], in three steps of torch."""
    top, left, height, width, flip_v, flip_h = view.tolist()
    box = torch.from_numpy(array[top : top + height, left : left + width].astype(np.float64)).permute(2, 0, 1)
    out = interpolate(box[None], (SIDE, SIDE), mode=mode)[0]
    return out.flip([axis for axis, flip in ((1, flip_v), (2, flip_h)) if flip])


def test_image_and_mask_are_cropped_alike_and_as_the_slow_twin_crops() -> None:
    scenes, epochs = Scenes(), 6
    loader = DenseLoader(scenes, plan(batch_size=5, micro_batch=2), SIDE, CROP, workers=2)
    seen = np.zeros(2)
    for batch in loader.micro_batches(0, epochs):
        for image, labels, index in zip(batch.images, batch.labels, batch.indices.tolist(), strict=True):
            view = geometry.crop_views(
                np.array([SIZES[index]]), CROP.scale, CROP.ratio, SEED, batch.epoch, np.array([index])
            )[0]
            seen += view[4:]
            expected = slow(scenes.image(index, 0), view, "bilinear")
            assert (image.permute(2, 0, 1) - expected).abs().max() <= 1
            torch.testing.assert_close(labels, slow(scenes.mask(index)[..., None], view, "nearest-exact")[0].long())
    assert (seen > 0).all()


def test_whole_images_are_not_cropped() -> None:
    scenes = Scenes()
    (batch,) = DenseLoader(scenes, plan(batch_size=5, micro_batch=5, order="stored"), SIDE, workers=1).micro_batches(
        0, 1
    )
    assert batch.indices.tolist() == [0, 1, 2, 3, 4]
    for index in range(5):
        view = np.array([0, 0, *SIZES[index], 0, 0])
        expected = slow(scenes.mask(index)[..., None], view, "nearest-exact")[0]
        torch.testing.assert_close(batch.labels[index], expected.long())
    assert batch.labels.dtype == torch.int64 and batch.labels.min() == -1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.booleans(), st.data())
def test_a_mask_larger_than_its_image_is_taken_at_the_same_place(
    height: int, width: int, factor: int, flip: bool, data: st.DataObject
) -> None:
    """A mask whose pixels are each repeated `factor` times shows the same scene, so that the same view is equal."""
    values = np.arange(height * width).reshape(height, width)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    view = np.array([top, left, h, w, flip, not flip])
    large = values.repeat(factor, 0).repeat(factor, 1)
    np.testing.assert_array_equal(
        crop_nearest(large, (height, width), view, SIDE), crop_nearest(values, (height, width), view, SIDE)
    )


def test_batches_depend_on_neither_threads_nor_ranks_nor_where_they_begin() -> None:
    whole = list(DenseLoader(Scenes(), plan(), SIDE, CROP, workers=3).micro_batches(0, 4))
    (alone,) = DenseLoader(Scenes(), plan(), SIDE, CROP, workers=1).micro_batches(3, 4)
    torch.testing.assert_close(alone.images, whole[3].images)
    torch.testing.assert_close(alone.labels, whole[3].labels)
    parts = [
        batch
        for rank in range(2)
        for batch in DenseLoader(
            Scenes(), plan(rank=rank, world=2, micro_batch=1), SIDE, CROP, workers=1
        ).micro_batches(3, 4)
    ]
    torch.testing.assert_close(torch.cat([part.labels for part in parts]), whole[3].labels)
    assert sum(part.loss_weight for part in parts) == pytest.approx(1) and not torch.equal(
        whole[2].labels, whole[3].labels
    )


def test_a_sample_that_cannot_be_read_is_one_line_and_threads_end() -> None:
    with pytest.raises(SampleError, match=r"^images/x\.png: truncated$"):
        list(DenseLoader(Scenes(damaged=3), plan(), SIDE, CROP, workers=2).micro_batches(0, 5))
    batches = DenseLoader(Scenes(), plan(), SIDE, CROP, workers=2).micro_batches(0, 1000)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kamim-dense")]


def test_a_rank_without_samples_takes_part() -> None:
    (batch,) = DenseLoader(Scenes(), plan(batch_size=5, micro_batch=5), SIDE, CROP, workers=1).micro_batches(0, 1)
    stand_in = batch.stand_in()
    assert stand_in.labels.shape == (1, SIDE, SIDE) and (stand_in.labels == -1).all() and stand_in.loss_weight == 0
