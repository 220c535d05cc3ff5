"""Any data set as tasks: files of every format, the column map, splits, and errors that name the row."""

import asyncio
import json
from pathlib import Path

import pytest

from agentopd.errors import ConfigError, TaskError
from agentopd_envs.code_generation import CodeGenerationEnvironment
from agentopd_envs.math import MathEnvironment
from agentopd_envs.tool_use import ToolUseEnvironment

ROWS = [{"n": n, "info": {"question": f"What is {n} + {n}?", "note": None}, "final": 2 * n} for n in range(60)]
COLUMNS = '[columns]\nproblem = "{info.question} Think."\nanswer = "final"\n'


@pytest.fixture
def described(tmp_path):
    """``described(text, rows, file)``: a description beside its file; returns the source to name."""

    def write(text='rows = "sums.jsonl"\n' + COLUMNS, rows=ROWS, file="sums.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "sums.toml"
        path.write_text(text)
        return str(path)

    return write


def load(source, split="train", limit=None, seed=0, env=MathEnvironment):
    return list(env.load_tasks(split, source, limit, seed))


def test_rows_become_tasks_by_the_column_map(described):
    source = described('rows = "sums.jsonl"\nlicence = "MIT"\n' + COLUMNS + 'id = "n"\nhint = "info.note"\n')
    tasks = {task.id: task for split in ("train", "eval", "retention") for task in load(source, split)}
    task = tasks["sums/7"]
    assert task.prompt[-1].content == "What is 7 + 7? Think." and task.hidden == {"answer": "14"}
    assert task.privileged.solution == "\\boxed{14}" and task.privileged.hint == ""
    assert (task.source.dataset, task.source.licence, task.source.row) == ("sums", "MIT", "7")
    assert len(tasks) == len(ROWS)


def test_one_file_is_divided_by_content_and_ordered_by_the_seed(described):
    source = described()
    ids = {split: [task.id for task in load(source, split)] for split in ("train", "eval", "retention")}
    assert sorted(len(set(found)) for found in ids.values()) == sorted(map(len, ids.values()))
    assert sum(map(len, ids.values())) == len(ROWS) == len(set().union(*ids.values()))
    assert len(ids["train"]) > 35 and all(ids.values())
    assert [task.id for task in load(source, limit=5)] == ids["train"][:5]
    assert sorted(task.id for task in load(source, seed=1)) == sorted(ids["train"]) != ids["train"]


def test_declared_splits_and_repeated_rows(described, tmp_path):
    source = described('[splits]\ntrain = "sums.jsonl"\n' + COLUMNS, [*ROWS, *ROWS])
    assert len(load(source)) == len(ROWS)
    with pytest.raises(ConfigError, match="no eval split"):
        load(source, "eval")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('rows = "sums.jsonl"\n[splits]\ntrain = "a"\n' + COLUMNS, "either rows or splits"),
        ('rows = "other.jsonl"\n' + COLUMNS, "no such file"),
        ('rows = "sums.jsonl"\nrevision = "main"\n' + COLUMNS, "belong to a data set of the hub"),
        ('hub = "a/b"\nrows = "train"\nrevision = "main"\n' + COLUMNS, "40 hex digits"),
        ('rows = "sums.jsonl"\n[columns]\nproblem = "info.question"\n', "names none for 'answer'"),
        ('rows = "sums.jsonl"\n' + COLUMNS + 'answr = "final"\n', "has no field 'answr'; it has: problem, answer"),
        ('row = "sums.jsonl"\n' + COLUMNS, "did you mean 'rows'"),
    ],
)
def test_a_wrong_description_says_what_to_change(described, text, message):
    with pytest.raises(ConfigError, match=message):
        load(described(text))


def test_a_bad_row_is_named(described):
    with pytest.raises(TaskError, match=r"sums.jsonl, row 1: no column 'info.question'; there is: n"):
        load(described(rows=[{"n": 1}]))
    with pytest.raises(TaskError, match=r"row 1: answer: Input should be a valid string"):
        load(described(rows=[{**ROWS[0], "final": [1]}]))


def test_a_line_that_is_not_json_is_named(described, tmp_path):
    source = described()
    (tmp_path / "sums.jsonl").write_text('{"n": 1}\n{"n"\n')
    with pytest.raises(TaskError, match="line 2 is not JSON"):
        load(source)


@pytest.mark.parametrize("space", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_row(described, tmp_path, space):
    source = described('[splits]\ntrain = "sums.jsonl"\n' + COLUMNS)
    row = {"info": {"question": f"one{space}two?"}, "final": 3}
    (tmp_path / "sums.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert f"one{space}two?" in load(source)[0].prompt[-1].content


def test_an_environment_that_reads_no_rows_says_so(described):
    with pytest.raises(ConfigError, match="'tool_use' reads no rows"):
        load(described(), env=ToolUseEnvironment)


@pytest.mark.slow
def test_a_described_data_set_is_a_source_that_can_be_certified(described, monkeypatch, tmp_path):
    from agentopd.certify import skill_of, validate

    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path / "cache"))
    skill = skill_of("math", described())
    certificate = asyncio.run(validate(skill))
    assert certificate.passed, certificate.findings


def test_functions_with_asserts_become_code_tasks(described):
    rows = [{"q": f"Add {n}.", "t": f"assert add(1) == {n + 1}", "s": f"add = lambda x: x + {n}"} for n in range(9)]
    text = 'rows = "sums.jsonl"\n[columns]\nprompt = "q"\nentry_point = "{name}"\ntest = "t"\nsolution = "s"\n'
    task = load(described(text, [{**row, "name": "add"} for row in rows]), env=CodeGenerationEnvironment)[0]
    assert task.hidden["cases"][0]["expression"] == "add(1)" and task.public["entry_point"] == "add"


def test_other_formats_are_read_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(str(tmp_path / "sums.parquet"))
    made.to_csv(str(tmp_path / "sums.csv"))
    found = []
    for file, question in (("sums.parquet", "info.question"), ("sums.csv", "info")):
        path = tmp_path / f"{Path(file).suffix[1:]}.toml"
        path.write_text(f'[splits]\ntrain = "{file}"\n[columns]\nproblem = "{question}"\nanswer = "final"\n')
        found.append(sorted(task.hidden["answer"] for task in load(str(path))))
    assert found[0] == found[1] == sorted(str(2 * n) for n in range(60))


def test_a_folder_in_the_hubs_layout_is_read_like_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    folder = tmp_path / "sums"
    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "train-00000.parquet"))
    path = tmp_path / "hub.toml"
    text = f'hub = "{folder}"\nrevision = "{"0" * 40}"\n[splits]\ntrain = "train"\neval = "nope"\n'
    path.write_text(text + '[columns]\nproblem = "info.question"\nanswer = "final"\n')
    (task, *_) = load(str(path))
    assert task.source.revision == "0" * 40
    with pytest.raises(ConfigError, match="split 'nope'"):
        load(str(path), "eval")
