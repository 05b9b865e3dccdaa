"""A ViT like CCT-7/3x1 (Hassani et al., arXiv 2104.05704) for CIFAR-10 on one GPU: 3.8 M parameters, 256 tokens.

    jvitmoe train --config cifar10_gpu
    jvitmoe train --config cifar10_gpu:random

300 epochs. The paper reports 96.53 % for CCT-7/3x1. Its recipe has RandAugment in place of 3-Augment, no erasing, and
no mixing after epoch 175 (configs/pretrained/cct_7-3x1_cifar10_300epochs.yml of SHI-Labs/Compact-Transformers). Its
blocks have no bias of queries, keys and values, and dropout of attention. Not measured here, neither accuracy nor time:
it needs a GPU.
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(
            **{"name": "cifar10", "crop_padding": 4, "flip": True, "augment": "three", "erase": 0.25},
            **{"mixup": 0.8, "cutmix": 1.0, "plain_at_end": 0.05},
            **{"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
        ),
        model=ModelConfig(
            **{"image_size": 32, "channels": 3, "classes": 10, "stem": "conv", "patch": 2, "pool": "seq"},
            **{"width": 256, "hidden": 512, "depth": 7, "heads": 4, "drop_path": 0.1},
        ),
        optim=OptimConfig(learning_rate=5.5e-4, weight_decay=0.06, warmup_epochs=10),
        train=TrainConfig(epochs=300, batch_size=128, label_smoothing=0.1, eval_every=10),
    )
    return with_variant(config, variant)
