"""Results: their JSON is that of the versions before them."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kamim import KamimError
from kamim.evaluation.modes import MODES, read_result
from kamim.evaluation.options import MODES as NAMES
from kamim.evaluation.results import (
    Accuracy,
    CorruptedAccuracy,
    FewShotAccuracy,
    KnnAccuracy,
    Reconstructions,
    Result,
    Robustness,
    SampleSet,
    Segmentation,
    ShapeBias,
    ShotAccuracy,
    headline,
    majority_lines,
)
from kamim.reporting.intervals import with_wilson

WRITTEN: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fixtures/results.json").read_text())
"""What version 0.2.0 wrote when results were dictionaries: every mode on a run, and a linear probe of pixels."""


def result_of(mode: str) -> dict[str, Any]:
    return copy.deepcopy(next(content for content in WRITTEN if content["mode"] == mode))


@pytest.mark.parametrize("content", WRITTEN, ids=lambda content: f"{content['mode']} of {content['name']}")
def test_a_result_is_written_as_it_was_read(content: dict[str, Any]) -> None:
    """Byte for byte: the same keys in the same order."""
    result = read_result(content)
    assert json.dumps(result.as_json(), indent=2) == json.dumps(content, indent=2)
    settings = {
        key: value
        for key, value in content.items()
        if key not in ("top1", "top5", "k", "rows", "best", "paper", "honest")
    }
    assert result.settings.as_json() == settings


def test_results_have_fields() -> None:
    probe, neighbours, sweep, similarity = (
        read_result(result_of(mode)) for mode in ("linprobe", "knn", "probe-sweep", "reconstruct")
    )
    assert probe.settings.block == result_of("linprobe")["block"]
    assert probe.settings.train is not None and probe.settings.train.images == result_of("linprobe")["train"]["images"]
    assert headline(probe).startswith(f"{result_of('linprobe')['top1']:.2f} [")
    assert neighbours.measured.k[5].top5 == result_of("knn")["k"]["5"]["top5"]
    assert sweep.measured.best in sweep.measured.rows
    assert similarity.settings.train is None and similarity.settings.block is None
    assert similarity.measured.honest.psnr == result_of("reconstruct")["honest"]["psnr"]


def test_headlines_and_summaries() -> None:
    settings = replace(read_result(result_of("knn")).settings, val=SampleSet("val", "imagefolder", 10, ""))
    knn = KnnAccuracy({5: Accuracy(10, 20), 20: Accuracy(70, 80)})
    assert headline(Result(settings, knn)) == "70.00 [39.7, 89.2]"  # Wilson's interval of 7 in 10
    assert knn.summary(10) == "k 5: top-1 10.00 [1.8, 40.4] %, k 20: top-1 70.00 [39.7, 89.2] %"
    reconstructed = read_result({**result_of("reconstruct"), "paper": None})
    one = reconstructed.measured
    assert one.summary(10) == f"honest PSNR {one.honest.psnr:.2f} dB, SSIM {one.honest.ssim:.4f}"
    assert headline(reconstructed) == f"{one.honest.psnr:.2f}"  # decibels have no interval
    assert headline(Result(settings, Reconstructions())) == ""


def test_the_majority_baseline_is_one_line_for_each_pair_of_stores() -> None:
    content = result_of("linprobe")
    old, new = read_result(content), read_result({**content, "majority_top1": 25.0})
    assert new.as_json() == {**content, "majority_top1": 25.0}
    images = new.settings.val.images
    (line,) = majority_lines([old, new, new])
    assert line.startswith(f"majority class: top-1 {with_wilson(25.0, images)} % ")
    assert len(majority_lines([new, replace(new, majority_top1=50.0)])) == 2
    with pytest.raises(KamimError, match="not a result of kamim eval"):
        read_result({**content, "majority_top1": "much"})


@pytest.mark.parametrize(
    ("mode", "measured"),
    [
        ("segment", Segmentation(50.0, 75.0, {"sky": 50.0, "road": None})),
        (
            "few-shot",
            FewShotAccuracy((ShotAccuracy(1, 10, 20.0, 1.0, 19.0, 1.0), ShotAccuracy(None, 90, 40.0, 0, 41.0, 0))),
        ),
        (
            "corruptions",
            Robustness(50.0, 40.0, (CorruptedAccuracy("blur", 1, 30.0, 20.0), CorruptedAccuracy("blur", 2, 10.0, 9.0))),
        ),
        ("shape-bias", ShapeBias(0, 0, 3, {"cat": None})),
        ("shape-bias", ShapeBias(3, 1, 0, {"cat": 75.0}, 75.0)),
    ],
)
def test_later_results_are_read_as_they_were_written(mode: str, measured: Any) -> None:
    result = Result(read_result(result_of("linprobe")).settings, measured)
    content = json.loads(json.dumps({**result.as_json(), "mode": mode}))
    assert read_result(content).measured == measured
    assert headline(result) in ("50.00", "20.00", "", "75.00") and measured.summary(result.settings.val.images)


def test_keys_of_other_versions() -> None:
    """Early results lack some keys and hold others."""
    old = {**result_of("linprobe"), "reconstructs": True}
    for key in ("resolution", "batch_size", "pretraining"):
        del old[key]
    assert read_result(old).settings.pretraining is None
    assert read_result(old).measured == read_result(result_of("linprobe")).measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "guess"}, "mode 'guess'; must be one of linprobe, finetune, knn"),
        ({"top1": "much"}, "top1: "),
        ({"train": {"store": "x"}}, "train.dataset: Field required"),
        ({"options": None}, "options: "),
    ],
)
def test_what_is_no_result_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KamimError, match=f"not a result of kamim eval .{message}"):
        read_result({**result_of("linprobe"), **change})
    with pytest.raises(KamimError, match="not a result of kamim eval"):
        read_result([])


def test_every_mode_has_a_name_of_the_configuration() -> None:
    assert tuple(MODES) == NAMES
