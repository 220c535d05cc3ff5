"""The page: alone in one file, safe against what a model may write, and honest about what is missing."""

import json
import re
import time
from html.parser import HTMLParser

import pytest

from agentopd.errors import UserError
from agentopd.mixture import Action
from agentopd.report import build_report, write_retention_page
from agentopd.report.collect import MAX_EPISODES, collect
from agentopd.report.inspector import choose, diffs, prompt_messages, view
from agentopd.report.page import embedded
from agentopd.report.panels import make_panels
from agentopd.report.story import skill_rows, story
from agentopd.tracking import Provenance, RunDirectory, read_jsonl
from agentopd.types import Message, Task


class Page(HTMLParser):
    """The tags, the attributes that can load something, and the text of each script."""

    LOADS = ("src", "href", "action", "poster", "srcset", "data", "xlink:href")

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.handlers, self.scripts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in self.LOADS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts and self.lasttag == "script":
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def build(run):
    text = build_report(run.path).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_loads_nothing(finished):
    text, page = build(finished)
    assert all(target.startswith(("#", "data:")) for target in page.loads)
    assert not {"iframe", "img", "object", "base"} & set(page.tags)
    for loader in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert loader not in text
    assert len(text.encode()) < 5_000_000


def test_what_a_model_wrote_never_becomes_markup(finished):
    text, page = build(finished)
    assert page.tags.count("script") == 3 and "img" not in page.tags and page.handlers == []
    assert "alert(1)</script>" not in text and "\u2028" not in text
    told = json.dumps(page.data["episodes"])
    assert "</script><script>alert(1)" in told  # shown to the reader as it was written
    assert "demo &lt;run&gt;" in text and "demo <run>" not in text


def test_a_dozen_episodes_can_be_read_token_by_token(finished):
    _, page = build(finished)
    episodes = page.data["episodes"]
    assert len(episodes) == 12
    assert {episode["class"] for episode in episodes} == {"passed", "failed", "unjudged"}
    for episode in episodes:
        assert [role for role, _ in episode["prompt"]] == ["system", "user"]
        for turn in episode["turns"]:
            lengths = {len(turn[stream]) for stream in ("tokens", "student", "teacher", "gate", "weights", "masks")}
            assert len(lengths) == 1
    first = episodes[0]["turns"][0]
    assert first["calls"] == [["edit", '{"old": "a+b", "new": "a-b"}']]
    assert first["replies"][0][:2] == ["tool", "edit"]
    assert first["masks"][-1] == "special" and first["weights"][-1] == 0.0


def test_every_chart_has_its_readout(finished):
    text, page = build(finished)
    charts = page.data["charts"]
    assert text.count('class="plot"') == len(charts)
    assert all(len(series["y"]) == len(chart["x"]) for chart in charts.values() for series in chart["series"])


def test_the_story_claims_only_what_intervals_allow(finished):
    run = collect(finished.path)
    told = [sentence for _, sentence in story(skill_rows(run, run.retention()))]
    assert told[0].startswith("The new skill repair rose from 30.0 % to 81.7 % (+51.7 points")
    assert told[2].startswith("The old skill math shows no measurable loss: 86.7 % to 83.3 %")
    assert run.missing() == []


def test_an_interrupted_run_says_what_is_missing(started):
    text, _ = build(started)
    assert "its final evaluation is missing; there is none after training yet" in text
    assert "<code>agentopd resume</code>" in text
    assert "unfinished" in text and "rose from" not in text


def test_a_run_that_never_stepped_still_has_a_report(tmp_path):
    run = RunDirectory.create(tmp_path / "empty", "", Provenance(seed=0))
    text, page = build(run)
    for note in ("No step was logged", "No evaluation was written yet", "No episode was kept"):
        assert note in text
    assert page.data == {"charts": {}, "episodes": []}


def test_final_wins_over_the_same_step(finished):
    finished.save_eval("step_000120", collect(finished.path).stages[0].result.model_copy(update={"step": 120}))
    stages = [stage.name for stage in collect(finished.path).stages]
    assert stages == ["base", "step 30", "step 60", "step 90", "final"]


def test_a_spoilt_evaluation_is_named(finished):
    (finished.eval / "final.json").write_text("{}")
    with pytest.raises(UserError, match=r"final\.json: not a EvalResult: .*mend the file or delete it"):
        build_report(finished.path)


