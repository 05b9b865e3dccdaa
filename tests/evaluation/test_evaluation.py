import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvitmoe import routing
from jvitmoe.data.batches import Resident
from jvitmoe.data.splits import Split
from jvitmoe.evaluation import evaluator
from jvitmoe.evaluation.evaluator import Result, make_evaluate
from jvitmoe.experts import cost, merge
from jvitmoe.experts.params import Params
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.machine.devices import make_mesh
from jvitmoe.models import vit

pytestmark = pytest.mark.slow

E = 3


@pytest.fixture(scope="module")
def params_of(tiny_config):
    """Returns a maker of noise in the shape of the parameters of that many experts; of one, a dense tree."""

    def make(experts):
        rng, shapes = np.random.default_rng(0), routing.find(tiny_config(routing={"experts": experts})).shapes()
        params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
        return params if experts > 1 else params.trunk

    return make


def slowly(p_NC, labels_N):
    """Returns the Result of probabilities in plain Python, one image at a time."""
    correct, nll, bins = 0, 0.0, [[] for _ in range(15)]
    for p_C, label in zip(p_NC, labels_N, strict=True):
        right, confidence = int(np.argmax(p_C) == label), float(max(p_C))
        correct += right
        nll -= np.log(p_C[label])
        (m,) = [m for m in range(15) if m / 15 < confidence <= (m + 1) / 15]
        bins[m].append((right, confidence))
    ece = sum(len(held) / len(p_NC) * abs(np.subtract(*np.mean(held, axis=0))) for held in bins if held)
    classes, best_NC = p_NC.shape[1], np.argsort(-p_NC, axis=1)
    top5 = float(np.mean([label in best_C[:5] for label, best_C in zip(labels_N, best_NC, strict=True)]))
    confusion = [[sum((labels_N == c) & (best_NC[:, 0] == d)) for d in range(classes)] for c in range(classes)]
    return Result(correct / len(p_NC), nll / len(p_NC), float(ece), len(p_NC), top5 if classes > 5 else None, confusion)


def near(result):
    return result._replace(nll=pytest.approx(result.nll, rel=1e-5), ece=pytest.approx(result.ece, rel=1e-5))


@pytest.fixture(scope="module")
def probabilities(tiny_config, tiny_split):
    """Returns a function from a dense tree to its probabilities, one image at a time, float64."""
    forward = jax.jit(vit.build(tiny_config().model).apply)
    images_NHWc = (tiny_split.images_NHWc / 127.5 - 1).astype(np.float32)

    def of(tree):
        logits_NC = np.concatenate([forward({"params": tree}, image[None]) for image in images_NHWc]).astype(float)
        return np.exp(logits_NC) / np.exp(logits_NC).sum(1, keepdims=True)

    return of


@pytest.fixture(scope="module")
def split(tiny_split, probabilities, params_of):
    """Returns the tiny split, its last image classified right: padding repeats it, and would be seen if it counted."""
    labels_N = tiny_split.labels_N.copy()
    labels_N[-1] = probabilities(params_of(1))[-1].argmax()
    return Split(tiny_split.images_NHWc, labels_N)


@pytest.mark.parametrize("devices", [1, 4])
def test_metrics_are_those_of_one_image_at_a_time_on_any_number_of_devices(
    tiny_config, split, params_of, probabilities, devices
):
    config = tiny_config(train={"devices": devices}, routing={"experts": E})
    mesh = make_mesh(config.train)
    evaluate = make_evaluate(vit.build(config.model), mesh, config.data)
    dense, params = params_of(1), params_of(E)
    route_PX = evaluator.path_routes(routing.find(config), 0, 1)
    p_PNC = [probabilities(merge.take_path(params, route_X)) for route_X in route_PX]
    slow = slowly(probabilities(dense), split.labels_N)
    slow_paths = [slowly(p_NC, split.labels_N) for p_NC in p_PNC]
    assert 0 < slow.accuracy < 1
    assert 0 < slow.ece < 1
    for batch_size in (8, 26):  # 26 images: three batches and two images, and one batch
        batches = Resident(split, batch_size, mesh)
        assert evaluate(dense, batches) == near(slow)
        results, ensemble = evaluate.paths(params, route_PX, E, batches)
        assert results == [near(result) for result in slow_paths]
        assert ensemble == near(slowly(np.mean(p_PNC[:E], axis=0), split.labels_N))
        assert ensemble != near(slowly(np.mean(p_PNC, axis=0), split.labels_N))


