"""Whoever teaches or judges, as config: what lacks an input, or has no effect, is an error at load."""

import pytest

from agentopd.config import dump_toml, load_run_config
from agentopd.config.teachers import ChatTeacherConfig, TeacherConfig
from agentopd.errors import ConfigError

SKILL = '[[suite.skills]]\nname = "store"\nenv = "tool_use"\n'
HF = '[teachers.default]\nmodel = "micro/teacher"\n'
CHAT = '[teachers.default]\nkind = "chat"\nbase_url = "http://localhost:8000/v1"\nmodel = "toy"\n'
JUDGE = '[judge]\nbase_url = "http://localhost:8000/v1"\nmodel = "toy"\n'


@pytest.fixture
def load(tmp_path):
    def config(text, *overrides):
        path = tmp_path / "run.toml"
        path.write_text(text + SKILL)
        return load_run_config(path, list(overrides))

    return config


def test_kinds_of_teachers_and_the_way_back(load, tmp_path):
    config = load(CHAT + JUDGE, "objective.preset=ropd")
    assert isinstance(config.teachers["default"], ChatTeacherConfig)
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load_run_config(tmp_path / "again.toml") == config
    assert isinstance(load(HF).teachers["default"], TeacherConfig)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (HF, ["objective.preset=ropd"], r"add \[judge\]"),
        (HF + JUDGE, ["objective.preset=opd"], "this objective has none: leave it out"),
        (CHAT, ["objective.preset=opd"], "needs a teacher that gives 'sampled'.*gives 'text' only"),
        (HF, ["objective.preset=seqkd", "teachers.default.context=hint"], "this objective scores nothing"),
        (HF, ["objective.preset=seqkd", "teachers.default.misread_share=0.5"], "this objective scores nothing"),
        (HF, ["objective.preset=sg_opd", "teachers.default.misread_share=0.5"], "does not reach the teacher's own"),
        (HF, ["objective.preset=sg_opd", "teachers.default.end_of_turn=</s>"], "end_of_turn does not reach"),
        (HF, ["objective.preset=lightning_opd"], "set num_train_tasks of skill 'store'"),
        (HF, ["objective.preset=opd", "suite.skills.store.teacher=codr"], "names teacher 'codr'.* has: default"),
        (HF, ["objective.preset=opd", "teachers.default.contxt=hint"], "teachers.default.contxt: unknown key|'contxt'"),
        (CHAT, ["teachers.default.context=hint"], "unknown key 'context' for kind 'chat'"),
        ('[teachers.default]\nkind = "gpt"\n', [], "unknown kind 'gpt'; valid kinds: chat, served, hf"),
        (HF, ["teachers.default.kind=servd"], "unknown kind 'servd'; did you mean 'served'"),
        (HF, ["objective.preset=exopd", "objective.reference.policy=teacher_base"], "set 'base'"),
    ],
)
def test_what_lacks_an_input_or_has_no_effect_is_refused(load, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(text, *overrides)


@pytest.mark.parametrize("preset", ["simct_opd", "gold_opd"])
@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('objective.anchor={kind="teacher_nll"}', "anchor 'teacher_nll'"),
        ("objective.source=teacher", "source 'teacher'"),
        ('objective.source={kind="mixed",other="teacher"}', "source 'mixed'"),
        (
            'objective.stages=[{until=0.5,source={kind="teacher"},divergence={kind="none"},'
            'anchor={kind="teacher_nll"},alignment={kind="same"}}]',
            "anchor 'teacher_nll'",
        ),
    ],
)
def test_rollouts_in_a_teachers_own_token_ids_are_not_trained_on(load, preset, override, value):
    with pytest.raises(ConfigError) as caught:
        load(HF, f"objective.preset={preset}", override)
    for words in (value, f"alignment '{preset.removesuffix('_opd')}'", "the teacher's token ids", "alignment 'same'"):
        assert words in str(caught.value)


def test_rubrics_and_gold_need_no_common_token_ids(load):
    assert load(HF, "objective.preset=simct_opd", 'objective.source={kind="mixed",other="gold"}')
    assert load(HF + JUDGE, "objective.preset=simct_opd", 'objective.verifier={kind="rubric"}')


def test_an_error_in_a_teacher_is_placed_in_the_files_own_words(load):
    with pytest.raises(ConfigError, match=r"run\.toml: teachers\.default\.model: "):
        load('[teachers.default]\nkind = "hf"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: objective\.divergence\.top_k: "):
        load(HF, "objective.preset=topk_opd", "objective.divergence.top_k=0")
