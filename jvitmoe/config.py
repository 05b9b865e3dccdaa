"""The configuration of a run: all settings, and the rules that join several of them.

An experiment is a small file in `configs/` whose `get_config()` returns a `Config`. On the command line any setting can
be overridden with `--config.a.b=value`. `python -m jvitmoe.config > docs/settings.md` writes the page about them.
"""

import dataclasses
import itertools
import json
import operator
from collections.abc import Collection, Iterator
from typing import Any

from jvitmoe.errors import ConfigError, did_you_mean
from jvitmoe.settings import check, page, setting

MOST_PARAMETERS = 10**13
SMALLEST_STD = 1e-3  # of pixels from 0 to 1: a quarter of their smallest difference


@dataclasses.dataclass
class DataConfig:
    """The data, and what is done to pixels."""

    name: str = setting(
        "digits",
        "digits; folder (train/CLASS/… and test/CLASS/…); hf:NAME, a set or folder of Hugging Face; or a TFDS set",
    )
    dir: str = setting("", "the image folder, or where TFDS or Hugging Face keep sets; empty: their default", free=True)
    validation: int = setting(0, "training images held out, class by class, to choose a checkpoint on", at_least=0)
    crop_padding: int = setting(0, "zero pixels added on each side before a random crop; 0 is no crop", at_least=0)
    flip: bool = setting(False, "mirror each image left to right with probability 1/2")
    stream: bool = setting(False, "read each batch from disk: for sets larger than a device's memory", free=True)
    crop: str = setting(
        "pad",
        "pad: images of the model's size; centre: any size, resized, their middle; resized: random parts, needs stream",
        ("pad", "centre", "resized"),
    )
    three_augment: bool = setting(False, "grey, solarize or blur, and colour jitter of 0.3 (3-Augment of DeiT III)")
    trivial_augment: bool = setting(False, "one random operation of random strength (TrivialAugment, wide)")
    erase: float = setting(0.0, "probability of erasing a random rectangle of an image", at_least=0, at_most=1)
    mixup: float = setting(0.0, "alpha of mixup, 0 is off; with cutmix, each batch draws one of them", at_least=0)
    cutmix: float = setting(0.0, "alpha of cutmix, 0 is off", at_least=0)
    plain_last: float = setting(0.0, "last fraction of training with crop and flip only", at_least=0, below=1)
    mean: tuple[float, ...] = setting((0.5,), "mean of pixels (0 to 1), 1 or per channel, subtracted from them")
    std: tuple[float, ...] = setting((0.5,), "standard deviation of pixels, 1 or per channel; divides them")


@dataclasses.dataclass
class ModelConfig:
    """The Vision Transformer."""

    image_size: int = setting(8, "height and width of an image in pixels", above=0)
    channels: int = setting(1, "channels of an image", above=0)
    classes: int = setting(10, "number of classes", above=0)
    patch: int = setting(2, "height and width of a patch in pixels", above=0)
    stem: str = setting(
        "patch",
        "for each factor 2 of patch: conv, a 3x3 convolution, ReLU, max pooling (CCT); strided, one of stride 2, ReLU",
        ("patch", "conv", "strided"),
    )
    width: int = setting(64, "width of a token, D", above=0)
    hidden: int = setting(128, "hidden units of an MLP, F", above=0)
    depth: int = setting(4, "number of layers, L", above=0, at_most=10_000)
    heads: int = setting(4, "attention heads, G", above=0)
    norm: str = setting("pre", "LayerNorm before or after attention and MLP", ("pre", "post"))
    pool: str = setting(
        "cls",
        "input of the head: CLS; mean of the patches; cls_mean: the same, with a CLS beside them; seq: weighted (CCT)",
        ("cls", "mean", "cls_mean", "seq"),
    )
    registers: int = setting(0, "learned tokens beside the patches that the head does not see", at_least=0)
    positions: str = setting("learned", "position embeddings: learned, or fixed sines", ("learned", "sincos2d"))
    cls_position: bool = setting(False, "the CLS token has a learned position, as in timm and Hugging Face")
    position_rows: int = setting(0, "rows of the learned positions; 0: one per patch; original: 300", at_least=0)
    head_hidden: int = setting(0, "hidden units of a two-layer head; 0 is a one-layer head", at_least=0)
    norm_epsilon: float = setting(1e-5, "epsilon of LayerNorm; 1e-6 in timm, 1e-12 in Hugging Face", above=0)
    init_layers: str = setting("independent", "layers start different or equal", ("independent", "shared"))
    layer_scale: float = setting(0.0, "initial value of a scale per channel on each branch; 0: none", at_least=0)
    qk_norm: bool = setting(False, "LayerNorm of every head's query and key")
    dropout: float = setting(0.0, "rate after attention weights, GELU and both branches", at_least=0, below=1)
    drop_path: float = setting(
        0.0, "rate of dropping a branch of an image in the last layer; linear over depth from 0", at_least=0, below=1
    )
    lora: int = setting(0, "rank of a LoRA on the MLP, one per expert; trains it and the head only", at_least=0)
    adapter: int = setting(0, "hidden units of an adapter beside the MLP, one per expert; as lora", at_least=0)
    dtype: str = setting(
        "auto",
        "dtype of computation; auto: bfloat16 on GPU and TPU; float32 has TF32 products on a GPU",
        ("auto", "float32", "bfloat16"),
    )
    attention: str = setting("auto", "auto: cudnn if it supports the shapes, else xla", ("auto", "xla", "cudnn"))
    unroll: int = setting(1, "layers per iteration of the scan over depth", above=0)

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def has_cls(self) -> bool:
        """True if the model has a CLS token."""
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

    def plain(self) -> "ModelConfig":
        """Returns the model after LoRA and adapters are folded into the MLP. An adapter becomes more hidden units."""
        return dataclasses.replace(self, hidden=self.hidden + self.adapter, lora=0, adapter=0)


