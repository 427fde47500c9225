"""The rules of the house: one-way imports, declared dependencies, configs that fit, no stray paths."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from skipdit import __version__
from skipdit.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skipdit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# A unit (a module or folder right below skipdit/) may import units of earlier levels ...
LEVELS = (
    {"errors", "config", "files", "kernels", "timing", "__version__"},
    {"models", "cache", "diffusion", "schedulers", "data"},
    {"pipelines", "acceleration", "checkpoints", "weights", "media", "operations"},
    {"training", "evaluation", "sampling", "registry", "convert"},
    {"demo", "cli"},
    {"skipdit", "__main__"},  # skipdit/__init__.py offers the public names
)
# ... and, within its own level, exactly these.
SIDEWAYS = {
    ("config", "errors"),
    ("config", "files"),
    ("files", "errors"),
    ("models", "cache"),  # a network offers enable_cache
    ("diffusion", "schedulers"),  # both need the noise schedule
    ("pipelines", "acceleration"),  # a pipeline offers compile
    ("weights", "checkpoints"),
    ("training", "evaluation"),  # FVD while it trains
    ("training", "sampling"),  # noise of a sample
    ("evaluation", "sampling"),  # samples what it evaluates
    ("convert", "sampling"),  # reads autoencoders and class names the same way
    ("sampling", "registry"),  # names the download command of a checkpoint that is not there
}
LEVEL_OF = {unit: number for number, units in enumerate(LEVELS) for unit in units}
SCHEMAS = {
    "sample.yaml": "skipdit.sampling.command:SampleConfig",
    "train.yaml": "skipdit.training.config:TrainConfig",
    "encode.yaml": "skipdit.training.encoding:EncodeConfig",
    "vae.yaml": "skipdit.training.autoencoder:AutoencoderConfig",
    "evaluate.yaml": "skipdit.evaluation.evaluate:EvaluateConfig",
}
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name != "accelerate")
NAME_OF_IMPORT = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}


# ---------------------------------------------------------------------- imports


def public_names() -> dict[str, str]:
    """Name that `skipdit` offers lazily -> the unit it comes from."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_EXPORTS":
            return ast.literal_eval(node.value)
    raise AssertionError("skipdit/__init__.py has no table _EXPORTS")


