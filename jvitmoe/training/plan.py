"""The settings of a training step, the same for all steps of a run."""

import dataclasses

import jax
from jax.sharding import Mesh

from jvitmoe.config import Config
from jvitmoe.models import vit
from jvitmoe.routing import Routing
from jvitmoe.runtime.devices import DATA, EXPERT


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The arguments that all functions of the step share, and values derived from them."""

    config: Config
    routing: Routing
    model: vit.ViT  # that `routing.model` returns for these devices
    mesh: Mesh
    steps_per_epoch: int

    @property
    def root(self) -> jax.Array:
        """The key of the run (`addresses.address`)."""
        return jax.random.key(self.config.train.seed)

    @property
    def total(self) -> int:
        """Number of steps of the run."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def data_devices(self) -> int:
        return self.mesh.shape[DATA]

    @property
    def expert_devices(self) -> int:
        return self.mesh.shape[EXPERT]