@pytest.mark.parametrize(("devices", "classes"), [(1, 5), (4, 9)])
def test_top5_and_confusion_are_those_of_one_image_at_a_time(tiny_config, tiny_split, devices, classes):
    config = tiny_config(model={"classes": classes}, train={"devices": devices})
    net, mesh, rng = vit.build(config.model), make_mesh(config.train), np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), vit.shapes(net))
    split = Split(tiny_split.images_NHWc, rng.integers(0, classes, 26).astype(np.int32))
    images = jnp.asarray(split.images_NHWc / 127.5 - 1, jnp.float32)
    p_NC = np.asarray(jax.jit(lambda x: jax.nn.softmax(vit.logits(net, params, x)))(images), float)
    found = make_evaluate(net, mesh, config.data)(params, Resident(split, 8, mesh))
    slow = slowly(p_NC, split.labels_N)
    assert found == near(slow)
    if classes > 5:
        assert 1 > found.top5 > found.accuracy > 0


def test_no_confusion_is_counted_for_more_than_1000_classes(tiny_config, split):
    config = tiny_config(model={"classes": 1001})
    net, mesh = vit.build(config.model), make_mesh(config.train)
    evaluate, params = make_evaluate(net, mesh, config.data), vit.init(net, jax.random.key(0))
    batches = Resident(split, 26, mesh)
    assert evaluate(params, batches).confusion == []
    (row,) = evaluator.evaluate_run(routing.find(config), 0, Params(params, {}), None, evaluate, batches, 8)
    assert (row["model"], row["images"]) == ("dense", 26)
    assert "confusion" not in row


def test_an_accuracy_is_told_that_may_be_guessing_the_largest_class():
    assert "accuracy 34.0% of 150 images is not above guessing, 33.3%" in evaluator.not_above_guessing(
        [[17, 17, 16], [16, 17, 17], [17, 16, 17]]
    )
    assert evaluator.not_above_guessing([[90, 0], [9, 1]])  # 91 % where 90 % are of one class
    assert not evaluator.not_above_guessing([[40, 5, 5], [5, 40, 5], [5, 5, 40]])
    assert not evaluator.not_above_guessing([])  # none is counted for very many classes
    said = [bool(evaluator.not_above_guessing([[n, 200 - n], [200 - n, n]])) for n in range(201)]
    wilson = [proportion_lower(2 * n, 400) <= 0.5 for n in range(201)]
    assert said == wilson


def proportion_lower(count: int, images: int) -> float:
    from scipy.stats import binomtest

    return binomtest(count, images).proportion_ci(method="wilson").low


def test_progress_is_told_after_every_batch_of_every_model(tiny_config, split, params_of):
    config, told = tiny_config(routing={"experts": E}), []
    mesh = make_mesh(config.train)
    batches = Resident(split, 8, mesh)
    evaluate = make_evaluate(vit.build(config.model), mesh, config.data, lambda: told.append(1))
    evaluator.evaluate_run(routing.find(config), 0, params_of(E), params_of(1), evaluate, batches)
    assert len(told) == 3 * len(batches)  # merged, EMA, and all paths


def test_an_expert_that_is_not_finite_ends_no_test_of_random_paths(tiny_config, split, params_of):
    config, mesh = tiny_config(routing={"experts": E}), make_mesh(tiny_config().train)

    params = params_of(E)
    params = params._replace(experts=jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params.experts))
    batches = Resident(split, 26, mesh)
    evaluate = make_evaluate(vit.build(config.model), mesh, config.data)
    rows = {
        row["model"]: row for row in evaluator.evaluate_run(routing.find(config), 0, params, None, evaluate, batches, 8)
    }
    assert np.isnan([rows["8 random paths"][name] for name in ("nll", "nll_std")]).all()
    assert np.isfinite(rows["expert 1"]["nll"])


