"""digits_dense with four experts per MLP, one drawn at random per step for all layers, averaged before testing.

python -m jvitmoe.train --config configs/digits_random.py
"""

import digits_dense

from jvitmoe.config import Config, RoutingConfig


def get_config() -> Config:
    config = digits_dense.get_config()
    config.routing = RoutingConfig(experts=4, granularity="batch", scope="shared", init="shared")
    return config
