"""cifar10_random on CIFAR-100: the same model and recipe with 100 classes.

    jvitmoe train --config cifar100_random

The original reports no figure for CIFAR-100, and none is measured here yet.
"""

import cifar10_random

from jvitmoe.config import Config


def get_config() -> Config:
    config = cifar10_random.get_config()
    config.data.name = "cifar100"
    config.model.classes = 100
    return config
