"""Who may import whom. Every file of the package is checked, new ones included."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import jvitmoe

ROOT = Path(jvitmoe.__file__).parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}

# A file imports from folders (and top-level files) to the left of its own; those of one group never import each other.
ORDER = (
    ("errors", "extras"),
    ("config",),
    ("rules",),
    ("settings", "machine"),
    ("data", "models"),
    ("experts", "runs"),
    ("routing", "reports"),
    ("evaluation",),
    ("interop",),
    ("training",),
    ("experiments",),
    ("commands",),
    ("api", "__main__"),
    ("train", "__init__"),
)
RANK = {folder: rank for rank, group in enumerate(ORDER) for folder in group}

JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "chex"}
WITHOUT_JAX = (
    *("errors", "settings", "config", "rules", "experiments", "train", "data.sources.__init__", "data.pictures"),
    *(f"commands.{name}" for name in ("cli", "report", "configs")),
    *("interop.weight_names", "interop.config_files"),
    *(f"runs.{name}" for name in ("console", "safe_io")),
    *(f"reports.{name}" for name in ("figures", "run_figures", "page", "results", "comparison")),
    *("runs.metrics_log", "machine.watchdog", "machine.memory"),
)
# Package -> the folder, or the one file, that may import it.
ONLY_IN = {
    **{"flax": "models", "orbax": "runs", "tensorstore": "nowhere", "grain": "data.stream"},
    **{
        "tensorflow_datasets": "data.sources.tfds",
        "datasets": "data.sources.hugging_face",
        "huggingface_hub": "interop",
    },
    **{"wandb": "runs.trackers", "torch": "nowhere"},
}
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy"}  # they run what they read


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


@functools.cache
def imports(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """Returns (outside packages, modules of jvitmoe) that a file imports, anywhere in it."""
    outside, inside = set(), set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            package, _, rest = target.partition(".")
            if package != "jvitmoe":
                outside.add(package)
                continue
            while rest and rest not in FILES and f"{rest}.__init__" not in FILES:
                rest = rest.rpartition(".")[0]  # a name in a module
            inside.add(rest if rest in FILES else f"{rest}.__init__".lstrip("."))
    return frozenset(outside), frozenset(inside)


@functools.cache
def reached(name: str) -> frozenset[str]:
    """Returns the modules of jvitmoe that importing this one runs, itself included."""
    seen, todo = set(), [name]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += imports(module)[1]
    return frozenset(seen)


def arrows() -> Iterator[tuple[str, str]]:
    """Yields (file, module that it imports)."""
    for name in FILES:
        for other in imports(name)[1]:
            yield name, other


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_the_checker_sees_what_is_imported():
    assert {"routing.base", "data.batches", "models.routers.__init__"} <= imports("training.step")[1]
    assert "tensorflow_datasets" in imports("data.sources.tfds")[0]  # inside a function
    assert {"errors", "config", "runs.checkpoints"} <= reached("commands.evaluate")
    assert ("models.routers.__init__", "models.routers.hash") in arrows()


def test_every_folder_has_its_place():
    assert {folder(name) for name in FILES} == RANK.keys()


def test_imports_point_to_the_left():
    wrong = [
        f"{name} imports {other}"
        for name, other in arrows()
        if folder(name) != folder(other) and RANK[folder(other)] >= RANK[folder(name)]
    ]
    assert not wrong


def test_no_module_imports_itself_through_others():
    assert not [name for name in FILES if any(name in reached(other) for other in imports(name)[1])]


def test_no_jax_where_none_is_needed():
    found = {(name, module): imports(module)[0] & JAX for name in WITHOUT_JAX for module in reached(name)}
    assert not {names: packages for names, packages in found.items() if packages}


def test_packages_stay_in_their_place():
    wrong = [
        f"{name} imports {package}"
        for name in FILES
        for package, place in ONLY_IN.items()
        if package in imports(name)[0] and place not in (name, folder(name))
    ]
    assert not wrong


def test_models_know_their_config_and_nothing_of_devices_or_optimisers():
    for name in FILES:
        if folder(name) == "models":
            assert "optax" not in imports(name)[0], name
            for node in ast.walk(tree(name)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module != "jax.sharding", name
                    assert node.module != "jvitmoe.config" or [a.name for a in node.names] == ["ModelConfig"], name


def test_nothing_that_comes_out_of_a_file_is_run():
    assert not [name for name in FILES if imports(name)[0] & NEVER]
    for name in FILES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "os.system"), f"{name} calls {called}"
                assert called != "np.load" or "allow_pickle=False" in ast.unparse(node), name
                assert not any(word.arg == "shell" for word in node.keywords), name


def test_there_is_no_utils():
    assert not [name for name in FILES if name.split(".")[-1] in ("utils", "util", "helpers")]
