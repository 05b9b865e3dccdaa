"""One expert for the whole batch, or one per layer: the step is the dense step on that expert's slice."""

import jax
import jax.numpy as jnp

from jvitmoe.experts import params
from jvitmoe.experts.params import Params, Tree
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.models import vit
from jvitmoe.models.routers import Statistics
from jvitmoe.routing.base import Route, Routing, StepInfo


class Batch(Routing):
    """A step draws one expert for all layers and all images (the original of this project). It takes this expert, a
    dense model with the trunk, trains it, and puts it back: idle experts, their moments and their step counts
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
        """Returns the expert of each pass."""
        taken = [params.take(experts, self.of_layers(route)) for route in routes]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *taken)

    def put(self, experts: Tree, taken: Tree, routes: tuple[Route, ...]) -> Tree:
        for number, route in enumerate(routes):
            part = jax.tree.map(lambda leaf, n=number: leaf[n : n + 1], taken)
            experts = params.put(experts, part, self.of_layers(route))
        return experts

    def logits(
        self, model: vit.ViT, given: Params, images_bHWc: jax.Array, key_b: jax.Array | None, info: StepInfo
    ) -> tuple[jax.Array, Statistics | None]:
        tree = params.join(given.trunk, params.one(given.experts, info.number))
        return vit.logits(model, tree, images_bHWc, key_b), None

    def of_layers(self, route: Route) -> Route:
        """Returns the route that `params.take` reads."""
        return route


class Layer(Batch):
    """As `Batch`, with an expert drawn for each layer (AdaMix, arXiv 2205.12410; THOR, arXiv 2110.04260). A route is
    int32 [L], uniform."""

    meaning = "one is drawn for each batch and layer"

    @property
    def draws(self) -> int:  # type: ignore[override]
        return self.model_settings.depth

    def of_layers(self, route: Route) -> Route:
        return route[jnp.array(self.layers_with_experts)]