def test_a_run_of_experts_is_tested_merged_per_expert_on_random_paths_and_as_an_ensemble(tiny_config, split, params_of):
    config, params = tiny_config(routing={"experts": E}), params_of(E)
    way = routing.find(config)
    mesh = make_mesh(config.train)
    batches = Resident(split, 26, mesh)
    evaluate = make_evaluate(vit.build(config.model), mesh, config.data)
    rows = evaluator.evaluate_run(way, 5, params, params_of(1), evaluate, batches, 4)
    experts = [f"expert {e}" for e in range(E)]
    assert [row["model"] for row in rows] == ["merged", "EMA", *experts, "4 random paths", "ensemble"]

    def metrics(tree):
        found = near(evaluate(tree, batches))
        return {name: getattr(found, name) for name in ("accuracy", "nll", "ece", "images")}

    route_PX = evaluator.path_routes(way, 5, 4)
    merged = merge.average_experts(params)
    assert rows[0].items() >= metrics(merged).items()
    assert rows[0]["confusion"] == evaluate(merged, batches).confusion
    assert not [row["model"] for row in rows[1:] if "confusion" in row]
    assert rows[1].items() >= metrics(params_of(1)).items()
    for e in range(E):
        assert rows[2 + e].items() >= metrics(merge.take_path(params, jnp.array([e]))).items()
    drawn = [evaluate(merge.take_path(params, route_X), batches) for route_X in route_PX[E:]]
    for name in ("accuracy", "nll", "ece"):
        values = [getattr(result, name) for result in drawn]
        assert rows[-2][name] == pytest.approx(np.mean(values), rel=1e-5)
        assert rows[-2][f"{name}_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-3, abs=1e-6)
    active, total = way.count_parameters()
    flops = rows[0]["flops_per_image"]
    assert {(row["parameters"], row["flops_per_image"]) for row in rows[:-1]} == {(active, flops)}
    assert (rows[-1]["parameters"], rows[-1]["flops_per_image"]) == (total, E * flops)


def test_equal_experts_make_every_path_and_the_ensemble_the_merged_model(tiny_config, split, params_of):
    config, dense = tiny_config(routing={"experts": E}), params_of(1)
    equal = routing.find(config).init(jax.random.key(0), dense)
    mesh = make_mesh(config.train)
    batches = Resident(split, 26, mesh)
    evaluate = make_evaluate(vit.build(config.model), mesh, config.data)
    rows = evaluator.evaluate_run(routing.find(config), 0, equal, None, evaluate, batches, 1)
    merged = evaluate(dense, batches)
    assert [row["model"] for row in rows][-2:] == ["random path", "ensemble"]
    assert len(rows) == E + 3
    assert "nll_std" not in rows[-2]
    for row in rows:
        names = merged.numbers()
        assert {name: row[name] for name in names} == pytest.approx(names, rel=1e-5)


@pytest.mark.parametrize(("kind", "is_routed"), [("token", False), ("switch", True), ("batch", False)])
def test_token_and_routing_outside_the_model_are_tested_merged(tiny_config, kind, is_routed):
    config = tiny_config(routing={"experts": 4, "kind": kind})
    way, mesh = routing.find(config), make_mesh(config.train)
    found = make_evaluate(way.model(mesh), mesh, config.data)
    assert found.net == way.model().plain()
    assert (found.routed is not None) == is_routed


def test_random_paths_are_fixed_by_the_seed_and_fresh_per_layer_and_number(tiny_config):
    way = routing.find(tiny_config(model={"depth": 12}, routing={"experts": 4}))

    def routes(seed, paths=3):
        return np.asarray(evaluator.path_routes(way, seed, paths)).tolist()

    assert routes(0)[:4] == [[e] * 12 for e in range(4)]
    assert routes(0) == routes(0, 5)[:7] != routes(1)
    assert all(len(set(route)) > 1 for route in routes(0)[4:])
    assert len(set(map(tuple, routes(0)))) == 7
    key = address(jax.random.key(0), Purpose.PATH, 2)
    assert routes(0)[6] == jax.random.randint(key, (12,), 0, 4).tolist()


def test_flops_count_every_layer_and_every_product_whatever_the_dtype_and_without_a_cpu_too(tiny_config, monkeypatch):
    def flops(depth, dtype="float32"):
        return cost.flops_per_image(
            vit.build(tiny_config(model={"depth": depth, "width": 32, "dtype": dtype}).model), 4
        )

    tokens, width, hidden = 5, 32, 12
    products = 2 * (tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width)  # of one layer
    one, three = flops(1), flops(3)
    assert products < (three - one) / 2 < 1.4 * products  # and norms, softmax, GELU
    assert flops(3, "bfloat16") == three

    def no_cpu(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_cpu)  # as under JAX_PLATFORMS=cuda
    assert flops(3) == pytest.approx(three, rel=0.02)
