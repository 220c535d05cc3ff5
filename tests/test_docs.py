"""Documentation is true: links, commands, config keys with their defaults, embedded files and names of tests."""

import ast
import asyncio
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentopd.certify import skill_of, validate
from agentopd.cli import app
from agentopd.compare import make_plan
from agentopd.config import PRESETS, RunConfig, load_run_config, load_suite
from agentopd.config.base import sections_in
from agentopd.config.load import load_section, tomllib
from agentopd.config.micro import MicroRecipe
from agentopd.config.objective import Blocks
from agentopd.registry import environments
from agentopd.rendering import HermesJSON, assistant_text
from agentopd_envs.adapters.rows import DataConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))
BLOCK_PAGES = sorted(ROOT.glob("docs/objective/*.md"))
HOSTS = {"arxiv.org", "chatgptaiml.com", "github.com", "localhost:8000"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ABSOLUTE_PATH = re.compile(r"(?<![\w./<~])/(?!proc\b|sys\b|dev\b)[A-Za-z][\w.-]*/[\w.-]+")
MISSING = object()
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def fences(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def anchors(page: Path) -> set[str]:
    """Slugs of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# --- links, paths, hosts ---------------------------------------------------------------------------------------------


@each_page
def test_links_and_images_resolve(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        where = page.parent / path if path else page
        if not where.exists() or (anchor and anchor not in anchors(where)):
            broken.append(target)
    assert not broken


@each_page
def test_no_machine_paths_foreign_hosts_or_decoration(page):
    text = page.read_text()
    assert {re.split(r"[/)\s]", url)[0] for url in re.findall(r"https?://(\S+)", text)} <= HOSTS
    assert not ABSOLUTE_PATH.findall(re.sub(r"https?://\S+", "", text))
    assert not EMOJI.findall(text)


def test_the_picture_is_self_contained():
    text = (ROOT / "docs/img/loop.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    assert not re.findall(r"href|@import|url\((?!#)|font-face", text)


def test_the_readme_keeps_a_place_for_results():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- results:start -->") == text.count("<!-- results:end -->") == 1
    assert text.index("<!-- results:start -->") < text.index("<!-- results:end -->")


def test_every_file_of_the_readmes_tree_exists():
    stack: list[tuple[int, Path]] = []
    for line in fences(ROOT / "README.md", "text")[0].splitlines():
        indent = len(line) - len(line.lstrip())
        stack = [entry for entry in stack if entry[0] < indent]
        path = (stack[-1][1] if stack else ROOT) / line.split()[0]
        assert path.exists(), line
        stack.append((indent, path))


# --- commands --------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words after ``agentopd`` (or ``-m agentopd.cli``) on every command line."""
    for body in fences(page, "bash", "console", "sh"):
        for line in body.splitlines():
            found = re.search(r"(?:^|\s)(?:agentopd|-m agentopd\.cli)\s+([^#]*)", line)
            if found:
                yield found[1].split()


@each_page
def test_commands_and_their_options_exist(page):
    for words in command_lines(page):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"agentopd {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, f"agentopd {' '.join(words)}"


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for body in fences(page, "bash") for name in re.findall(r"^make ([a-z-]+)", body, re.MULTILINE)}
    assert named <= targets


# --- config ----------------------------------------------------------------------------------------------------------


@each_page
def test_toml_files_load(page, tmp_path):
    """Blocks that begin with ``# file: NAME.toml``; those of one page may name each other."""
    files = [(body.splitlines()[0].removeprefix("# file: "), body) for body in fences(page, "toml")]
    assert all(body.startswith("# file: ") for _, body in files)
    for name, body in files:
        (tmp_path / name).write_text(body)
    for name, body in files:
        keys = tomllib.loads(body)
        if "arms" in keys:
            assert make_plan(tmp_path / name).runs
        elif "columns" in keys:
            assert load_section(DataConfig, tmp_path / name).columns
        elif "tokenizer" in keys or "out" in keys:
            load_section(MicroRecipe, tmp_path / name)
        elif "skills" in keys:
            load_suite(tmp_path / name)
        else:
            load_run_config(tmp_path / name)


@each_page
def test_overrides_in_commands_name_keys(page):
    for words in command_lines(page):
        for flag, override in pairwise(words):
            key = override.partition("=")[0].replace("skills.repair.", "skills.NAME.")
            assert flag != "--set" or field(RunConfig, key) is not None, override


def field(model: type[BaseModel], key: str) -> FieldInfo | None:
    """The field at a dotted key; ``NAME`` stands for an entry's name."""
    sections, found = [model], None
    for part in key.split("."):
        if part == "NAME":
            continue
        holders = [section for section in sections if part in section.model_fields]
        if not holders:
            return None
        found = holders[-1].model_fields[part]
        sections = [inner for holder in holders for inner in sections_in(holder.model_fields[part].annotation)]
    return found


def default_of(model: type[BaseModel], key: str) -> Any:
    """The default at a dotted key; of a block that comes in kinds, the default kind's value where it has the key."""
    found = field(model, key)
    assert found is not None
    value: Any = model.model_construct()
    for part in key.split("."):
        value = getattr(value, part, MISSING)
    if value is not MISSING:
        return value
    return "required" if found.is_required() else found.get_default(call_default_factory=True)


def key_rows(page: Path) -> Iterator[tuple[str, str]]:
    """(key, default cell) of every row of a table headed ``| key | default |`` or ``| recipe key | default |``."""
    inside = False
    for line in prose(page).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] in ("key", "recipe key") and cells[1] == "default":
            inside = True
        elif inside and cells[0].startswith("`"):
            yield cells[0].strip("`"), cells[1].strip("`")


