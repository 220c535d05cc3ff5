"""A teacher in vLLM, and behind HTTP, against a local one on the same weights in fp32."""

import asyncio
import multiprocessing
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agentopd.build import build_policy
from agentopd.config.run import RolloutConfig
from agentopd.config.teachers import ServedTeacherConfig
from agentopd.contracts import Teacher
from agentopd.doctor import self_disagreement
from agentopd.engines.background import BackgroundLoop
from agentopd.engines.vllm_process import BlockingLLM
from agentopd.errors import ConfigError, QuestionError, TeacherError
from agentopd.models import load_model, vocabulary_hash
from agentopd.rollout import EpisodeSpec, run_episodes
from agentopd.serving import serve_teacher
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.served import Needs, ServedTeacher
from agentopd.teachers.vllm import Limits, VLLMCandidateTeacher, start_vllm_teacher
from agentopd_envs.micro import store
from agentopd_envs.tool_use import ToolUseEnvironment
from tests.tiny import episode, qwen3

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]


def test_a_vllm_teacher_behind_http_scores_as_a_local_one():
    student = build_policy("micro/student", "float32", RolloutConfig())
    tasks = islice(store.tasks("train", None, 0), 4)
    specs = [EpisodeSpec(task, ToolUseEnvironment, f"e{i}", seed=i) for i, task in enumerate(tasks)]
    episodes = asyncio.run(run_episodes(specs, student.engine, student.renderer))
    local = LocalTeacher("near", load_model("micro/teacher", "float32"))
    server = serve_teacher("micro/teacher", "vllm", "float32", host="127.0.0.1", port=0, limits=Limits(max_top_k=16))
    try:
        needs = Needs(vocabulary_hash(student.tokenizer), len(student.tokenizer))
        far_config = ServedTeacherConfig(base_url=server.base_url)
        far = ServedTeacher("far", far_config, needs)
        assert isinstance(far, Teacher) and far.max_top_k == 16
        for top_k in (16, 0):
            near = asyncio.run(local.score(episodes, top_k))
            for one, other in zip(near, asyncio.run(far.score(episodes, top_k)), strict=True):
                np.testing.assert_allclose(other.teacher_logprobs, one.teacher_logprobs, atol=1e-4)
                if top_k:
                    np.testing.assert_allclose(other.topk_logprobs, one.topk_logprobs, atol=0.01)
                    assert (other.topk_ids == one.topk_ids).mean() > 0.99
        assert asyncio.run(self_disagreement(far, len(student.tokenizer))) < 1e-4
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, len(student.tokenizer), (item.num_sampled, 5)) for item in episodes]
        if isinstance(server.teacher, VLLMCandidateTeacher):  # on a GPU
            for a, b in zip(*(asyncio.run(x.score_ids(episodes, ids)) for x in (local, far)), strict=True):
                np.testing.assert_allclose(a, b, atol=0.01, rtol=1e-3)
        else:
            with pytest.raises(ConfigError, match=r"cannot score ids that it did not choose, .* model runner V2"):
                ServedTeacher("far", far_config, replace(needs, student_top_k=5))
        for child in multiprocessing.active_children():
            child.kill()
        dying = far_config.model_copy(update={"outage_s": 0.0})
        with pytest.raises(TeacherError, match=r"was away for \d+ s: 503 TeacherEndedError"):
            asyncio.run(ServedTeacher("far", dying, needs).score(episodes[:1], 0))
        server.wait()
        assert "EngineDeadError" in server.ended
    finally:
        server.close()


def test_a_padded_vllm_teacher_gives_no_id_of_its_padding():
    """The ids from the median of its own top-8 upwards are declared padding."""
    whole = LocalTeacher("near", load_model("micro/teacher", "float32"))
    episodes = [episode(seed) for seed in range(3)] + [episode(7, sizes=(54,))]
    assert len(episodes[-1].token_ids) - 2 == 64
    near = asyncio.run(whole.score(episodes, 8))
    vocab_size = int(np.median(np.concatenate([found.topk_ids for found in near])))
    teacher = start_vllm_teacher(
        "padded", "micro/teacher", "float32", vocab_size, Limits(max_top_k=8, max_context=64, kv_cache_gb=0.125)
    )
    try:
        found = asyncio.run(teacher.score(episodes, 8))
        with pytest.raises(
            TeacherError, match="takes episodes of 64 tokens, and one has 83: serve it with --max-context 83"
        ):
            asyncio.run(teacher.score([episode(0, sizes=(80,))], 8))
    finally:
        asyncio.run(teacher.aclose())
    assert any(np.isneginf(item.topk_logprobs).any() for item in found)
    for item, other, asked in zip(found, near, episodes, strict=True):
        padding = np.isneginf(item.topk_logprobs)
        assert (item.topk_ids < vocab_size).all() and not item.topk_ids[padding].any()
        np.testing.assert_allclose(item.topk_logprobs[~padding], other.topk_logprobs[~padding], atol=1e-3)
        sampled = np.array(asked.token_ids)[np.flatnonzero(asked.loss_mask)]
        assert (np.isneginf(item.teacher_logprobs) == (sampled >= vocab_size)).all()


def test_a_cache_too_small_for_the_context_is_told_by_the_options_that_set_them():
    """One full-length request of the micro teacher takes more than 1 MiB of keys and values."""
    with pytest.raises(
        ConfigError, match=r"one request of 1,024 tokens .*--kv-cache-gb gives .* or lower --max-context"
    ):
        start_vllm_teacher("small", "micro/teacher", "float32", 300, Limits(kv_cache_gb=2**-10))


class V2:
    """What vLLM's model runner V2, which a CPU lacks, makes of a prompt by the words of ``SamplingParams``.

    Row i holds the log-probs of its ids as predictions of prompt token ``prompt_logprob_start`` + i + 1, -inf for -1.
    """

    errored = False

    def __init__(self, model):
        self.model = model
        sizes = SimpleNamespace(max_model_len=512, get_vocab_size=lambda: model.config.vocab_size)
        self.vllm_config = SimpleNamespace(model_config=sizes)

    async def generate(self, prompt, params, request_id):
        ids, start, rows = prompt["prompt_token_ids"], params.prompt_logprob_start, params.prompt_logprob_token_ids
        assert len(rows) == len(ids) - 1 - start
        with torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        picked = np.take_along_axis(logprobs[start : len(ids) - 1], np.maximum(rows, 0), axis=1)
        yield SimpleNamespace(prompt_token_id_logprobs=np.where(rows < 0, -np.inf, picked))


def test_given_ids_are_asked_of_vllm_in_its_rows():
    model = qwen3(64, initializer_range=0.3).requires_grad_(False)
    loop = BackgroundLoop("v2")
    far = VLLMCandidateTeacher("far", BlockingLLM(V2(model), loop, 60), vocab_size=60, max_top_k=8)
    episodes = [*(episode(seed) for seed in range(3)), episode(5, sizes=())]
    ids = [np.random.default_rng(i).integers(0, 64, (item.num_sampled, 5)) for i, item in enumerate(episodes)]
    near = asyncio.run(LocalTeacher("near", model).score_ids(episodes, ids))
    try:
        for asked, a, b in zip(ids, near, asyncio.run(far.score_ids(episodes, ids)), strict=True):
            np.testing.assert_allclose(b, np.where(asked < 60, a, -np.inf), atol=1e-5)
        with pytest.raises(QuestionError, match="at most 8 ids a token, and 9 were asked for"):
            asyncio.run(far.score_ids(episodes[:1], [np.zeros((7, 9), np.int64)]))
    finally:
        loop.close()
