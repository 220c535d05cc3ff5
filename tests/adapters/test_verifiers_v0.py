"""verifiers v0: environments of the real package, played by its own loop with the student as the model."""

import warnings

import pytest

from agentopd.errors import ConfigError, EnvironmentFault
from agentopd.types import Message, VerdictStatus
from agentopd_envs import tool_turn
from agentopd_envs.adapters.verifiers_v0 import from_verifiers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def vf():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(
            "verifiers.legacy", reason="verifiers before 0.4 is not installed: pip install 'verifiers<0.4'"
        )
        import verifiers

        return verifiers


@pytest.fixture(scope="module")
def rows():
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    words = [f"word{n:02}" for n in range(40)]
    return datasets.Dataset.from_list(
        [{"question": f"Reverse {w}.", "answer": w[::-1], "info": {"w": w}} for w in words]
    )


def says(text):
    return Message(role="assistant", content=text)


def first(env, split="train"):
    return next(iter(env.load_tasks(split, "micro", None, 0)))


@pytest.fixture
def single(vf, rows):
    def make(*funcs, weights=None, **kwargs):
        parser = vf.XMLParser(["think", "answer"], answer_field="answer")
        rubric = vf.Rubric(funcs=list(funcs), weights=weights, parser=parser)
        return vf.SingleTurnEnv(dataset=rows, system_prompt="Be brief.", parser=parser, rubric=rubric, **kwargs)

    return make


def right(parser, completion, answer):
    return float(parser.parse_answer(completion) == answer)


def brief(completion):
    return float(len(completion[-1].content) < 40)


def test_a_single_turn_environment_is_scored_by_its_rubric(single, play):
    env = from_verifiers(single(right, brief, weights=[1.0, 0.25]), "reverse")
    tasks = {split: list(env.load_tasks(split, "micro", None, 0)) for split in ("train", "eval", "retention")}
    assert sum(map(len, tasks.values())) == 40 and all(tasks.values())
    task = tasks["train"][0]
    word = task.prompt[-1].content.split()[1].rstrip(".")
    assert [message.role for message in task.prompt] == ["system", "user"] and env.tool_schemas(task) == ()
    seen, verdict = play(env, task, [says(f"<answer>{word[::-1]}</answer>")])
    assert tuple(seen) == task.prompt and (verdict.outcome, verdict.status) == (1.0, VerdictStatus.OK)
    assert verdict.components == {"right": 1.0, "brief": 1.0, "num_turns": 1.0}
    assert play(env, task, [says("no")])[1].outcome == 0.2
    assert play(env, task, [says("x" * 50)])[1].outcome == 0.0


def test_held_out_rows_are_the_split_eval(single, rows):
    env = from_verifiers(single(right, eval_dataset=rows.select(range(5))), "reverse")
    assert len(list(env.load_tasks("eval", "micro", None, 0))) == 5
    assert first(env, "eval").public == {"index": -1}


def test_a_reward_function_that_raises_is_a_fault(single, play):
    def broken(completion):
        raise OSError("no judge answers")

    env = from_verifiers(single(right, broken), "reverse")
    with pytest.raises(EnvironmentFault, match="reward function broken: OSError: no judge answers"):
        play(env, first(env), [says("x")])


def test_rubrics_that_cannot_score_one_episode_are_refused(single):
    def diverse(completions):
        return [1.0 for _ in completions]

    with pytest.raises(ConfigError, match="compares the episodes of a group"):
        from_verifiers(single(diverse), "reverse")
    with pytest.raises(ConfigError, match="has a weight above 0"):
        from_verifiers(single(right, weights=[0.0]), "reverse")


@pytest.fixture
def tools(vf, rows):
    async def letter(word: str, place: int) -> str:
        """Look at one letter.

        Args:
            word: where to look
            place: from 0
        """
        return word[place]

    def used(completion, answer):
        return float(any(message.role == "tool" for message in completion) and answer in completion[-1].content)

    return from_verifiers(vf.ToolEnv(dataset=rows, tools=[letter], rubric=vf.Rubric([used]), max_turns=4), "letters")


def test_a_tool_environment_answers_calls_and_mistakes(tools, play):
    task = first(tools)
    (schema,) = tools.tool_schemas(task)
    assert schema.name == "letter" and schema.parameters["required"] == ["word", "place"]
    word = task.prompt[-1].content.split()[1].rstrip(".")
    turns = [tool_turn("letter", word=word, place=0), tool_turn("letter", word=word, place=99), says(word[::-1])]
    seen, verdict = play(tools, task, turns)
    assert [(message.role, message.name) for message in seen[1:]] == [("tool", "letter")] * 2
    assert seen[1].content == word[0] and "index out of range" in seen[2].content
    assert verdict.outcome == 1.0 and verdict.components["letter_calls"] == 2.0
    assert play(tools, task, [says(word[::-1])])[1].outcome == 0.0


def test_their_limit_of_turns_is_the_tasks(tools, play):
    task = first(tools)
    assert task.limits.max_turns == 4
    turns = [tool_turn("letter", word="ab", place=1)] * 9
    assert play(tools, task, turns)[1].outcome == 0.0
    short = task.model_copy(update={"limits": task.limits.model_copy(update={"max_turns": 2})})
    assert play(tools, short, turns)[1].components["num_turns"] == 2.0


@pytest.fixture
def guessing(vf, rows):
    class Guess(vf.MultiTurnEnv):
        async def setup_state(self, state):
            state["left"] = 3

        async def env_response(self, messages, state):
            state["left"] -= 1
            if state["answer"] in messages[-1].content:
                state["final_env_response"] = [vf.UserMessage(content="yes")]
                return state["final_env_response"]
            if rewriting:
                messages[0].content = "?"
            return [vf.UserMessage(content=f"{state['left']} left")]

        @vf.stop
        async def no_guess_left(self, state):
            return state["left"] == 0

    rewriting = []
    env = Guess(dataset=rows, rubric=vf.Rubric([lambda state: float(state["final_env_response"] is not None)]))
    return from_verifiers(env, "guess"), rewriting


def test_a_multi_turn_environment_keeps_its_state_and_its_stops(guessing, play):
    env, _ = guessing
    task = first(env)
    word = task.prompt[-1].content.split()[1].rstrip(".")
    seen, verdict = play(env, task, [says("a"), says(word[::-1]), says("never said")])
    assert [message.content for message in seen[1:]] == ["2 left"] and verdict.outcome == 1.0
    seen, verdict = play(env, task, [says("a")] * 9)
    assert [message.content for message in seen[1:]] == ["2 left", "1 left", "0 left"] and verdict.outcome == 0.0


def test_a_rewritten_conversation_is_a_fault(guessing, play):
    env, rewriting = guessing
    rewriting.append(True)
    with pytest.raises(EnvironmentFault, match="rewrites the conversation"):
        play(env, first(env), [says("a")] * 3)


def test_the_environment_of_the_page_is_certified(vf, rows, certified, snippet):
    certificate = certified(snippet("from_verifiers("), "Reverse")
    assert certificate.passed, certificate.findings