def plain(value: Any) -> Any:
    """TOML has lists where a config has tuples."""
    return list(value) if isinstance(value, tuple) else value


def shown(cell: str) -> Any:
    """A default as a page writes it: TOML, ``none`` or ``required``."""
    if cell in ("none", "required"):
        return None if cell == "none" else cell
    return tomllib.loads(f"value = {cell}")["value"]


@each_page
def test_config_keys_exist_with_the_defaults_shown(page):
    model = MicroRecipe if page.name == "micro.md" else RunConfig
    wrong = [
        f"{key}: {cell}"
        for key, cell in key_rows(page)
        if field(model, key) is None or plain(default_of(model, key)) != shown(cell)
    ]
    assert not wrong


def test_the_tables_of_keys_are_found():
    assert {page.name for page in PAGES if list(key_rows(page))} >= {"router.md", "train.md", "micro.md"}


def test_the_objectives_keys_are_all_documented():
    documented = {key for page in BLOCK_PAGES for key, _ in key_rows(page)}
    blocks = RunConfig.model_fields["objective"].annotation
    assert blocks is not None
    keys = {
        f"objective.{block}.{key}"
        for block, info in blocks.model_fields.items()
        for section in sections_in(info.annotation)
        for key in section.model_fields
    }
    inside_stages = {f"objective.stages.{key}" for key in Blocks.model_fields}
    assert keys - inside_stages <= documented


def test_the_table_of_presets_is_the_table_in_code():
    rows = re.findall(r"^\| `(\w+)` \| `.*?\|", prose(ROOT / "docs/algorithms.md"), re.MULTILINE)
    assert [row for row in rows if row in PRESETS] == list(PRESETS)


# --- what pages quote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/environments.md"])
def test_the_example_is_embedded_verbatim(name):
    assert (ROOT / "examples/my_env.py").read_text() in fences(ROOT / name, "python")


def test_the_single_turn_example_is_embedded_verbatim():
    page = ROOT / "docs/environments.md"
    assert (ROOT / "examples/my_question.py").read_text() in fences(page, "python")


def test_the_snippets_on_environments_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    for body in fences(ROOT / "docs/environments.md", "python"):
        if '"""' in body[:3] or "loaders =" in body or "import verifiers" in body:
            continue  # Tested where they stand, and in tests/adapters; a fragment names what is not there.
        names = {"__name__": "docs_environments"}
        exec(body, names)
        for env in [item for item in names.values() if getattr(item, "name", "") == "vending"]:
            certificate = asyncio.run(validate(skill_of("vending")))
            assert env.name == "vending" and certificate.passed, certificate.findings


@cache
def names_of_tests() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("test_*.py")))
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@each_page
def test_tests_that_are_named_exist(page):
    assert set(re.findall(r"`(test_\w+)`", prose(page))) <= names_of_tests()


def test_every_block_names_its_tests():
    assert len(BLOCK_PAGES) == 11
    assert all(re.search(r"^Tests: `test_", prose(page), re.MULTILINE) for page in BLOCK_PAGES)


def test_the_architecture_names_every_room_on_its_floor():
    house = ast.parse((ROOT / "tests/test_house.py").read_text())
    (floors,) = (
        ast.literal_eval(node.value)
        for node in house.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    rows = re.findall(r"^\| (\d) \| ([^|]+)\|", prose(ROOT / "docs/architecture.md"), re.MULTILINE)
    drawn = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert drawn == {room: int(floor) for room, floor in floors.items()}


@pytest.mark.parametrize("name", ["math", "code_repair", "tool_use"])
def test_micro_examples_are_the_first_held_out_tasks(name):
    text = "\n".join(fences(ROOT / "docs/micro.md", ""))
    (task,) = islice(environments.get(name).load_tasks("eval", "micro", 1, 0), 1)
    assert task.prompt[-1].content in text
    for turn in environments.get(name).gold_turns(task):
        assert assistant_text(turn, HermesJSON()) in text
