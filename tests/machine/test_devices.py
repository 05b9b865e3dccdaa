import collections
import dataclasses
import functools
import math
import re

import chex
import jax
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jvitmoe.config import ModelConfig
from jvitmoe.data.batches import Resident
from jvitmoe.data.splits import Dataset, Split
from jvitmoe.errors import ConfigError
from jvitmoe.evaluation.evaluator import make_evaluate
from jvitmoe.experts import cost
from jvitmoe.experts.params import Params
from jvitmoe.machine import memory
from jvitmoe.machine.devices import EXPERT, make_mesh
from jvitmoe.machine.programs import collectives, for_reading, reduced_bytes
from jvitmoe.models import vit
from jvitmoe.training import build, state, step, update

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def axis_run(tiny_config, training):
    """Returns three steps of four experts on a mesh, all options on: axis_run(devices, expert_devices, **train)."""

    @functools.cache
    def run(devices, expert_devices, **train):
        config = tiny_config(
            data={"crop_padding": 1, "flip": True},
            model={"dropout": 0.2, "depth": 2},
            routing={"experts": 4, "kind": "sample", "pull": 0.1, "pattern": ("dense", "experts")},
            optim={"eps": 1e-3, "clip_norm": 0.5},
            train={"devices": devices, "expert_devices": expert_devices, "ema": 0.5, "batch_size": 16, "epochs": 8}
            | train,
        )
        return training(config).run(3)

    return run


def test_an_expert_axis_changes_nothing_but_where_things_are(axis_run):
    """Nor does a batch that runs in parts. On 8 devices, 2 of them for experts: the next test but one."""
    one, many = axis_run(1, 1), axis_run(4, 4, accumulate=2)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(many.history, one.history, rtol=1e-6, atol=3e-7)
    leaf = many.state.params.experts["mlp"]["up"]
    assert leaf.addressable_shards[0].data.shape == (1, 1, 8, 12)
    counts = optax.tree.get(many.state.opt_state.experts, "count")
    np.testing.assert_array_equal(counts, 3)  # every expert runs in every step
    assert counts.sharding.spec[0] == EXPERT


def test_a_mean_and_deviation_of_pixels_reach_training_and_evaluation(tiny_config, tiny_split, training):
    """Pixels of half the deviation are twice as large: with patches of half the size nothing else changes."""
    runs = {}
    for std in (0.5, 0.25):
        run = training(tiny_config(data={"std": (std,), "mean": (0.5,)}))
        trunk = run.state.params.trunk
        patches = trunk["patches"] | {"kernel": trunk["patches"]["kernel"] * (std / 0.5)}
        run.state = run.state._replace(params=Params(trunk | {"patches": patches}, {}))
        evaluate = make_evaluate(run.plan.model, run.plan.mesh, run.plan.data)
        found = evaluate(run.state.params.trunk, Resident(tiny_split, 8, run.plan.mesh))
        runs[std] = found.nll, float(run.run(1).metrics[0].loss)
    assert runs[0.25] == pytest.approx(runs[0.5], rel=1e-5)


MIXED = {
    "crop_padding": 1,
    "flip": True,
    "augment": "three",
    "erase": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "plain_at_end": 0.25,
}


@pytest.mark.parametrize(("kind", "mesh"), [("sample", (8, 2)), ("token", (4, 1))])
def test_mixing_images_is_the_same_on_any_devices(tiny_config, training, kind, mesh):
    """The partner of an image may be on another device, and where experts have devices, images are sorted by expert.
    So are the tokens that each expert draws."""

    def run(devices, expert_devices):
        return training(
            tiny_config(
                data=MIXED,
                model={"stem": "strided"},
                routing={"experts": 4, "kind": kind},
                optim={"eps": 1e-3},
                train={"devices": devices, "expert_devices": expert_devices, "batch_size": 16, "epochs": 8},
            )
        ).run(8)

    one, many = run(1, 1), run(*mesh)
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-5, atol=1e-6)
    assert len({float(metrics.loss) for metrics in one.metrics}) == 8
    assert one.step._cache_size() == 1  # the last steps are without augmentation


