"""What a run needs, one line each, before anything is trained."""

import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, Qwen3Config

from agentopd import commands
from agentopd.config import load_run_config
from agentopd.doctor import check_template, diagnose
from agentopd.doctor.diagnosis import fit
from agentopd.doctor.disk import disk
from agentopd.doctor.machine import memory
from agentopd.doctor.ports import ports
from agentopd.doctor.teachers import scoring_teachers, served_teachers
from agentopd.errors import ConfigError
from agentopd.learner.body import hidden_states
from agentopd.models import available_bytes, load_model, load_tokenizer, vocabulary_hash
from agentopd.rendering import HermesJSON, OpenAI, Pythonic, Qwen3XML
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.server import Identity, TeacherServer
from tests.tiny import qwen3, served_run

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs/quickstart.toml"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path / "cache"))


def test_the_quickstart_is_healthy(capsys, tmp_path):
    free = [f"run_dir={tmp_path / 'run'}"]
    found = diagnose(load_run_config(QUICKSTART, free))
    talk = {"chat template", "tool calls", "teacher template", "vocabulary", "scoring teacher"}
    machine = {"sandbox", "run directory", "disk", "ports", "memory"}
    assert {item.check for item in found} == talk | machine | {"certificate"}
    assert [item for item in found if item.level != "ok"] == []
    commands.doctor(QUICKSTART, free, plain=True)
    assert len(capsys.readouterr().out.strip().splitlines()) == len(found)


class Faulty:
    """The shipped teacher, with a fault in what it says of the tokens it is asked about."""

    name = "faulty"

    def __init__(self, fault):
        self.teacher = LocalTeacher("faulty", load_model("micro/teacher", "float32"))
        self.fault, self.asked, self.max_top_k = fault, 0, 0 if fault.startswith("bare") else 8

    async def score(self, episodes, top_k):
        self.asked += 1
        found = await self.teacher.score(episodes, top_k)
        return [self.spoilt(item, index) for index, item in enumerate(found)]

    def spoilt(self, found, index):
        logprobs, topk = found.teacher_logprobs, found.topk_logprobs
        if self.fault == "drifts":
            logprobs = logprobs + np.float32(0.05 * self.asked)
        if self.fault == "minds its neighbours":
            logprobs = logprobs - np.float32(index > 0)
        if self.fault.endswith("late"):
            logprobs = np.roll(logprobs, 1)
        if self.fault.endswith("early"):
            logprobs = np.roll(logprobs, -1)
        if self.fault == "top-K of another token":
            topk = None if topk is None else np.roll(topk, 1, axis=0)
        return replace(found, teacher_logprobs=logprobs, topk_logprobs=topk)

    async def aclose(self):
        pass


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("none", "each token in its place"),
        ("bare", "each token in its place"),
        ("drifts", "0.1 is the bound"),
        ("minds its neighbours", "among others within 1; 0.1 is the bound"),
        ("early", "evidence lies too early"),
        ("bare and early", "evidence lies too early"),
        ("late", "evidence lies too late"),
        ("bare and late", "evidence lies too late"),
        ("top-K of another token", "they lie on different tokens"),
    ],
)
def test_a_teacher_whose_evidence_cannot_be_trusted_is_refused(tmp_path, fault, told):
    identity = Identity("weights", vocabulary_hash(load_tokenizer("micro/student")))
    server = TeacherServer(Faulty(fault), identity)
    try:
        (found,) = served_teachers(served_run(tmp_path, "opd", server.base_url))
    finally:
        server.close()
    assert found.level == ("fail" if fault not in ("none", "bare") else "ok"), found
    assert "scores one sequence 8 times at once" in found.detail and told in found.detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_in_this_process_is_asked_too(dtype):
    (found,) = scoring_teachers(load_run_config(QUICKSTART, [f"teachers.default.dtype={dtype}"]))
    assert found.level == "ok" and "as a plain forward pass within" in found.detail, found


