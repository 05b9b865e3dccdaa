import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.data import augment, splits
from jvitmoe.data.batches import Resident
from jvitmoe.evaluation import evaluator, mergeability
from jvitmoe.experts import merge
from jvitmoe.experts.params import Params
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import mlp, vit

pytestmark = pytest.mark.slow

E, L = 3, 2


@pytest.fixture(scope="module")
def setup(tiny_config, tiny_split):
    """Returns a maker of (dense model, noise in the shape of a run's parameters, batches)."""

    def make(devices=1, part="mlp", **model):
        config = tiny_config(train={"devices": devices}, model=model, routing={"experts": E, "part": part})
        mesh, way, rng = make_mesh(config.train), routing.find(config), np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), way.shapes())
        return way.model(), params, Resident(tiny_split, 8, mesh)

    return make


def equal(params):
    return params._replace(experts=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), params.experts))


def layer_vectors(params, layer):
    """Returns one float64 vector per expert: all its weights in this layer."""
    leaves = [np.asarray(leaf, float)[:, layer] for _, leaf in sorted(params.experts["mlp"].items())]
    return [np.concatenate([leaf[e].ravel() for leaf in leaves]) for e in range(E)]


def test_spread_and_cosines_are_those_of_plain_loops(setup):
    _, params, _ = setup()
    geometry = mergeability.weight_geometry(params)

    def cosines(vectors):
        pairs = [(e, f) for e in range(E) for f in range(e)]
        return [vectors[e] @ vectors[f] / np.linalg.norm(vectors[e]) / np.linalg.norm(vectors[f]) for e, f in pairs]

    for layer in range(L):
        vectors = layer_vectors(params, layer)
        mean = sum(vectors) / E
        spreads = [np.linalg.norm(vector - mean) / np.linalg.norm(mean) for vector in vectors]
        assert geometry["spread"][layer] == pytest.approx(np.mean(spreads), rel=1e-5)
        assert geometry["cosine"][layer] == pytest.approx(np.mean(cosines(vectors)), rel=1e-4, abs=1e-6)
        apart = cosines([vector - mean for vector in vectors])
        assert geometry["difference_cosine"][layer] == pytest.approx(max(apart), rel=1e-4)
        assert np.mean(apart) == pytest.approx(-1 / (E - 1), abs=0.02)  # which is why the largest is told


@pytest.mark.parametrize(
    ("devices", "model"),
    [(1, {}), (4, {"pool": "mean", "positions": "sincos2d"})],
)
def test_the_layer_gap_is_that_of_one_image_at_a_time(setup, tiny_split, devices, model):
    net, params, batches = setup(devices, **model)
    gap = mergeability.layer_gap(net, E, params, batches, range(L))
    merged = jax.jit(merge.average_experts)(params)
    inputs = jax.jit(lambda x: mergeability.mlp_inputs(net, merged, x))

    def f(layer, x_TD, weights):
        up_DF, up_bias_F, down_FD, down_bias_D = (np.asarray(w, float) for w in weights)
        h_TF = x_TD @ up_DF + up_bias_F[None]
        cdf_TF = 0.5 * np.asarray(jax.scipy.special.erfc(-h_TF / 2**0.5))
        return (h_TF * cdf_TF) @ down_FD + down_bias_D[None]

    above, below = np.zeros(L), np.zeros(L)
    for image in tiny_split.images_NHWc:
        for layer, x_BTD in enumerate(inputs(augment.normalize(image[None]))):
            x_TD = np.asarray(x_BTD[0], float)
            stacks = [params.experts["mlp"][name][:, layer] for name in ("up", "up_bias", "down", "down_bias")]
            mean_TD = sum(f(layer, x_TD, [w[e] for w in stacks]) for e in range(E)) / E
            merged_TD = f(layer, x_TD, [np.asarray(w, float).mean(0) for w in stacks])
            above[layer] += np.linalg.norm(mean_TD - merged_TD, axis=-1).sum()
            below[layer] += np.linalg.norm(mean_TD, axis=-1).sum()
    assert min(gap) > 0.01
    assert gap == pytest.approx((above / below).tolist(), rel=1e-4)


