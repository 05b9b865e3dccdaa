"""A ViT for CIFAR-10 of 0.6 M parameters like CCT-4/3x2 (Hassani et al., arXiv 2104.05704): 128 x 4, 64 tokens from two
convolutions with pooling, sequence pooling, Muon.

    jvitmoe train --config cifar10_cct
    jvitmoe train --config cifar10_cct:random

It is `cifar10_fast` with CCT's stem, two heads, MLP rate x 2, cutmix and five times the epochs. Seed 0 has 88.84 % of
the test images dense, and 88.82 % with random experts, averaged after every step (JPEG copy; results/recipe90); other
seeds are not trained yet. The goal was 90 %. The shipped model, `jvitmoe predict --model cifar10_cct`, is a run with
`--config.data.plain_at_end=0.2`, which ended without cutmix: two seeds had 88.54 and 88.79 %. Such a run comes to know
its training images by heart in its last fifth. With 5,000 images held out it had 88.94 % of them, and the recipe, with
cutmix to the end, 89.88 % (one seed; 88.38 and 88.88 % of the test images).

What tries of one seed had of held-out images: 80 epochs with strong cutmix and erasing, 89.06 %. 24 epochs of the
recipe, 86.34 %; as much computation at a low resolution first, 24 epochs at 24 x 24 pixels and 11 at 32 x 32, 85.92 %.
24 epochs at MLP rate x 1, crop and flip alone 85.12 %, and with plain ends weak cutmix 86.28 %, strong cutmix 86.02 %,
3-Augment with weak cutmix 83.92 %. Twice and half the learning rate are not better after 8 epochs.

Both cores of an EPYC Zen 4 trained 257 to 363 images/s in five timings of 1 to 2 minutes: 3 to 4.3 hours for 80
epochs. On one core, with another run on the other, a seed took 5 hours and 20 to 45 minutes, with random experts 6
hours and 15 minutes.
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="cifar10", crop_padding=4, flip=True, cutmix=0.3),
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