# Fields of ModelConfig that do not change what a trained, merged model computes in float32.
NEUTRAL = frozenset(("position_rows", "init_layers", "dropout", "drop_path", "lora", "adapter"))
NEUTRAL |= {"dtype", "attention", "unroll"}


@dataclasses.dataclass
class RoutingConfig:
    """The experts: how many, which of them runs, and what keeps them together."""

    experts: int = setting(1, "experts per MLP, E; 1 is the dense model", above=0)
    router: str = setting("random", "random, or switch, topk, expert_choice, soft, hash, frozen with granularity=batch")
    pattern: tuple[str, ...] = setting(("experts",), """kinds of layers, repeated over depth: '("dense","experts")'""")
    granularity: str = setting(
        "batch",
        "what shares a route: all images, an equal share of the images, or of the tokens",
        ("batch", "sample", "token"),
    )
    scope: str = setting("shared", "one draw for all layers (the original), or one per layer", ("shared", "layer"))
    init: str = setting("independent", "experts start different (the original) or equal", ("independent", "shared"))
    shared_layer: str = setting(
        "none", "MLP layer that all experts share; with up, merging is exactly their mean", ("none", "up", "down")
    )
    learning_rate: float = setting(
        1.0, "learning rate of experts (of the MLPs, if dense), as a multiple of optim.learning_rate", above=0
    )
    pull: float = setting(0.0, "share of the way to their mean that experts move (EWA, PAPA)", at_least=0, at_most=1)
    pull_every: int = setting(1, "steps between two pulls; with qsr, at the highest learning rate", above=0)
    pull_schedule: str = setting(
        "constant",
        "pull over training: rising from 0, as the learning_rate, or rarer while that falls (QSR)",
        ("constant", "rising", "learning_rate", "qsr"),
    )
    top_k: int = setting(2, "experts of a token: topk; frozen at the start, growing to all experts", above=0)
    capacity: float = setting(
        1.25,
        "tokens an expert takes of an image, relative to an even share: switch, topk, frozen, expert_choice",
        above=0,
    )
    eval_capacity: float = setting(2.0, "capacity in evaluation: switch, topk, frozen", above=0)
    balance_loss: float = setting(
        0.01, "coefficient of the load-balancing loss, the mean over layers (Switch, V-MoE: the sum)", at_least=0
    )
    z_loss: float = setting(0.0, "coefficient of mean(logsumexp(router logits)^2); 1e-3 in ST-MoE", at_least=0)
    consistency: float = setting(0.0, "weight of the divergence of two passes; doubles the cost", at_least=0)
    consistency_loss: str = setting(
        "adamix",
        "adamix: cross-entropy of one pass; thor: of both (R-Drop if one expert); cosub: each is the other's target",
        ("adamix", "thor", "cosub"),
    )
    augment_spread: float = setting(
        0.0,
        "0: every image gets all augmentations; s: an image of expert e gets them with probability 1 - s (1 - e / (E - "
        "1)), which is 1 - s for the first expert and 1 for the last",
        at_least=0,
        at_most=1,
    )
    tie_last: float = setting(0.0, "last fraction of training with all experts equal", at_least=0, below=1)


