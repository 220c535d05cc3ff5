"""A step's episodes: who is judged on what, and which seeds a prompt's group has."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from agentopd.build import Judge, Skill, load_skills
from agentopd.collect import collect
from agentopd.config import SuiteConfig
from agentopd.config.objective import Blocks
from agentopd.config.retention import ReplayConfig
from agentopd.config.rollout import RolloutConfig
from agentopd.evaluate import evaluate_script, stable_seed
from agentopd.mixture import Drawn, Mixture, TaskStream
from agentopd.models import load_tokenizer
from agentopd.rendering import ChatRenderer, HermesJSON


@pytest.fixture
def gold_run():
    """A run that plays the gold of ``skills``, as far as collecting reads one."""

    def make(skills):
        codec = HermesJSON()
        policy = SimpleNamespace(codec=codec, renderer=ChatRenderer(load_tokenizer("micro/student"), codec))
        blocks = Blocks.model_validate(
            {"source": "gold", "divergence": {"kind": "none"}, "anchor": {"kind": "gold_nll"}}
        )
        config = SimpleNamespace(seed=0, rollout=RolloutConfig())
        judge = Judge(skills.values(), None)
        return SimpleNamespace(skills=skills, judge=judge, policy=policy, step=0, config=config, blocks=blocks)

    return make


def named_alike(root, answers):
    """Math skills whose data sets have one file name and number their rows, each from 0."""
    for skill, found in answers.items():
        rows = [{"id": i, "q": f"{skill} question {i}?", "a": answer} for i, answer in enumerate(found)]
        (root / skill).mkdir()
        (root / skill / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (root / skill / "data.toml").write_text(
            '[splits]\ntrain = "rows.jsonl"\n[columns]\nid = "id"\nproblem = "q"\nanswer = "a"\n'
        )
    return load_skills(
        SuiteConfig.model_validate(
            {"skills": [{"name": skill, "env": "math", "source": f"{root}/{skill}/data.toml"} for skill in answers]}
        )
    )


def test_an_episode_is_judged_on_its_own_skills_task(gold_run, tmp_path):
    skills = named_alike(tmp_path, {"easy": ("4", "6"), "hard": ("40", "60")})
    drawn = [Drawn(name, task, False) for name, skill in skills.items() for task in skill.tasks("train", 2, 0)]
    assert len({item.task.id for item in drawn}) == 2
    _, judged = asyncio.run(collect(gold_run(skills), drawn))
    assert [(episode.skill, verdict.outcome) for episode, verdict in judged] == [(item.skill, 1.0) for item in drawn]


@pytest.fixture
def watched(tmp_path):
    """A skill with three tasks and a bound, and how many of its episodes were under way at once."""
    skills = named_alike(tmp_path, {"easy": ("4", "6", "8")})

    def make(bound):
        live, most = 0, [0]

        class Watched(skills["easy"].env):
            async def reset(self, task, ctx):
                nonlocal live
                live += 1
                most[0] = max(most[0], live)
                await asyncio.sleep(0)
                return await super().reset(task, ctx)

            async def close(self):
                nonlocal live
                live -= 1
                await super().close()

        return Skill(skills["easy"].config.model_copy(update={"max_live": bound}), Watched), most

    return make


@pytest.mark.parametrize("bound", [None, 2])
def test_no_more_gold_is_under_way_than_a_skill_allows(gold_run, watched, bound):
    skill, most = watched(bound)
    drawn = [Drawn("easy", task, False) for task in skill.tasks("train", 3, 0)]
    _, judged = asyncio.run(collect(gold_run({"easy": skill}), drawn))
    assert most == [bound or 3] and all(verdict.passed for _, verdict in judged)


@pytest.mark.parametrize("bound", [None, 2])
def test_a_script_keeps_to_what_a_skill_allows(watched, bound):
    skill, most = watched(bound)
    judge, tasks = Judge([skill], None), {"easy": list(skill.tasks("train", 3, 0))}
    judged = asyncio.run(evaluate_script("gold", {"easy": skill}, tasks, judge, HermesJSON()))
    assert most == [bound or 3] and all(verdict.passed for _, verdict in judged)


def test_a_task_drawn_twice_in_a_batch_has_two_groups(gold_run, tmp_path):
    skills = named_alike(tmp_path, {"easy": ("4", "6", "8")})
    configs = [skill.config for skill in skills.values()]
    streams = {name: TaskStream(skill.env, skill.config, 0) for name, skill in skills.items()}
    drawn = Mixture(streams, configs, ReplayConfig(share=0)).draw(8)
    _, judged = asyncio.run(collect(gold_run(skills), drawn))
    episodes = [episode for episode, _ in judged]
    assert [len({getattr(item, key) for item in episodes}) for key in ("task_hash", "group_id", "id", "seed")] == [
        3, 8, 8, 8,
    ]  # fmt: skip
    for episode in episodes[:3]:
        assert episode.group_id == f"0/easy/{episode.task_id}"
        assert episode.seed == stable_seed("train", 0, episode.group_id, 0)
