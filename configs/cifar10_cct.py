"""A ViT for CIFAR-10 of 0.6 M parameters like CCT-4/3x2 (Hassani et al., arXiv 2104.05704): 128 x 4, 64 tokens from two
convolutions with pooling, sequence pooling, Muon.

    jvitmoe train --config cifar10_cct
    jvitmoe train --config cifar10_cct:random

It is `cifar10_fast` with CCT's stem, two heads, MLP rate x 2, cutmix and five times the epochs. No run of it has ended
yet. In tries of 24 epochs at MLP rate x 1 weak cutmix had 86.28 % of held-out images, strong cutmix 86.02 %, crop and
flip alone 85.12 %, and 3-Augment with weak cutmix 83.92 % (one seed, 5,000 images; results/recipe90).
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="cifar10", crop_padding=4, flip=True, cutmix=0.3, plain_at_end=0.2),
        model=ModelConfig(
            **{"image_size": 32, "channels": 3, "classes": 10, "stem": "conv", "patch": 4},
            **{"width": 128, "hidden": 256, "depth": 4, "heads": 2, "pool": "seq", "dtype": "bfloat16"},
        ),
        optim=OptimConfig(
            **{"name": "muon", "learning_rate": 4e-3, "mlp_rate": 2, "weight_decay": 0.05},
            **{"warmup_epochs": 1, "clip_norm": 1.0},
        ),
        train=TrainConfig(
            **{"epochs": 80, "batch_size": 128, "accumulate": 8, "label_smoothing": 0.1},
            **{"log_every": 50, "eval_every": 10},
        ),
    )
    return with_variant(config, variant)