@dataclasses.dataclass
class InitConfig:
    """A trained ViT to start from. Read when a run starts, not when it resumes."""

    source: str = setting(
        "",
        "trained ViT: run or export folder, .safetensors, .npz, hf://OWNER/NAME@REVISION or timm://NAME; its MLPs are "
        "what experts start as",
    )
    mean: tuple[float, ...] = setting(
        (), "mean of the source's pixels (0 to 1), 1 or per channel; (): from its config, or 0.5"
    )
    std: tuple[float, ...] = setting((), "standard deviation of the source's pixels, in the form of mean")
    noise: float = setting(0.0, "normal noise on each expert's copy, in standard deviations of its array", at_least=0)


@dataclasses.dataclass
class OptimConfig:
    """The optimiser and its schedule."""

    name: str = setting("adamw", "adam (weight decay in the gradient, the original), adamw, lion, or muon with adamw")
    learning_rate: float = setting(1e-3, "highest learning rate", above=0)
    weight_decay: float = setting(
        0.05, "coefficient of weight decay; except with adam, of matrices only, not of LoRA and adapters", at_least=0
    )
    schedule: str = setting("step", "cosine per step, or per epoch (the original)", ("step", "epoch"))
    final_rate: float = setting(
        0.0, "learning rate that the cosine ends at, as a fraction of learning_rate", at_least=0, at_most=1
    )
    warmup_epochs: float = setting(0.0, "linear from 0, at most half of training; only if schedule=step", at_least=0)
    clip_norm: float = setting(0.0, "largest global norm of the gradient; 0 does not clip", at_least=0)
    b1: float = setting(
        0.9, "decay of Adam's first moment; with lion, weight of the momentum in the update", at_least=0, below=1
    )
    b2: float = setting(
        0.999, "decay of Adam's second moment; of lion's momentum, 0.99 in its paper", at_least=0, below=1
    )
    eps: float = setting(1e-8, "epsilon of Adam", above=0)
    layer_decay: float = setting(
        1.0, "ratio of a layer's learning rate to that of the next layer, as in timm; 1 is off", above=0, at_most=1
    )
    freeze_layers: int = setting(
        0, "first layers that are not trained, nor are embeddings; depth: only final norm and head are", at_least=0
    )
    skip_nonfinite: int = setting(0, "steps in a row to skip if loss or gradient is not finite; 0 stops", at_least=0)


@dataclasses.dataclass
class TrainConfig:
    """Length, batch, loss, devices and checkpoints of a run."""

    epochs: int = setting(10, "passes over the training images", above=0)
    batch_size: int = setting(128, "images per step over all devices, B", above=0)
    seed: int = setting(0, "seed of all random numbers of training", at_least=0)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", at_least=0, below=1)
    ema: float = setting(
        0.0, "decay of a running mean of the merged model, also tested; 0 is none", at_least=0, below=1
    )
    distil_last: float = setting(
        0.0,
        "last fraction of training: experts stay equal, and half of the loss is the divergence from the mean of the "
        "probabilities that they gave before it",
        at_least=0,
        below=1,
    )
    ema_warmup: bool = setting(False, "decay of ema is at most (1 + t) / (10 + t) after t steps")
    devices: int = setting(0, "number of devices; 0 is all", free=True, at_least=0)
    expert_devices: int = setting(
        1, "devices along the expert axis; each holds its share of experts", free=True, above=0
    )
    shard: str = setting(
        "none",
        "what the data axis splits: moments (ZeRO), or all (FSDP)",
        ("none", "optimizer", "parameters"),
        free=True,
    )
    accumulate: int = setting(1, "parts of a batch that run in turn, to save memory", free=True, above=0)
    platform: str = setting(
        "",
        "kind of devices; empty: what JAX finds. JAX starts the others too; the variable JAX_PLATFORMS=cpu prevents it",
        ("", "cpu", "gpu", "tpu"),
        free=True,
    )
    log_every: int = setting(20, "steps from one log line to the next", free=True, above=0)
    eval_every: int = setting(1, "epochs from one evaluation to the next", free=True, above=0)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: only after evaluations", free=True, at_least=0)
    keep: int = setting(2, "newest checkpoints kept, besides the best on validation images", free=True, above=0)
    stall_minutes: float = setting(30.0, "minutes without progress until the run ends; 0: never", free=True, at_least=0)


