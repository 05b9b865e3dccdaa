"""Parameters and FLOPs of a config."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.config import Config
from jvitmoe.experts import build, slices
from jvitmoe.models import routers, vit
from jvitmoe.runtime import compilation


def flops_per_image(net: vit.ViT, batch: int) -> float:
    """Returns the floating-point operations (a multiply-add is two) that XLA counts in the compiled forward pass of a
    batch, per image.

    Layers are unrolled, because XLA counts the body of a loop once. The program is compiled for the CPU, if JAX has one
    here, because on other devices products become library calls, which XLA does not count.
    """
    config = dataclasses.replace(net.config, unroll=net.config.depth)
    model = net.clone(config=config, attention="xla")
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.channels), jnp.float32)
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    with jax.default_device(device):
        lowered = jax.jit(lambda p, x: vit.logits(model, p, x)).lower(vit.shapes(model), images)
        cost = compilation.for_reading(lowered).cost_analysis()
    assert cost is not None, "XLA analyses programs of the CPU, GPU and TPU"
    return float(cost["flops"]) / batch


def count_parameters(config: Config) -> tuple[int, int]:
    """Returns (active, total): what one token passes through, its router included, and all experts together.

    A token passes through as many experts as its router says (`Router.active_experts`), without a router through one.
    Nothing is allocated.
    """
    model = build.make_model(config, "cpu")
    params = vit.shapes(model)
    trunk, experts = slices.split(params, slices.stacked(params))
    router = model.router
    active = routers.find(router.kind).active_experts(router, model.experts, config.model.tokens) if router else 1
    return tree_size(trunk) + round(active * tree_size(experts) / model.experts), tree_size(params)


def count_trained(config: Config) -> int:
    """Returns the number of parameters that training may change, all experts together. Nothing is allocated."""
    params, frozen, total = vit.shapes(build.make_model(config, "cpu")), build.frozen(config), 0
    for path, leaf in jax.tree.leaves_with_path(params):
        if frozen is None or not frozen(path):
            trained = build.trained_layers(config, path, leaf)
            total += leaf.size // trained.size * int(trained.sum())
    return total


def tree_size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
