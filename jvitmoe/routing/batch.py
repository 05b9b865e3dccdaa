"""One expert for the whole batch, or one per layer: the step is the dense step on that expert's slice."""

import jax
import jax.numpy as jnp

from jvitmoe.experts import trees
from jvitmoe.models import vit
from jvitmoe.models.routers import Statistics
from jvitmoe.routing.base import Pass, Route, Routing, Tree
from jvitmoe.runtime.addresses import Purpose, address


class Batch(Routing):
    """A step draws one expert for all layers and all images (the original of this project). It takes this expert, a
    dense model, out of the stacked tree, trains it, and puts it back: idle experts, their moments and their step counts
    keep their bits. A second pass runs a second expert.

    A route is int32 [1], uniform.
    """

    meaning = "one is drawn for each batch"
    draws = 1

    def draw(self, root: jax.Array, step: jax.Array) -> tuple[Route, ...]:
        key = address(root, Purpose.ROUTE, step)
        route = jax.random.randint(key, (self.draws,), 0, self.experts)
        return self.distinct(root, step, route, self.draws)

    def take(self, experts: Tree, routes: tuple[Route, ...]) -> Tree:
        """Returns the dense leaves [L, ...] of the expert that runs; of two, [L, 2, ...]."""
        taken = [trees.take(experts, self.expert(route), self.axis) for route in routes]
        if len(taken) == 1:
            return taken[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, self.axis), *taken)

    def put(self, experts: Tree, taken: Tree, routes: tuple[Route, ...]) -> Tree:
        if len(routes) == 1:
            return trees.put(experts, taken, self.expert(routes[0]), self.axis)
        for number, route in enumerate(routes):
            experts = trees.put(experts, trees.take(taken, number, self.axis), self.expert(route), self.axis)
        return experts

    def logits(
        self, model: vit.ViT, params: Tree, images_bHWc: jax.Array, key_b: jax.Array | None, at: Pass
    ) -> tuple[jax.Array, Statistics | None]:
        if self.passes > 1:
            trunk, experts = trees.split(params, trees.stacked(params))
            params = trees.join(trunk, trees.take(experts, at.number, self.axis))
        return vit.logits(model, params, images_bHWc, key_b), None

    def expert(self, route: Route) -> Route:
        """Returns the index that `trees.take` reads: a scalar for all layers."""
        return route[0]


class Layer(Batch):
    """As `Batch`, with an expert drawn for each layer (AdaMix, arXiv 2205.12410; THOR, arXiv 2110.04260). A route is
    int32 [L], uniform."""

    meaning = "one is drawn for each batch and layer"

    @property
    def draws(self) -> int:  # type: ignore[override]
        return self.model_settings.depth

    def expert(self, route: Route) -> Route:
        return route
