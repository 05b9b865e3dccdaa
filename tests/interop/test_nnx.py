"""A loaded model as a module of Flax NNX."""

import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jvitmoe
from jvitmoe.commands import export
from jvitmoe.data import augment
from jvitmoe.interop.classifier import Classifier
from jvitmoe.interop.load import Source
from jvitmoe.interop.pretrained import fresh
from processes import ROOT, succeed

MODELS = [
    {},
    {"pool": "seq", "stem": "conv", "patch": 4, "registers": 2, "positions": "sincos2d"},
    {"head_hidden": 6, "layer_scale": 0.1, "qk_norm": True},
]


def classifier(config: Any) -> Classifier:
    return Classifier(Source(Path(), "jvitmoe", fresh(config), config.model, mean=(0.4,), std=(0.3,)))


@pytest.mark.parametrize("model", MODELS)
def test_the_nnx_module_has_the_logits_and_the_tree_of_the_linen_module(tiny_config, tiny_split, model):
    loaded = classifier(tiny_config(model=model))
    module, images_NHWc = loaded.nnx(), tiny_split.images_NHWc[:4]
    x_NHWc = augment.normalize(jnp.asarray(images_NHWc), loaded.mean, loaded.std)
    np.testing.assert_allclose(module(x_NHWc), loaded.logits(images_NHWc), atol=1e-6)
    np.testing.assert_allclose(loaded.model.apply({"params": loaded.params}, x_NHWc), module(x_NHWc), atol=1e-6)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(module)), loaded.params)


@pytest.mark.slow
def test_a_step_of_optax_lowers_the_loss_and_leaves_the_loaded_model(tiny_config, tiny_split):
    loaded = classifier(tiny_config())
    before = jax.device_get(loaded.params)
    module, labels_N = loaded.nnx(), tiny_split.labels_N
    x_NHWc = augment.normalize(jnp.asarray(tiny_split.images_NHWc))
    graph, state = nnx.split(module)

    @jax.jit
    def loss(state):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, state)(x_NHWc), labels_N).mean()

    tx = optax.adam(1e-3)
    first, grads = jax.value_and_grad(loss)(state)
    updates, _ = tx.update(grads, tx.init(state), state)
    nnx.update(module, optax.apply_updates(state, updates))
    assert loss(nnx.state(module)) < first
    chex.assert_trees_all_equal(loaded.params, before)


def test_the_example_of_the_page_runs_and_its_weights_go_back_into_an_export(experiment_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeed(export.main, f"--workdir={experiment_run}", "--to=safetensors", "--out=exports/digits")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    module = names["module"]
    with np.load("exports/digits/sample.npz") as sample:
        before = optax.softmax_cross_entropy_with_integer_labels(sample["logits"], sample["labels"]).mean()
    assert names["loss"](nnx.state(module)) < before
    Path("exports/digits/SHA256SUMS").unlink()
    succeed(export.main, "--model=exports/digits", "--to=safetensors", "--out=exports/tuned")
    tuned = jvitmoe.load("exports/tuned")
    chex.assert_trees_all_equal(tuned.params, nnx.to_pure_dict(nnx.state(module)))
    with np.load("exports/tuned/sample.npz") as sample:
        np.testing.assert_allclose(module(sample["inputs"]), sample["logits"], atol=1e-5)
