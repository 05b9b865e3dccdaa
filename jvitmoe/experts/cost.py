"""Parameters and FLOPs of a model."""

from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.machine import programs
from jvitmoe.models import vit


def flops_per_image(net: vit.ViT, batch: int) -> float:
    """Returns the floating-point operations (a multiply-add is two) that XLA counts in the compiled forward pass of a
    batch, per image.

    Layers are unrolled, because XLA counts the body of a loop once, and compute in float32, because it counts
    conversions. The program is compiled for the CPU, because on other devices products become library calls, which XLA
    does not count; if JAX has no CPU here (JAX_PLATFORMS), it is counted as written, before XLA optimises it.
    """
    config = net.config
    model = net.clone(unroll=config.depth, attention="xla", dtype=jnp.dtype("float32"))
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.channels), jnp.float32)
    forward = jax.jit(lambda p, x: vit.logits(model, p, x))
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        cost = forward.lower(vit.shapes(model), images).cost_analysis()
    else:
        with jax.default_device(cpu):
            cost = programs.for_reading(forward.lower(vit.shapes(model), images)).cost_analysis()
    assert cost is not None, "XLA analyses programs of the CPU, GPU and TPU"
    return float(cost["flops"]) / batch


def tree_size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
