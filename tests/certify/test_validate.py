"""Certificates: what is caught, what is kept, and who is stopped without one."""

import asyncio
import json
import random
from itertools import count
from pathlib import Path

import pytest

from agentopd.certify import find_certificate, require_certificates, skill_of, validate
from agentopd.certify.certificate import certificate_key, is_certified, sample_tasks, store_certificate
from agentopd.certify.probes import sample_value
from agentopd.env_commands import What, envs_describe, envs_new, envs_play, envs_validate
from agentopd.errors import UserError
from agentopd_envs import ToolEnvironment, tool, tool_turn

ROOT = Path(__file__).parents[2]
EXAMPLES = {"my_env.py:Thermostat": 20, "my_question.py:Backwards": 12}


class Safe(ToolEnvironment):
    """A lock with three digits."""

    name = "safe"

    @classmethod
    def generate(cls, rng):
        code = rng.randrange(100, 1000)
        gold = [tool_turn("dial", code=code), "Open."]
        return cls.new_task(f"The code is {code}.", public={"code": code}, hidden={"code": code}, gold=gold)

    def setup(self):
        self.dialled = None

    @tool(mutates=True)
    def dial(self, code: int):
        """Dial a code. Args: code: three digits."""
        self.dialled = code

    @staticmethod
    def score(task, episode):
        return float(episode.final_state["dialled"] == task.hidden["code"])


def test_a_sound_environment_passes(examine):
    assert examine(Safe, num=8) is None


def broken(numbers=count(), **members):  # noqa: B008 - one counter: score functions are registered by class name
    return type(f"Broken{next(numbers)}", (Safe,), {"name": "safe", "__module__": __name__, **members})


def leaky_dial(self, code: int):
    """Dial a code."""
    self.dialled = code
    return f"no, {SECRETS[self.task.prompt[-1].content]}"


SECRETS = {}


def generate_with_secret(cls, rng):
    task = Safe.generate.__func__(cls, rng)
    SECRETS[task.prompt[-1].content] = secret = f"the combination for {rng.random()}"
    return task.model_copy(update={"hidden": {**task.hidden, "note": secret}})


def shared_setup(self):
    self.dialled = None
    type(self).log = []


def shared_dial(self, code: int):
    """Dial a code."""
    type(self).log.append(code)
    self.dialled = code
    return len(type(self).log)


def random_dial(self, code: int):
    """Dial a code."""
    self.dialled = code
    return random.SystemRandom().random()


async def closes_once(self):
    del self.dialled


def score_from_text(task, episode):
    return float("Open" in episode.final_text)


def forgiving_score(task, episode):
    return float(episode.final_state["dialled"] == task.hidden.get("code"))


