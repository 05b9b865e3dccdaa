"""What is drawn and counted of a learned router, against the slots and statistics that it trains with."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.commands import evaluate
from jvitmoe.data import augment
from jvitmoe.data.splits import Split
from jvitmoe.evaluation import expert_maps
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params, join_all
from jvitmoe.models import vit
from jvitmoe.reports import figures, run_figures

E, LAYERS = 4, 4


@pytest.fixture(scope="module")
def made(tiny_config):
    """Returns (model, parameters, images, labels) of a router in every second layer."""

    @functools.cache
    def make(kind, **settings):
        routed = {"experts": E, "kind": kind, "pattern": ("dense", "experts"), "eval_capacity": 1.0} | settings
        config = tiny_config(model={"depth": LAYERS, "patch": 2}, routing=routed)
        way, rng = routing.find(config), np.random.default_rng(0)
        params = jax.tree.map(lambda x: (0.7 * rng.normal(size=x.shape)).astype(x.dtype), way.shapes())
        return way.model(), params, rng.integers(0, 256, (7, 8, 8, 1)).astype(np.uint8), np.arange(7) % 3

    return make


def test_the_mean_gate_is_of_training_images_and_what_is_shown_of_test_images(tiny_config, made, tmp_path):
    model, params, images, labels = made("switch")
    config = tiny_config(model={"depth": LAYERS, "patch": 2}, routing={"experts": E, "pattern": ("dense", "experts")})
    seen, few = Split(images[:4], labels[:4]), Split(images[4:], labels[4:])
    routed = SimpleNamespace(net=model, normalize=augment.normalize)
    gate_X, shown = evaluate._routes(routing.find(config), params, routed, seen, few, tmp_path)
    of_seen, of_few = (
        expert_maps.measure(model, params, split.images_NHWc, split.labels_N, augment.normalize).gate_X.tolist()
        for split in (seen, few)
    )
    assert gate_X.tolist() == of_seen
    assert shown["gate"] == of_few != of_seen


@pytest.mark.parametrize("kind", ["switch", "topk", "expert_choice", "soft"])
def test_the_weights_of_tokens_are_those_that_the_layers_use(made, kind):
    model, params, images, labels = made(kind)
    found = expert_maps.measure(model, params, images, labels, augment.normalize)
    normalised = augment.normalize(jnp.asarray(images))

    @jax.jit
    def wanted(tree, images):
        return vit.token_weights(model, tree, images), vit.logits_and_statistics(model, tree, images)[1]

    weight_XBTE, statistics = jax.device_get(wanted(join_all(params), normalised))
    assert weight_XBTE.shape == (2, 7, 17, E)  # 16 patches and CLS
    chosen_XBTE = weight_XBTE > 0
    if kind in ("switch", "topk"):
        per_token = 2 if kind == "topk" else 1
        np.testing.assert_allclose(1 - chosen_XBTE.sum(-1).mean((1, 2)) / per_token, statistics.dropped, atol=1e-6)
        assert (statistics.dropped > 0).all()
    elif kind == "expert_choice":
        np.testing.assert_allclose((~chosen_XBTE.any(-1)).mean((1, 2)), statistics.dropped, atol=1e-6)
    else:
        np.testing.assert_allclose(weight_XBTE.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.gate_X, weight_XBTE.sum(-1).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.load_XE.sum(1), 1, rtol=1e-5)
    patches = weight_XBTE[:, :, 1:]
    untaken = found.expert_XBP < 0
    np.testing.assert_array_equal(untaken, ~(patches > 0).any(-1))
    np.testing.assert_array_equal(found.expert_XBP[~untaken], patches.argmax(-1)[~untaken])
    of_one = patches[:, labels == 1].sum((1, 2))
    np.testing.assert_allclose(found.of_class_XCE[:, 1], of_one / of_one.sum(-1, keepdims=True), rtol=1e-5)


def test_the_gated_mean_of_equal_experts_is_what_a_router_of_one_weight_computes(made):
    """With equal experts and logits, every token gets 1 / E of the MLP from Switch; the mean alone is E times that."""
    model, params, images, _ = made("switch", eval_capacity=float(E))

    def zeros(path, leaf):
        return np.zeros_like(leaf) if path[-2:][0].key == "router" else leaf

    experts = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), params.experts)
    params = Params(jax.tree.map_with_path(zeros, params.trunk), experts)
    normalised = augment.normalize(jnp.asarray(images))
    wanted, _ = jax.jit(functools.partial(vit.logits_and_statistics, model))(join_all(params), normalised)
    gate = expert_maps.measure(model, params, images, np.zeros(7, int), augment.normalize).gate_X
    np.testing.assert_allclose(gate, 1 / E, rtol=1e-6)
    logits = jax.jit(functools.partial(vit.logits, model.plain()))
    for scaled, same in ((merge.scale_by_gate(params, jnp.asarray(gate)), True), (params, False)):
        merged = logits(merge.average_experts(scaled), normalised)
        assert np.allclose(merged, wanted, rtol=1e-3, atol=1e-4) == same


@pytest.mark.parametrize("channels", [1, 3])
def test_the_drawing_has_a_row_per_layer_for_many_experts_and_classes(channels):
    rng = np.random.default_rng(0)
    share_XCE = rng.dirichlet(np.ones(9), (2, 30))
    routes = expert_maps.Routes(np.zeros((2, 1, 4)), share_XCE[:, 0], np.ones(2), share_XCE)
    pictures = [(rng.integers(0, 256, (8, 8, channels)).astype(np.uint8), "cat", np.array([[0, 1, -1, 8], [0] * 4]))]
    figure = run_figures.experts(routes, pictures, [1, 3], [f"class {n}" for n in range(30)])
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["layer 1", "layer 3"]
    colours = [{bar.get_facecolor() for bar in axes.patches} for axes in figure.axes if axes.get_title() == "load, %"]
    assert [len(of_layer) for of_layer in colours] == [9]
    figures.png(figure)
