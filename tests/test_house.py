"""The house: imports go down, files and functions stay small, one name means one package."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("house")  # one process reads the sources

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "agentopd": ROOT / "agentopd",
    "agentopd_envs": ROOT / "envs/agentopd_envs",
    "agentopd_verifiers": ROOT / "verifiers/agentopd_verifiers",
    "agentopd_sandboxes": ROOT / "sandboxes/agentopd_sandboxes",
}
MAX_FILE, MAX_OBJECTIVE_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 150, 80, 7

# The floor of every module of `agentopd`, by its first name below the package (docs/architecture.md).
FLOORS = {
    "types": 0, "errors": 0,
    "contracts": 1, "config": 1, "registry": 1, "capacity": 1,
    "objective": 2.0, "rendering": 2.0, "testing": 2.0, "memory": 2.0, "packing": 2.01, "attention": 2.02,
    "models": 2.05, "weights": 2.06, "learner": 2.1, "engines": 2.2, "scaleout": 2.25, "teachers": 2.3,
    "rollout": 3, "scoring": 3, "batching": 3, "mixture": 3, "evaluation": 3, "checkpoint": 3, "tracking": 3,
    "trackers": 3, "report": 3, "console": 3, "dashboard": 3, "stats": 3,
    "teaching": 4, "demonstrations": 4, "collect": 4, "rubrics": 4, "reaction": 4, "retention": 4, "compare": 4,
    "build": 4, "train": 4, "evaluate": 4, "micro": 4, "runs": 4, "inspection": 4, "reverify": 4, "sandboxing": 4,
    "pipeline": 4, "certify": 4, "doctor": 4, "play": 4, "scaffold": 4, "serving": 4,
    "commands": 5, "env_commands": 5, "cli": 5,
}  # fmt: skip
# The leaves see floors 0 and 1, and only the leaves below them.
LEAVES = {"agentopd_sandboxes": 0, "agentopd_verifiers": 1, "agentopd_envs": 2}


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield package, path


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below a node, at any depth. Expressions are not entered: they are most of a file, and hold no imports."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, name, ()):
            yield child
            yield from statements(child)


@cache
def nodes(path: Path) -> list[ast.AST]:
    """A file's imports and functions, wherever they are."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in statements(tree(path)) if isinstance(node, kinds)]


@cache
def imported(path: Path) -> set[str]:
    """Dotted names imported anywhere in the file; inside TYPE_CHECKING blocks too."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGES["agentopd"])
    return relative.parts[0].removesuffix(".py")


def test_every_module_of_agentopd_has_a_floor():
    rooms = {room(path) for package, path in modules() if package == "agentopd"} - {"__init__", "__main__", "assets"}
    assert rooms <= set(FLOORS), f"give these a floor: {sorted(rooms - set(FLOORS))}"


def test_imports_go_down():
    wrong = []
    for package, path in modules():
        if package != "agentopd" or room(path) in ("__init__", "__main__"):
            continue
        floor = FLOORS[room(path)]
        for name in imported(path):
            parts = name.split(".")
            if parts[0] in LEAVES and floor < 4:
                wrong.append(f"{path.relative_to(ROOT)} (floor {floor}) imports {name}")
            if parts[0] == "agentopd" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room(path):
                below = FLOORS[parts[1]] < floor or (floor in (1, 3, 4, 5) and FLOORS[parts[1]] == floor)
                if not below:
                    wrong.append(f"{path.relative_to(ROOT)} (floor {floor}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_leaves_see_only_the_ground_and_lower_leaves():
    wrong = []
    for package, path in modules():
        if package == "agentopd":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "agentopd" and len(parts) > 1 and FLOORS.get(parts[1], 0) > 1:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if parts[0] in LEAVES and LEAVES[parts[0]] > LEAVES[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_torch_on_the_ground_floors():
    ground = [path for package, path in modules() if package == "agentopd" and FLOORS.get(room(path), 9) <= 1]
    assert not [str(path) for path in ground if any(name.split(".")[0] == "torch" for name in imported(path))]


def test_files_and_functions_stay_small():
    wrong = []
    for _, path in modules():
        lines = path.read_text().count("\n")
        limit = MAX_OBJECTIVE_FILE if "objective" in path.relative_to(ROOT).parts else MAX_FILE
        if lines > limit:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                parameters = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
                if length > MAX_FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.name}: {length} lines")
                is_command = path.name == "cli.py"
                if len(parameters) > MAX_PARAMETERS and not is_command:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.name}: {len(parameters)} parameters")
    assert not wrong, "\n".join(wrong)


def public(node: ast.AST) -> bool:
    named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    if not named or node.name.startswith("_"):
        return False
    return not any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def test_every_public_function_and_class_has_a_docstring():
    wrong = []
    for _, path in modules():
        top = [node for node in tree(path).body if public(node)]
        inside = [item for node in top if isinstance(node, ast.ClassDef) for item in node.body if public(item)]
        wrong += [f"{path.relative_to(ROOT)}:{node.name}" for node in top + inside if not ast.get_docstring(node)]
    assert not wrong, "\n".join(wrong)


def test_the_training_loop_fits_a_screen_and_a_half():
    path = ROOT / "agentopd/train.py"
    assert path.read_text().count("\n") <= 200
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "train":
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60


def test_no_preset_is_named_outside_the_table():
    wrong = []
    for package, path in modules():
        if package == "agentopd" and path.name != "presets.py" and "preset" in path.read_text():
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.Compare) and "preset" in ast.unparse(node.left):
                    constants = [c for c in node.comparators if isinstance(c, ast.Constant)]
                    if constants:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_the_top_level_folders_are_not_packages():
    assert not [name for name in ("envs", "verifiers", "sandboxes") if (ROOT / name / "__init__.py").exists()]


def test_nothing_heavy_or_generated_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    big = [str(path) for path in paths if path.is_file() and path.stat().st_size > 20_000_000]
    generated = [str(path) for path in paths if "__pycache__" in path.parts or ".venv" in path.parts]
    assert not big and not generated