@dataclasses.dataclass
class Config:
    """All settings of a run, in six sections. `get_config()` of an experiment returns one; `validate` checks it."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def validate(self) -> "Config":
        """Returns itself if every rule holds. Raises ConfigError naming the first setting that breaks one."""
        for path, field in SETTINGS.items():
            check(path, field, operator.attrgetter(path)(self))
        faults = (_data_faults, _model_faults, _train_faults, _routing_faults)
        if fault := next(itertools.chain.from_iterable(find(self) for find in faults), None):
            path, rule = fault
            raise ConfigError(f"config.{path} is {operator.attrgetter(path)(self)!r}; it {rule}")
        return self

    @property
    def routes_in_model(self) -> bool:
        """True if the model routes its tokens, by a router or a hash; False if a route is its input."""
        return self.routing.router != "random"

    @property
    def tuned(self) -> bool:
        """True if only LoRA or adapters, and the head, are trained."""
        return self.model.lora > 0 or self.model.adapter > 0

    @property
    def tied_last(self) -> float:
        """Last fraction of training with all experts equal."""
        return max(self.routing.tie_last, self.train.distil_last)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold experts, if there are several experts."""
        pattern = self.routing.pattern
        return tuple(layer for layer in range(self.model.depth) if pattern[layer % len(pattern)] == "experts")

    @property
    def slots(self) -> int:
        """Number of equal parts of a batch that run at once, each through another expert."""
        return 1 if self.routing.granularity == "batch" else self.routing.experts


def routing_of(variant: str) -> RoutingConfig:
    """Returns the routing of a variant of an experiment: "dense", or "random", where each image of a batch goes through
    one of four experts, which have four times the learning rate and are averaged after every step. Of 24 settings these
    were the best in a search, and they lose nothing against dense (docs/study.md, A: a small model, Muon, CIFAR-10).

    Raises ConfigError for another name.
    """
    if variant not in ("dense", "random"):
        raise ConfigError(
            f"the variant is {variant!r}; it must be 'dense' or 'random', such as --config=FILE.py:random"
        )
    if variant == "dense":
        return RoutingConfig()
    return RoutingConfig(experts=4, granularity="sample", init="shared", learning_rate=4.0, pull=1.0)


SETTINGS = {  # {"section.field": field}
    f"{section.name}.{field.name}": field
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), section.name))
}
# A run may resume with other values of these: they never change a number of training (but see `differences`).
FREE_ON_RESUME = frozenset(path for path, field in SETTINGS.items() if field.metadata["free"])


