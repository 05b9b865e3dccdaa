"""The configuration of a run: all settings, each with its description and its bounds. `rules` checks them.

An experiment is a small file in `configs/` whose `get_config()` returns a `Config`. On the command line any setting can
be overridden with `--config.a.b=value`.
"""

import dataclasses
import json
import operator
from collections.abc import Collection
from typing import Any

from jvitmoe.errors import ConfigError, did_you_mean

LARGEST = 2**31 - 1  # sizes, steps and seeds are int32 on the devices
BOUNDS = {
    "above": ("greater than", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "at_most": ("at most", operator.le),
}


def setting(default: Any, doc: str, choices: tuple[str, ...] = (), free: bool = False, **bounds: float) -> Any:
    """Returns a dataclass field with the description of a setting, the values that it allows (empty `choices`: all),
    and limits by the names in BOUNDS. A run may resume with another value of a `free` one: it changes no number."""
    limits = [f"{BOUNDS[name][0]} {limit:,}" for name, limit in bounds.items()]
    rule = f"one of {', '.join(map(repr, choices))}" if choices else " and ".join(limits)
    about = {"doc": doc, "choices": choices, "free": free, "bounds": bounds, "rule": rule}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class DataConfig:
    """The data, and what is done to pixels."""

    name: str = setting(
        "digits", "digits; folder (train/CLASS/… and test/CLASS/…); hf:NAME of Hugging Face; or a TFDS set"
    )
    dir: str = setting("", "the image folder, or where TFDS or Hugging Face keep sets; empty: their default", free=True)
    part: str = setting("", "part of the training images to train on: 2/8 is the second eighth; '' is all")
    validation: int = setting(0, "training images held out, class by class, to choose a checkpoint on", at_least=0)
    crop_padding: int = setting(0, "zero pixels added on each side before a random crop; 0 is no crop", at_least=0)
    flip: bool = setting(False, "mirror each image left to right with probability 1/2")
    stream: bool = setting(False, "read each batch from disk: for sets larger than a device's memory", free=True)
    crop: str = setting(
        "exact",
        "exact: images of the model's size; centre: the middle of any size; whole: all of it, padded to a square; "
        "resized: random parts, needs stream",
        ("exact", "centre", "whole", "resized"),
    )
    crop_area: float = setting(0.08, "smallest share of a picture that crop=resized shows", above=0, at_most=1)
    augment: str = setting("none", "three: 3-Augment of DeiT III with jitter of 0.3", ("none", "three"))
    erase: float = setting(0.0, "probability of erasing a random rectangle of an image", at_least=0, at_most=1)
    mixup: float = setting(0.0, "alpha of mixup, 0 is off; with cutmix, each batch draws one of them", at_least=0)
    cutmix: float = setting(0.0, "alpha of cutmix, 0 is off", at_least=0)
    plain_at_end: float = setting(0.0, "last fraction of training with crop and flip only", at_least=0, below=1)
    mean: tuple[float, ...] = setting((0.5,), "mean of pixels (0 to 1), 1 or per channel, subtracted from them")
    std: tuple[float, ...] = setting((0.5,), "standard deviation of pixels, 1 or per channel; divides them")


@dataclasses.dataclass
class ModelConfig:
    """The Vision Transformer."""

    image_size: int = setting(8, "height and width of an image in pixels", above=0)
    channels: int = setting(1, "channels of an image", above=0)
    classes: int = setting(10, "number of classes; 0: counted from the data when a run starts", at_least=0)
    patch: int = setting(2, "height and width of a patch in pixels", above=0)
    stem: str = setting(
        "patch",
        "patch: one linear layer; else log2(patch) 3x3 convolutions that halve by max pooling (conv) or stride",
        ("patch", "conv", "strided"),
    )
    width: int = setting(64, "width of a token, D; 0: the model of init.source, but for what is set", at_least=0)
    hidden: int = setting(128, "hidden units of an MLP, F", above=0)
    expert_hidden: int = setting(0, "hidden units of each expert of a router; 0: those of an MLP", at_least=0)
    shared_hidden: int = setting(0, "hidden units of a shared expert, which every token passes", at_least=0)
    depth: int = setting(4, "number of layers, L", above=0, at_most=10_000)
    heads: int = setting(4, "attention heads, G", above=0)
    pool: str = setting(
        "cls",
        "what the head sees: CLS; mean of patches; that beside a CLS; seq: weighted",
        ("cls", "mean", "cls_mean", "seq"),
    )
    registers: int = setting(0, "learned tokens beside the patches that the head does not see", at_least=0)
    positions: str = setting("learned", "position embeddings: learned, or fixed sines", ("learned", "sincos2d"))
    cls_position: bool = setting(False, "the CLS token has a learned position, as in timm and Hugging Face")
    head_hidden: int = setting(0, "hidden units of a two-layer head; 0 is a one-layer head", at_least=0)
    norm_epsilon: float = setting(1e-5, "epsilon of LayerNorm; 1e-6 in timm, 1e-12 in Hugging Face", above=0)
    init: str = setting("independent", "original: equal layers, 300 rows of positions", ("independent", "original"))
    layer_scale: float = setting(0.0, "initial value of a scale per channel on each branch; 0: none", at_least=0)
    qk_norm: bool = setting(False, "LayerNorm of every head's query and key")
    dropout: float = setting(0.0, "rate after attention weights, GELU and both branches", at_least=0, below=1)
    drop_path: float = setting(0.0, "rate of dropped branches in the last layer; linear from 0", at_least=0, below=1)
    lora: int = setting(0, "rank of a LoRA on the MLP, one per expert; trains it and the head only", at_least=0)
    adapter: int = setting(0, "hidden units of an adapter beside the MLP, one per expert; as lora", at_least=0)
    dtype: str = setting(
        "auto",
        "dtype of computation; auto: bfloat16 on GPU and TPU; float32 has TF32 products on a GPU",
        ("auto", "float32", "bfloat16"),
    )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def has_cls(self) -> bool:
        return self.pool in ("cls", "cls_mean")

    @property
    def tokens(self) -> int:
        """T: the CLS token if there is one, registers, and the patches of an image."""
        return self.has_cls + self.registers + self.patches

    @property
    def drops(self) -> bool:
        """True if training needs random numbers for dropout or drop_path."""
        return self.dropout > 0 or self.drop_path > 0

    @property
    def fits_cudnn(self) -> bool:
        """True if JAX can differentiate cuDNN's fused attention for these shapes."""
        head_width = self.width // self.heads
        return head_width % 8 == 0 and head_width <= 128 and self.tokens % 2 == 0

    def set_beyond(self, fields: Collection[str]) -> list[str]:
        """Returns the names of the fields, except these, whose value is not the default."""
        named = ((field.name, field.default) for field in dataclasses.fields(self) if field.name not in fields)
        return sorted(name for name, default in named if getattr(self, name) != default)

    def one_expert(self) -> "ModelConfig":
        """Returns the dense model whose MLP is an expert."""
        return dataclasses.replace(self, hidden=self.expert_hidden or self.hidden, expert_hidden=0, shared_hidden=0)

    def plain(self) -> "ModelConfig":
        """Returns the merged model; LoRA is folded into the MLP, adapters and shared experts are more hidden units."""
        hidden = (self.expert_hidden or self.hidden) + self.shared_hidden + self.adapter
        return dataclasses.replace(self, hidden=hidden, expert_hidden=0, shared_hidden=0, lora=0, adapter=0)


# Fields of ModelConfig that do not change what a trained, merged model computes in float32.
NEUTRAL = frozenset(("init", "dropout", "drop_path", "lora", "adapter", "dtype"))


@dataclasses.dataclass
class RoutingConfig:
    """The experts: how many, which of them runs, and what keeps them together."""

    experts: int = setting(1, "experts per MLP, E; 1 is the dense model", above=0)
    kind: str = setting(
        "batch",
        "which expert runs. Drawn at random: batch, one for all images and layers (the original); layer, one per "
        "layer; sample, each on a share of the images; token, each on a share of an image's tokens. By a router: "
        "switch, topk, expert_choice, soft, hash",
    )
    pattern: tuple[str, ...] = setting(("experts",), """kinds of layers, repeated over depth: '("dense","experts")'""")
    part: str = setting(
        "mlp",
        "what an expert owns: the MLP; its first or second layer, of LoRA and adapters the matrix that is first or "
        "second (AdaMix: up); the whole model (local training)",
        ("mlp", "up", "down", "model"),
    )
    init: str = setting("independent", "experts start different (the original) or equal", ("independent", "shared"))
    pull: float = setting(0.0, "share of the way to their mean that experts move (EWA, PAPA)", at_least=0, at_most=1)
    pull_every: int = setting(1, "steps between two pulls", above=0)
    top_k: int = setting(2, "experts of a token: topk", above=0)
    capacity: float = setting(1.25, "slots per expert * experts / tokens / K (expert_choice: K = 1)", above=0)
    eval_capacity: float = setting(2.0, "capacity in evaluation: switch, topk", above=0)
    balance_loss: float = setting(
        0.01, "coefficient of the load-balancing loss, the mean over layers (Switch, V-MoE: the sum)", at_least=0
    )
    balance_bias: float = setting(
        0.0,
        "step of a bias by which switch and topk select experts (DeepSeek-V3: 0.001, with balance_loss=0); 0: none",
        at_least=0,
    )
    consistency: float = setting(0.0, "weight of the divergence of two passes; doubles the cost", at_least=0)
    consistency_loss: str = setting(
        "adamix",
        "adamix: cross-entropy of one pass; thor: of both (R-Drop if one expert); cosub: each is the other's target",
        ("adamix", "thor", "cosub"),
    )

    @property
    def averages_every_step(self) -> bool:
        """True if all experts are equal after every step."""
        return self.pull == self.pull_every == 1


@dataclasses.dataclass
class InitConfig:
    """A trained ViT to start from. Read when a run starts, not when it resumes."""

    source: str = setting(
        "", "trained ViT: run or export folder, .safetensors, cifar10_cct, hf://OWNER/NAME@REVISION or timm://NAME"
    )
    start: str = setting("", "hash of the start that train --start names; it sets this itself")


@dataclasses.dataclass
class OptimConfig:
    """The optimiser and its schedule."""

    name: str = setting("adamw", "adam (weight decay in the gradient, the original), adamw, or muon with adamw")
    learning_rate: float = setting(1e-3, "highest learning rate", above=0)
    mlp_rate: float = setting(1.0, "learning rate of MLPs, or of what experts own, as a multiple", above=0)
    weight_decay: float = setting(0.05, "coefficient of weight decay; except with adam, of matrices only", at_least=0)
    schedule: str = setting("step", "cosine per step, or per epoch (the original)", ("step", "epoch"))
    warmup_epochs: float = setting(0.0, "linear from 0, at most half of training; only if schedule=step", at_least=0)
    clip_norm: float = setting(0.0, "largest global norm of the gradient; 0 does not clip", at_least=0)
    eps: float = setting(1e-8, "epsilon of Adam", above=0)
    layer_decay: float = setting(1.0, "ratio of a layer's learning rate to that of the next layer", above=0, at_most=1)
    freeze_layers: int = setting(0, "first layers to freeze, with the embeddings; depth: all but the head", at_least=0)


@dataclasses.dataclass
class TrainConfig:
    """Length, batch, loss, devices and checkpoints of a run."""

    epochs: int = setting(10, "passes over the training images", above=0)
    batch_size: int = setting(
        128,
        "images per step, B; a multiple of the devices (sample: x experts); 0: chosen by the number of images",
        at_least=0,
    )
    seed: int = setting(0, "seed of all random numbers of training", at_least=0)
    class_weights: str = setting(
        "none",
        "weights of classes in the loss; balanced: all classes have the same sum over the training images",
        ("none", "balanced"),
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", at_least=0, below=1)
    ema: float = setting(
        0.0, "decay of the merged model's mean, at most (1 + t) / (10 + t), also tested; 0: none", at_least=0, below=1
    )
    devices: int = setting(0, "number of devices; 0 is all", free=True, at_least=0)
    expert_devices: int = setting(1, "devices along the expert axis, for a share of experts each", free=True, above=0)
    shard: str = setting(
        "none",
        "what the data axis splits: moments, or parameters too (ZeRO)",
        ("none", "optimizer", "parameters"),
        True,
    )
    accumulate: int = setting(1, "parts of a batch that run in turn, to save memory", free=True, above=0)
    log_every: int = setting(20, "steps from one log line to the next", free=True, above=0)
    eval_every: int = setting(1, "epochs from one evaluation to the next", free=True, above=0)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: only after evaluations", free=True, at_least=0)

    @property
    def images_at_once(self) -> int:
        """The images of a step's batch that run together, on all devices; evaluation takes as many."""
        return self.batch_size // self.accumulate


@dataclasses.dataclass
class Config:
    """All settings of a run, in six sections. `get_config()` of an experiment returns one; `rules.check` checks it."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    @property
    def trains_adapters_only(self) -> bool:
        """True if only LoRA or adapters, and the head, are trained."""
        return self.model.lora > 0 or self.model.adapter > 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold experts, if there are several experts."""
        pattern = self.routing.pattern
        return tuple(layer for layer in range(self.model.depth) if pattern[layer % len(pattern)] == "experts")


def with_variant(config: Config, variant: str) -> Config:
    """Returns the config of a variant of an experiment: "dense", or "random", where each image of a batch goes through
    one of four experts, which have four times the learning rate and are averaged after every step. Of 24 settings these
    were the best in a search, and they lose nothing against dense (docs/study.md, A: a small model, Muon, CIFAR-10).

    Raises ConfigError for another name.
    """
    if variant not in ("dense", "random"):
        raise ConfigError(f"the variant is {variant!r}; it must be 'dense' or 'random': --config=FILE.py:random")
    if variant == "random":
        config.routing = RoutingConfig(experts=4, kind="sample", init="shared", pull=1.0)
        config.optim.mlp_rate = 4.0
    return config


SETTINGS = {  # {"section.field": field}
    f"{section.name}.{field.name}": field
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), section.name))
}
# Settings that are gone, at the values with which they did nothing: older run folders have them.
RETIRED: dict[str, tuple[Any, ...]] = {
    **{"optim.outer_rate": (0.0,), "optim.primal_averaging": (0.0,), "routing.pull_schedule": ("constant",)},
    **{"model.position_rows": (0, 300)},  # 300 beside init_layers=shared: init=original
}
RETIRED_DETAILS = ("optim.outer_momentum", "optim.primal_share")  # of these
# A run may resume with other values of these: they never change a number of training (but see `differences`).
FREE_ON_RESUME = frozenset(path for path, field in SETTINGS.items() if field.metadata["free"])


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """Returns the Config of `to_dict`. Absent fields get their defaults. Raises ConfigError for unknown fields."""
    config = Config()
    sections = {field.name for field in dataclasses.fields(config)}
    for section_name, section_values in values.items():
        if section_name not in sections or not isinstance(section_values, dict):
            raise ConfigError(unknown_field(section_name))
        section = getattr(config, section_name)
        for name, value in section_values.items():
            path = f"{section_name}.{name}"
            if path == "model.init_layers":
                path, name, value = "model.init", "init", "original" if value == "shared" else value
            if path in RETIRED_DETAILS or (path in RETIRED and value in RETIRED[path]):
                continue
            if path in RETIRED:
                raise ConfigError(f"config.{path} is {value!r}; the setting is gone; commit 6c750bb has it")
            if path not in SETTINGS:
                raise ConfigError(unknown_field(path))
            setattr(section, name, tuple(value) if isinstance(value, list) else value)  # JSON has no tuples
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Returns {"section.field": value}."""
    return {path: operator.attrgetter(path)(config) for path in SETTINGS}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {"section.field": (old, new)} for the fields that would change a run's numbers, except those that depend
    on the data (`data.sources.differences`)."""
    olds, news = flatten(old), flatten(new)
    if old.init.start and old.init.start == new.init.start:  # the hash of one start, which may lie elsewhere now
        del olds["init.source"]
    return {k: (olds[k], news[k]) for k in olds if olds[k] != news[k] and k not in FREE_ON_RESUME}


def unknown_field(path: str) -> str:
    """Returns the one-line message for a field that does not exist, with the most similar one."""
    hint = did_you_mean(path, SETTINGS) or f"; the sections are {', '.join(to_dict(Config()))}"
    return f"config.{path} is not a field{hint}"


def dumps(config: Config) -> str:
    """Returns the JSON text kept in a run folder."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def loads(text: str | bytes, name: str) -> Config:
    """Returns the Config of `dumps`. Raises ConfigError with the file's name if the text is not a config."""
    try:
        return from_dict(json.loads(text))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name} is not the config of a run: {error}; restore it from a copy") from error
