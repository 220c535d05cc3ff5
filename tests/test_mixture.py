"""Batches: exact shares, reproducible draws, replay that follows forgetting."""

import json
import random
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.config.retention import GuardConfig
from agentopd.config.run import ReplayConfig, SkillConfig, SuiteConfig
from agentopd.errors import ConfigError
from agentopd.mixture import (
    CoresetStream,
    GuardState,
    Mixture,
    MixtureState,
    ReplayScores,
    TaskStream,
    guard_actions,
    replay_weights,
)
from agentopd.mixture.budget import Watch, evaluated_shares, within_budget
from agentopd.types import Task


def source(name: str, size: int | None):
    class Env:
        @classmethod
        def load_tasks(cls, split, source, limit, seed):
            number = 0
            while size is None or number < size:
                if limit is not None and number >= limit:
                    return
                yield Task(id=f"{name}-{number}", env=name, prompt=())
                number += 1

    return Env


def skill(name: str, role: str = "new", **kwargs) -> SkillConfig:
    return SkillConfig(name=name, env=name, role=role, **kwargs)


def mixture(share: float = 0.25, policy: str = "forgetting") -> Mixture:
    skills = [skill("math", "old"), skill("logic", "old"), skill("repair"), skill("store", weight=2.0)]
    streams = {item.name: TaskStream(source(item.name, None), item, seed=0) for item in skills}
    return Mixture(streams, skills, ReplayConfig(share=share, policy=policy))


def counts(drawn) -> dict[str, int]:
    return {name: sum(item.skill == name for item in drawn) for name in ("math", "logic", "repair", "store")}


@pytest.mark.parametrize("num", [4, 7, 48])
def test_every_batch_is_within_one_prompt_of_its_shares(num):
    mix = mixture()
    for _ in range(20):
        drawn = mix.draw(num)
        assert len(drawn) == num
        assert abs(sum(item.replay for item in drawn) - 0.25 * num) <= 1
        assert all(item.replay == (item.skill in ("math", "logic")) for item in drawn)


def test_long_run_shares_are_exact():
    mix = mixture()
    total = counts([item for _ in range(40) for item in mix.draw(6)])
    assert total == {"math": 30, "logic": 30, "repair": 60, "store": 120}


def test_a_lost_skill_is_replayed_more_and_a_kept_one_is_never_dropped():
    mix = mixture()
    mix.scores.update({"math": 0.9, "logic": 0.8})
    mix.scores.update({"math": 0.3, "logic": 0.85})
    total = counts([item for _ in range(50) for item in mix.draw(16)])
    assert total["math"] + total["logic"] == 200
    assert total["math"] == pytest.approx(200 * 0.7 / 0.9, abs=2)


def test_replay_weights_follow_the_formula():
    config = ReplayConfig(policy="forgetting", floor=0.1)
    scores = ReplayScores(base={"a": 0.9, "b": 0.9}, current={"a": 0.5, "b": 0.95})
    assert replay_weights(["a", "b"], config, scores) == pytest.approx({"a": 0.5 / 0.7, "b": 0.2 / 0.7})
    assert replay_weights(["a", "b"], ReplayConfig(), scores) == pytest.approx({"a": 0.5, "b": 0.5})


BUDGET = ReplayConfig(policy="budgeted", share=0.2, min_share=0.05, max_share=0.4)


def replayed(**losses):
    return {name: Watch(loss=loss, replayed=True) for name, loss in losses.items()}