def _data_faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (setting, rule) for each broken rule that joins several settings; so do those of the other sections."""
    data, model = config.data, config.model
    if data.crop == "resized" and not data.stream:
        yield (
            "data.crop",
            "must be 'pad' or 'centre' for sets that live on the device; 'resized' needs data.stream=True",
        )
    for path, values, least in (("data.mean", data.mean, 0.0), ("data.std", data.std, SMALLEST_STD)):
        if len(values) not in (1, model.channels) or not all(least <= value <= 1 for value in values):
            yield path, f"must be one number or {model.channels}, one per channel, each from {least:g} to 1"
    if data.crop_padding > model.image_size:
        yield "data.crop_padding", f"must be at most model.image_size, which is {model.image_size}"


def _model_faults(config: Config) -> Iterator[tuple[str, str]]:
    model, parameters = config.model, _about_parameters(config)
    if parameters > MOST_PARAMETERS:
        about = f"makes about {parameters:.1e} parameters with the other sizes"
        yield "model.width", f"{about}; they must be at most {MOST_PARAMETERS:.1e}"
    if model.width % model.heads:
        yield "model.width", f"must be a multiple of model.heads, which is {model.heads}"
    if model.positions == "sincos2d" and model.width % 4:
        yield "model.width", "must be a multiple of 4 for model.positions=sincos2d"
    if model.image_size % model.patch:
        yield "model.patch", f"must divide model.image_size, which is {model.image_size}"
    if 0 < model.position_rows < model.patches:
        yield "model.position_rows", f"must be 0 or at least the number of patches, which is {model.patches}"
    if model.attention == "cudnn" and (not model.fits_cudnn or model.dtype == "float32"):
        fits = "bfloat16, heads of a multiple of 8 up to 128 and an even number of tokens"
        yield "model.attention", f"must be auto or xla except for {fits}"
    if model.stem != "patch" and (model.patch < 2 or model.patch & (model.patch - 1)):
        halves = f"model.stem={model.stem}, which halves the image at each convolution"
        yield "model.patch", f"must be a power of two for {halves}"
    if model.cls_position and not model.has_cls:
        yield "model.cls_position", f"must be False for model.pool={model.pool}, which has no CLS token"


def _train_faults(config: Config) -> Iterator[tuple[str, str]]:
    optim, routing, train, slots = config.optim, config.routing, config.train, config.slots
    if train.batch_size % slots:
        rule = f"must be a multiple of routing.experts, {slots}, for granularity={routing.granularity}"
        yield "train.batch_size", rule
    if train.devices and train.batch_size % train.devices:
        yield "train.batch_size", f"must be a multiple of train.devices, which is {train.devices}"
    splits = (routing.granularity, routing.scope, routing.consistency) == ("sample", "shared", 0)
    if train.expert_devices > 1 and (slots % train.expert_devices or not splits):
        rule = "must be 1, or divide routing.experts for granularity sample, scope shared and no consistency"
        yield "train.expert_devices", rule
    if train.devices % train.expert_devices:
        yield "train.expert_devices", f"must divide train.devices, which is {train.devices}"
    if train.ema_warmup and not train.ema:
        yield "train.ema_warmup", "must be False without train.ema, such as --config.train.ema=0.9999"
    if optim.schedule == "epoch" and optim.warmup_epochs:
        yield "optim.warmup_epochs", "must be 0 for optim.schedule=epoch; warm-up needs optim.schedule=step"
    if optim.freeze_layers > config.model.depth:
        yield "optim.freeze_layers", f"must be at most model.depth, which is {config.model.depth}"
    if optim.freeze_layers and routing.experts > 1 and (routing.pull or config.tied_last):
        rule = "must be 0 with routing.pull, routing.tie_last or train.distil_last, which move experts of all layers"
        yield "optim.freeze_layers", rule
    if train.distil_last and (train.expert_devices > 1 or config.routes_in_model or config.tuned):
        rule = "must be 0 with train.expert_devices, learned routers, LoRA and adapters: all experts see each image"
        yield "train.distil_last", rule
    if train.distil_last and routing.tie_last:
        yield "routing.tie_last", "must be 0 with train.distil_last, which makes experts equal where it begins"


def _routing_faults(config: Config) -> Iterator[tuple[str, str]]:
    model, routing, init = config.model, config.routing, config.init
    is_random = routing.experts > 1 and not config.routes_in_model
    if "experts" not in routing.pattern or not {*routing.pattern} <= {"experts", "dense"}:
        rule = "must be a tuple of 'experts' and 'dense', with 'experts' in it, such as "
        yield "routing.pattern", rule + """--config.routing.pattern='("dense","experts")'"""
    elif model.depth % len(routing.pattern):
        yield "routing.pattern", f"must have a length that divides model.depth, which is {model.depth}"
    if (
        is_random
        and routing.pattern.count("experts") > 1
        and (routing.granularity, routing.scope) == ("batch", "layer")
    ):
        # The layers of one optimiser state must have one route.
        yield "routing.pattern", "must have one 'experts', for granularity=batch and scope=layer"
    if config.routes_in_model and (routing.experts == 1 or routing.granularity != "batch" or routing.consistency):
        needed = "routing.experts above 1, routing.granularity=batch and routing.consistency=0"
        yield "routing.router", f"must be 'random', or have {needed}"
    if config.routes_in_model and routing.pull == routing.pull_every == 1 and routing.pull_schedule == "constant":
        rule = "must be below 1 with a learned router, or all experts would be equal after every step; set it to 0"
        yield "routing.pull", rule
    if routing.consistency and routing.experts == 1 and not model.drops:
        rule = "must be 0 with one expert, without model.dropout and model.drop_path: both passes are equal"
        yield "routing.consistency", rule
    if routing.consistency > 1 and routing.consistency_loss == "cosub":
        yield "routing.consistency", "must be at most 1 for consistency_loss=cosub: it is a share of the loss"
    if routing.augment_spread and (not is_random or routing.scope == "layer" or routing.granularity == "token"):
        rule = "must be 0 but for random routing of scope shared and granularity batch or sample: an expert per image"
        yield "routing.augment_spread", rule
    if routing.pull_schedule == "qsr" and config.optim.schedule == "epoch":
        yield "routing.pull_schedule", "must not be 'qsr' for optim.schedule=epoch; it needs the rate of every step"
    if config.tuned and not init.source:
        yield "init.source", "must name a trained ViT for model.lora and model.adapter, which keep it frozen"
    if config.tuned and (routing.router, routing.pattern, routing.shared_layer) != ("random", ("experts",), "none"):
        needed = "'random', with pattern ('experts',) and shared_layer 'none'"
        yield "routing.router", f"must be {needed}, for model.lora and model.adapter"
    if init.noise and (routing.experts == 1 or not init.source or config.tuned):
        rule = "must be 0 without an init.source, with one expert, LoRA or adapters: it sets copies of the MLP apart"
        yield "init.noise", rule


def _about_parameters(config: Config) -> int:
    """Returns the approximate number of parameters, to refuse sizes that no machine holds."""
    model = config.model
    block = 4 * model.width + 2 * config.routing.experts * (model.hidden + model.lora + model.adapter)
    head = (model.width + model.classes) * model.head_hidden or model.width * model.classes
    tables = max(model.patches, model.position_rows) + model.patch**2 * model.channels
    return model.width * (model.depth * block + tables) + head


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """Returns the Config of `to_dict`, of this version or an older one. Absent fields get their defaults, with which
    older versions behaved alike. Raises ConfigError for an unknown section or field."""
    config = Config()
    sections = {field.name for field in dataclasses.fields(config)}
    for section_name, section_values in _renamed(values).items():
        if section_name not in sections or not isinstance(section_values, dict):
            raise ConfigError(unknown_field(section_name))
        section = getattr(config, section_name)
        for name, value in section_values.items():
            if f"{section_name}.{name}" not in SETTINGS:
                raise ConfigError(unknown_field(f"{section_name}.{name}"))
            setattr(section, name, tuple(value) if isinstance(value, list) else value)  # JSON has no tuples
    return config


def _renamed(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the values of an older version under the present names: routing.init=upcycled, routing.upcycle_from=x
    became routing.init=shared, init.source=x."""
    routing = values.get("routing")
    if not isinstance(routing, dict) or "upcycle_from" not in routing:
        return values
    kept = {name: value for name, value in routing.items() if name != "upcycle_from"}
    if kept.get("init") != "upcycled":
        return {**values, "routing": kept}
    return {**values, "routing": {**kept, "init": "shared"}, "init": {"source": routing["upcycle_from"]}}


def flatten(config: Config) -> dict[str, Any]:
    """Returns {"section.field": value}."""
    return {path: operator.attrgetter(path)(config) for path in SETTINGS}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {"section.field": (old, new)} for the fields that would change a run's numbers, except those that depend
    on the data (`data.datasets.differences`)."""
    olds, news = flatten(old), flatten(new)
    return {k: (olds[k], news[k]) for k in olds if olds[k] != news[k] and k not in FREE_ON_RESUME}


def unknown_field(path: str) -> str:
    """Returns the one-line message for a field that does not exist, with the most similar one."""
    hint = did_you_mean(path, SETTINGS) or f"; the sections are {', '.join(to_dict(Config()))}"
    return f"config.{path} is not a field{hint}"


def dumps(config: Config) -> str:
    """Returns the JSON text kept in a run folder."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def loads(text: str, name: str) -> Config:
    """Returns the Config of `dumps`. Raises ConfigError with the file's name if the text is not a config."""
    try:
        return from_dict(json.loads(text))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name} is not the config of a run: {error}; restore it from a copy") from error


if __name__ == "__main__":
    print(page(SETTINGS))
