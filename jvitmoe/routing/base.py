"""What a way of routing decides in a training step. A way of routing is a class derived from `Routing`.

b the images of one device · C classes · E experts, e the share of one device · L layers
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jvitmoe import rules
from jvitmoe.config import Config
from jvitmoe.experts import cost, params
from jvitmoe.experts.params import Params, Tree
from jvitmoe.machine import devices
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.models import vit
from jvitmoe.models.routers import Statistics

Route = jax.Array  # int32: which experts run


class StepInfo(NamedTuple):
    """What a forward pass of a step knows of the step."""

    number: int  # of the pass: 0, or 1 for the second of a consistency loss
    routes: tuple[Route, ...]  # of all passes


class Routing:
    """The dense run, with one expert for all images, and the base class of ways of routing.

    An expert is a dense ViT, whose parameters are the trunk and what the expert owns (`experts.params`). A step draws
    routes, takes the experts that run, differentiates and updates them, and puts them back. Routes come from
    (seed, step) for the global batch, so any step can be replayed on any number of devices.
    """

    meaning = ""  # what an expert is trained on, for the first lines of a run
    slots = 1  # equal parts of a batch that run at once, each through another expert
    untrained = ""  # the key of parameters that the optimiser does not train; "" if there are none

    def __init__(self, config: Config) -> None:
        self.settings, self.model_settings = config.routing, config.model
        self.layers_with_experts = config.expert_layers
        self.trains_adapters_only = config.trains_adapters_only
        self._mlp_rate = config.optim.mlp_rate

    @classmethod
    def faults(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Yields (setting, rule) for each rule of this way of routing that the config breaks: here what holds for all.
        More rules of jvitmoe's own ways are in `rules`."""
        yield from rules.of_route(config)

    @property
    def experts(self) -> int:
        """E."""
        return self.settings.experts

    @property
    def has_whole_models(self) -> bool:
        """True if each expert is a whole model: E copies of it are trained by themselves."""
        return self.experts > 1 and self.settings.part == "model"

    @property
    def passes(self) -> int:
        """Number of forward passes per step. The consistency loss compares two: on two routes if there are several
        experts, and with two draws of dropout and drop_path."""
        return 2 if self.settings.consistency else 1

    @property
    def trained_apart(self) -> int:
        """The number of whole models that a step trains, each on its share of the batch: 1, or E."""
        return self.slots if self.has_whole_models else 1

    @property
    def active_experts(self) -> float:
        """The experts that a token passes through."""
        return 1

    @property
    def reduced_experts(self) -> int:
        """The experts whose gradients all devices reduce in a step, without an expert axis."""
        return min(self.passes, self.experts)

    def model(self, mesh: Mesh | None = None) -> vit.ViT:
        """Returns the model for the devices of a mesh, or for a CPU: dense, because an expert is a dense model."""
        pattern = self.settings.pattern if self.experts > 1 else ("experts",)
        platform, fused = (mesh.devices.flat[0].platform, devices.fuses_attention(mesh)) if mesh else ("cpu", False)
        return vit.build(self.model_settings, platform, pattern, fused)

    def init(self, key: jax.Array, trained: Tree | None = None) -> Params:
        """Returns the parameters at step 0, float32. Experts start as copies of the dense model's draw, or with
        routing.init=independent each as a dense model of its own; of a trained dense tree, trunk and all experts start
        as its copies (`vit.fill`)."""
        model, experts = self.model(), self.experts
        drawn = self._start(model, trained, key)
        if experts == 1:
            return Params(drawn, {})
        dense = model.clone(router=None, config=self.model_settings.one_expert())
        if self.settings.init == "independent":
            copies = jax.vmap(lambda key: self._start(dense, trained, key))(jax.random.split(key, experts))
        else:
            start = self._start(dense, trained, key)
            copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (experts, *x.shape)), start)
        return params.divide(drawn, copies, self.settings, self.trains_adapters_only)

    @staticmethod
    def _start(model: vit.ViT, trained: Tree | None, key: jax.Array) -> Tree:
        drawn = vit.init(model, key)
        return drawn if trained is None else vit.fill(drawn, trained)

    def shapes(self) -> Params:
        """Returns the parameters as `jax.ShapeDtypeStruct`; nothing is allocated."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def count_parameters(self) -> tuple[int, int]:
        """Returns (active, total): what one token passes through, a router included, and all experts together."""
        trunk, experts = map(cost.tree_size, self.shapes())
        return trunk + round(self.active_experts * experts / self.experts), trunk + experts

    def draw(self, root: jax.Array, step: jax.Array) -> tuple[Route, ...]:
        """Returns the route of each pass of a step; () if nothing is drawn."""
        return ()

    def distinct(self, root: jax.Array, step: jax.Array, route: Route, draws: int = 1) -> tuple[Route, ...]:
        """Returns the routes of all passes, of which `route` is the first. A second one differs from it everywhere: it
        is shifted cyclically by a uniform draw from 1 .. E - 1, so a permutation stays one. `draws` is 1, or L for a
        draw in each layer."""
        if self.passes == 1:
            return (route,)
        shift = jax.random.randint(address(root, Purpose.SECOND_ROUTE, step), (draws,), 1, self.experts)
        return route, (route + shift) % self.experts

    def take(self, experts: Tree, routes: tuple[Route, ...]) -> Tree:
        """Returns the R experts that a step runs and updates, of their weights or moments: all of them here."""
        return experts

    def put(self, experts: Tree, taken: Tree, routes: tuple[Route, ...]) -> Tree:
        """Returns the experts with what `take` returned replaced by `taken`. Nothing else is written."""
        return taken

    def slot_of_expert(self, routes: tuple[Route, ...]) -> jax.Array:
        """Returns, for each of the `slots` experts that run at once, the part of the batch that it sees. Image n of
        the global batch is in part n modulo `slots`."""
        return jnp.arange(self.slots)

    def logits(
        self, model: vit.ViT, given: Params, images_bHWc: jax.Array, key_b: jax.Array | None, info: StepInfo
    ) -> tuple[jax.Array, Statistics | None]:
        """Returns (logits_bC of a pass, statistics of a learned router or None).

        Args:
            model: as `model`.
            given: the trunk and what `take` returned; on the expert axis, the share of this device.
            images_bHWc: augmented images, in `slots` equal parts in the order of `slot_of_expert`.
            key_b: one dropout key per image; None without dropout.
            info: the pass and the routes.
        """
        return vit.logits(model, given.trunk, images_bHWc, key_b), None

    @property
    def needs_keys(self) -> bool:
        """True if `logits` needs `key_b`."""
        return self.model_settings.drops

    def adjust(self, given: Params, statistics: Statistics | None) -> Params:
        """Returns the parameters after what a router changes in them by itself, from the statistics of the global
        batch."""
        return given

    def loss(self, statistics: Statistics | None) -> jax.Array:
        """Returns what is added to the loss, of the statistics of the global batch."""
        return jnp.float32(0)

    def rate(self, step: jax.Array) -> jax.Array:
        """Returns what multiplies the learning rate of experts at a step. Of whole models, see
        `Optimizer.scales`."""
        return jnp.float32(1.0 if self.has_whole_models else self._mlp_rate)
