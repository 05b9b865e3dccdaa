"""The settings of a training step, the same for all steps of a run."""

import dataclasses

import jax
from jax.sharding import Mesh

from jvitmoe.config import Config
from jvitmoe.models import vit
from jvitmoe.runtime.devices import DATA, EXPERT


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The arguments that all functions of the step share, and values derived from them."""

    config: Config
    model: vit.ViT  # the whole model, all experts
    mesh: Mesh
    steps_per_epoch: int

    @property
    def root(self) -> jax.Array:
        """The key of the run (`routes.address`)."""
        return jax.random.key(self.config.train.seed)

    @property
    def total(self) -> int:
        """Number of steps of the run."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def first_tied(self) -> int:
        """First step at which all experts are equal. Without tied_last it lies after the end of the run."""
        tied_last = self.config.tied_last
        first = round((1.0 - tied_last) * self.total) if tied_last else self.total + 1
        return max(first, 1) if self.config.train.distil_last else first  # the step before it makes the teacher

    @property
    def passes(self) -> int:
        """Number of forward passes per step. The consistency loss compares two, on two routes, if there are several
        experts, and with two draws of dropout and drop_path."""
        return 2 if self.config.routing.consistency else 1

    @property
    def all_run(self) -> bool:
        """True if every expert takes part in each step; False if only the selected experts do."""
        return self.config.slots > 1 or self.config.routes_in_model

    @property
    def sorts_images(self) -> bool:
        """True if the images are sorted by expert before the first layer. If all layers have the same route, this
        replaces gathering the weights in each layer."""
        routed = self.config.routing
        return (routed.granularity, routed.scope) == ("sample", "shared") and not routed.consistency

    @property
    def data_devices(self) -> int:
        return self.mesh.shape[DATA]

    @property
    def expert_devices(self) -> int:
        return self.mesh.shape[EXPERT]

    @property
    def local_model(self) -> vit.ViT:
        """The model of one device: with its share of all experts, or with the selected expert of each pass."""
        experts = self.model.experts // self.expert_devices if self.all_run else min(self.passes, self.model.experts)
        return self.model if experts == self.model.experts else self.model.clone(experts=experts)
