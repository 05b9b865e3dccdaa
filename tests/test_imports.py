"""Who may import whom. Every file of the package is checked, new ones included."""

import ast
from pathlib import Path

import pytest

import jvitmoe

ROOT = Path(jvitmoe.__file__).parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = [name for name in FILES if name.split(".")[-1] != "__init__"]
COMMANDS = {"train", "evaluate", "predict", "export", "report", "benchmark"}
IN_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "chex"}
WITHOUT_JAX = [
    *("config", "lock", "watchdog", "lifeline", "rendezvous", "cli", "tracking", "plots", "report", "formats"),
    *("data.sources", "data.decode", "data.pictures"),
]

# Imports point to lower ranks, or to a neighbour in the same folder.
RANK = {
    **dict.fromkeys(("config", "peer"), 0),
    **dict.fromkeys(("lock", "watchdog", "lifeline", "rendezvous"), 1),
    **dict.fromkeys(("data", "compilation", "formats", "models", "routing"), 1),
    **{"optim": 2, "merging": 2, "state": 3, "step": 4},
    **dict.fromkeys(("evaluation", "mergeability", "checkpoint", "cli", "tracking", "distributed"), 5),
    **dict.fromkeys(("plots", "pretrained", "stop", "verify"), 6),
    **dict.fromkeys(("classifier", "sheet", "cards"), 7),
    **dict.fromkeys(("__main__", *COMMANDS), 8),
}
ONLY = {
    "checkpoint": {"state", "config"},
    "tracking": {"config"},
    "cli": {"config"},
    "distributed": {"config", "lifeline", "rendezvous"},
    "stop": {"distributed"},
}
ONLY_IN = {
    **{"flax": "models.", "orbax": "checkpoint", "tensorstore": "checkpoint", "torch": "peer"},
    **{"tensorflow_datasets": "data.sources", "grain": "data.stream"},
}


def imports(name: str) -> tuple[set[str], set[str]]:
    """Returns (outside packages, modules of jvitmoe) that a file imports, anywhere in it."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
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
    return outside, inside


def reached(name: str) -> set[str]:
    """Returns the modules of jvitmoe that importing this one runs, itself included."""
    seen, todo = set(), [name]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += imports(module)[1]
    return seen


def test_the_checker_sees_what_is_imported():
    assert {"config", "routing", "data.feed", "models.vit"} <= imports("step")[1]
    assert "tensorflow_datasets" in imports("data.sources")[0]  # inside a function
    assert {"state", "merging", "config"} <= reached("checkpoint")


@pytest.mark.parametrize("name", [name for name in WITHOUT_JAX if name in FILES])
def test_no_jax_in_it_nor_in_what_it_imports(name):
    found = {module: imports(module)[0] & IN_JAX for module in reached(name)}
    assert not any(found.values()), found


@pytest.mark.parametrize("name", FILES)
def test_flax_orbax_and_tfds_stay_in_their_place(name):
    for package, place in ONLY_IN.items():
        at_home = name.startswith(place) if place.endswith(".") else name == place
        assert at_home or package not in imports(name)[0]


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_a_command(name):
    assert not imports(name)[1] & COMMANDS


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    assert name.split(".")[0] in RANK, f"{name} has no rank yet: give it its place in DESIGN's graph and in RANK"
    for other in imports(name)[1]:
        if other.endswith("__init__"):
            continue
        neighbours = "." in name and name.split(".")[0] == other.split(".")[0]
        assert neighbours or RANK[other.split(".")[0]] < RANK[name.split(".")[0]], f"{name} imports {other}"
        assert name not in ONLY or other in ONLY[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", FILES)
def test_no_module_imports_itself_through_others(name):
    assert not any(name in reached(other) for other in imports(name)[1])


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("models.")])
def test_models_know_their_config_and_nothing_of_devices_or_optimisers(name):
    assert imports(name)[1] <= {"config", *(other for other in FILES if other.startswith("models."))}
    assert "optax" not in imports(name)[0]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "jax.sharding"
            assert node.module != "jvitmoe.config" or [alias.name for alias in node.names] == ["ModelConfig"]


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_comes_out_of_a_file_is_run(name):
    assert not imports(name)[0] & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy"}
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system"), f"{name} calls {called}"
            assert called != "np.load" or "allow_pickle=False" in ast.unparse(node)
            assert not any(word.arg == "shell" for word in node.keywords)


def test_there_is_no_utils():
    assert not [name for name in FILES if name.split(".")[-1] in ("utils", "util", "helpers")]