@pytest.mark.parametrize("by", [-1, 1])
def test_evidence_that_is_off_by_one_shows(by, monkeypatch):
    """The teacher reads hidden states of the position before, or after, the one that predicts a token."""

    def shifted(model, input_ids_BT, row_N, position_N):
        return hidden_states(model, input_ids_BT, row_N, (position_N + by).clamp(max=input_ids_BT.shape[1] - 1))

    monkeypatch.setattr("agentopd.teachers.local.hidden_states", shifted)
    (found,) = scoring_teachers(load_run_config(QUICKSTART))
    assert found.level == "fail" and ("different tokens" if by > 0 else "evidence lies too late") in found.detail


@pytest.mark.parametrize("codec", [HermesJSON(), Qwen3XML(), Pythonic(), OpenAI()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral"])
def test_families_of_templates(family, codec, chat_tokenizer):
    found = check_template(chat_tokenizer(family), codec)
    assert [item.level for item in found] == ["warn" if family == "mistral" else "ok", "ok"]
    assert ("no user turns" in found[0].detail) == (family == "mistral")


def test_a_template_that_rewrites_history_is_named(chat_tokenizer):
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(ConfigError, match="lacks the prefix property"):
        check_template(tokenizer, HermesJSON())


def test_what_cannot_succeed_exits_with_2(tmp_path, capsys):
    config = tmp_path / "mine.toml"
    config.write_text(
        f'[objective]\npreset = "grpo"\n[[suite.skills]]\nname = "mine"\n'
        f'env = "{ROOT}/examples/my_question.py:Backwards"\n'
    )
    with pytest.raises(SystemExit) as stopped:
        commands.doctor(config, ["model.student=./nowhere"], plain=True)
    assert stopped.value.code == 2
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("fail  chat template: ") and "no model at './nowhere'" in lines[0]
    assert any(line.startswith("fail  certificate: mine: not certified; run: agentopd envs validate") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["sandbox.backend=nonesuch"], "sandbox: unknown sandbox 'nonesuch'"),
        (
            ["sandbox.backend=docker", 'sandbox.hosts=["unix:///nowhere.sock"]'],
            "sandbox: no Docker engine at unix:///nowhere.sock",
        ),
        (["rollout.engine=vllm"], "packages: vLLM is not installed"),
        (["replay.policy=coreset"], "packages: replay.coreset.model "),
        (["decontamination.embedding_model=some/model"], "packages: decontamination.embedding_model "),
        (["tracking.wandb=true"], "trackers: tracking.wandb = true, but wandb is not installed"),
        (["tracking.tensorboard=true"], "trackers: tracking.tensorboard = true, but tensorboard is not installed"),
        (["tracking.trackio=true"], "trackers: tracking.trackio = true, but trackio is not installed"),
        (["run_dir=used"], "run directory: run directory 'used' already holds files"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_train_would_refuse_is_told_before(overrides, told, tmp_path, monkeypatch, capsys):
    for name in ("vllm", "sentence_transformers", "wandb", "trackio", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        commands.doctor(QUICKSTART, ["run_dir=free", *overrides], plain=True)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert line.startswith(f"fail  {told}")


def rubric(path, server, key="none"):
    endpoint = f'base_url = "{server.base_url}"\nmodel = "toy"\napi_key_env = "{key}"\nmax_retries = 0\n'
    path.write_text(
        f'run_dir = "{path.parent / "run"}"\n[objective]\npreset = "ropd"\n[teachers.default]\nkind = "chat"\n'
        f'{endpoint}[judge]\n{endpoint}[[suite.skills]]\nname = "store"\nenv = "tool_use"\n'
    )
    return [item for item in diagnose(load_run_config(path)) if item.check.startswith("chat endpoint")]


def test_chat_endpoints_are_asked(serve, honest_server, tmp_path, monkeypatch):
    path = tmp_path / "rubric.toml"
    assert [item.level for item in rubric(path, honest_server)] == ["ok", "ok"]
    (unset,) = rubric(path, honest_server, key="NO_SUCH_KEY")
    assert unset.level == "fail" and "set the environment variable 'NO_SUCH_KEY'" in unset.detail
    monkeypatch.setenv("MY_KEY", "stale")
    (stale,) = rubric(path, serve(lambda question, messages: (401, {"error": "no"})), key="MY_KEY")
    assert stale.level == "fail" and "answers 401" in stale.detail and "'MY_KEY'" in stale.detail
    (away,) = rubric(path, serve(lambda question, messages: (503, {"error": "down"})))
    assert away.level == "fail" and "503" in away.detail
    cut = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "I"}, "finish_reason": "length"}]}
    assert [item.level for item in rubric(path, serve(lambda question, messages: (200, cut)))] == ["ok", "ok"]


