"""The worst images of a split, and the map of where a model looked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jvitmoe.config import ModelConfig
from jvitmoe.data.batches import Resident
from jvitmoe.evaluation import mistakes
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import vit

SIZES = {"image_size": 8, "channels": 1, "classes": 4, "patch": 2, "width": 12, "hidden": 16, "depth": 3, "heads": 2}


def made(**settings):
    model = vit.build(ModelConfig(**SIZES | settings))
    params = vit.init(model, jax.random.key(0))
    return model, jax.tree.map(lambda leaf: 8 * leaf, params)  # so that attention is far from even


@pytest.mark.parametrize("pool", ["cls", "mean", "seq"])
def test_rollout_is_the_product_of_the_layers_attention_and_even_if_attention_is(pool):
    model, params = made(pool=pool, registers=1)
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("f")
    found = np.asarray(jax.jit(lambda p, x: vit.rollout(model, p, x))(params, images))
    assert found.shape == (3, 16)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)

    seen = {}
    _, sown = model.apply({"params": params}, images, mutable=["intermediates"])
    layers = np.asarray(sown["intermediates"]["blocks"]["attention"]["weights_BGTT"], np.float64)
    for b in range(3):
        mixed = np.eye(model.config.tokens)
        for layer in layers:
            mixed = (layer[b].mean(0) / 2 + np.eye(len(mixed)) / 2) @ mixed
        rows = mixed[:1] if pool == "cls" else mixed[-16:]
        seen[b] = rows.mean(0)[-16:] / rows.mean(0)[-16:].sum()
    np.testing.assert_allclose(found, [seen[b] for b in range(3)], rtol=1e-4, atol=1e-6)
    assert np.ptp(found) > 0.02

    blind = params["blocks"]["attention"]
    blind = {name: jax.tree.map(jnp.zeros_like, blind[name]) if name == "query" else blind[name] for name in blind}
    even = params | {"blocks": params["blocks"] | {"attention": blind}}
    np.testing.assert_allclose(vit.rollout(model, even, images), 1 / 16, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_images_of_the_highest_loss_are_found_whatever_the_batches(tiny_config, tiny_split, devices):
    config = tiny_config(train={"devices": devices})
    model = vit.build(config.model)
    params = jax.tree.map(lambda leaf: 8 * leaf, vit.init(model, jax.random.key(1)))
    batches = Resident(tiny_split, 8, make_mesh(config.train))
    normalize = lambda images: images / 255.0  # noqa: E731
    found = mistakes.measure(model, params, batches, normalize, 5)
    logits = np.asarray(vit.logits(model, params, normalize(jnp.asarray(tiny_split.images_NHWc))), np.float64)
    nll = scipy.special.logsumexp(logits, 1) - logits[np.arange(len(logits)), tiny_split.labels_N]
    worst = np.argsort(-nll)[:5]
    np.testing.assert_array_equal(found.images_KHWc, tiny_split.images_NHWc[worst])
    np.testing.assert_array_equal(found.labels_K, tiny_split.labels_N[worst])
    np.testing.assert_allclose(found.share_KC, scipy.special.softmax(logits[worst], 1), rtol=1e-3, atol=1e-6)
    assert found.rollout_KP.shape == (5, model.config.patches)
    assert len(mistakes.measure(model, params, batches, normalize, 1000).labels_K) == len(tiny_split)