def test_budgeted_replay_doubles_for_a_lost_skill_and_relaxes_for_a_kept_one():
    scores = ReplayScores(base=dict.fromkeys("abc", 0.9), current={"a": 0.8, "b": 0.9, "c": 0.88})
    watches = replayed(a=0, b=0, c=0)
    moved = evaluated_shares({"a": 0.1, "b": 0.1, "c": 0.1}, BUDGET, scores, watches, tolerated_drop=0.02)
    assert moved == pytest.approx({"a": 0.2, "b": 0.07, "c": 0.07})
    assert evaluated_shares({"b": 0.06}, BUDGET, scores, watches, 0.02) == {"b": 0.05}
    lost = ReplayScores(base={"a": 0.9, "b": 0.9}, current={"a": 0.5, "b": 0.5})
    assert evaluated_shares({"a": 0.39, "b": 0.1}, BUDGET, lost, watches, 0.02) == {"a": 0.4, "b": 0.2}


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.05, 0.4), min_size=1))
def test_a_budget_is_kept_and_no_skill_gets_less_than_its_least(wanted):
    given = within_budget(wanted, BUDGET)
    assert sum(given.values()) == pytest.approx(min(0.4, sum(wanted.values())))
    assert all(min(0.05, 0.4 / len(wanted)) - 1e-9 <= given[name] <= share + 1e-9 for name, share in wanted.items())


def test_a_skill_that_never_fails_has_its_share_back_when_a_lost_one_is():
    mix = mixture(policy="budgeted", share=0.2)
    before = mix.shares()

    def step(outcome):
        mix.draw(12)
        mix.observe({"math": [outcome] * 4, "logic": [1.0] * 4}, 0.02)
        return mix.shares()

    for _ in range(3):
        step(1.0)
    during = [step(0.0) for _ in range(60)][-1]
    assert during["math"] > 0.4
    assert during["logic"] == pytest.approx(0.0857, abs=1e-3), "scaled down once, not at every step"
    after = [step(1.0) for _ in range(5)][-1]
    assert after["logic"] == before["logic"] and after["math"] == pytest.approx(1.4 * before["math"])


def test_a_share_goes_up_by_less_where_it_may_be_chance_and_not_while_the_skill_mends():
    def moved(score, error, watch):
        scores = ReplayScores()
        scores.update({"a": 0.9})
        scores.update({"a": score}, {"a": error})
        return evaluated_shares({"a": 0.1}, BUDGET, scores, {"a": watch}, 0.02)["a"]

    assert moved(0.84, 0.03, Watch(replayed=True)) == pytest.approx(0.2)
    assert moved(0.84, 0.05, Watch(replayed=True)) == pytest.approx(0.14)
    assert moved(0.84, 0.03, Watch(loss=0.07, replayed=True)) == 0.1
    assert moved(0.9, 0.03, Watch()) == 0.1, "what was not replayed has not been shown to do with less"


def test_a_loss_of_just_the_tolerance_is_within_it():
    scores = ReplayScores(base={"a": 0.92, "b": 0.92}, current={"a": 0.90, "b": 0.89})
    config = ReplayConfig(policy="budgeted", share=0.1)
    moved = evaluated_shares({"a": 0.1, "b": 0.1}, config, scores, replayed(a=0, b=0), 0.02)
    assert moved == pytest.approx({"a": 0.07, "b": 0.2})
    state = GuardState(step=9, share=0.1, rate_scale=1.0, kept_step=None)
    assert guard_actions(GuardConfig(enabled=True), config, scores, ["a"], 0.02, state) == []


def test_budgeted_shares_find_the_least_replay_that_keeps_a_skill():
    """A skill that is lost below a share of 0.12 and kept above it: the share settles around that."""
    mix = mixture(policy="budgeted")
    mix.assign(["repair", "store"], ["math"])
    mix.scores.update({"math": 0.9})
    seen = []
    for _ in range(40):
        share = mix.shares()["math"]
        seen.append(share)
        mix.draw(30)
        mix.scores.update({"math": 0.9 if share >= 0.12 else 0.8})
        mix.react(0.02)
    assert min(seen[10:]) >= 0.08 and max(seen[10:]) <= 0.25
    assert sum(mix.shares().values()) == pytest.approx(1)
    other = mixture()
    before = other.shares()
    other.react(0.02)
    assert other.shares() == before, "only this policy reacts so"