def test_the_mlp_inputs_are_what_the_whole_model_hands_its_mlps(setup, tiny_split, monkeypatch):
    net, params, _ = setup(pool="mean", positions="sincos2d")
    merged = jax.jit(merge.average_experts)(params)
    images = augment.normalize(tiny_split.images_NHWc[:2])
    inputs = jax.jit(lambda x: mergeability.mlp_inputs(net, merged, x))(images)
    seen, two_layers = [], mlp.two_layers

    def spy(x_BTD, *rest):
        if not isinstance(x_BTD, jax.core.Tracer):
            seen.append(x_BTD)
        return two_layers(x_BTD, *rest)

    monkeypatch.setattr(mlp, "two_layers", spy)
    with jax.disable_jit():
        vit.logits(net, merged, images)
    assert len(seen) == L
    for x_BTD, wanted_BTD in zip(inputs, seen, strict=True):
        np.testing.assert_allclose(x_BTD, wanted_BTD, rtol=1e-4, atol=1e-5)


def test_equal_experts_have_no_spread_and_no_gap(setup):
    net, params, batches = setup()
    params = equal(params)
    geometry = mergeability.weight_geometry(params)
    assert geometry["spread"] == pytest.approx([0.0] * L, abs=1e-6)
    assert geometry["cosine"] == pytest.approx([1.0] * L, rel=1e-6)
    assert mergeability.layer_gap(net, E, params, batches, range(L)) == pytest.approx([0.0] * L, abs=1e-6)


def test_experts_that_differ_by_the_rounding_of_their_mean_are_equal():
    weight = np.float32(12582914 * 2.0**-23)  # the mean of three of it, in float32, is the next number
    assert (weight + weight + weight) / np.float32(3) != weight
    leaf = np.full((3, 1, 4, 4), weight)
    names = {"up": leaf, "down": leaf, "up_bias": leaf[..., 0], "down_bias": leaf[..., 0]}
    geometry = mergeability.weight_geometry(Params({}, {"mlp": names}))
    assert (geometry["spread"], geometry["difference_cosine"]) == ([0.0], [0.0])


def test_experts_that_own_one_layer_and_the_gap(setup):
    """The MLP is linear in `down`, so that a mean over `down` alone is the mean of outputs; `up` sits in the GELU."""
    gaps = {}
    for part in ("down", "up"):
        net, params, batches = setup(part=part)
        assert set(params.experts["mlp"]) == {part, f"{part}_bias"}
        gaps[part] = mergeability.layer_gap(net, E, params, batches, range(L))
    assert gaps["down"] == pytest.approx([0.0] * L, abs=1e-5)
    assert min(gaps["up"]) > 0.01


def test_the_line_starts_at_the_experts_and_ends_at_the_merged_model(tiny_config, setup):
    net, params, batches = setup()
    config = tiny_config(routing={"experts": E})
    evaluate = evaluator.make_evaluate(net, make_mesh(config.train), config.data)
    route_PX = evaluator.path_routes(routing.find(config), 0, 0)

    def losses(tree):
        return [result.nll for result in evaluate.paths(tree, route_PX, E, batches)[0]]

    def loss(tree):
        return evaluate(tree, batches).nll

    line = mergeability.barrier(params, losses)
    experts = [merge.take_path(params, route_X) for route_X in route_PX]
    mean = merge.average_experts(params)
    assert line["share"] == pytest.approx(np.linspace(0, 1, 9))
    for expert, values in zip(experts, line["losses"], strict=True):
        assert values[0] == pytest.approx(loss(expert), rel=1e-5)
        assert values[-1] == pytest.approx(loss(mean), rel=1e-5)
        halfway = jax.tree.map(lambda a, b: (a + b) / 2, expert, mean)
        assert values[4] == pytest.approx(loss(halfway), rel=1e-5)
    assert line["height"] == pytest.approx(np.mean([max(v) - v[0] for v in line["losses"]]))
    flat = mergeability.barrier(equal(params), losses)
    assert np.ptp(flat["losses"]) == pytest.approx(0.0, abs=1e-5)
    assert flat["height"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("count", [1, 26, 1000, 3001])
def test_the_subset_is_fixed_even_and_at_most_a_thousand(count):
    chosen = splits.evenly_spaced(count, mergeability.IMAGES)
    assert len(chosen) == len(set(chosen)) == min(count, 1000)
    assert np.ptp(np.diff(chosen)) <= 1 if count > 1 else True
    assert {0, count - 1} <= set(chosen.tolist())
