"""Folds LoRA and adapters into the weights of an MLP."""

from typing import Any

import jax.numpy as jnp

LORA = ("up_a", "up_b", "down_a", "down_b")
ADAPTER = ("adapter_up", "adapter_up_bias", "adapter_down", "adapter_down_bias")


def fold(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns {up, up_bias, down, down_bias} of the plain MLP that computes the same function; exact. Leading axes
    (L, E) are optional: those of the MLP's weights broadcast to those of LoRA and adapter.

    LoRA (arXiv 2106.09685) adds the product of its two matrices to a weight. An adapter beside the MLP (AdaptFormer,
    arXiv 2205.13535; here with the MLP's own GELU) adds R hidden units.
    """
    plain = {name: weights[name] for name in ("up", "up_bias", "down", "down_bias")}
    for name in ("up", "down"):
        if f"{name}_a" in weights:
            product = weights[f"{name}_a"] @ weights[f"{name}_b"]
            plain[name] = jnp.broadcast_to(plain[name], product.shape) + product
    if "adapter_up" in weights:
        lead = weights["adapter_up"].shape[:-2]
        wide = {
            name: jnp.broadcast_to(plain[name], (*lead, *leaf.shape[leaf.ndim - 2 + name.endswith("bias") :]))
            for name, leaf in plain.items()
        }
        plain = {
            "up": jnp.concatenate([wide["up"], weights["adapter_up"]], axis=-1),
            "up_bias": jnp.concatenate([wide["up_bias"], weights["adapter_up_bias"]], axis=-1),
            "down": jnp.concatenate([wide["down"], weights["adapter_down"]], axis=-2),
            "down_bias": wide["down_bias"] + weights["adapter_down_bias"],
        }
    return plain
