import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import evaluation, routing
from jvitmoe.data import feed
from jvitmoe.data.sources import Split
from jvitmoe.evaluation import Result, make_evaluate
from jvitmoe.models import vit
from jvitmoe.routing import Purpose
from jvitmoe.step import make_mesh

E, L = 3, 2


@pytest.fixture(scope="module")
def params_of(tiny_config):
    """Returns a maker of noise in the shape of the parameters of that many experts."""

    def make(experts):
        rng = np.random.default_rng(0)
        model = vit.build(tiny_config().model, experts)
        shapes = jax.eval_shape(lambda: vit.init(model, jax.random.key(0)))
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)

    return make


@pytest.fixture(scope="module")
def logits(tiny_config, tiny_split, params_of):
    """Returns the logits of one image at a time, float64."""
    forward, params = jax.jit(vit.build(tiny_config().model).apply), params_of(1)
    images_NHWC = (tiny_split.images_NHWC / 127.5 - 1).astype(np.float32)
    return np.concatenate([forward({"params": params}, image_HWC[None]) for image_HWC in images_NHWC]).astype(float)


@pytest.fixture(scope="module")
def split(tiny_split, logits):
    """Returns the tiny split, its first image classified right: padding repeats it, and would be seen if it counted."""
    labels_N = tiny_split.labels_N.copy()
    labels_N[0] = logits[0].argmax()
    return Split(tiny_split.images_NHWC, labels_N)


@pytest.fixture(scope="module")
def slow(split, logits):
    """Returns the Result in plain NumPy, one image at a time."""
    correct, nlls = 0, []
    for logits_C, label in zip(logits, split.labels_N, strict=True):
        correct += int(np.argmax(logits_C) == label)
        nlls.append(np.log(np.exp(logits_C).sum()) - logits_C[label])
    return Result(correct / len(nlls), float(np.mean(nlls)), len(nlls))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_metrics_are_those_of_one_image_at_a_time_on_any_number_of_devices(
    tiny_config, split, params_of, slow, devices
):
    config = tiny_config(train={"devices": devices})
    mesh = make_mesh(config.train)
    evaluate = make_evaluate(vit.build(config.model), mesh)
    images, params = feed.put(split, mesh), params_of(1)
    assert 0 < slow.accuracy < 1
    for batch_size in (8, 26):  # 26 images: three batches and two images, and one batch
        result = evaluate(params, images, feed.eval_batches(26, batch_size, mesh))
        assert result.images == slow.images == 26
        assert result.accuracy == slow.accuracy
        assert result.nll == pytest.approx(slow.nll, rel=1e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_images_outside_the_batches_do_not_count(tiny_config, split, params_of, count):
    config = tiny_config(train={"devices": 2})
    mesh = make_mesh(config.train)
    evaluate = make_evaluate(vit.build(config.model), mesh)
    images, params = feed.put(split, mesh), params_of(1)
    few = evaluate(params, images, feed.eval_batches(count, 8, mesh))
    changed = split.images_NHWC.copy()
    changed[count:] = 255
    images = feed.put(Split(changed, split.labels_N), mesh)
    assert few == evaluate(params, images, feed.eval_batches(count, 8, mesh))
    assert few.images == count


def test_a_run_of_experts_is_tested_merged_per_expert_and_on_a_random_path(tiny_config, params_of):
    config, params, seen = tiny_config(routing={"experts": E}, train={"seed": 5}), params_of(E), []

    def test(tree):
        seen.append(tree)
        return Result(0.5, 1.0 * len(seen), 26)

    rows = evaluation.evaluate_run(config, params, None, test)
    names = ["merged", "expert 0", "expert 1", "expert 2", "random path"]
    assert rows == [{"model": name, "accuracy": 0.5, "nll": i + 1.0, "images": 26} for i, name in enumerate(names)]
    up_LEDF = np.asarray(params["blocks"]["mlp"]["up"])
    ups = [np.asarray(tree["blocks"]["mlp"]["up"]) for tree in seen]
    np.testing.assert_allclose(ups[0], up_LEDF.mean(1), rtol=1e-5, atol=1e-6)
    for e in range(E):
        np.testing.assert_array_equal(ups[1 + e], up_LEDF[:, e])
    for layer in range(L):
        assert any(np.array_equal(ups[-1][layer], up_LEDF[layer, e]) for e in range(E))
    for tree in seen:
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params_of(1))
    chex.assert_trees_all_equal(evaluation.dense_tree(config, params), seen[0])


def test_the_random_path_is_fixed_by_the_seed_and_fresh_per_layer(tiny_config):
    depth, experts = 12, 4
    take_up = {"blocks": {"mlp": {"up": jnp.arange(experts)[None, :, None, None] + jnp.zeros((depth, 1, 1, 1))}}}

    def path(seed):
        config = tiny_config(model={"depth": depth}, routing={"experts": experts}, train={"seed": seed})
        tree = evaluation.dense_trees(config, take_up)["random path"]()
        return np.asarray(tree["blocks"]["mlp"]["up"]).ravel().astype(int).tolist()

    assert path(0) == path(0)
    assert path(0) != path(1)
    assert len(set(path(0))) > 1
    key = routing.address(jax.random.key(0), Purpose.PATH, 0)
    assert path(0) == jax.random.randint(key, (depth,), 0, experts).tolist()


def test_a_dense_run_has_one_row(tiny_config, params_of):
    params = params_of(1)
    rows = evaluation.evaluate_run(tiny_config(), params, None, lambda tree: Result(float(tree is params), 2.0, 26))
    assert rows == [{"model": "dense", "accuracy": 1.0, "nll": 2.0, "images": 26}]


def test_active_parameters_are_those_of_the_dense_model_and_total_counts_every_expert(tiny_config, params_of):
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert evaluation.count_parameters(tiny_config()) == (size(params_of(1)), size(params_of(1)))
    active, total = evaluation.count_parameters(tiny_config(routing={"experts": E}))
    assert (active, total) == (size(params_of(1)), size(params_of(E)))
    assert total - active == (E - 1) * L * (8 * 12 + 12 + 12 * 8 + 8)
