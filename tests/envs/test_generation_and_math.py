"""Code generation and math with tools: what counts as an answer, and every row of the data."""

import ast

import pytest

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.code_generation import CodeGenerationEnvironment, program_of
from agentopd_envs.math import MathEnvironment, MathRow, MathToolsEnvironment

some_rows = pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.long)])


def said(text):
    return Message(role="assistant", content=text)


# --- code generation -------------------------------------------------------------------------------------------------


def test_the_last_block_that_defines_the_function_is_the_program():
    first, second = "def f(x):\n    return 1\n", "f = lambda x: 2\n"
    answer = f"Try:\n```python\n{first}```\nBetter:\n```\n{second}```\nUse it:\n```python\nprint(f(1))\n```"
    assert program_of(answer, "f") == second
    assert program_of(answer, "g") is None and program_of(first, "f") is None
    assert program_of("```python\ndef ff(x): ...\n```", "f") is None


def test_imports_of_the_code_that_was_shown_need_not_be_repeated():
    given = "from typing import List\nimport math\n\ndef f(x: List[int]):\n    '''Sum.'''\n"
    program = program_of("```\ndef f(x: List[int]):\n    return math.fsum(x)\n```", "f", given)
    assert program.startswith("from typing import List\nimport math\ndef f")


@pytest.mark.parametrize(
    "head",
    [
        "from __future__ import annotations\n",
        '"""A sum:\none of floats."""\nfrom __future__ import annotations\n',
        '"""A sum."""; from __future__ import annotations\n',
    ],
)
def test_what_must_come_first_in_an_answer_stays_first(head):
    given = "from __future__ import division\nimport math\n"
    program = program_of(f"```\n{head}import os\n\ndef f(x: T) -> T: return math.fsum(x)\n```", "f", given)
    assert program.startswith(f"{head}{given}import os\n")
    names = {}
    exec(compile(program, "<answer>", "exec", dont_inherit=True), names)
    assert names["f"]([1, 2]) == 3.0 and names.get("__doc__") == ast.get_docstring(ast.parse(head), clean=False)


@pytest.mark.parametrize("rest", ["return (", "return " + "-" * 50_000 + "1", "return '\0'"])
def test_an_answer_that_cannot_be_read_is_still_a_program(rest):
    program = program_of(f"```\ndef f(x): {rest}\n```", "f", "import math\n")
    assert program == f"import math\ndef f(x): {rest}\n"


@pytest.mark.data
def test_what_is_hidden_is_not_in_the_question(data_dir):
    for source in CodeGenerationEnvironment.sources:
        for task in CodeGenerationEnvironment.load_tasks("eval", source, None, 0):
            assert len(task.hidden["cases"]) >= 3 and task.privileged.solution not in task.prompt[-1].content
            assert "expected" not in str(task.student_view().model_dump())


@pytest.mark.data
@pytest.mark.slow
@some_rows
@pytest.mark.parametrize("source", CodeGenerationEnvironment.sources)
def test_every_row_is_solved_by_its_gold_program_and_by_nothing_less(source, stride, data_dir, outcomes):
    env_class = CodeGenerationEnvironment
    tasks = list(env_class.load_tasks("eval", source, None, 0))
    assert len(tasks) == {"humaneval": 40, "mbpp": 60}[source]
    tasks = tasks[::stride]
    for turns_of, wanted in ((env_class.gold_turns, 1.0), (env_class.starter_turns, 0.0), (lambda t: [said("")], 0.0)):
        assert set(outcomes(env_class, tasks, turns_of).values()) == {wanted}
    for index in range(3):
        attacks = outcomes(env_class, tasks[::5], lambda task, i=index: list(env_class.wrong_turns(task))[i])
        assert set(attacks.values()) == {0.0}


# --- math ------------------------------------------------------------------------------------------------------------


class Answers:
    """A sandbox whose program said something."""

    name, capabilities = "answers", frozenset()

    def __init__(self, status, stdout, detail=""):
        self.result = (status, None, detail, stdout)

    async def run_cases(self, program, cases, limits=None):
        self.program = program.source
        status, value, detail, stdout = self.result
        return [CaseResult(case.id, status, value, detail, stdout) for case in cases]


