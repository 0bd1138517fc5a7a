"""The house: who may import whom, how long a file may be, and what a method must bring along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import thresher
from thresher.methods import CONFIGS, METHODS
from thresher.policy import Policy, PolicyConfig

ROOT = Path(thresher.__file__).parent
LONGEST = 400

# From the ground up; a module may import from floors below its own, and from its own room. The longest prefix counts.
FLOORS = [
    ["errors", "timing", "memory"],
    ["settings", "foreign", "stamped", "padding"],
    ["targets"],
    ["packed", "tasks", "report", "measure.layer", "pairs.store"],
    ["exported.directory", "proposals"],
    ["exported.sessions"],
    ["exported.runner"],
    ["backbones", "linears", "tiles"],
    ["cpu", "cuda", "evidence"],
    ["bands"],
    ["attention", "frozen"],
    ["policy"],
    ["parts", "exits", "protection"],
    ["measure.flops", "outputs"],
    ["leaving"],
    ["passes"],
    ["engine", "methods", "measure"],
    ["checkpoint", "frontier"],
    ["model"],
    ["measure.run"],
    ["attribution"],
    [
        "calibration",
        "explanation",
        "searching",
        "measure.latency",
        "measure.profile",
        "measure.rationales",
        "question_pipeline",
        "exported.graph",
    ],
    ["exported", "measure.serving"],
    ["training"],
    ["comparing", "demo", "pairs"],
    ["scale"],
    [""],
    ["cli"],
    ["__main__"],
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def name_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def room_of(name: str) -> str:
    """The longest known prefix of a module's name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in FLOOR_OF:
            return ".".join(parts[:end])
    if name:
        raise AssertionError(f"{name} has no floor; give it one in this test")
    return ""


def imports_of(file: Path, *, top: bool = False) -> set[str]:
    """The thresher modules a file imports, anywhere in it or only when it is imported itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole.removeprefix("thresher.") in FILES else module)
    return {m.removeprefix("thresher").removeprefix(".") for m in found if m == "thresher" or m.startswith("thresher.")}


@pytest.mark.parametrize("name", sorted(FILES), ids=lambda n: n or "thresher")
def test_imports_point_downward(name: str) -> None:
    own = room_of(name)
    for other in imports_of(FILES[name]):
        room = room_of(other)
        same_room = room.partition(".")[0] == own.partition(".")[0] and room == own
        assert same_room or FLOOR_OF[room] < FLOOR_OF[own], (
            f"{name or 'thresher'} imports {other}, which is not below it"
        )


def test_every_floor_is_lived_on() -> None:
    assert {room_of(name) for name in FILES} == set(FLOOR_OF)


def test_the_floors_can_catch_something() -> None:
    assert "packed" in imports_of(FILES["engine"])
    assert "training.learner" in imports_of(FILES["training.recipe"])
    assert FLOOR_OF["packed"] < FLOOR_OF["attention"] < FLOOR_OF["policy"] < FLOOR_OF["engine"]
    assert FLOOR_OF["backbones"] < FLOOR_OF["policy"]
    assert FLOOR_OF["parts"] < FLOOR_OF["methods"] < FLOOR_OF["model"] < FLOOR_OF["calibration"] < FLOOR_OF["training"]


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_is_too_long_and_every_one_says_what_it_is_for(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST
    assert ast.get_docstring(ast.parse(text)) or file.name == "__main__.py"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("thresher.report", ("torch", "transformers", "datasets")),
        ("thresher.errors", ("torch", "transformers")),
        ("thresher.exported.runner", ("torch", "transformers", "datasets")),
        ("thresher.tasks", ("torch", "sklearn", "datasets")),
    ],
)
def test_light_rooms_stay_light(module: str, absent: tuple[str, ...]) -> None:
    """Imported as part of a package whose own __init__ is left out, since that one needs torch."""
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('thresher'); package.__path__ = [{str(ROOT)!r}]; sys.modules['thresher'] = package\n"
        f"import {module}\n"
        f"print([name for name in {absent!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_thresher_does_not_load_what_only_training_needs() -> None:
    code = "import sys, thresher; print([m for m in ('datasets', 'typer', 'optuna') if m in sys.modules])"
    path = {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("config", sorted(METHODS, key=lambda c: c.method), ids=lambda c: c.method)
def test_a_method_is_named_described_and_exported(config: type[PolicyConfig]) -> None:
    assert config.method
    assert config.method == config.method.lower()
    assert CONFIGS[config.method] is config
    assert config.__doc__
    assert not config.__doc__.startswith(f"{config.__name__}(")
    assert config.__name__ in thresher.__all__
    assert getattr(thresher, config.__name__) is config
    assert issubclass(METHODS[config], Policy)
    assert METHODS[config].__doc__
    assert config() == config()  # it has defaults, and is a value


def test_names_are_unique_and_the_exports_exist() -> None:
    assert len(CONFIGS) == len(METHODS)
    assert len(set(thresher.__all__)) == len(thresher.__all__)
    for name in thresher.__all__:
        assert getattr(thresher, name) is not None
