"""Every expert runs in every step, each on an equal share of the images: `jax.vmap` of the dense model over experts."""

import jax
import jax.numpy as jnp

from jvitmoe.experts.params import Params, Tree, join, one
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.models import vit
from jvitmoe.models.routers import Statistics
from jvitmoe.routing.base import Route, Routing, StepInfo


class Sample(Routing):
    """A step draws which of E equal parts of the batch each expert sees. The images are sorted by expert once, before
    the first layer, so weights stay where they are, and an expert may live on a device of its own.

    A route is int32 [E], the expert of each part of the batch: a uniform permutation, so every expert runs on equally
    many images, and nothing is dropped.
    """

    meaning = "each gets a random share of every batch's images"

    @property
    def slots(self) -> int:  # type: ignore[override]
        return self.experts

    @property
    def reduced_experts(self) -> int:
        return self.experts

    def draw(self, root: jax.Array, step: jax.Array) -> tuple[Route, ...]:
        uniform_E = jax.random.uniform(address(root, Purpose.ROUTE, step), (self.experts,))
        return self.distinct(root, step, jnp.argsort(uniform_E).astype(jnp.int32))

    def slot_of_expert(self, routes: tuple[Route, ...]) -> jax.Array:
        return jnp.argsort(routes[0])

    def logits(
        self, model: vit.ViT, given: Params, images_bHWc: jax.Array, key_b: jax.Array | None, info: StepInfo
    ) -> tuple[jax.Array, Statistics | None]:
        """Part e of the images meets expert e; in a second pass, the expert that the second route gives to the part."""
        trunk, experts = given
        here = len(jax.tree.leaves(experts)[0])  # e: experts of this device
        if here == 1:
            return vit.logits(model, join(trunk, one(experts)), images_bHWc, key_b), None
        if info.number:
            expert_of_part_E = info.routes[info.number][self.slot_of_expert(info.routes)]
            experts = jax.tree.map(lambda leaf: leaf[expert_of_part_E], experts)

        def run(expert: Tree, images_bHWc: jax.Array, key_b: jax.Array | None) -> jax.Array:
            return vit.logits(model, join(trunk, expert), images_bHWc, key_b)

        images_ebHWc, key_eb = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), (images_bHWc, key_b))
        return jax.vmap(run)(experts, images_ebHWc, key_eb).reshape(len(images_bHWc), -1), None
