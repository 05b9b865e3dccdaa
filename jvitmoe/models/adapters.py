"""LoRA and adapters, folded into the weights of an MLP."""

from typing import Any

import jax
import jax.numpy as jnp

LORA = ("up_a", "up_b", "down_a", "down_b")
ADAPTER = ("adapter_up", "adapter_up_bias", "adapter_down", "adapter_down_bias")


def fold(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns {up, up_bias, down, down_bias} of the plain MLP that computes the same function; exact. Leading axes
    (L, E) are optional: those of the MLP's weights broadcast to those of LoRA and adapter.

    LoRA (arXiv 2106.09685) adds the product of its two matrices to a weight. An adapter beside the MLP (AdaptFormer,
    arXiv 2205.13535; here with the MLP's own GELU) adds hidden units.
    """
    plain = {name: weights[name] for name in ("up", "up_bias", "down", "down_bias")}

    def broadcast(name: str, lead: tuple[int, ...]) -> jax.Array:
        axes = 1 if name.endswith("bias") else 2
        return jnp.broadcast_to(plain[name], (*lead, *plain[name].shape[-axes:]))

    for name in ("up", "down"):
        if f"{name}_a" in weights:
            # A GPU would round the factors to TF32.
            product = jnp.matmul(weights[f"{name}_a"], weights[f"{name}_b"], precision="highest")
            plain[name] = broadcast(name, product.shape[:-2]) + product
    if "adapter_up" in weights:
        lead = weights["adapter_up"].shape[:-2]
        for name, axis in (("up", -1), ("up_bias", -1), ("down", -2)):
            plain[name] = jnp.concatenate([broadcast(name, lead), weights[f"adapter_{name}"]], axis)
        plain["down_bias"] = broadcast("down_bias", lead) + weights["adapter_down_bias"]
    return plain
