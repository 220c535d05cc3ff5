"""``agentopd serve``: a teacher for runs on other machines."""

from __future__ import annotations

from typing import Literal

from agentopd.contracts import Teacher
from agentopd.errors import ConfigError
from agentopd.models import load_model, load_tokenizer, model_hash, vocabulary_hash
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.server import Identity, TeacherServer
from agentopd.teachers.vllm import Limits, start_vllm_teacher


def serve_teacher(
    model: str, kind: Literal["hf", "vllm"], dtype: str, host: str, port: int, limits: Limits | None = None
) -> TeacherServer:
    """Load ``model`` and serve it. ``limits`` are vLLM's; ``hf`` has none.

    Raises ``ConfigError`` for a model that cannot be loaded or an address that cannot be had, and without vLLM.
    """
    tokenizer = load_tokenizer(model)
    teacher: Teacher
    if kind == "vllm":
        teacher = start_vllm_teacher(model, model, dtype, len(tokenizer), limits)
    else:
        teacher = LocalTeacher(model, load_model(model, dtype), vocab_size=len(tokenizer))
    try:
        return TeacherServer(teacher, Identity(model_hash(model), vocabulary_hash(tokenizer)), host, port)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"cannot listen on {host}:{port} ({exc}): choose another --host or --port") from None