def test_a_sharded_state_trains_the_same_on_less_memory(axis_run):
    one, many = axis_run(1, 1), axis_run(4, 1, shard="parameters")
    chex.assert_trees_all_close(many.metrics, one.metrics, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(many.history[-1], one.history[-1], rtol=1e-6, atol=3e-7)

    def share(tree):
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves) / sum(x.size for x in leaves)

    assert share(many.state.opt_state) < 0.3
    assert share(many.state.params) < 0.3
    train = dataclasses.replace(many.plan.train, shard="optimizer")
    moments_only = state.abstract_state(dataclasses.replace(many.plan, train=train))
    assert (share(moments_only.opt_state), share(moments_only.params)) == (share(many.state.opt_state), 1.0)


@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_the_memory_that_a_start_asks_for_is_what_a_device_holds(tiny_config, monkeypatch, shard):
    config = tiny_config(
        routing={"experts": 2, "kind": "sample"},
        train={"devices": 4, "expert_devices": 2, "batch_size": 8, "shard": shard, "ema": 0.9},
    )
    plan = build.plan_for(config, make_mesh(config.train), 8)
    made = jax.tree.leaves(state.make_state(plan))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in made)
    split = Split(np.zeros((3, 8, 8, 1), np.uint8), np.zeros(3, np.int32))
    dataset = Dataset(split, split, ("one",))
    needed = held + 2 * split.images_NHWc.nbytes
    monkeypatch.setattr(memory, "installed", lambda: needed)
    build.check_memory(plan, dataset)
    needed -= 1
    with pytest.raises(ConfigError, match=r"the images need .*; set --config.data.stream=true"):
        build.check_memory(plan, dataset)
    config.data.stream = True
    needed = held
    build.check_memory(plan, dataset)
    needed -= 1
    with pytest.raises(ConfigError, match="the state of training needs"):
        build.check_memory(plan, dataset)


def test_an_expert_axis_reduces_the_trunk_and_means_of_experts_and_moves_no_image(tiny_config):
    config = tiny_config(
        model={"width": 32, "hidden": 64, "patch": 2},
        routing={"experts": 4, "kind": "sample", "pull": 0.1},
        train={"devices": 4, "expert_devices": 4, "batch_size": 16, "ema": 0.9},
    )
    mesh = make_mesh(config.train)
    plan = build.plan_for(config, mesh, 26)
    text, (trunk, experts) = for_reading(step.lower(plan)).as_text(), plan.routing.shapes()
    size = cost.tree_size(trunk) + cost.tree_size(experts) // 4 * 2  # of pull and EMA
    # Every gradient of the trunk, the loss and the accuracy; and the sum of squares of the experts' part of the norm.
    assert 4 * (size + 2) <= reduced_bytes(text, mesh.shape) <= 4 * (size + 2 + 8)
    assert [update.bytes_reduced(plan)(done) for done in range(4)] == [0, 4 * size, 8 * size, 12 * size]


@pytest.mark.parametrize(
    "sections",
    [
        {"routing": {"experts": 4, "kind": "sample", "pull": 0.1}, "train": {"expert_devices": 2}},  # two hold each
        {"routing": {"experts": 4, "kind": "batch", "pull": 0.1, "consistency": 1.0}},
        {"routing": {"experts": 4, "kind": "topk"}},
        {"optim": {"freeze_layers": 1}},
        {"model": {"adapter": 3}, "init": {"source": "x"}, "routing": {"experts": 2, "kind": "sample"}},
    ],
    ids=lambda sections: "-".join(f"{n}={v}" for section in sections.values() for n, v in section.items()),
)
def test_the_bytes_that_are_counted_are_those_of_the_program(tiny_config, sections):
    config = tiny_config(**sections | {"train": {"devices": 4, "batch_size": 16} | sections.get("train", {})})
    mesh = make_mesh(config.train)
    plan = build.plan_for(config, mesh, 64)
    text = for_reading(step.lower(plan)).as_text()
    spreads, routed = config.train.expert_devices > 1, config.routing.kind == "topk"
    scalars = 2 + 4 * spreads + 28 * routed  # loss, accuracy; parts of the norm; statistics of two layers
    assert reduced_bytes(text, mesh.shape) == update.bytes_reduced(plan)(1) + 4 * scalars


