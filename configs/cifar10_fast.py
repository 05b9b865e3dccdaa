from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, RoutingConfig, TrainConfig


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="cifar10", crop_padding=4, flip=True),
        model=ModelConfig(
            image_size=32, channels=3, classes=10, stem="conv", patch=4, width=128, hidden=256, depth=4, heads=4,
            pool="seq", dtype="bfloat16",
        ),
        optim=OptimConfig(name="muon", learning_rate=2e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0),
        train=TrainConfig(epochs=10, batch_size=128, label_smoothing=0.1, log_every=50, eval_every=2),
    )
    return config
