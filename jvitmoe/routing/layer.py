"""One expert per layer for the whole batch: a path through the experts."""

from collections.abc import Iterator

from jvitmoe.config import Config
from jvitmoe.routing.base import Route
from jvitmoe.routing.batch import Batch


class Layer(Batch):
    """As `Batch`, with an expert drawn for each layer (AdaMix, arXiv 2205.12410; THOR, arXiv 2110.04260). A route is
    int32 [L], uniform."""

    meaning = "one is drawn for each batch and layer"

    @classmethod
    def faults(cls, config: Config) -> Iterator[tuple[str, str]]:
        if config.routing.pattern.count("experts") > 1:  # the layers of one optimiser state must have one route
            yield "routing.pattern", "must have one 'experts', for routing.kind=layer"

    @property
    def draws(self) -> int:  # type: ignore[override]
        return self.config.model.depth

    def expert(self, route: Route) -> Route:
        return route
