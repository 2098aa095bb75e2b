"""Configurations: rejected values, error messages, and presets equal to the paper's settings."""

from pathlib import Path

import pytest
import yaml

from kamim import KamimError
from kamim.config.pretrain import Pretrain
from kamim.config.schema import dump, load
from kamim.evaluation.options import Evaluation
from kamim.training.checkpoint import Checkpoint
from kamim.training.data import coarse_mask

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NEEDED = ("data.store=s", "out=o")


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load(Pretrain, None, [*NEEDED, *overrides])
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; allowed are lr, weight_decay, betas,"),
        ("weighting.temp=1", "weighting.temp: unknown key; allowed are detector, footprint, patch_size, temperature,"),
        ("colour=red", "colour: unknown key; allowed are data, method, model, decoder, mask,"),
        ("optim.lr=fast", "optim.lr = 'fast': input should be a valid number"),
        ("optim.epochs=1.5", "optim.epochs = 1.5: input should be a valid integer"),
        ("optim.epochs=0", "optim.epochs = 0: input should be greater than 0"),
        ("weighting.temperature=0", "weighting.temperature = 0: input should be greater than 0"),
        ("weighting.temperature=-1", "weighting.temperature = -1: input should be greater than 0"),
        ("weighting.detector=surf", "weighting.detector = 'surf': must be one of fast, sift, orb"),
        ("weighting.footprint=disc", "weighting.footprint = 'disc': must be one of ring, point"),
        ("weighting.patch_size=7", "data.resolution = 192: must be a multiple of weighting.patch_size = 7"),
        ("mask.patch_size=40", "data.resolution = 192: must be a multiple of mask.patch_size = 40"),
        ("mask.patch_size=24", "mask.patch_size = 24: must be a multiple of model patch = 16"),
        ("mask.ratio=1.5", "mask.ratio = 1.5: input should be less than or equal to 1"),
        ("data.resolution=100", "data.resolution = 100: must be a multiple of model patch = 16"),
        (
            "model.name=resnet50",
            "model.name = 'resnet50': timm's resnet50 is not one of the ViTs and Swins that can be"
            " pretrained; choose vit_tiny, vit_small, vit_base,",
        ),
        ("model.name=vit_smal", "or a ViT or Swin of timm; the nearest names are vit_small, "),
        ("model.name=xyz", "or a ViT or Swin of timm, such as vit_small_patch16_224 or swin_tiny_patch4_window7_224"),
        ("data.crop_scale=[1.0,0.5]", "data.crop_scale = [1.0, 0.5]: the first must not be larger than the second"),
        ("optim.warmup_epochs=100", "optim.warmup_epochs = 100: must be less than epochs = 100"),
        ("compute.device=tpu", "compute.device = 'tpu': input should be 'auto', 'cuda' or 'cpu'"),
        ("optim.lr=.inf", "optim.lr = inf: input should be a finite number"),
        ("optim.betas=[0.9]", "optim.betas: has too few values"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1 = 1.0: input should be less than 1"),
        ("optim.duration=1e400 steps", "optim.duration = '1e400 steps': must be a number and its unit"),
        ("seed=1e30", "seed = 1e+30: "),
        ("optim.duration=100", "optim.duration = 100: input should be a valid string"),
        ("optim.warmup=5 minutes", "optim.warmup = '5 minutes': must be a number and its unit, such as 5000 steps,"),
        ("compute.precision=fp16", "compute.precision = 'fp16': input should be 'auto', 'bf16' or 'fp32'"),
        ("on_nonfinite=ignore", "on_nonfinite = 'ignore': input should be 'stop' or 'skip'"),
        ("optim", "'optim': overrides are key=value"),
        ("optim.lr=[1", "'optim.lr=[1': the value is not YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(override: str, expected: str) -> None:
    assert expected in refused(override)


def test_a_missing_key_says_how_to_set_it() -> None:
    with pytest.raises(ValueError, match=r"data: is missing; set it in the file or as data=\.\.\.; out: is missing"):
        load(Pretrain, None)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file nor a preset"):
        load(Pretrain, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        load(Pretrain, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold keys and values, holds list"):
        load(Pretrain, tmp_path / "list.yaml")


HOSTILE_YAML = {
    "hexadecimal": (f"seed: 0x{'1' * 5000}", "a number of more than 64 characters"),
    "decimal": (f"seed: {'1' * 5000}", "a number of more than 64 characters"),
    "base 60": (f"seed: {':'.join(['1'] * 400)}", "a number of more than 64 characters"),
    "base 60, float": (f"seed: {':'.join(['1'] * 400)}.5", "a number of more than 64 characters"),
    "10^60": (f"optim: {{epochs: 1{'0' * 60}}}", "optim.epochs = 1000000000000000"),
    "10^13 epochs": (f"optim: {{epochs: 1{'0' * 13}}}", "should be less than or equal to 1000000000000"),
    "a large rate": ("optim: {lr: 1.0e300}", "should be less than or equal to 1000000000000"),
    "itself": ("data: &a {store: *a}", "more than 20 levels, or an alias inside what it names"),
    "itself, wide": (f"data: &a [{'*a, ' * 9000}]", "more than 10,000 values"),
    "aliases": (
        "a: &a [1, 2]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{chr(ord(n) - 1)}'] * 8)}]\n" for n in "bcdefghij"),
        "more than 10,000 values",
    ),
    # PyYAML before 6.0.4 makes 8^9 pairs of these.
    "merges": (
        "a: &a {x: 1}\n"
        + "".join(f"{n}: &{n} {{<<: [{', '.join([f'*{chr(ord(n) - 1)}'] * 8)}]}}\n" for n in "bcdefghij"),
        "a: unknown key",
    ),
    "long": ("a: b\n" * 10**5, "characters; must be at most 262,144"),
    "int of nothing": ("seed: !!int ''", "the tag tag:yaml.org,2002:int is not supported"),
    "timestamp": ("seed: !!timestamp x", "the tag tag:yaml.org,2002:timestamp is not supported"),
    "set": ("seed: !!set {a, b}", "the tag tag:yaml.org,2002:set is not supported"),
    "binary": ("out: !!binary aGVsbG8=", "the tag tag:yaml.org,2002:binary is not supported"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_numbers_and_sizes_of_yaml_are_limited(name: str, tmp_path: Path) -> None:
    text, said = HOSTILE_YAML[name]
    (tmp_path / "c.yaml").write_text(f"data: {{store: s}}\nout: o\n{text}" if "data:" not in text else text)
    with pytest.raises(KamimError) as error:
        load(Pretrain, tmp_path / "c.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)
    key, _, value = text.partition(": ")
    if "\n" not in value:
        with pytest.raises(KamimError) as error:
            load(Pretrain, None, [*NEEDED, f"{key}={value}"])
        assert said in str(error.value) or key == "data"


def test_dates_and_merges_are_read(tmp_path: Path) -> None:
    """As PyYAML reads them, except that a date is the text that was written."""
    text = "data: &a {store: s, resolution: 96}\nout: 2026-11-22\ninit_from: 2026-11-22 10:00:00\n"
    (tmp_path / "c.yaml").write_text(text + "weighting: null\nmask: {<<: {ratio: 0.5}}")
    made = load(Pretrain, tmp_path / "c.yaml")
    assert (made.out, made.init_from, made.mask.ratio) == (Path("2026-11-22"), Path("2026-11-22 10:00:00"), 0.5)


def test_overrides_win_over_the_file_and_numbers_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {store: a}\nout: b\noptim: {lr: 1.0}\n")
    made = load(Pretrain, tmp_path / "c.yaml", ["optim.lr=1e-3", "out=runs/x", "weighting.temperature=0.5"])
    assert made.optim.lr == 1e-3
    assert made.out == Path("runs/x")
    assert made.weighting is not None
    assert made.weighting.temperature == 0.5


def test_a_null_section_is_not_brought_back_by_one_of_its_keys() -> None:
    with pytest.raises(ValueError, match=r"'weighting\.temperature=1': weighting is null here"):
        load(Pretrain, CONFIGS / "pretrain/vit_base_simmim.yaml", ["weighting.temperature=1"])


def test_what_is_shown_reads_back_to_the_same(tmp_path: Path) -> None:
    made = load(Pretrain, None, [*NEEDED, "weighting=null", "optim.clip_grad=null", "optim.cosine_epochs=90"])
    (tmp_path / "c.yaml").write_text(dump(made))
    assert load(Pretrain, tmp_path / "c.yaml") == made


@pytest.mark.parametrize("file", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda file: file.stem)
def test_pretraining_presets(file: Path) -> None:
    made = load(Pretrain, file)
    model, _, method = file.stem.rpartition("_")
    if method not in ("kamim", "simmim") or model == "vit_base_relpos":  # not one of the paper's
        return
    assert made.model.name == model
    assert (made.weighting is None) == (method == "simmim")
    if made.weighting is not None:
        w = made.weighting
        assert (w.detector, w.footprint, w.patch_size, w.temperature) == ("fast", "ring", 8, 0.25)
    optim = made.optim
    assert (optim.lr, optim.weight_decay, optim.batch_size, optim.epochs) == (8e-4, 0.05, 2048, 100)
    assert (made.data.resolution, made.mask.patch_size, made.mask.ratio) == (192, 32, 0.6)
    assert made.model.drop_path == 0  # the released code's drop_path_rate, for its Swins too


def test_fine_tuning_has_no_stochastic_depth_as_the_released_codes() -> None:
    assert load(Evaluation, None, NEEDED_TO_EVALUATE).finetune.drop_path == 0
    assert load(Evaluation, CONFIGS / "eval/finetune.yaml", NEEDED_TO_EVALUATE).finetune.drop_path == 0


def test_a_checkpoint_states_its_own_stochastic_depth(tmp_path: Path) -> None:
    """Older Swin runs were trained with 0.1, and resume with it."""
    made = load(Pretrain, CONFIGS / "pretrain/swin_tiny_kamim.yaml", ["model.drop_path=0.1"])
    (tmp_path / "config.yaml").write_text(dump(made))
    assert load(Pretrain, tmp_path / "config.yaml").model.drop_path == 0.1
    checkpoint = Checkpoint(tmp_path, "pretrain", 1, made.model_dump(mode="json"), True, "")
    assert checkpoint.config.model.drop_path == 0.1


def test_the_released_codes_preset_is_the_papers_and_ten_epochs_at_the_floor() -> None:
    paper, code = (load(Pretrain, CONFIGS / f"pretrain/vit_base_kamim{kind}.yaml") for kind in ("", "_released_code"))
    assert code.optim.schedule(625) == (68750, 6250, 62500)
    assert paper.optim.schedule(625) == (62500, 6250, 62500)
    same = code.optim.model_copy(update={"epochs": 100, "cosine_epochs": None})
    data = code.data.model_copy(update={"drop_last": True})
    assert not code.data.drop_last
    assert code.model_copy(update={"optim": same, "out": paper.out, "data": data}) == paper


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), (1000, 100, 1000)),
        (("duration=250 steps", "warmup=1e1 steps"), (250, 10, 250)),
        (("duration=12.5epochs", "warmup=0.5 epochs"), (125, 5, 125)),
        (("duration=20480 examples", "warmup=2.56e3 examples", "batch_size=256"), (80, 10, 80)),
        (("duration=500 steps", "cosine=400 steps", "warmup_epochs=2"), (500, 20, 400)),
        (("duration=500 steps", "cosine_epochs=40"), (500, 100, 400)),
        (("epochs=30", "cosine=25 epochs"), (300, 100, 250)),
    ],
)
def test_durations_in_any_unit_become_steps(given: tuple[str, ...], expected: tuple[int, int, int]) -> None:
    made = load(Pretrain, None, [*NEEDED, *(f"optim.{key}" for key in given)])
    assert made.optim.schedule(steps_per_epoch=10) == expected


@pytest.mark.parametrize(
    "given", [("duration=50 steps",), ("cosine=2000 steps",), ("warmup=1e6 examples", "batch_size=1")]
)
def test_durations_that_do_not_fit_together(given: tuple[str, ...]) -> None:
    made = load(Pretrain, None, [*NEEDED, *(f"optim.{key}" for key in given)])
    with pytest.raises(
        ValueError, match=r"optim: a warm-up of \d+ steps, a cosine to step \d+ and \d+ steps in all do not"
    ):
        made.optim.schedule(steps_per_epoch=10)


NEEDED_TO_EVALUATE = ("checkpoint=[c]", "val=v")


@pytest.mark.parametrize("mode", ["linprobe", "finetune"])
def test_the_papers_evaluation_is_the_default(mode: str) -> None:
    assert load(Evaluation, CONFIGS / f"eval/{mode}.yaml", NEEDED_TO_EVALUATE) == load(
        Evaluation, None, NEEDED_TO_EVALUATE
    )
    optim = getattr(load(Evaluation, None, [*NEEDED_TO_EVALUATE, f"{mode}.optim.epochs=50"]), mode).optim
    assert (optim.lr, optim.min_lr, optim.clip_grad, optim.batch_size) == (5e-3, 2.5e-6, None, 2048)


@pytest.mark.parametrize("mode", ["linprobe", "finetune"])
def test_the_released_codes_evaluation_is_the_papers_and_ten_epochs_at_the_floor(mode: str) -> None:
    paper, code = (
        getattr(load(Evaluation, CONFIGS / f"eval/{name}.yaml", NEEDED_TO_EVALUATE), mode)
        for name in (mode, "released_code")
    )
    assert code.optim.schedule(625) == (68750, 6250, 62500)
    same = code.optim.model_copy(update={"epochs": 100, "cosine_epochs": None})
    assert code.model_copy(update={"optim": same}) == paper


def test_a_protocol_gives_defaults_that_keys_stand_over() -> None:
    made = load(Evaluation, CONFIGS / "eval/mae.yaml", [*NEEDED_TO_EVALUATE, "linprobe.optim.lr=1"]).linprobe
    assert (made.block, made.norm, made.augment) == ("last", "batch", "crop")
    assert (made.optim.algorithm, made.optim.lr, made.optim.epochs) == ("lars", 1.0, 90)
    given = load(Evaluation, None, [*NEEDED_TO_EVALUATE, "linprobe.protocol=dinov2", "linprobe.pooling=mean"]).linprobe
    assert (given.optim.algorithm, given.pooling, given.norm) == ("sgd", "mean", "final")
    with pytest.raises(ValueError, match=r"linprobe.protocol = 'vicreg': input should be 'paper', 'mae' or 'dinov2'"):
        load(Evaluation, None, [*NEEDED_TO_EVALUATE, "linprobe.protocol=vicreg"])


def test_neighbours_read_what_the_linear_probe_reads_or_what_dino_does() -> None:
    knn = load(Evaluation, None, NEEDED_TO_EVALUATE).knn
    assert (knn.protocol, knn.block, knn.pooling, knn.norm) == ("linprobe", "paper", "mean", "none")
    dino = load(Evaluation, CONFIGS / "eval/dino.yaml", [*NEEDED_TO_EVALUATE, "knn.k=[20]"]).knn
    assert (dino.protocol, dino.block, dino.pooling, dino.norm) == ("dino", "last", "cls", "final")
    assert (dino.k, dino.temperature) == ((20,), 0.07)
    assert load(Evaluation, None, [*NEEDED_TO_EVALUATE, "knn.protocol=dino"]).knn.k == (10, 20, 100, 200)
    with pytest.raises(ValueError, match=r"knn.protocol = 'vicreg': input should be 'linprobe' or 'dino'"):
        load(Evaluation, None, [*NEEDED_TO_EVALUATE, "knn.protocol=vicreg"])


def test_every_yaml_file_is_a_known_kind() -> None:
    for file in CONFIGS.rglob("*.yaml"):
        assert file.parent.name in ("pretrain", "eval", "sweeps")
        assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        (
            ("data.resolution=64",),
            "64 px has only 2 x 2 mask blocks (the paper: 6 x 6); mask.patch_size=16 gives 4 x 4",
        ),
        (
            ("data.resolution=32", "mask.patch_size=16"),
            "has only 2 x 2 mask blocks (the paper: 6 x 6); train at a larger",
        ),
        (("data.resolution=64", "mask.patch_size=16"), None),
        (("data.resolution=96",), None),
        ((), None),
    ],
)
def test_a_mask_of_a_few_blocks_is_warned_of(keys: tuple[str, ...], warning: str | None) -> None:
    text = coarse_mask(load(Pretrain, None, ["data.store=s", "out=o", "model.name=vit_demo", *keys]))
    assert (text == "") if warning is None else (warning in text)
