"""Weights on the Hugging Face hub, downloaded once into its cache: hf://OWNER/NAME[@REVISION], and timm://NAME for a
model of timm. Only .safetensors and their JSON files are fetched."""

from pathlib import Path

from jvitmoe.errors import UserError, one_line

FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def is_name(source: Path | str) -> bool:
    """True for a name on the hub, False for a path."""
    return str(source).startswith(("hf://", "timm://"))


def repository_of(name: str) -> tuple[str, str]:
    """Returns (OWNER/NAME on the hub, revision or "") of a name on the hub."""
    scheme, _, rest = name.partition("://")
    repository, _, revision = rest.partition("@")
    return f"timm/{repository}" if scheme == "timm" else repository, revision


def fetch(name: str) -> Path:
    """Returns the folder in the cache that holds the files of a model; its name is the commit. Raises UserError."""
    repository, revision = repository_of(name)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{name!r} is not a name on the hub; write hf://OWNER/NAME@REVISION or timm://NAME")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{name!r} needs huggingface_hub; install it with pip install 'jvitmoe[hf]'") from error
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=[*FILES]))
    except Exception as error:  # of the hub's client, its HTTP library and the disk
        raise UserError(f"{name!r} cannot be fetched ({one_line(error)}); give a folder that you have") from error
    if not (folder / FILES[0]).is_file():
        raise UserError(f"{name!r} holds no {FILES[0]}; only safetensors are read")
    return folder
