"""MLPs whose router picks the expert of each token: Switch, noisy top-k, expert choice, Soft MoE; or a fixed one.

Every image is a routing group of its own: capacity, sorting and softmax over tokens stay within it, so a result never
depends on how the batch is spread over devices.

B batch · T tokens of an image · D width · F hidden width · E experts · K experts chosen by a token
C slots an expert has for one image · A = K T choices of an image · L layers
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvitmoe.models.mlp import Mlp, torch_uniform, two_layers

# Sites of random draws (mlp.dropout); 0 to 3 are those of dropout in a block.
NOISE, EXPERT_DROPOUT = 4, 5


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """Which router, and how many tokens an expert takes."""

    kind: str = "switch"  # switch | topk | expert_choice | soft | hash | frozen
    top_k: int = 2  # K of topk and frozen, at most E
    capacity: float = 1.25  # C = ceil(capacity K T / E), at most T: switch, topk, frozen; expert_choice with K = 1
    eval_capacity: float = 2.0  # the same without keys, not for expert_choice; from E / K on nothing is dropped


class Statistics(NamedTuple):
    """What a router did, float32, per layer. Each is a mean over tokens, so a mean over devices is exact."""

    load_E: jax.Array  # share of all choices that fell on each expert, before drops; no gradient
    probability_E: jax.Array  # mean router probability, without noise
    smooth_load_E: jax.Array  # topk: mean probability that new noise puts the expert in the top K; else load_E
    dropped: jax.Array  # share of choices that found no slot; expert_choice: of tokens that no expert took
    entropy: jax.Array  # mean entropy of the router probabilities, nats
    z: jax.Array  # mean of logsumexp(logits)^2


class Slots(NamedTuple):
    """Which token each slot holds; an empty slot points to a place from T on, another for each."""

    token_EBC: jax.Array
    weight_EBC: jax.Array  # float32, what the expert's output is scaled by
    once: bool  # no token is in two slots


class RoutedMlp(Mlp):
    """The MLP of a block with a router instead of a route; parameters as `Mlp`, and under "router" the router's.

    switch (arXiv 2101.03961): a token goes to the expert of highest softmax probability p and gets p f(x). An expert
        takes C at most, in order of place in the image.
    topk (V-MoE, arXiv 2106.05974): a token goes to its K experts of highest probability and gets the sum of p f(x),
        not renormalised; N(0, 1/E^2) is added to logits in training. An expert takes C at most: first choices before
        second ones, and among these the tokens with the highest p (batch priority routing).
    expert_choice (arXiv 2202.09368): an expert takes the C tokens that give it the highest p, the softmax over E. A
        token gets the sum of p f(x) over the experts that took it.
    soft (arXiv 2308.00951): logits are the cosine of token and slot times a learned scale. Each of C = ceil(T/E) slots
        of an expert is a mean of tokens, by the softmax over T; a token gets the mean of f over all E C slots, by the
        softmax over them.
    hash (arXiv 2106.04426): the place in the image says which expert, in all layers the same; an expert has T/E places,
        rounded up or down. A token gets f(x).
    frozen (SMoE-Dropout, arXiv 2303.01610): the router stays as it was drawn. A token goes to its K experts of highest
        logit and gets the sum of p f(x), p the softmax over these K, which grow to all E in training (`top_k_at`).
        An expert takes C at most, first choices before second ones. Testing runs all E.

    A token in no slot gets 0: the residual carries it past. Expert choice and soft look at all tokens of the image.

    Cost of an image against dense, 4 T D F FLOPs: experts run E C / T times as many, which is K times the capacity,
    full or not (1 for soft and hash where E divides T). The router adds 2 T D E. Tokens move to slots and back by
    index: 2 E C D numbers written and read, and no array holds T E C. Soft instead multiplies by two T x E C matrices
    made from one more: 6 T E C D FLOPs, about 6 T^2 D. Weights read are E times the dense model's.

    Parameters of "router", float32: kernel [D, E] and bias [E] as PyTorch's Linear; soft: kernel [D, E, C], scale [].
    Router, softmax and statistics are computed in float32, all else in the compute dtype.

    Publishes `Statistics` as "routing" of the collection "statistics" where that is mutable.
    """

    settings: RouterSettings = RouterSettings()

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key_B: jax.Array | None) -> jax.Array:  # type: ignore[override]
        """Returns y_BTD in the compute dtype.

        Args:
            x_BTD: input tokens.
            key_B: one key per image, for noise and dropout. None is evaluation: deterministic, with eval_capacity.
        """
        weights, stacked = self._weights(x_BTD.shape[-1])
        key_EB = None
        if key_B is not None and self.dropout:
            fold_B = jax.vmap(jax.random.fold_in, (0, None))
            key_EB = jax.vmap(fold_B, (None, 0))(fold_B(key_B, EXPERT_DROPOUT), jnp.arange(self.experts))
        axes = (0, None if key_EB is None else 0, tuple(0 if e else None for e in stacked), None)

        def run(x_EBCD: jax.Array) -> jax.Array:
            return jax.vmap(two_layers, axes)(x_EBCD, key_EB, weights, self.dropout)

        if self.settings.kind == "soft":
            y_BTD, statistics = self._soft(x_BTD, run)
        else:
            slots, statistics = self._route(x_BTD, key_B)
            x_BTD = jnp.asarray(x_BTD, self.dtype)
            index = jnp.arange(x_BTD.shape[0])[None, :, None], slots.token_EBC
            x_EBCD = x_BTD.at[index].get(mode="fill", fill_value=0, unique_indices=slots.once)
            y_EBCD = run(x_EBCD) * slots.weight_EBC[..., None].astype(self.dtype)
            y_BTD = jnp.zeros_like(x_BTD).at[index].add(y_EBCD, mode="drop", unique_indices=slots.once)
        self.sow("statistics", "routing", statistics, reduce_fn=lambda _, new: new)
        return y_BTD

    def _route(self, x_BTD: jax.Array, key_B: jax.Array | None) -> tuple[Slots, Statistics]:
        batch, tokens, _ = x_BTD.shape
        settings, experts = self.settings, self.experts
        if settings.kind == "hash":
            return _hash(batch, tokens, experts)
        logits_BTE = Router(experts, settings.kind == "frozen", name="router")(x_BTD.astype(jnp.float32))
        factor = settings.eval_capacity if key_B is None else settings.capacity
        if settings.kind == "frozen":
            top_BTK, choice_BTK = jax.lax.top_k(logits_BTE, settings.top_k)
            count = _capacity(factor * settings.top_k, tokens, experts)
            slots, load_E, dropped = _by_token(choice_BTK, jax.nn.softmax(top_BTK), experts, count)
            return slots, _statistics(logits_BTE, load_E, load_E, dropped)
        if settings.kind == "switch":
            probability_BTE = jax.nn.softmax(logits_BTE)
            choice_BTK = logits_BTE.argmax(-1, keepdims=True)
            weight_BTK = jnp.take_along_axis(probability_BTE, choice_BTK, axis=-1)
            slots, load_E, dropped = _by_token(choice_BTK, weight_BTK, experts, _capacity(factor, tokens, experts))
            return slots, _statistics(logits_BTE, load_E, load_E, dropped)
        if settings.kind == "topk":
            noisy_BTE = logits_BTE
            if key_B is not None:
                draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), (tokens, experts)))
                noisy_BTE = logits_BTE + draw(key_B) / experts
            top_BTK, choice_BTK = jax.lax.top_k(noisy_BTE, settings.top_k)
            weight_BTK = jnp.take_along_axis(jax.nn.softmax(noisy_BTE), choice_BTK, axis=-1)
            count = _capacity(factor * settings.top_k, tokens, experts)
            slots, load_E, dropped = _by_token(choice_BTK, weight_BTK, experts, count, weight_BTK[..., 0])
            smooth_load_E = upper_tail((top_BTK[..., -1:] - logits_BTE) * experts).mean((0, 1))
            return slots, _statistics(logits_BTE, load_E, smooth_load_E, dropped)
        if settings.kind == "expert_choice":  # always `capacity`: more would add terms the model was not trained with
            count = _capacity(settings.capacity, tokens, experts)
            probability_EBT = jax.nn.softmax(logits_BTE).transpose(2, 0, 1)
            weight_EBC, token_EBC = jax.lax.top_k(probability_EBT, count)
            taken_BT = jnp.zeros((batch, tokens)).at[jnp.arange(batch)[None, :, None], token_EBC].set(1.0)
            load_E = jnp.full((experts,), 1.0 / experts)
            statistics = _statistics(logits_BTE, load_E, load_E, 1.0 - taken_BT.mean())
            return Slots(token_EBC, weight_EBC, once=False), statistics
        raise ValueError(f"kind is {settings.kind!r}; it must be switch, topk, expert_choice, soft, hash or frozen")

    def _soft(self, x_BTD: jax.Array, run: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, Statistics]:
        tokens = x_BTD.shape[1]
        router = SoftRouter(self.experts, -(-tokens // self.experts), name="router")
        logits_BTEC = router(x_BTD.astype(jnp.float32))
        dispatch_BTEC = jax.nn.softmax(logits_BTEC, axis=1).astype(self.dtype)
        combine_BTEC = jax.nn.softmax(logits_BTEC, axis=(2, 3)).astype(self.dtype)
        y_EBCD = run(jnp.einsum("btec,btd->ebcd", dispatch_BTEC, x_BTD.astype(self.dtype)))
        load_E = jnp.full((self.experts,), 1.0 / self.experts)
        # The softmax of these is an expert's share of the softmax over slots.
        logits_BTE = jax.nn.logsumexp(logits_BTEC, axis=3)
        statistics = _statistics(logits_BTE, load_E, load_E, jnp.zeros(()))
        return jnp.einsum("btec,ebcd->btd", combine_BTEC, y_EBCD), statistics


class Router(nn.Module):
    """x_BTD -> logits_BTE: a linear layer with PyTorch's default initialisation; a frozen one has no gradient."""

    experts: int
    frozen: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        init = torch_uniform(width)
        kernel_DE = self.param("kernel", init, (width, self.experts))
        bias_E = self.param("bias", init, (self.experts,))
        if self.frozen:
            kernel_DE, bias_E = jax.lax.stop_gradient((kernel_DE, bias_E))
        # The highest precision, because float32 products are rounded on their way in on a GPU (TF32) or TPU.
        return jnp.matmul(x_BTD, kernel_DE, precision="highest") + bias_E[None, None]


