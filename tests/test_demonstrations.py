"""Actors other than the student: sampled once, judged, kept; phased and mixed prompts."""

import asyncio
import shutil
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from agentopd.build import Judge, Policy, load_skills
from agentopd.collect import collect, phased_prompts, store_rollouts, student_answers, unsolved
from agentopd.config import SuiteConfig
from agentopd.config.objective_data import OfflineSource
from agentopd.config.rollout import RolloutConfig
from agentopd.contracts import Generation
from agentopd.demonstrations import Demonstrator
from agentopd.errors import EngineError, UserError
from agentopd.mixture import Drawn
from agentopd.models import load_tokenizer
from agentopd.rendering import ChatRenderer, HermesJSON
from agentopd.rollout import RolloutOptions
from agentopd.rollout.cache import RolloutCache
from agentopd.types import Episode, StopReason, Verdict, VerdictStatus


@dataclass
class ScriptedEngine:
    """Answers every request with the same text, and counts requests."""

    ids: tuple[int, ...]
    max_context: int = 1024
    lockstep: bool = True
    asked: list[int] = field(default_factory=list)

    async def generate(self, requests):
        self.asked.append(len(requests))
        return [Generation(self.ids, (-0.5,) * len(self.ids), "stop") for _ in requests]

    def sync_weights(self, version):
        return {}

    def sleep(self):
        pass

    async def aclose(self):
        pass


@pytest.fixture(scope="module")
def skills():
    return load_skills(SuiteConfig.model_validate({"skills": [{"name": "math", "env": "math"}]}))


@pytest.fixture(scope="module")
def renderer():
    return ChatRenderer(load_tokenizer("micro/student"), HermesJSON())


def demonstrator(renderer, skills, root, text="\\boxed{1}", **more):
    engine = ScriptedEngine(tuple(renderer.encode_turn(text)))
    policy = Policy(None, renderer.tokenizer, renderer.codec, renderer, engine)
    judge = Judge(skills.values(), sandbox=None)
    options = RolloutOptions(**more)
    return Demonstrator(policy, "T", skills, judge, RolloutCache(root), options, seed=0)


def ask(actor, tasks, num=1):
    return asyncio.run(actor.answer([("math", task) for task in tasks], num))


def test_a_teacher_is_asked_once_for_each_task(renderer, skills, tmp_path):
    tasks = skills["math"].tasks("train", 3, 0)
    actor = demonstrator(renderer, skills, tmp_path)
    first = ask(actor, tasks[:2], num=2)
    assert [len(answers) for answers in first] == [2, 2]
    assert ask(actor, tasks, num=2)[:2] == first
    assert actor.policy.engine.asked == [4, 2]
    fresh = demonstrator(renderer, skills, tmp_path)
    assert ask(fresh, tasks, num=2)[:2] == first and fresh.policy.engine.asked == []
    assert fresh.has("math", tasks[0], 2) and not fresh.has("math", tasks[0], 3)


def test_rollouts_that_were_finished_are_kept_when_the_rest_fails(renderer, skills, tmp_path):
    tasks = skills["math"].tasks("train", 2, 0)
    actor = demonstrator(renderer, skills, tmp_path)

    class Dies(ScriptedEngine):
        async def generate(self, requests):
            if len(self.asked) == 2:  # both of the first task's have been answered
                for _ in range(10_000):
                    await asyncio.sleep(0)
                raise EngineError("gone")
            return await super().generate(requests)

    actor.policy.engine = Dies(actor.policy.engine.ids, lockstep=False)
    with pytest.raises(EngineError):
        ask(actor, tasks, num=2)
    assert [actor.has("math", task, 2) for task in tasks] == [True, False]
    again = demonstrator(renderer, skills, tmp_path)
    assert [len(answers) for answers in ask(again, tasks, num=2)] == [2, 2] and again.policy.engine.asked == [2]


def test_the_tokens_are_those_sampled_and_the_verdict_is_the_verifiers(renderer, skills, tmp_path):
    (task,) = skills["math"].tasks("train", 1, 0)
    right = f"\\boxed{{{task.hidden['answer']}}}"
    ((episode, verdict),) = ask(demonstrator(renderer, skills, tmp_path, right), [task])[0]
    assert list(episode.turns[0].token_ids) == renderer.encode_turn(right)
    assert episode.rollout_logprobs[-1] == -0.5
    assert verdict.passed
    ((_, wrong),) = ask(demonstrator(renderer, skills, tmp_path / "w", "\\boxed{-7}"), [task])[0]
    assert wrong.outcome == 0


def test_equal_prompts_in_one_step_share_one_answer(renderer, skills, tmp_path):
    (task,) = skills["math"].tasks("train", 1, 0)
    actor = demonstrator(renderer, skills, tmp_path)
    one, other = ask(actor, [task, task])
    assert one == other and actor.policy.engine.asked == [1]