def test_replayed_prompts_that_fail_raise_the_share_until_they_succeed_again():
    mix = mixture(policy="budgeted")
    mix.assign(["repair", "store"], ["math"])
    mix.scores.update({"math": 0.9})
    mix.draw(10)
    started = mix.shares()["math"]

    def seen(*outcomes):
        gaps = mix.observe({"math": outcomes}, 0.02)
        return gaps.get("math"), mix.shares()["math"]

    for outcomes in ([1, 1, 0, 1], [1] * 6, [1, 0, 1], [], [1], [0, 0]):
        assert seen(*outcomes) == (None, started)
    assert seen(0, 0, 0) == (pytest.approx(0.9), 0.5), "at most max_share"
    assert sum(mix.shares().values()) == pytest.approx(1)
    assert seen(0, 1) == (None, 0.5)
    mix.scores.update({"math": 0.5})
    mix.react(0.02)
    assert seen(1, 1)[1] == 0.5
    assert seen(*[1] * 8) == (pytest.approx(-0.1), pytest.approx(1.4 * started)), "back: a little more than before"
    assert seen(*[1] * 8)[1] == pytest.approx(1.4 * started)
    assert mixture().observe({"math": [0] * 50}, 0.02) == {}


def test_training_tasks_that_are_harder_than_held_out_ones_raise_no_alarm():
    watch = Watch()
    for _ in range(30):
        watch.observe([1, 0, 1, 0])
        assert not (watch.gap(base=0.95, tolerated_drop=0.02) or (0, False))[1]
    watch.observe([0] * 12)
    assert watch.gap(base=0.95, tolerated_drop=0.02) == (0.5, True)


def test_success_that_fades_by_less_than_half_is_for_evaluations():
    watch = Watch(first=(10.0, 10), steps=[(60.0, 100)])
    assert watch.gap(base=1.0, tolerated_drop=0.02) is None
    watch.observe([0.0] * 100)
    assert watch.gap(base=1.0, tolerated_drop=0.02) == (1.0, True)


@given(rate=st.floats(0.2, 1.0), seed=st.integers(0, 2**32))
def test_a_skill_that_is_kept_seldom_raises_an_alarm(rate, seed):
    """One in 400 for each stretch; a hundred steps have many, most of them nearly the same."""
    rng, alarms = random.Random(seed), 0
    for _ in range(20):
        watch = Watch(first=(rate * 100, 100))
        for _ in range(100):
            watch.observe([float(rng.random() < rate) for _ in range(4)])
            alarms += (watch.gap(rate, 0.02) or (0, False))[1]
    assert alarms <= 0.01 * 20 * 100


def test_a_mixture_goes_on_from_its_state_as_if_it_had_not_stopped():
    def played(mix, outcomes):
        for outcome in outcomes:
            mix.draw(10)
            mix.observe({"math": [outcome] * 3, "logic": [1.0] * 3}, 0.02)
        return mix

    first = mixture(policy="budgeted")
    first.scores.update({"math": 0.9, "logic": 0.9})
    played(first, [1.0] * 5 + [0.0])
    saved = MixtureState(**json.loads(json.dumps(asdict(first.state()))))
    second = mixture(policy="budgeted")
    second.restore(saved)
    for mix in (first, second):
        played(mix, [0.0, 0.0, 1.0])
        mix.scores.update({"math": 0.7, "logic": 0.9}, {"math": 0.01, "logic": 0.02})
        mix.react(0.02)
    assert first.state() == second.state() and first.shares() == second.shares()


def test_skills_of_other_stages_are_not_drawn_and_learned_ones_are_replayed():
    mix = mixture()
    mix.assign(["repair"], ["math"])
    assert {item.skill for item in mix.draw(20)} == {"repair", "math"}
    mix.assign(["store"], ["math", "repair"])
    drawn = [item for _ in range(10) for item in mix.draw(16)]
    assert {item.skill for item in drawn if item.replay} == {"math", "repair"}
    assert abs(sum(item.replay for item in drawn) - 40) <= 2
    mix.assign(["repair"], [])
    assert mix.shares() == {"repair": 1.0}


