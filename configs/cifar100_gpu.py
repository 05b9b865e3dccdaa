"""A ViT like CCT-7/3x1 for CIFAR-100 on one GPU, 300 epochs: the model and recipe of cifar10_gpu.py.

    jvitmoe train --config cifar100_gpu
    jvitmoe train --config cifar100_gpu:random

Not measured here, neither accuracy nor time: it needs a GPU.
"""

import cifar10_gpu

from jvitmoe.config import Config


def get_config(variant: str = "dense") -> Config:
    config = cifar10_gpu.get_config(variant)
    config.data.name, config.model.classes = "cifar100", 100
    config.data.mean, config.data.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return config
