"""The study of averaging: its sites are trained as the command trains them, and its sets are what its protocol says."""

import itertools
from pathlib import Path
from typing import Any

import archive
import average_report
import average_study as study
import numpy as np
import pytest
from PIL import Image

import jvitmoe
from jvitmoe import config as config_lib
from jvitmoe.commands import start
from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jvitmoe.data import sources
from jvitmoe.data.splits import Split
from jvitmoe.interop import load

DIGITS = tuple("0123456789")


def test_a_site_of_the_study_is_trained_to_the_bits_of_the_command(tmp_path: Path):
    config = Config(
        model=ModelConfig(width=12, hidden=16, depth=2, heads=2),
        optim=OptimConfig(name="muon", mlp_rate=2.0, warmup_epochs=0.2),
        train=TrainConfig(epochs=2, batch_size=32, devices=1, log_every=100),
    )
    start.start(config, DIGITS, tmp_path / "start")
    overrides = {"data.part": "2/4"}
    run = jvitmoe.train(start=tmp_path / "start", overrides=overrides, workdir=tmp_path / "run", trackers=())
    digits = sources.load(DataConfig("digits"), ModelConfig())
    site, _ = sources.training_images(digits.train, DataConfig(part="2/4"))
    found = study.train(run.config, site, load.read(tmp_path / "start").params)
    wanted = load.read(tmp_path / "run").params
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, name)


def numbered(labels_N: np.ndarray) -> Split:
    images = np.arange(len(labels_N), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2, 1)
    return Split(images, labels_N.astype(np.int32))


@pytest.mark.parametrize("mix", study.MIXES)
def test_sites_share_out_all_images_without_one_twice(mix: str):
    split = numbered(np.repeat(np.arange(10), 300))
    sites = study.sites_of(split, mix, seed=3)
    numbers = [site.images_NHWc.reshape(-1, 4).view(np.uint32).ravel() for site in sites]
    assert sorted(np.concatenate(numbers)) == list(range(len(split)))
    for site, kept in zip(sites, numbers, strict=True):
        np.testing.assert_array_equal(site.labels_N, split.labels_N[kept])
    shares = np.array([np.bincount(site.labels_N, minlength=10) for site in sites]) / 300
    assert (shares.std(0).mean() > 0.2) == (mix == "unlike")
    assert min(map(len, sites)) >= study.LEAST
    again = study.sites_of(split, mix, seed=3)
    for one, other in zip(sites, again, strict=True):
        np.testing.assert_array_equal(one.images_NHWc, other.images_NHWc)


def test_no_image_of_a_start_is_held_out_or_at_a_site_and_the_other_task_has_other_classes():
    labels_N = np.tile(np.arange(10), 1000)
    images = np.broadcast_to(numbered(labels_N).images_NHWc, (len(labels_N), 2, 2, 1))
    dataset = sources.Dataset(Split(images.copy(), labels_N.astype(np.int32)), numbered(labels_N[:100]), DIGITS)
    for kind, classes in (("same", 10), ("other", 4)):
        found = study.parts(dataset, kind)
        sets = [{bytes(image) for image in part.images_NHWc} for part in (found.start, found.held, found.sites)]
        assert len(set.union(*sets)) == sum(map(len, sets))
        assert len(found.names) == classes
        assert {*found.sites.labels_N.tolist()} == {*found.test.labels_N.tolist()} == {*range(classes)}
        assert {*found.start.labels_N.tolist()} == {*range(len(found.classes))}


def test_corrupted_images_keep_their_labels_and_get_worse_with_strength():
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(image) for image in rng.integers(0, 256, (40, 8, 8, 3), np.uint8)]
    smooth = np.array([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in coarse])
    clean = Split(smooth, rng.integers(0, 10, 40).astype(np.int32))
    seen = study.corrupted(clean)
    images_KNHWc = seen.images_NHWc.reshape(len(study.CORRUPTIONS), *clean.images_NHWc.shape).astype(float)
    np.testing.assert_array_equal(seen.labels_N.reshape(len(study.CORRUPTIONS), -1), clean.labels_N[None].repeat(15, 0))
    far = np.abs(images_KNHWc - clean.images_NHWc).mean((1, 2, 3, 4)).reshape(-1, 3)
    assert (np.diff(far) > 0).all()
    assert (far > 0).all()


def kept_runs(seeds: int, gain: float) -> dict[str, Any]:
    """Returns runs of all arms, in which the mean is `gain` points above all sites, and together 1 point above it."""
    rng, runs = np.random.default_rng(0), {}
    config = config_lib.to_dict(study.recipe(study.Task("same", "once_alike", 0, 1e-3, 2), 10))
    for kind, arm, seed in itertools.product(study.KINDS, study.ARMS, range(seeds)):
        base = 0.6 + 0.01 * rng.random()
        accuracy = {"start": base - 0.05, "dense": base + 0.01 + gain / 100, "merged": base + gain / 100}
        accuracy |= {name: base + gain / 100 for name in ("mean", "mean, equal", "toward start", "ensemble", "greedy")}
        accuracy |= {"best": base, "four times as long": base + 0.02} | {f"site {n}": base - 0.01 * n for n in range(4)}
        rows = [{"model": name, "accuracy": value} for name, value in accuracy.items()]
        result = {"split": "test", "rows": rows, "corrupted": {}, "seconds": 60.0, "chosen": {"images": [100] * 4}}
        runs[f"{kind}-{arm}-seed{seed}"] = {"config": config, "result": result}
    tried = study.Task("same", "once_alike", study.SEARCH_SEED, 1e-3, 2).name
    return runs | {tried: {"config": config, "result": result | {"split": "held out"}}}


def test_the_overview_has_the_mean_of_each_model_s_seeds_where_there_is_such_an_arm():
    runs = kept_runs(5, 3.0)
    by_title = {row["model"]: row for row in average_report.overview(runs)}
    of_arm = [run["result"]["rows"] for name, run in runs.items() if name.startswith("other-rounds4_unlike-seed")]
    values = [100 * row["accuracy"] for rows in of_arm for row in rows if row["model"] == "mean"]
    assert len(values) == 5
    assert by_title["4 rounds"]["other task, unlike"].startswith(f"{np.mean(values):.2f} ± ")
    assert by_title["whole models in one run"]["other task, unlike"] == "-"


def test_verdicts_follow_the_rules_of_the_protocol(tmp_path: Path):
    for gain, is_useful in ((3.0, True), (-3.0, False)):
        archive.write(tmp_path / archive.FILE, kept_runs(5, gain))
        average_report.write(tmp_path, "command")
        text = (tmp_path / "report.md").read_text()
        assert ("averaging is useful with one mean" in text) == is_useful
        assert ("averaging is not shown to be useful with 16 rounds" in text) != is_useful
        assert ("Soups pay" in text) == is_useful
        assert "one mean is not shown to be as good as training together" in text
        assert "one mean is as good as" not in text
        assert (tmp_path / average_report.PICTURE).stat().st_size > 10_000