def test_a_coreset_is_cycled_through_and_seekable():
    tasks = TaskStream(source("rows", 5), skill("rows"), seed=3).take(4)
    stream = CoresetStream(tasks, "rows", seed=0)
    first, second = stream.take(4), stream.take(4)
    assert {task.id for task in first} == {task.id for task in second} == {task.id for task in tasks}
    stream.seek(4)
    assert stream.take(4) == second
    mix = mixture()
    mix.replay_streams["math"] = CoresetStream(tasks, "rows", seed=0)
    assert {item.task.env for item in mix.draw(40) if item.skill == "math"} == {"rows"}


def test_a_restored_mixture_draws_the_same_batches():
    one, two = mixture(), mixture()
    for _ in range(3):
        one.draw(5)
    one.share = 0.4
    two.restore(one.state())
    assert [one.draw(5) for _ in range(4)] == [two.draw(5) for _ in range(4)]


def test_a_small_source_is_shuffled_anew_each_epoch_and_seekable():
    stream = TaskStream(source("rows", 5), skill("rows"), seed=3)
    first, second = stream.take(5), stream.take(5)
    assert {task.id for task in first} == {task.id for task in second} == {f"rows-{i}" for i in range(5)}
    assert first != second
    stream.seek(5)
    assert stream.take(5) == second


def test_a_large_source_is_streamed_in_order():
    stream = TaskStream(source("many", None), skill("many"), seed=0)
    stream.seek(2000)
    assert [task.id for task in stream.take(2)] == ["many-2000", "many-2001"]


def test_an_empty_source_is_named():
    with pytest.raises(ConfigError, match="skill 'none'"):
        TaskStream(source("none", 0), skill("none"), seed=0)


# --- suites ----------------------------------------------------------------------------------------------------------


def test_temperature_shares_by_number_of_tasks():
    skills = [skill("small"), skill("large")]
    sizes = {"small": 10, "large": 90}
    streams = {item.name: TaskStream(source(item.name, sizes[item.name]), item, seed=0) for item in skills}
    assert Mixture(streams, skills, ReplayConfig(share=0.0), temperature=1.0).shares()["large"] == pytest.approx(0.9)
    assert Mixture(streams, skills, ReplayConfig(share=0.0), temperature=2.0).shares()["large"] == pytest.approx(0.75)
    endless = {item.name: TaskStream(source(item.name, None), item, seed=0) for item in skills}
    with pytest.raises(ConfigError, match="num_train_tasks"):
        Mixture(endless, skills, ReplayConfig(share=0.0), temperature=1.0)
    capped = skill("small", num_train_tasks=5000)
    assert TaskStream(source("small", None), capped, seed=0).size == 5000


def test_a_weight_that_no_batch_would_read_is_refused():
    with pytest.raises(ValueError, match=r"'math' is old.*replay\.share"):
        skill("math", "old", weight=0.2)


def test_temperature_and_weights_exclude_each_other():
    with pytest.raises(ValueError, match="either temperature or weights"):
        SuiteConfig(temperature=2.0, skills=(skill("a", weight=2.0), skill("b")))


def graded(size: int | None):
    env = source("graded", size)
    env.difficulty = classmethod(lambda cls, task: (int(task.id.split("-")[1]) * 37) % 64)
    return env


@pytest.mark.parametrize("size", [64, None])
def test_a_curriculum_begins_with_the_easiest_and_ends_with_all(size):
    env = graded(size)
    stream = TaskStream(env, skill("graded", curriculum={"start": 0.25, "tasks": 300}), seed=0)
    levels = [env.difficulty(task) for task in stream.take(700)]
    assert max(levels[:16]) < 16 <= max(levels[16:120])
    assert sorted(levels[-64:])[-1] == 63
    stream.seek(100)
    assert [env.difficulty(task) for task in stream.take(50)] == levels[100:150], "seekable"


