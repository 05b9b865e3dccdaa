"""A router inside the model chooses the experts of each token."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jvitmoe.config import Config
from jvitmoe.experts.params import Params, join_all
from jvitmoe.models import routers, vit
from jvitmoe.models.routers import SELECTION_BIAS, RouterSettings, Statistics
from jvitmoe.routing.base import Routing, StepInfo


class InModel(Routing):
    """All experts take part in each step, on the tokens that a router gives them (`models.routers`)."""

    untrained = SELECTION_BIAS

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.router = routers.find(config.routing.kind)
        self._frozen_layers = config.optim.freeze_layers
        self.meaning = "each gets a random share of every image's tokens"
        if self.router.is_tested:
            self.meaning = f"{config.routing.kind} routes the tokens"

    @property
    def router_settings(self) -> RouterSettings:
        routing = self.settings
        top_k = self.router.most_experts(routing.top_k, self.experts)
        capacity = routing.capacity, routing.eval_capacity
        return RouterSettings(routing.kind, self.experts, top_k, *capacity, has_bias=routing.balance_bias > 0)

    @property
    def active_experts(self) -> float:
        return self.router.active_experts(self.router_settings, self.model_settings.tokens)

    @property
    def reduced_experts(self) -> int:
        return self.experts

    @property
    def needs_keys(self) -> bool:
        return True  # also without dropout: no keys mean evaluation

    def model(self, mesh: Mesh | None = None) -> vit.ViT:
        return super().model(mesh).clone(router=self.router_settings)

    def logits(
        self, model: vit.ViT, given: Params, images_bHWc: jax.Array, key_b: jax.Array | None, info: StepInfo
    ) -> tuple[jax.Array, Statistics | None]:
        return vit.logits_and_statistics(model, join_all(given), images_bHWc, key_b)

    def adjust(self, given: Params, statistics: Statistics | None) -> Params:
        """Moves the bias of each trained expert by `routing.balance_bias`, up below the mean load and down above
        (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; arXiv 2408.15664)."""
        step = self.settings.balance_bias
        if not step:
            return given
        assert statistics is not None
        layers = jnp.array(self.layers_with_experts)
        is_trained_X1 = (layers >= self._frozen_layers)[:, None]
        load_XE = jnp.where(is_trained_X1, statistics.load_E, 1 / self.experts)
        load_LE = jnp.zeros((self.model_settings.depth, self.experts)).at[layers].set(load_XE)

        def move(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
            if path[-1].key != SELECTION_BIAS:
                return leaf
            return leaf + step * jnp.sign(1 / self.experts - vit.of_group(path, load_LE, leaf.shape[0]))

        return given._replace(trunk=jax.tree.map_with_path(move, given.trunk))

    def loss(self, statistics: Statistics | None) -> jax.Array:
        assert statistics is not None
        return self.settings.balance_loss * self.router.loss(statistics)