def test_no_run_no_report(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        build_report(tmp_path / "nowhere")


def test_every_numeric_metric_is_charted_once(finished):
    run = collect(finished.path)
    panels = make_panels([*run.rows, {"step": 121, "odd": 1, "note": "text", "nan": None}], run.skills)
    groups = [*panels.learning, *panels.signal, *panels.cost]
    lines = sum(len(chart.lines) for chart in panels.charts)
    zero = [title for group in groups for title in group.zero]
    assert zero == ["Attempts without a verdict"]
    assert lines + len(run.skills) == len({key for row in run.rows for key in row} - {"step"}) + 1
    assert [chart.caption for chart in panels.learning[0].charts[:2]] == ["success", "distill/reverse_kl"]
    by_name = {chart.caption: chart for chart in panels.charts}
    assert [line.colour for line in by_name["success"].lines] == [0, 1, 2]
    assert {bar.label for bar in panels.phases} == {"rollout", "teacher", "verify", "learner"}
    assert sum(int(bar.share.split()[0]) for bar in panels.phases) == pytest.approx(100, abs=2)


def test_a_small_budget_keeps_every_skill_and_outcome(finished):
    kept = list(finished.kept_episodes()) * 20
    one = len(json.dumps(view(kept[0]), ensure_ascii=False).encode())
    chosen = choose(kept, budget=14 * one)
    assert 10 <= len(chosen) <= 15
    assert len({(episode["skill"], episode["class"]) for episode in chosen}) == 9


def test_one_huge_episode_does_not_push_out_the_rest(finished):
    kept = list(finished.kept_episodes())
    huge = kept[0].model_copy(update={"tokens": ("x" * 100_000, *kept[0].tokens[1:])})
    assert len(choose([huge, *kept[1:]], budget=60_000)) == 11


def test_a_sample_of_episodes_is_even_over_the_run(finished):
    steps = [kept.step for kept in finished.kept_episodes(at_most=4)]
    assert steps == [1, 40, 80, 120] and finished.num_kept_episodes() == 12
    assert len(list(finished.kept_episodes(at_most=5))) == 5 and len(list(finished.kept_episodes(at_most=50))) == 12


def long_run(run, num_episodes):
    """Four episodes a step, and the metrics of as many steps."""
    lines = [kept.model_dump_json() for kept in run.kept_episodes()]
    row = json.dumps(read_jsonl(run.metrics)[-1] | {"step": 0}).removeprefix('{"step": 0,')
    with run.metrics.open("a") as metrics:
        for step in range(121, 121 + num_episodes // 4):
            group = [lines[(4 * step + i) % 12] for i in range(4)]
            (run.episodes / f"step_{step:06d}.jsonl").write_text("\n".join(group) + "\n")
            metrics.write(f'{{"step": {step},{row}\n')


@pytest.mark.parametrize(
    "num_episodes",
    [
        pytest.param(4000, marks=pytest.mark.slow),
        pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_a_long_run_is_sampled_and_says_so(finished, num_episodes):
    long_run(finished, num_episodes)
    started = time.process_time()
    text, page = build(finished)
    assert time.process_time() - started < 60
    told = re.search(rf"This page is a sample: (\d+) of the {num_episodes + 12:,} episodes that were kept", text)
    assert told and int(told[1]) == len(page.data["episodes"]) <= MAX_EPISODES
    assert {episode["class"] for episode in page.data["episodes"]} == {"passed", "failed", "unjudged"}
    assert len(text.encode()) < 5_000_000


def test_a_torn_episode_file_is_read_up_to_the_tear(finished):
    (finished.episodes / "step_000121.jsonl").write_text('{"step": 121, "ep')
    assert len(collect(finished.path).episodes) == 12


def test_what_an_episode_changed_is_a_diff(finished):
    kept = next(finished.kept_episodes())
    start = {"program": "def f(a):\n    return a + 1\n", "stock": {"tea": 2}, "only": "here"}
    task = Task(
        id="t",
        env="x",
        prompt=(Message(role="user", content="?"),),
        public=start,
        hidden={"gold": "def f(a):\n    return a\n"},
    )
    end = {"program": "def f(a):\n    return a - 1\n", "stock": {"tea": 2}, "more": 1}
    shown = diffs(
        kept.model_copy(update={"task": task, "episode": kept.episode.model_copy(update={"final_state": end})})
    )
    program = ["@@ -1,2 +1,2 @@", " def f(a):", "-    return a + 1"]
    assert shown == [["program", [*program, "+    return a - 1"]], ["gold", [*program, "+    return a"]]]


def test_actions_of_replay_and_guards_are_listed(finished):
    finished.record(Action(step=60, action="raise_share", skill="math", drop=0.05, before=0.25, after=0.5))
    text, _ = build(finished)
    assert "<td>raise share</td><td>math</td><td>+5.0</td><td>0.25</td><td>0.5</td>" in text


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", [["user", "hi"]]),
        ("[INST] hi [/INST]", [["prompt", "[INST] hi [/INST]"]]),
        ("stray<|im_start|>user\nhi<|im_end|>\n", [["prompt", "stray<|im_start|>user\nhi<|im_end|>\n"]]),
    ],
)
def test_a_prompt_is_split_only_if_nothing_is_lost(text, messages):
    assert prompt_messages(text) == messages


def test_the_picture_of_a_matrix_stands_alone(finished, tmp_path):
    matrix = collect(finished.path).retention()
    assert matrix is not None
    text = write_retention_page(matrix, tmp_path / "retention.html", {"math": "old"}).read_text()
    assert text.count("<td style=") == 15 and "86.7" in text and "Mean forgetting" in text
    assert "−3.3 (−9.7 to +3.2)" in text
    assert "<script" not in text and "http" not in text


def test_embedded_json_is_json_again():
    data = {"x": "</script><!-- & \u2028"}
    text = str(embedded(data))
    assert json.loads(text) == data and not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded({"x": float("nan")})