class SoftRouter(nn.Module):
    """x_BTD -> logits_BTEC: cosine of token and slot, times a learned scale (Soft MoE, arXiv 2308.00951, sec. 2.3)."""

    experts: int
    slots: int  # C

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        kernel_DEC = self.param("kernel", init, (width, self.experts, self.slots))
        scale = self.param("scale", nn.initializers.ones, ())
        return jnp.einsum("btd,dec->btec", _unit(x_BTD, -1), scale * _unit(kernel_DEC, 0), precision="highest")


def top_k_at(step: jax.Array, total: int, top_k: int, experts: int) -> jax.Array:
    """Returns K of a frozen router at a step of `total`: each K from `top_k` to E for an equal part of training
    (SMoE-Dropout, arXiv 2303.01610, sec. 3.2: linear in the step).

    It counts the steps at which K grows, as integers: a quotient in float32 can be late by a step.
    """
    values = experts - top_k + 1
    grows_at = np.array([-(-n * total // values) for n in range(1, values)], np.int32)
    return top_k + (step >= grows_at).sum(dtype=jnp.int32)


def balance_loss(kind: str, statistics: Statistics) -> jax.Array:
    """Returns the scalar that grows as experts are used unevenly, a mean over layers of statistics [L, ...].

    switch: E sum_e load_e probability_e, 1 when balanced (Switch, arXiv 2101.03961, eq. 4; GShard).
    topk: the mean of CV^2 of probability (importance) and of smooth load, 0 when balanced (V-MoE, arXiv 2106.05974,
    app. A; there over a device's images, here over those that the statistics are a mean of).
    Other kinds are balanced by construction: 0.
    """
    if kind == "switch":
        experts = statistics.load_E.shape[-1]
        return experts * (statistics.load_E * statistics.probability_E).sum(-1).mean()
    if kind == "topk":
        return (_cv_squared(statistics.probability_E) + _cv_squared(statistics.smooth_load_E)).mean() / 2
    return jnp.zeros(())


def z_loss(statistics: Statistics) -> jax.Array:
    """Returns the mean over layers of z, which keeps logits small. Source: ST-MoE, arXiv 2202.08906, eq. 5."""
    return statistics.z.mean()


@jax.custom_jvp
def upper_tail(x: jax.Array) -> jax.Array:
    """Returns 1 - Phi(x), the probability that a standard normal draw is above x, of any shape."""
    return 0.5 * jax.lax.erfc(x * 0.5**0.5)


@upper_tail.defjvp
def _upper_tail_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Written out for the reason that mlp.gelu's is.
    (x,), (dx,) = primals, tangents
    return upper_tail(x), -dx * jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5


def _by_token(
    choice_BTK: jax.Array, weight_BTK: jax.Array, experts: int, count: int, priority_BT: jax.Array | None = None
) -> tuple[Slots, jax.Array, jax.Array]:
    """Returns (slots, load_E, dropped) where tokens choose and each expert has `count` slots per image.

    Slots go to first choices, then to second ones; among these to tokens of high priority, then of low place.
    """
    _, tokens, chosen = choice_BTK.shape
    empty_EC = tokens + jnp.arange(experts * count).reshape(experts, count)

    def one(choice_TK: jax.Array, weight_TK: jax.Array, priority_T: jax.Array | None) -> tuple[jax.Array, ...]:
        order_T = jnp.arange(tokens) if priority_T is None else jnp.argsort(-priority_T)
        token_A = jnp.tile(order_T, chosen)
        choice_A, weight_A = (x_TK[order_T].T.reshape(-1) for x_TK in (choice_TK, weight_TK))
        by_expert_A = jnp.argsort(choice_A)  # stable: in the order of precedence within an expert
        count_E = (choice_A[:, None] == jnp.arange(experts)[None]).sum(0)
        start_E = jnp.cumsum(count_E) - count_E
        slot_C = jnp.arange(count)
        full_EC = slot_C[None] < count_E[:, None]
        choice_EC = by_expert_A[jnp.where(full_EC, start_E[:, None] + slot_C[None], 0)]
        token_EC = jnp.where(full_EC, token_A[choice_EC], empty_EC)
        return token_EC, jnp.where(full_EC, weight_A[choice_EC], 0.0), count_E

    token_BEC, weight_BEC, count_BE = jax.vmap(one)(choice_BTK, weight_BTK, priority_BT)
    slots = Slots(token_BEC.swapaxes(0, 1), weight_BEC.swapaxes(0, 1), once=chosen == 1)
    load_E = count_BE.mean(0) / (chosen * tokens)
    dropped = jnp.maximum(count_BE - count, 0).sum(1).mean() / (chosen * tokens)
    return slots, load_E, dropped


def _hash(batch: int, tokens: int, experts: int) -> tuple[Slots, Statistics]:
    # Multiplying by an odd number permutes 32-bit numbers; places in their new order are dealt out one by one.
    hash_T = np.arange(tokens, dtype=np.uint32) * np.uint32(2654435761)
    count = -(-tokens // experts)
    token_EC = np.append(np.argsort(hash_T), np.arange(tokens, count * experts)).reshape(count, experts).T
    token_EBC = jnp.broadcast_to(jnp.asarray(token_EC, jnp.int32)[:, None], (experts, batch, count))
    load_E = jnp.asarray((token_EC < tokens).mean(1) * count / tokens, jnp.float32)
    zero = jnp.zeros(())
    return Slots(token_EBC, jnp.ones(token_EBC.shape), once=True), Statistics(load_E, load_E, load_E, zero, zero, zero)


def _statistics(logits_BTE: jax.Array, load_E: jax.Array, smooth_load_E: jax.Array, dropped: jax.Array) -> Statistics:
    probability_BTE = jax.nn.softmax(logits_BTE)
    normaliser_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = normaliser_BT - (probability_BTE * logits_BTE).sum(-1)
    z = jnp.square(normaliser_BT).mean()
    return Statistics(load_E, probability_BTE.mean((0, 1)), smooth_load_E, dropped, entropy_BT.mean(), z)


def _capacity(factor: float, tokens: int, experts: int) -> int:
    # Rounding before the ceiling: 1.1 * 10 is a little more than 11. No expert gets a token twice, so T is enough.
    return min(math.ceil(round(factor * tokens / experts, 6)), tokens)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-6)


def _cv_squared(x_LE: jax.Array) -> jax.Array:
    return x_LE.var(-1) / jnp.square(x_LE.mean(-1))
