"""Names to things: lazily, strictly, and from anywhere."""

import pytest

from agentopd.errors import RegistryError
from agentopd.registry import Registry, environments, load_path


def test_bundled_names_are_listed_without_importing_them():
    assert {"math", "code_repair", "tool_use"} <= set(environments.entries())


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(RegistryError, match="did you mean 'code_repair'"):
        environments.get("code_repiar")


def test_a_decorator_registers_and_two_claims_are_an_error_naming_both():
    registry = Registry("environments")
    one, two = type("One", (), {}), type("Two", (), {})
    registry.register("mine")(one)
    registry.register("mine")(one)
    assert registry.get("mine") is one
    registry.register("mine")(two)
    with pytest.raises(RegistryError, match=r"registered twice.*One.*Two"):
        registry.get("mine")


def test_a_file_path_gives_a_class_once(tmp_path):
    path = tmp_path / "my_env.py"
    path.write_text("class Env:\n    pass\n")
    first = load_path(f"{path}:Env")
    assert load_path(f"{path}:Env") is first


@pytest.mark.parametrize(
    ("path", "needle"),
    [
        ("nowhere.py:X", "no such file"),
        ("no_such_module_at_all:X", "cannot be imported"),
        ("json:nothing", "no 'nothing'"),
    ],
)
def test_bad_paths_are_named(path, needle):
    with pytest.raises(RegistryError, match=needle):
        load_path(path)


def test_a_plugin_that_fails_to_import_is_reported_only_to_who_asks():
    registry = Registry("environments")

    def broken() -> None:
        raise ImportError("no module named x")

    from agentopd.registry import Entry

    registry._local["bad"] = [Entry("bad", "somewhere:Bad", broken)]
    assert "bad" in registry.entries()
    with pytest.raises(RegistryError, match="somewhere:Bad cannot be imported"):
        registry.get("bad")
