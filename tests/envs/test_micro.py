"""The three micro worlds: wording, gold and wrong solutions, splits, speed."""

import itertools
import re
import time

import pytest

from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_envs.math import MathEnvironment
from agentopd_envs.micro import math, repair, store
from agentopd_envs.tool_use import ToolUseEnvironment
from agentopd_verifiers.diff import patch_penalty

WORLDS = [(MathEnvironment, math), (CodeRepairEnvironment, repair), (ToolUseEnvironment, store)]
SPLITS = ("train", "eval", "retention")

worlds = pytest.mark.parametrize(("env_class", "module"), WORLDS, ids=["math", "repair", "store"])


def core(task) -> object:
    """What a problem is, read from the finished task and not from the generator: its numbers, without names."""
    if task.env == "math":
        return tuple(re.findall(r"^(.*)=", task.privileged.solution, re.M))
    if task.env == "tool_use":
        read, write, _ = (turn.tool_calls for turn in task.privileged.trajectory)
        db, source, target = task.public["db"], read[0].arguments["item"], write[0].arguments["item"]
        return (source == target, db[source], db[target], write[0].arguments["count"])
    names = re.search(r"\((\w), (\w)\)", task.public["program"]).groups()
    edit = task.privileged.trajectory[0].tool_calls[0].arguments
    return tuple(edit[key].replace(names[0], "A").replace(names[1], "B") for key in ("old", "new"))


@worlds
def test_gold_solves_and_wrong_turns_do_not(env_class, module, outcome, trusting_sandbox):
    for task in itertools.chain.from_iterable(env_class.load_tasks(split, "micro", 12, 3) for split in SPLITS):
        sandbox = trusting_sandbox if task.env == "code_repair" else None
        assert outcome(env_class, task, env_class.gold_turns(task), sandbox) == 1.0
        assert outcome(env_class, task, env_class.starter_turns(task), sandbox) == 0.0
        assert outcome(env_class, task, [Message(role="assistant")], sandbox) == 0.0
        for turns in module.wrong_turns(task):
            assert outcome(env_class, task, turns, sandbox) == 0.0, (task, turns)


@worlds
def test_splits_never_overlap_across_seeds(env_class, module):
    seen = {split: set() for split in SPLITS}
    for split, seed in itertools.product(SPLITS, (0, 1, 2)):
        seen[split].update(core(task) for task in env_class.load_tasks(split, "micro", 300, seed))
    assert all(len(cores) > 60 for cores in seen.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


@worlds
def test_tasks_repeat_by_seed_split_and_index(env_class, module):
    first = list(env_class.load_tasks("eval", "micro", 40, 7))
    assert first == list(itertools.islice(env_class.load_tasks("eval", "micro", None, 7), 40))
    assert first != list(env_class.load_tasks("eval", "micro", 40, 8))
    assert len({task.id for task in first}) == 40
    assert {(task.split, task.env, task.seed) for task in first} == {("eval", env_class.name, 7)}


@worlds
def test_generation_is_fast(env_class, module):
    started = time.process_time()
    assert sum(1 for _ in env_class.load_tasks("train", "micro", 1500, 0)) == 1500
    assert time.process_time() - started < 0.5


def test_math_wording():
    stories, sums = set(), set()
    for task in math.tasks("train", 300, 0):
        system, user = task.prompt
        assert system.content == "Solve step by step. End with \\boxed{answer}."
        (stories if " has " in user.content else sums).add(user.content)
        a, b = (re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line) for line in task.privileged.solution.split("\n")[:2])
        assert a[4] == b[1] and task.privileged.solution.endswith(f"\\boxed{{{b[4]}}}")
        assert task.hidden == {"answer": b[4]} and int(b[4]) >= 0
        assert [eval(f"{m[1]}{m[2]}{m[3]}") == int(m[4]) for m in (a, b)] == [True, True]
    assert all(re.fullmatch(r"What is \d+ [+-] \d [+-] \d\?", text) for text in sums)
    story = r"(\w+) has \d+ (\w+)\. \1 (\w+) \d\. Then \1 (\w+) \d\. How many \2\?"
    assert all(re.fullmatch(story, text) for text in stories)
    assert len(stories) > 100 and len(sums) > 100


