"""The base class of routers, slots of experts, statistics.

Every image is routed alone: capacity, sorting and softmax over tokens do not cross images, so results do not depend on
the number of devices.

B batch · T tokens · D width · E experts · K experts of a token · Q slots of an expert for one image
A = K T choices of an image · L layers
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvitmoe.models.layers import torch_uniform

SELECTION_BIAS = "selection_bias"  # the name of a parameter [E] of a router


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """Which router, and how many tokens an expert takes: Q = ceil(capacity K T / E), at most T (`slots_per_expert`)."""

    kind: str = "switch"  # a key of ROUTERS
    experts: int = 4  # E
    top_k: int = 2  # K of topk, at most E
    capacity: float = 1.25  # of switch and topk; of expert_choice with K = 1
    eval_capacity: float = 2.0  # in evaluation (expert_choice keeps `capacity`); at E / K or more no token is dropped
    has_bias: bool = False  # switch and topk: the bias of `Router.preference`


class Statistics(NamedTuple):
    """What a router did, float32, per layer. Each value is a mean over tokens, so a mean over devices is exact."""

    load_E: jax.Array  # share of all choices that each expert has, before drops; no gradient
    probability_E: jax.Array  # mean router probability, without noise
    dropped: jax.Array  # share of choices without a slot; expert_choice: share of tokens that no expert took
    entropy: jax.Array  # mean entropy of the router probabilities, nats
    smooth_load_E: jax.Array | None = None  # topk only: mean probability that new noise puts the expert in the top K


class Slots(NamedTuple):
    """The token in each slot. Empty slots hold distinct indices >= T: gather gives zero there, scatter ignores them."""

    token_EBQ: jax.Array
    weight_EBQ: jax.Array  # float32, multiplies the expert's output
    once: bool  # no token is in two slots

    def gather(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the inputs of the experts, x_EBQD."""
        return x_BTD.at[self._index].get(mode="fill", fill_value=0, unique_indices=self.once)

    def scatter(self, y_EBQD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Returns y_BTD like x_BTD: for each token the weighted sum over its slots, 0 for a token in none."""
        weighted_EBQD = y_EBQD * self.weight_EBQ[..., None].astype(y_EBQD.dtype)
        return jnp.zeros_like(x_BTD).at[self._index].add(weighted_EBQD, mode="drop", unique_indices=self.once)

    def weights(self, tokens: int) -> jax.Array:
        """Returns weight_BTE of each expert's output in each token, 0 if it is in no slot of the expert."""
        experts, batch, _ = self.token_EBQ.shape
        index = jnp.arange(batch)[None, :, None], self.token_EBQ, jnp.arange(experts)[:, None, None]
        return jnp.zeros((batch, tokens, experts)).at[index].add(self.weight_EBQ, mode="drop")

    @property
    def _index(self) -> tuple[jax.Array, jax.Array]:
        return jnp.arange(self.token_EBQ.shape[1])[None, :, None], self.token_EBQ


class Mixtures(NamedTuple):
    """Slots that hold weighted means of tokens (soft)."""

    dispatch_BTEQ: jax.Array  # float32, weight of the token in the slot
    combine_BTEQ: jax.Array  # float32, weight of the slot's output in the token

    def gather(self, x_BTD: jax.Array) -> jax.Array:
        return jnp.einsum("bteq,btd->ebqd", self.dispatch_BTEQ.astype(x_BTD.dtype), x_BTD)

    def weights(self, tokens: int) -> jax.Array:
        """Returns weight_BTE of each expert's slots in each token."""
        return self.combine_BTEQ.sum(-1)

    def scatter(self, y_EBQD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return jnp.einsum("bteq,ebqd->btd", self.combine_BTEQ.astype(x_BTD.dtype), y_EBQD)


class Router(nn.Module):
    """Base class of routers. A subclass defines `route`; its parameters are "router" beside those of the MLP."""

    settings: RouterSettings

    uses_top_k: ClassVar[bool] = False  # True if it reads settings.top_k
    uses_bias: ClassVar[bool] = False  # True if it selects experts by `preference`
    is_tested: ClassVar[bool] = True  # False if it exists in training only, and the merged model is what is tested

    @property
    def experts(self) -> int:
        """E."""
        return self.settings.experts

    def route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots | Mixtures, Statistics]:
        """Returns the slots of all experts, and Statistics.

        Args:
            x_BTD: float32 tokens.
            key_B: one key per image, for noise; None is evaluation: deterministic, with eval_capacity.
        """
        raise NotImplementedError

    @classmethod
    def has_loss(cls) -> bool:
        """True if it has a balance loss."""
        return cls.loss is not Router.loss

    @staticmethod
    def loss(statistics: Statistics) -> jax.Array:
        """Returns the balance loss of statistics [X, ...], a scalar: the mean over layers; 0 for a router that is
        balanced by construction."""
        return jnp.zeros(())

    @staticmethod
    def most_experts(top_k: int, experts: int) -> int:
        """Returns K, the most experts that a token chooses, for routing.top_k of E."""
        return 1

    @staticmethod
    def active_experts(settings: RouterSettings, tokens: int) -> float:
        """Returns the number of experts that a token passes through in evaluation: the mean over the T tokens of an
        image if it varies. For `Mixtures` a slot takes the place of the token."""
        return settings.top_k

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits_BTE of a linear layer, kernel [D, E] and bias [E], float32, initialised as PyTorch's Linear
        (V-MoE's and Switch's routers have no bias)."""
        width = x_BTD.shape[-1]
        init = torch_uniform(width)
        kernel_DE = self.param("kernel", init, (width, self.experts))
        bias_E = self.param("bias", init, (self.experts,))
        # A GPU (TF32) or TPU would round the inputs of float32 products.
        return jnp.matmul(x_BTD, kernel_DE, precision="highest") + bias_E[None, None]

    def preference(self, probability_BTE: jax.Array) -> jax.Array:
        """Returns by what a token selects experts: their probabilities, plus a bias that evens the load and that
        `InModel.adjust` moves. It has no gradient, and what weighs an expert's output are the probabilities alone."""
        if not self.settings.has_bias:
            return probability_BTE
        bias_E = self.param(SELECTION_BIAS, nn.initializers.zeros, (self.experts,))
        return probability_BTE + jax.lax.stop_gradient(bias_E)[None, None]

    def capacity(self, tokens: int, key_B: jax.Array | None, top_k: int = 1) -> int:
        """Returns Q where each token makes `top_k` choices."""
        factor = self.settings.eval_capacity if key_B is None else self.settings.capacity
        return slots_per_expert(factor * top_k, tokens, self.experts)


def slots_per_expert(factor: float, tokens: int, experts: int) -> int:
    """Returns Q = ceil(factor T / E), at most T: no expert gets a token twice."""
    return min(math.ceil(round(factor * tokens / experts, 6)), tokens)  # rounded first: 1.1 * 100 > 110 in floats


def fill_slots(
    choice_BTK: jax.Array,
    weight_BTK: jax.Array,
    experts: int,
    count: int,
    priority_BT: jax.Array | None = None,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Returns (slots, load_E, dropped) if tokens choose experts and each expert has `count` slots per image.

    Slots go to first choices, then to second ones; among these to tokens of high priority, then of low index.
    """
    _, tokens, ranks = choice_BTK.shape
    empty_EQ = tokens + jnp.arange(experts * count).reshape(experts, count)

    def one_image(choice_TK: jax.Array, weight_TK: jax.Array, priority_T: jax.Array | None) -> tuple[jax.Array, ...]:
        order_T = jnp.arange(tokens) if priority_T is None else jnp.argsort(-priority_T)
        token_A = jnp.tile(order_T, ranks)
        choice_A, weight_A = (x_TK[order_T].T.reshape(-1) for x_TK in (choice_TK, weight_TK))
        by_expert_A = jnp.argsort(choice_A)  # stable: keeps the order of precedence within an expert
        count_E = (choice_A[:, None] == jnp.arange(experts)[None]).sum(0)
        start_E = jnp.cumsum(count_E) - count_E
        slot_Q = jnp.arange(count)
        full_EQ = slot_Q[None] < jnp.minimum(count_E, count)[:, None]
        choice_EQ = by_expert_A[jnp.where(full_EQ, start_E[:, None] + slot_Q[None], 0)]
        token_EQ = jnp.where(full_EQ, token_A[choice_EQ], empty_EQ)
        return token_EQ, jnp.where(full_EQ, weight_A[choice_EQ], 0.0), count_E

    token_BEQ, weight_BEQ, count_BE = jax.vmap(one_image)(choice_BTK, weight_BTK, priority_BT)
    slots = Slots(token_BEQ.swapaxes(0, 1), weight_BEQ.swapaxes(0, 1), once=ranks == 1)
    load_E = count_BE.mean(0) / (tokens * ranks)
    dropped = jnp.maximum(count_BE - count, 0).sum(1).mean() / (tokens * ranks)
    return slots, load_E, dropped


def statistics(
    logits_BTE: jax.Array, load_E: jax.Array, dropped: jax.Array, smooth_load_E: jax.Array | None = None
) -> Statistics:
    """Returns Statistics of these logits."""
    probability_BTE = jax.nn.softmax(logits_BTE)
    normaliser_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    return Statistics(
        load_E=load_E,
        probability_E=probability_BTE.mean((0, 1)),
        dropped=dropped,
        entropy=(normaliser_BT - (probability_BTE * logits_BTE).sum(-1)).mean(),
        smooth_load_E=smooth_load_E,
    )