def imports_of(path: Path, for_types: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(), filename=str(path))
    if not for_types:
        tree.body = [node for node in tree.body if ast.unparse(node).split(":")[0] != "if TYPE_CHECKING"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_module", "__import__"):
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def unit_edges() -> dict[tuple[str, str], set[str]]:
    """(importing unit, imported unit) -> the files that do so."""
    exports, edges = public_names(), {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        unit = "skipdit" if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0]
        unit = unit.removesuffix(".py")
        for name in imports_of(path):
            first, *rest = name.split(".")
            target = exports.get(rest[0], rest[0]) if rest else "skipdit"
            if first == "skipdit" and target != unit:
                edges.setdefault((unit, target), set()).add(str(relative))
    return edges


def test_every_unit_has_a_level():
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    names |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    unplaced = names - set(LEVEL_OF)
    assert not unplaced, f"say in LEVELS where {sorted(unplaced)} belong"


def test_imports_go_one_way():
    wrong = [
        f"{', '.join(sorted(files))}: {unit} imports {target}"
        for (unit, target), files in unit_edges().items()
        if (unit, target) not in SIDEWAYS and LEVEL_OF[unit] <= LEVEL_OF[target]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle():
    graph: dict[str, set[str]] = {}
    for unit, target in unit_edges():
        graph.setdefault(unit, set()).add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_modules_of_a_unit_make_no_circle():
    """File by file, imports inside functions counted too; those for type checkers are not."""
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__init__.py":
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imports_of(path, for_types=False):
            parts = name.split(".")
            while parts and not (ROOT.joinpath(*parts)).with_suffix(".py").is_file():
                parts.pop()
            if parts and ".".join(parts) != module:
                graph.setdefault(module, set()).add(".".join(parts))
    TopologicalSorter(graph).prepare()


def required(words: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9_.-]+", word).group() for word in words)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def imported_distributions() -> set[str]:
    """Normalised names of the packages that skipdit/ imports."""
    known = packages_distributions()
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top != "skipdit" and top not in sys.stdlib_module_names:
                found |= required([NAME_OF_IMPORT.get(top) or (known.get(top) or [top])[0]])
    return found


def test_every_import_is_a_declared_dependency():
    optional = {name for words in PROJECT["optional-dependencies"].values() for name in required(words)}
    implied = {"modelscope-hub"}  # the other half of the package modelscope
    missing = imported_distributions() - required(PROJECT["dependencies"]) - optional - implied
    assert not missing, f"imported but not in pyproject.toml: {sorted(missing)}"


def test_every_dependency_is_imported():
    imported_by_others = {"tensorboard"}  # by accelerate, whose default tracker here it is
    unused = required(PROJECT["dependencies"]) - imported_distributions() - imported_by_others
    assert not unused, f"in pyproject.toml but never imported: {sorted(unused)}"


def test_the_lock_pins_every_dependency():
    lines = (ROOT / "requirements/lock.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert all(line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    extras = PROJECT["optional-dependencies"]
    wanted = required(PROJECT["dependencies"] + extras["dev"]) - {"skipdit"}
    assert wanted <= pinned, f"not pinned: {sorted(wanted - pinned)}"


def test_one_version_everywhere():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


# ---------------------------------------------------------------------- configs


def schema_of(file_name: str) -> type:
    module, name = SCHEMAS[file_name].split(":")
    return getattr(import_module(module), name)


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_fits_its_schema(path):
    assert path.name in SCHEMAS, f"{path.name}: a config is named {', '.join(SCHEMAS)}"
    config = load_config(schema_of(path.name), path)
    if hasattr(config, "check"):
        config.check()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_says_the_command_that_uses_it(path):
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header, "starts with no comment"
    commands = r"skipdit (sample|train|train-vae|encode|evaluate) |accelerate launch .*train\.py|sample/scripts/\w+\.sh"
    assert re.search(commands, header.group()), "its header names no command"


# ---------------------------------------------------------------------- the tree

HOME = "|".join(("home", "root", "Users", "mnt", "opt", "srv", "tmp", "work", "workspace", "scratch"))
FORBIDDEN = {
    "a path of one machine": re.compile(rf"(?<![\w.~/\-$}}*])/({HOME})/[\w.]"),
    "an option that names a package index": re.compile(r"--(extra-)?index-url|--find-links|--trusted-host"),
    "a conflict marker": re.compile(r"^(<{7}|>{7}) ", re.MULTILINE),
}
MAY_NAME_PATHS = {"tests/test_house.py"}


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_forbidden_strings():
    found = []
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or weights
        for what, pattern in FORBIDDEN.items():
            if (match := pattern.search(text)) and name not in MAY_NAME_PATHS:
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {what}: {match.group()}")
    assert not found, "\n".join(found)


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert script.read_text().splitlines()[-1] == "exec make test"


def test_the_carried_pipeline_is_small():
    sizes = [path.stat().st_size for path in (ROOT / "pretrained/digits").rglob("*") if path.is_file()]
    assert sum(sizes) <= 16 * 2**20


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kinds = {"single_gpu": "NO", "8_gpus": "MULTI_GPU", "2_nodes": "MULTI_GPU", "fsdp": "FSDP"}
    assert config.distributed_type == kinds.get(path.stem, "DEEPSPEED")
    assert config.num_processes == {"single_gpu": 1, "2_nodes": 16}.get(path.stem, 8)
    if path.stem == "fsdp":
        from skipdit.models import layers

        assert hasattr(layers, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])