def bytes_by_kind(config):
    """Returns (the plan, bytes of the arrays in the collectives of a step by their kind)."""
    mesh = make_mesh(config.train)
    plan, found = build.plan_for(config, mesh, 64), collections.Counter()
    for one in collectives(for_reading(step.lower(plan)).as_text(), mesh.shape):
        found[one.kind] += one.bytes * one.times
    return plan, found


@pytest.mark.parametrize(("experts", "shard"), [(1, "parameters"), (4, "optimizer")])
def test_sharded_gradients_are_scattered_and_parameters_gathered_once(tiny_config, shard, experts):
    """ZeRO moves 2 N bytes: N gradients scattered, N parameters gathered. With experts only the slices that run
    move."""
    config = tiny_config(routing={"experts": experts}, train={"devices": 4, "batch_size": 16, "shard": shard})
    plan, found = bytes_by_kind(config)
    size = 4 * plan.routing.count_parameters()[0]
    assert 0.9 * size < found["reduce-scatter"] <= size
    assert 0.9 * size < found["all-gather"] <= 1.1 * size
    assert found["all-reduce"] < 0.1 * size  # leaves that no axis divides, and scalars


@pytest.mark.parametrize(("devices", "shard"), [(4, "optimizer"), (8, "parameters")])
def test_muon_reduces_gradients_of_matrices_whole_and_gathers_them_twice_more_where_parameters_are_split(
    tiny_config, shard, devices
):
    """N bytes of parameters, M of them in Muon's matrices. Sent, an all-reduce counting twice: N + M with
    `optimizer`, about 3 N, and N + 3 M with `parameters`, about 5 N (docs/multi_gpu.md)."""
    model = {"width": 96, "hidden": 384, "heads": 4, "pool": "mean"}
    train = {"devices": devices, "batch_size": 16, "shard": shard}
    plan, found = bytes_by_kind(tiny_config(model=model, optim={"name": "muon"}, train=train))
    leaves = jax.tree.leaves_with_path(plan.routing.shapes())
    size = sum(4 * leaf.size for _, leaf in leaves)
    matrices = sum(4 * leaf.size for path, leaf in leaves if plan.optimizer.multiplies_whole(path))
    assert matrices > 0.95 * size
    within = functools.partial(pytest.approx, abs=0.02 * size)
    assert found["all-reduce"] == within(matrices)
    assert found["reduce-scatter"] == within(size - matrices)
    assert found["all-gather"] == within(size + (2 * matrices if shard == "parameters" else 0))


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_the_step_lowers_for_cuda_where_there_is_no_gpu(tiny_config, monkeypatch, attention):
    # JAX asks the driver what it has before it writes cuDNN's call; here there is none to ask.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    config = tiny_config(
        model={"width": 32, "hidden": 64, "heads": 4, "pool": "mean", "dtype": "bfloat16"},
        routing={"experts": 4},
        train={"devices": 2, "batch_size": 8},
    )
    model = vit.build(config.model, platform="gpu", fused=attention == "cudnn")
    plan = dataclasses.replace(build.plan_for(config, make_mesh(config.train), 26), model=model)
    given = step.abstract_inputs(plan)
    text = step.make_train_step(plan).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo.dot_general.*-> tensor<\S*x(\w+)>", text)
    assert set(products) == {"bf16"}
    calls = set(re.findall(r"custom_call @([\w$]+)", text))
    fused = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert calls & fused == (fused if attention == "cudnn" else set())


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        ({"width": 384, "heads": 6, "pool": "mean"}, True),
        ({"width": 384, "heads": 6, "pool": "cls"}, False),  # an odd number of tokens
        ({"width": 300, "heads": 12, "pool": "mean"}, False),  # heads of 25
        ({"width": 384, "heads": 2, "pool": "mean"}, False),  # heads of 192
        ({"width": 384, "heads": 6, "pool": "mean", "dtype": "float32"}, False),
    ],
)
def test_attention_is_cudnns_where_a_gpu_has_it_and_it_takes_the_shapes(model, fits):
    config = ModelConfig(**{"image_size": 32, "patch": 4, "dtype": "bfloat16"} | model)
    assert vit.build(config, platform="gpu", fused=True).attention == ("cudnn" if fits else "xla")
    assert vit.build(config, platform="gpu", fused=False).attention == "xla"