@pytest.fixture
def use(play):
    """``use(tool, sandbox=None, **arguments)``: what the student is shown."""
    (task,) = MathToolsEnvironment.load_tasks("train", "micro", 1, 0)

    def call(name, sandbox=None, **arguments):
        return play(MathToolsEnvironment, task, [tool_turn(name, **arguments)], sandbox).seen[-1].content

    return call


@pytest.mark.parametrize(
    ("expression", "shown"),
    [("2 + 3 * (4 - 1)", "11"), ("1/4", "0.25"), ("0.1 + 0.2", "0.3"), ("2/3", "2/3 (about 0.6666666667)"),
     ("1/0", "error"), ("__import__('os')", "error"), ("9**9**9", "error"), ("1" * 201, "error")],
)  # fmt: skip
def test_the_calculator_is_exact_and_runs_no_code(use, expression, shown):
    assert use("calculator", expression=expression).startswith(shown)


@pytest.mark.parametrize("expression", ["*".join(["1e308"] * 15), "1e308*1e308/3", "1e308*1e308+0.5"])
def test_a_result_that_cannot_be_written_is_told_to_the_student(use, expression):
    assert use("calculator", expression=expression) == "error: the result is too large"


def test_python_runs_in_the_sandbox_and_shows_what_was_printed(use):
    box = Answers(CaseStatus.VALUE, "3\n")
    assert use("python", box, code="print(1 + 2)") == "3" and box.program == "print(1 + 2)"
    assert use("python", Answers(CaseStatus.VALUE, ""), code="1") == "(nothing was printed)"
    assert use("python", Answers(CaseStatus.VALUE, "x" * 9000), code="1").endswith("x\n[cut at 2000 characters]")
    failed = use("python", Answers(CaseStatus.EXCEPTION, "so far\n", "NameError: name 'y'"), code="y")
    assert failed == "error: so far\n\nNameError: name 'y'"
    assert use("python", Answers(CaseStatus.TIMEOUT, ""), code="1") == "error: timeout"


def test_the_gold_trajectory_works_its_steps_on_the_calculator(outcome, play):
    for task in MathToolsEnvironment.load_tasks("train", "micro", 5, 0):
        turns = MathToolsEnvironment.gold_turns(task)
        played = play(MathToolsEnvironment, task, turns)
        results = [event.data["result"] for event in played.episode.events]
        assert len(results) == 2 and results[-1] == task.hidden["answer"]
        assert task.env == "math_tools" and outcome(MathToolsEnvironment, task, turns) == 1.0
        assert outcome(MathToolsEnvironment, task, turns[:-1]) == 0.0


@pytest.mark.data
@pytest.mark.slow
@some_rows
def test_latex_answers_of_any_data_set(stride, data_dir, outcomes, tmp_path):
    env_class = MathToolsEnvironment if stride > 1 else MathEnvironment
    path = tmp_path / "latex.toml"
    columns = '[columns]\nid = "id"\nproblem = "problem"\nanswer = "answer"\n'
    path.write_text(f'[splits]\neval = "{data_dir / "math_dev.jsonl"}"\n{columns}')
    tasks = list(env_class.load_tasks("eval", str(path), None, 0))
    assert len(tasks) == 100
    tasks = tasks[::stride]
    assert set(outcomes(env_class, tasks, env_class.gold_turns).values()) == {1.0}
    assert set(outcomes(env_class, tasks, lambda task: [said("")]).values()) == {0.0}
    wrong = outcomes(env_class, tasks, lambda task: [said("\\boxed{-98765}")])
    assert set(wrong.values()) == {0.0}


def test_an_answer_is_boxed_once():
    task = MathEnvironment.from_row(MathRow(problem="?", answer=r"$\frac{1}{2}$", solution="Half."))
    assert task.privileged.solution == "Half.\n\\boxed{\\frac{1}{2}}"