@pytest.mark.parametrize(
    ("env", "check", "says"),
    [
        (broken(dial=tool(leaky_dial), generate=classmethod(generate_with_secret)), "leaks", "hidden text"),
        (broken(dial=tool(shared_dial), setup=shared_setup), "isolation", "keep state on `self`"),
        (broken(dial=tool(random_dial)), "determinism", "gave different episodes"),
        (broken(close=closes_once), "closing", "AttributeError"),
        (broken(score=staticmethod(score_from_text)), "others", "does the verdict use"),
        (broken(score=staticmethod(forgiving_score)), "faults", "without its hidden data was scored 0"),
        (broken(score=staticmethod(lambda task, episode: 1.0)), "noop", "must score 0"),
        (broken(score=staticmethod(lambda task, episode: 1 / 0)), "gold", "ZeroDivisionError"),
        (broken(gold_turns=classmethod(lambda cls, task: ())), "gold", "no gold trajectory"),
        (broken(starter_turns=classmethod(lambda cls, task: cls.gold_turns(task))), "starter", "starting point"),
        (broken(wrong_turns=classmethod(lambda cls, task: [cls.gold_turns(task)])), "wrong", "must score below 1"),
        (broken(capabilities=frozenset({"moat"})), "sandbox", "lacks moat"),
        (
            broken(dial=tool(mutates=True)(Safe.dial), tool_schemas=classmethod(lambda cls, task: BAD)),
            "schemas",
            "name",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named(env, check, says, examine):
    finding = examine(env, num=8)
    assert finding is not None and finding.check == check and says in finding.detail


BAD = (Safe.tool_schemas(next(iter(Safe.load_tasks("train", "micro", 1, 0))))[0].model_copy(update={"name": "di al"}),)


def test_a_lucky_environment_must_say_so(examine):
    members = {"score": staticmethod(lambda task, episode: float(episode.final_state["dialled"] is not None))}
    assert examine(broken(**members), num=8).check == "others"
    assert examine(broken(**members, chance=1.0), num=8).check == "near"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_short_and_certified(example):
    path, _, name = example.partition(":")
    lines = [line for line in (ROOT / "examples" / path).read_text().splitlines() if line.strip()]
    assert len(lines) <= EXAMPLES[example]
    skill = skill_of(f"{ROOT}/examples/{path}:{name}")
    with pytest.raises(UserError, match=r"run `agentopd envs validate .*`, or pass --allow-uncertified environment"):
        require_certificates({"environment": skill})
    require_certificates({"environment": skill}, ["environment"])
    certificate = asyncio.run(validate(skill))
    assert certificate.passed, certificate.findings
    store_certificate(certificate)
    require_certificates({"environment": skill})
    assert find_certificate(certificate.key) == certificate


def test_allowing_a_stranger_is_an_error():
    with pytest.raises(UserError, match="'maths' names no skill"):
        require_certificates({"environment": skill_of("math")}, ["maths"])


@pytest.mark.parametrize("env", ["math", "math_tools", "code_repair", "repo_repair", "tool_use", "retail"])
def test_shipped_certificates_are_current(env):
    """If this fails, what is certified has changed: run ``make certificates``."""
    assert is_certified(skill_of(env, "micro"))


@pytest.mark.data
@pytest.mark.parametrize(
    ("env", "source"),
    [("math", "gsm8k"), ("math_tools", "gsm8k"), ("code_generation", "humaneval"), ("code_generation", "mbpp"),
     ("code_repair", "quixbugs"), ("code_repair", "humanevalfix"), ("tool_use", "bfcl"), ("bfcl_multi_turn", "bfcl"),
     ("tau2_mock", "tau2")],
)  # fmt: skip
def test_shipped_certificates_of_benchmarks_are_current(env, source, data_dir):
    """If this fails, run ``make certificates`` with AGENTOPD_DATA set."""
    assert is_certified(skill_of(env, source))


def test_the_key_follows_tasks_verifier_limits_and_source_code(tmp_path):
    file = tmp_path / "env.py"
    file.write_text((ROOT / "examples/my_question.py").read_text())
    skill = skill_of(f"{file}:Backwards")
    tasks = sample_tasks(skill)
    keys = {certificate_key(skill, tasks), certificate_key(skill, tasks[:-1])}
    longer = tasks[0].model_copy(update={"limits": tasks[0].limits.model_copy(update={"max_turns": 2})})
    keys.add(certificate_key(skill, [longer, *tasks[1:]]))
    file.write_text(file.read_text().replace(".strip()", ""))
    keys.add(certificate_key(skill, tasks))
    assert len(keys) == 4


def test_sampled_arguments_fit_their_schemas():
    rng = random.Random(0)
    schema = {
        "type": "object",
        "required": ["n", "kind", "items", "ref", "maybe"],
        "$defs": {"Small": {"type": "integer", "minimum": 1, "maximum": 3}},
        "properties": {
            "n": {"type": "number", "minimum": 0.5, "maximum": 0.75},
            "kind": {"enum": ["a", "b"]},
            "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
            "ref": {"$ref": "#/$defs/Small"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    }
    for _ in range(50):
        value = sample_value(schema, rng, ["word"])
        assert 0.5 <= value["n"] <= 0.75 and value["kind"] in "ab" and 1 <= value["ref"] <= 3
        assert 1 <= len(value["items"]) <= 2 and value["maybe"] in ("word", None)


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_new_package_is_certified_as_it_is(tmp_path, capsys):
    envs_new("box_shelf", tmp_path)
    assert "agentopd envs validate box_shelf" in capsys.readouterr().out
    folder = tmp_path / "box_shelf"
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == [
        "box_shelf/__init__.py",
        "box_shelf/env.py",
        "pyproject.toml",
        "suite.toml",
        "tests/test_box_shelf.py",
    ]
    assert 'box_shelf = "box_shelf.env:BoxShelf"' in (folder / "pyproject.toml").read_text()
    env = f"{folder}/box_shelf/env.py:BoxShelf"
    envs_validate(What(env, False, None, None), None, as_json=True, plain=True)
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["passed"] and is_certified(skill_of(env))
    with pytest.raises(UserError, match="is there already"):
        envs_new("box_shelf", tmp_path)
    with pytest.raises(UserError, match="lower-case"):
        envs_new("Box-Shelf", tmp_path)
    with pytest.raises(UserError, match="registered already"):
        envs_new("math", tmp_path)


def test_validate_says_what_is_wrong_and_fails(tmp_path, capsys):
    file = tmp_path / "env.py"
    file.write_text((ROOT / "examples/my_question.py").read_text().replace('task.hidden["answer"])', '"")'))
    with pytest.raises(SystemExit) as stopped:
        envs_validate(What(f"{file}:Backwards", False, None, None), None, as_json=False, plain=True)
    assert stopped.value.code == 1
    assert "NOT certified" in capsys.readouterr().out
    with pytest.raises(UserError, match="give one of"):
        envs_validate(What(None, False, None, None), None, as_json=False, plain=True)


def test_a_suite_is_validated_as_it_uses_its_environments(tmp_path, capsys):
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'[[skills]]\nname = "q"\nenv = "{ROOT}/examples/my_question.py:Backwards"\nlimits = {{max_turns = 2}}\n'
    )
    envs_validate(What(None, False, None, suite), None, as_json=False, plain=True)
    assert not is_certified(skill_of(f"{ROOT}/examples/my_question.py:Backwards"))


def test_describe_shows_the_certificate(capsys):
    envs_describe("tool_use", None)
    shown = json.loads(capsys.readouterr().out)
    assert shown["certificate"]["gold"] == "scores 1 on every task"
    assert {tool["name"]: tool.get("mutates", False) for tool in shown["tools"]} == {"read": False, "write": True}
    envs_describe(f"{ROOT}/examples/my_question.py:Backwards", None)
    assert "agentopd envs validate" in json.loads(capsys.readouterr().out)["certificate"]


def test_a_person_can_play(capsys, monkeypatch):
    (task,) = skill_of("tool_use").tasks("eval", 1, 0)
    lines = [f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})"
             for turn in task.privileged.trajectory for call in turn.tool_calls]  # fmt: skip
    typed = iter([*lines, "Done."])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    envs_play("tool_use", None, 0, plain=True)
    shown = capsys.readouterr().out
    assert task.prompt[-1].content in shown and "write(item, count)" in shown and "outcome 1.0" in shown


def test_leaving_the_game_is_judged_too(capsys, monkeypatch):
    def leave(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", leave)
    envs_play("tool_use", None, 0, plain=True)
    assert "outcome 0.0" in capsys.readouterr().out
