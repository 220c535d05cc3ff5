"""Judging stored episodes again, from their records."""

import asyncio
import json

import pytest

from agentopd.errors import RegistryError, UserError
from agentopd.registry import environments, load_path
from agentopd.rendering import HermesJSON
from agentopd.reverify import rejudge
from agentopd.rollout import EpisodeSpec, run_scripted
from agentopd.scoring import judge
from agentopd.tracking import KeptEpisode
from agentopd.types import Message

ENVIRONMENT = '''
from agentopd.types import Verdict, VerdictStatus
from agentopd_envs import SingleTurnEnvironment
from agentopd_envs.function_verifier import FunctionVerifier


class Echo(SingleTurnEnvironment):
    """Say what you are told."""

    name = "echo"

    @staticmethod
    def score(task, episode):
        return float(episode.final_text == task.hidden["answer"])


class Backwards(FunctionVerifier):
    """Wants it the other way round."""

    name, version = "backwards", "1"

    @staticmethod
    def score(task, episode):
        return float(episode.final_text == task.hidden["answer"][::-1])
'''


@pytest.fixture
def keep(tmp_path):
    """Write one kept episode of an environment that only its file knows; ``verifier`` overrides its own."""
    file = tmp_path / "echo_env.py"
    file.write_text(ENVIRONMENT)

    def run(text, verifier="", environment=None):
        env = environments.get(f"{file}:Echo")
        task = env.new_task("Say ab.", hidden={"answer": "ab"})
        episode = asyncio.run(
            run_scripted(EpisodeSpec(task, env, skill="talk"), [Message(role="assistant", content=text)], HermesJSON())
        )
        chosen = load_path(f"{file}:{verifier}" if verifier else f"{file}:Echo")
        made = chosen() if verifier else _own(env, task)
        verdict = asyncio.run(judge(task, episode, made, None))
        kept = KeptEpisode(
            step=1, skill="talk", episode=episode, verdict=verdict, task=task, tokens=(),
            environment=f"{file}:Echo" if environment is None else environment,
            verifier=f"{file}:{verifier}" if verifier else "",
        )  # fmt: skip
        path = tmp_path / "kept.jsonl"
        path.write_text(kept.model_dump_json() + "\n")
        return path

    return run


def _own(env, task):
    from agentopd.registry import verifiers

    return verifiers.get(env.verifier_for(task))()


@pytest.mark.parametrize(("text", "verifier", "outcome"), [("ab", "", 1.0), ("ba", "", 0.0), ("ba", "Backwards", 1.0)])
def test_environments_and_verifiers_in_files_are_found(keep, text, verifier, outcome):
    (found,) = asyncio.run(rejudge(keep(text, verifier)))
    assert not found.differs
    assert found.now == f"{'ok' if outcome else 'wrong'} {outcome} {outcome}"


def test_a_changed_verdict_shows(keep):
    path = keep("ab")
    row = json.loads(path.read_text())
    row["verdict"] |= {"outcome": 0.0, "reward": 0.0, "status": "wrong"}
    path.write_text(json.dumps(row) + "\n")
    (found,) = asyncio.run(rejudge(path))
    assert (found.stored, found.now) == ("wrong 0.0 0.0", "ok 1.0 1.0")


def test_an_environment_that_cannot_be_found_is_named(keep):
    with pytest.raises(RegistryError, match="'echo'"):
        asyncio.run(rejudge(keep("ab", environment="")))
    with pytest.raises(RegistryError, match=r"no such file .*gone\.py"):
        asyncio.run(rejudge(keep("ab", environment="gone.py:Echo")))


def test_the_sandbox_is_the_one_of_the_run_around_it(keep, tmp_path):
    path = keep("ab")
    run = tmp_path / "run/episodes"
    run.mkdir(parents=True)
    (run / "step_000001.jsonl").write_text(path.read_text())
    (run.parent / "config.toml").write_text('nonsense = "yes"')
    with pytest.raises(UserError, match="nonsense"):
        asyncio.run(rejudge(run))