def test_wordy_patches_pass_at_a_price(outcome, trusting_sandbox):
    plain = list(repair.tasks("train", 12, 0))
    for index, (task, other) in enumerate(zip(repair.wordy_tasks("train", 12, 0), plain, strict=True)):
        assert task.model_copy(update={"privileged": other.privileged}) == other, "only gold differs"
        assert repair.difficulty(task) == repair.difficulty(other)
        assert repair.wrong_turns(task) == repair.wrong_turns(other)
        turns = CodeRepairEnvironment.gold_turns(task)
        assert outcome(CodeRepairEnvironment, task, turns, trusting_sandbox) == 1.0
        price, patch = patch_penalty(task.public["program"], task.privileged.solution, task.hidden["gold"])
        assert (patch.cost, price.total) == ((4.0, 0.15) if index % 4 else (2.0, 0.0))


def test_repair_wording(play, trusting_sandbox):
    kinds = set()
    for task in repair.tasks("train", 200, 0):
        system, user = task.prompt
        assert system.content == "Fix the bug with one small edit, then submit."
        form = r'def (\w+)\((\w), (\w)\):\n    """(.*)"""\n    return (.*)\n\n'
        form += r"\1\((\d), (\d)\) gives (-?\d+), expected (-?\d+)"
        match = re.fullmatch(form, user.content)
        edit, submit = (turn.tool_calls[0] for turn in task.privileged.trajectory)
        assert edit.arguments["old"] == match[5] and submit.arguments == {}
        spoken = re.sub("plus|minus|times", lambda m: {"plus": "+", "minus": "-", "times": "*"}[m[0]], match[4])
        assert spoken == edit.arguments["new"]
        scope = {match[2]: int(match[6]), match[3]: int(match[7])}
        assert (eval(match[5], {}, scope), eval(spoken, {}, scope)) == (int(match[8]), int(match[9]))
        (changed,) = [i for i, (a, b) in enumerate(zip(match[5].split(), spoken.split(), strict=True)) if a != b]
        kinds.add(changed)
        (hidden,) = task.hidden["cases"]
        assert len(hidden["args"]) == len(hidden["expected"]) == 6
    assert kinds == {0, 1, 2, 3, 4}, "both variables, both operators and the constant get broken"
    schemas = {
        schema.name: list(schema.parameters["properties"]) for schema in CodeRepairEnvironment.tool_schemas(task)
    }
    assert schemas == {"edit": ["old", "new"], "run_tests": [], "submit": []}


def test_store_wording():
    forms = (
        r"Add \d \w+\.",
        r"We got \d more \w+\.",
        r"Sell \d \w+\.",
        r"\d \w+ went bad\.",
        r"Set \w+ to the count of \w+\.",
    )
    met = set()
    for task in store.tasks("train", 200, 0):
        assert task.prompt[0].content == "Keep the stock right using the tools."
        (form,) = (form for form in forms if re.fullmatch(form, task.prompt[1].content))
        met.add(form)
        assert task.hidden["initial"] == task.public["db"] and len(task.public["db"]) == 3
        changed = {item for item in task.public["db"] if task.public["db"][item] != task.hidden["goal"][item]}
        assert changed == {task.privileged.trajectory[1].tool_calls[0].arguments["item"]}
        assert all(count > 0 for count in task.hidden["goal"].values())
    assert met == set(forms)


def test_store_answers(play):
    (task,) = store.tasks("train", 1, 0)
    item, count = next(iter(task.public["db"].items()))
    turns = [
        tool_turn("read", item=item),
        tool_turn("write", item=item, count=3),
        tool_turn("read", item=item),
        tool_turn("read", item="gold"),
        tool_turn("write", item=item, count=-1),
        tool_turn("write", item=item),
        Message(role="assistant", content="Done."),
    ]
    played = play(ToolUseEnvironment, task, turns)
    answers = [message.content for message in played.seen[2:]]
    assert answers[:3] == [str(count), "ok", "3"]
    assert answers[3].startswith("error: no item 'gold'; there is: ")
    assert all(answer.startswith("error: count: ") for answer in answers[4:])
    assert played.episode.final_state == {"db": {**task.public["db"], item: 3}}