@pytest.mark.parametrize(("preset", "level"), [("simct_opd", "ok"), ("gold_opd", "ok"), ("opd", "fail")])
def test_only_an_objective_without_alignment_wants_the_students_tokens(preset, level, tmp_path, chat_tokenizer):
    chat_tokenizer("qwen3").save_pretrained(tmp_path / "teacher")
    qwen3(340, 0, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "across.toml"
    path.write_text(
        f'[teachers.default]\nmodel = "{tmp_path / "teacher"}"\n[objective]\npreset = "{preset}"\n'
        '[[suite.skills]]\nname = "store"\nenv = "tool_use"\n'
    )
    (found,) = [item for item in diagnose(load_run_config(path)) if item.check == "vocabulary"]
    assert found.level == level, found
    assert ("aligned with the student's by" in found.detail) == (level == "ok")


@pytest.fixture
def padded(tmp_path):
    """A folder with a random model that speaks the student's tokens, and has so many embedding rows beyond them."""

    def make(name, rows, **shape):
        tokenizer = load_tokenizer("micro/student")
        tokenizer.save_pretrained(tmp_path / name)
        qwen3(len(tokenizer) + rows, 0, **shape).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def lines(check, *overrides):
    return [item for item in diagnose(load_run_config(QUICKSTART, list(overrides))) if item.check == check]


def test_rows_that_pad_an_embedding_are_counted(padded):
    student, teacher = padded("student", 8), padded("teacher", 24)
    (both,) = lines("vocabulary", f"model.student={student}", f"teachers.default.model={teacher}")
    assert both.level == "ok"
    assert both.detail.endswith("rows without a token: 8 of the student's embedding, 24 of the teacher's embedding")
    (one,) = lines("vocabulary", f"teachers.default.model={teacher}")
    assert one.detail.endswith("rows without a token: 24 of the teacher's embedding")
    (none,) = lines("vocabulary")
    assert none.detail == "teacher 'default' has the student's 512 tokens"
    (few,) = lines("vocabulary", f"teachers.default.model={padded('few', -3)}")
    assert few.level == "fail" and "has 509 embeddings but its tokenizer 512 tokens" in few.detail


def test_a_student_alone_has_its_rows_counted(padded, tmp_path):
    path = tmp_path / "alone.toml"
    path.write_text('[objective]\npreset = "grpo"\n[[suite.skills]]\nname = "store"\nenv = "tool_use"\n')
    config = load_run_config(path, [f"model.student={padded('student', 8)}"])
    (found,) = [item for item in diagnose(config) if item.check == "vocabulary"]
    assert found.detail == "the student has 512 tokens; rows without a token: 8 of the student's embedding"


@pytest.fixture
def speaker(tmp_path):
    """A folder with a tokenizer that has the student's tokens and speaks otherwise, and a random model's config."""

    def make(name, template=lambda text: text, **special):
        tokenizer = load_tokenizer("micro/student")
        tokenizer.chat_template = template(tokenizer.chat_template)
        for key, value in special.items():
            setattr(tokenizer, key, value)
        tokenizer.save_pretrained(tmp_path / name)
        qwen3(len(tokenizer)).config.save_pretrained(tmp_path / name)
        return f"teachers.default.model={tmp_path / name}"

    return make


def test_a_teacher_that_ends_turns_otherwise_is_named(speaker):
    (alike,) = lines("teacher template")
    assert alike.level == "ok" and "ends turns in '<|im_end|>' and has the student's chat template" in alike.detail
    other = speaker("other", lambda text: text.replace("<|im_end|>", "<|endoftext|>"), eos_token="<|endoftext|>")
    (masked,) = lines("teacher template", other)
    assert masked.level == "warn"
    assert "ends turns in '<|endoftext|>', the student in '<|im_end|>'" in masked.detail
    assert "ends text in '<|endoftext|>', the student's tokenizer in '<|im_end|>'" in masked.detail
    assert (
        "objective.masks.special_tokens leaves both out" in masked.detail and "another chat template" in masked.detail
    )
    (open_,) = lines("teacher template", other, "objective.masks.special_tokens=false")
    assert "set objective.masks.special_tokens = true" in open_.detail
    (said,) = lines("teacher template", "teachers.default.end_of_turn=<|endoftext|>")
    assert said.level == "warn" and "ends turns in '<|endoftext|>'" in said.detail


@pytest.mark.parametrize(
    ("template", "told"),
    [(lambda text: text + "{# later #}", "another chat template than the student's"), (lambda text: None, "no chat")],
    ids=["other", "none"],
)
def test_a_teacher_of_another_template_is_named(speaker, template, told):
    (found,) = lines("teacher template", speaker("teacher", template))
    assert found.level == "warn" and told in found.detail and "special_tokens" not in found.detail


def test_what_does_not_fit_the_disk_cannot_succeed(tmp_path):
    (small,) = lines("disk", f"run_dir={tmp_path / 'run'}", "train.checkpoint_every=10")
    assert small.level == "ok" and "3 checkpoints of " in small.detail and "GiB" in small.detail
    giant = tmp_path / "giant"
    load_tokenizer("micro/student").save_pretrained(giant)
    shape = {"hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 400, "num_attention_heads": 512}
    Qwen3Config(vocab_size=512, head_dim=128, num_key_value_heads=8, **shape).save_pretrained(giant)
    found = {item.check: item for item in disk(load_run_config(QUICKSTART, [f"model.student={giant}"]))}
    assert found["disk"].level == "fail" and "which cannot fit" in found["disk"].detail


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["train.checkpoint_every=none"], "1 checkpoint of"),
        (["train.steps=30", "train.checkpoint_every=25"], "2 checkpoints of"),
        (["train.keep_checkpoints=4", "train.checkpoint_every=1"], "5 checkpoints of"),
        (["guard.enabled=true", "train.eval_every=10", "suite.retention.tolerated_drop=0.02"], "4 checkpoints of"),
        (["rollout.engine=vllm_servers"], "3 of the student's weights for vLLM"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_everything_large_is_counted(overrides, kept):
    (found,) = disk(load_run_config(QUICKSTART, overrides))
    assert kept in found.detail


def test_what_nearly_fills_the_disk_is_tight():
    assert [fit(needed, 100) for needed in (80, 81, 100, 101)] == ["ok", "warn", "warn", "fail"]


@pytest.fixture
def port():
    """One that is bound: nobody else gets it, and nobody answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def of_ports(*overrides):
    (found,) = ports(load_run_config(QUICKSTART, list(overrides)))
    return found.level, found.detail


def test_addresses_that_nobody_answers_at_are_named(port, honest_server):
    assert of_ports() == ("ok", "none is listened on, and no address is gone to")
    engine = "rollout.engine=vllm_servers"
    level, detail = of_ports(engine, f'rollout.servers.urls=["http://127.0.0.1:{port}"]')
    assert level == "fail" and f"rollout.servers.urls http://127.0.0.1:{port} takes no connection" in detail
    there = honest_server.base_url.removesuffix("/v1")
    level, detail = of_ports(engine, f'rollout.servers.urls=["{there}"]', "rollout.servers.replicas=2")
    assert level == "ok" and f"{there} takes connections; 2 local ports" in detail
    served = [f'teachers.default={{ kind = "served", base_url = "http://127.0.0.1:{port}" }}']
    level, detail = of_ports(*served)
    assert level == "fail" and f"teachers.default.base_url http://127.0.0.1:{port} takes no connection" in detail


@pytest.mark.parametrize(
    ("changes", "level", "told"),
    [
        ({}, "fail", "cannot be listened on"),
        ({"RANK": "1"}, "ok", "the ranks meet at 127.0.0.1:"),
        ({"RANK": "1", "MASTER_ADDR": "nowhere.invalid"}, "fail", "is no known host"),
        ({"MASTER_PORT": ""}, "fail", "set both, or use torchrun"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "fail", "takes no connection"),
    ],
    ids=["taken", "another rank", "no host", "no port", "no agent"],
)
def test_where_ranks_meet_is_looked_at(changes, level, told, port, monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for key, value in {**launched, **changes}.items():
        monkeypatch.setenv(key, value)
    found = of_ports()
    assert found[0] == level and told in found[1]


def estimated(*overrides):
    """The level, the line, and the figure of each part in GiB."""
    (found,) = memory(
        load_run_config(QUICKSTART, ["model.dtype=float32", "teachers.default.dtype=float32", *overrides])
    )
    figures = re.findall(r"([a-z ]+?) ([\d.,]+(?:e-\d+)?)(?:, | for each|\))", found.detail.split("(", 1)[1])
    return found.level, found.detail, {name.strip(): float(size.replace(",", "")) for name, size in figures}


WEIGHTS = 4 * 1_722_432 / 2**30


def test_every_part_of_the_memory_is_counted():
    level, detail, parts = estimated()
    assert level == "ok" and " free" in detail
    assert set(parts) == {"learner", "teachers", "sampler", "activations and output head", "evidence of a step"}
    assert parts["learner"] == pytest.approx(4 * WEIGHTS, rel=0.05)
    assert parts["teachers"] == pytest.approx(2 * WEIGHTS, rel=0.05)  # the teacher and the frozen start
    alone = estimated("eval.start_kl=false", "replay.share=0")[2]
    assert alone["teachers"] == pytest.approx(WEIGHTS, rel=0.05)
    vllm = estimated("rollout.engine=vllm", "rollout.vllm.kv_cache_gb=3")[2]
    assert vllm["sampler"] == pytest.approx(3 + WEIGHTS, rel=0.05)
    checkpointed = estimated("learner.activation_checkpointing=true")[2]
    assert checkpointed["activations and output head"] < parts["activations and output head"]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_an_adapted_student_counts_in_its_own_dtype(dtype, size):
    learner = estimated("model.lora.rank=1", f"model.dtype={dtype}")[2]["learner"]
    assert size / 4 * WEIGHTS < learner < size / 4 * WEIGHTS + 0.1 * WEIGHTS


def test_ranks_share_the_machine_and_what_zero_splits(monkeypatch):
    whole = estimated("learner.zero_stage=2")[2]["learner"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    _, detail, parts = estimated("learner.zero_stage=2")
    assert "for each of 2 ranks" in detail and parts["learner"] == pytest.approx(whole * (1 + 4 / 4) / 5, rel=0.1)
    assert float(detail.split()[0]) == pytest.approx(2 * sum(parts.values()), rel=0.05)


def test_what_does_not_fit_the_memory_cannot_succeed(monkeypatch):
    needed = float(estimated()[1].split()[0]) * 2**30
    for share, level, told in ((0.5, "ok", "free"), (0.9, "warn", "(tight)"), (1.1, "fail", "which cannot fit")):
        monkeypatch.setattr("agentopd.doctor.machine.available_bytes", lambda share=share: needed / share)
        found = estimated()
        assert found[0] == level and found[1].endswith(told)


def test_what_a_container_may_take_is_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("agentopd.models._CGROUP", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    whole = available_bytes()
    for name, text in {"memory.max": "9000", "memory.current": "5000", "memory.stat": "inactive_file 200"}.items():
        (tmp_path / name).write_text(text)
    assert available_bytes() == 4200 < whole
    (tmp_path / "memory.max").write_text("max")
    assert available_bytes() > 4200


def test_a_model_that_the_formulas_do_not_know_is_no_failure(tmp_path):
    load_tokenizer("micro/student").save_pretrained(tmp_path)
    GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    for check in ("disk", "memory"):
        (found,) = lines(check, f"model.student={tmp_path}", "run_dir=runs/none")
        assert found.level == "warn" and "has no 'intermediate_size'" in found.detail


def test_a_teacher_that_cannot_be_loaded_is_not_asked(monkeypatch):
    monkeypatch.setattr("agentopd.doctor.teachers.available_bytes", lambda: 1000)
    (found,) = scoring_teachers(load_run_config(QUICKSTART))
    assert found.level == "fail" and "is not asked: its weights take" in found.detail