def test_a_curriculum_needs_a_difficulty():
    with pytest.raises(ConfigError, match="no `difficulty`"):
        TaskStream(source("plain", None), skill("plain", curriculum={}), seed=0).take(1)


def retrying(share: float = 0.5) -> Mixture:
    skills = [skill("math", "old"), skill("repair"), skill("store")]
    streams = {item.name: TaskStream(source(item.name, None), item, seed=0) for item in skills}
    return Mixture(streams, skills, ReplayConfig(share=0.2), retry_share=share)


def failing(drawn) -> tuple[set[str], set[str]]:
    """Every task is tried; those with an even number are solved."""
    hashes = {item.task.hash for item in drawn}
    return hashes, {item.task.hash for item in drawn if int(item.task.id.rpartition("-")[2]) % 2 == 0}


def test_failed_tasks_come_again_and_solved_ones_do_not():
    mix = retrying()
    first = mix.draw(20)
    assert not any(item.again for item in first)
    mix.record(first, *failing(first))
    second = mix.draw(20)
    again = [item for item in second if item.again]
    assert [sum(item.skill == name for item in again) for name in ("math", "repair", "store")] == [0, 4, 4]
    failed = {item.task.id for item in first if int(item.task.id.rpartition("-")[2]) % 2}
    assert {item.task.id for item in again} <= failed
    assert len(second) == 20 and not {item.task.id for item in second if not item.again} & failed
    mix.record(second, {item.task.hash for item in second}, {item.task.hash for item in second})
    assert not any(item.again for item in mix.draw(20))


def test_a_task_that_nobody_tried_says_nothing():
    mix = retrying()
    drawn = mix.draw(20)
    mix.record(drawn, set(), set())
    assert not any(item.again for item in mix.draw(20))


def test_retries_keep_their_share_in_the_long_run_and_skills_theirs():
    mix, retried, drawn_in_all = retrying(share=0.3), 0, 0
    for step in range(60):
        drawn = mix.draw(7)
        mix.record(drawn, {item.task.hash for item in drawn}, set())
        new = [item for item in drawn if not item.replay]
        if step >= 10:
            retried, drawn_in_all = retried + sum(item.again for item in new), drawn_in_all + len(new)
    assert retried == pytest.approx(0.3 * drawn_in_all, abs=2)
    assert drawn_in_all == pytest.approx(0.8 * 7 * 50, abs=1)


def test_an_interrupted_mixture_retries_the_same_tasks():
    mix = retrying()
    for _ in range(3):
        drawn = mix.draw(10)
        mix.record(drawn, *failing(drawn))
    saved = MixtureState(**json.loads(json.dumps(asdict(mix.state()))))
    fresh = retrying()
    fresh.restore(saved)
    for _ in range(3):
        drawn = mix.draw(10)
        assert fresh.draw(10) == drawn
        mix.record(drawn, *failing(drawn))
        fresh.record(drawn, *failing(drawn))


def test_an_interrupted_mixture_trains_on_what_was_drawn_ahead():
    """Its prompts were drawn before the last outcomes were known, which would draw others."""

    def step(mix) -> list:
        prompts, _ = [mix.ahead(index, 10) for index in range(2)]
        mix.taken()
        mix.record(prompts.drawn, *failing(prompts.drawn))
        return [prompts.drawn, prompts.shares]

    mix, fresh = retrying(), retrying()
    for _ in range(3):
        step(mix)
    fresh.restore(MixtureState(**json.loads(json.dumps(asdict(mix.state())))))
    left_alone = [step(mix) for _ in range(3)]
    assert [step(fresh) for _ in range(3)] == left_alone
    assert any(item.again for drawn, _ in left_alone for item in drawn)