def test_other_settings_are_another_address(renderer, skills, tmp_path):
    tasks = skills["math"].tasks("train", 1, 0)
    ask(demonstrator(renderer, skills, tmp_path), tasks)
    warm = demonstrator(renderer, skills, tmp_path, temperature=0.5)
    ask(warm, tasks)
    assert warm.policy.engine.asked == [1]


def test_what_could_not_be_judged_is_not_kept(renderer, skills, tmp_path, monkeypatch):
    tasks = skills["math"].tasks("train", 1, 0)
    actor = demonstrator(renderer, skills, tmp_path)

    async def broken(task, episode, sandbox):
        raise RuntimeError("verifier down")

    monkeypatch.setattr(actor.judge.verifier("math", tasks[0]), "verify", broken)
    ((_, verdict),) = ask(actor, tasks)[0]
    assert verdict.status is VerdictStatus.INFRA_ERROR
    assert not actor.has("math", tasks[0])


def test_the_starting_students_rollouts_are_kept_unjudged_and_never_made_up(renderer, tmp_path, monkeypatch):
    skills = load_skills(
        SuiteConfig.model_validate({"skills": [{"name": "math", "env": "math", "num_train_tasks": 3}]})
    )
    stored = replace(demonstrator(renderer, skills, tmp_path), keep_unjudged=True)
    tasks = skills["math"].train_tasks(0)
    judge = stored.judge.verifier("math", tasks[0]).verify

    async def broken_once(task, episode, sandbox):
        if task.hash == tasks[1].hash:
            raise RuntimeError("verifier down")
        return await judge(task, episode, sandbox)

    monkeypatch.setattr(stored.judge.verifier("math", tasks[0]), "verify", broken_once)
    teachers = SimpleNamespace(stored_rollouts=stored, routes={"math": "t"}, by_key={"t": UnaskedTeacher()})
    config = SimpleNamespace(seed=0, rollout=RolloutConfig(group_size=2))
    blocks = SimpleNamespace(top_k=0, source=OfflineSource())
    run = SimpleNamespace(teachers=teachers, skills=skills, config=config, blocks=blocks, step=0)
    asyncio.run(store_rollouts(run))
    assert stored.policy.engine.asked == [6]
    run.step = 5
    asyncio.run(store_rollouts(run))
    prompts = [Drawn("math", task, False) for task in tasks]
    own, _ = asyncio.run(collect(run, prompts))
    assert [verdict.status for _, verdict in own[2:4]] == [VerdictStatus.INFRA_ERROR] * 2
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="has lost rollouts of the starting student"):
        asyncio.run(collect(run, prompts))
    assert stored.policy.engine.asked == [6]


class UnaskedTeacher:
    """Evidence takes no part here."""

    async def score(self, episodes, top_k):
        return []


def drawn(skills, num):
    return [Drawn("math", task, False) for task in skills["math"].tasks("train", num, 0)]


def test_the_teacher_answers_its_share_of_a_steps_prompts(skills):
    prompts = drawn(skills, 9)
    chosen = [phased_prompts(prompts, 0.1, step) for step in range(8)]
    assert all(len(item) == 1 for item in chosen)
    assert len({item[0].task.id for item in chosen}) > 2
    assert phased_prompts(prompts, 1.0, 3) == prompts
    assert phased_prompts(prompts, 0.4, 3) == phased_prompts(prompts, 0.4, 3)


def test_mixed_prompts_are_split_by_share(skills):
    prompts = drawn(skills, 8)
    mine, others = student_answers(prompts, 0.5, 0)
    assert len(mine) == len(others) == 4
    assert sorted(item.task.id for item in mine + others) == sorted(item.task.id for item in prompts)
    assert student_answers(prompts, 0.5, 1)[0] != mine


def test_gold_is_shown_where_every_judged_rollout_failed(skills):
    prompts = drawn(skills, 4)
    solved, failed, broken, _never_tried = prompts

    def judged(item, outcome, status=VerdictStatus.OK):
        task = item.task
        episode = Episode(
            id=task.id,
            task_id=task.id,
            task_hash=task.hash,
            env=task.env,
            skill="math",
            split="train",
            prompt_ids=(1,),
            turns=(),
            stop_reason=StopReason.COMPLETED,
        )
        return episode, Verdict(outcome=outcome, status=status, reward=outcome)

    rollouts = [
        judged(solved, 0.0),
        judged(solved, 1.0),
        judged(failed, 0.0),
        judged(failed, None, VerdictStatus.INFRA_ERROR),
        judged(broken, None, VerdictStatus.INFRA_ERROR),
    ]
    assert unsolved(prompts, rollouts) == [failed]
