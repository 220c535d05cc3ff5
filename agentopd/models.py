"""Finding, loading and comparing models and tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

from agentopd.attention import ATTENTION
from agentopd.errors import ConfigError

SHIPPED = ("micro/student", "micro/teacher")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CGROUP = Path("/sys/fs/cgroup")
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16")


def resolve_model(name: str) -> str:
    """A model name as something ``from_pretrained`` takes: shipped alias, local directory, or hub id.

    Raises ``ConfigError`` for a path that is not there or is a run's, and for a shipped alias that is misspelt.
    """
    if name in SHIPPED:
        path = Path(str(files("agentopd"))) / "assets" / name
        if not path.is_dir():
            raise ConfigError(f"the shipped model {name!r} is missing; build it with: agentopd micro build")
        return str(path)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file() and (Path(name) / "model/config.json").is_file():
            raise ConfigError(f"{name!r} is a run: its student is {str(Path(name) / 'model')!r}")
        return name
    if close := get_close_matches(name, SHIPPED, n=1, cutoff=0.85):
        raise ConfigError(f"no model at {name!r}: did you mean {close[0]!r}?")
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ConfigError(f"no model at {name!r}: give a directory, a hub id, or one of {', '.join(SHIPPED)}")
    return name


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a model. Raises ``ConfigError`` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model {name!r}: its tokenizer cannot be loaded: {_first_line(exc)}") from None


def load_model(name: str, dtype: str) -> Any:
    """A causal language model in evaluation mode. Raises ``ConfigError`` when it cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name), dtype=_DTYPES[settle_dtype(dtype)], attn_implementation=ATTENTION
        )
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model {name!r} cannot be loaded: {_first_line(exc)}") from None
    return model.eval().to(default_device())


def load_shape(name: str) -> Any:
    """The config of a causal language model, without its weights. Raises ``ConfigError``."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(name)).get_text_config()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model {name!r} cannot be loaded: {_first_line(exc)}") from None


def settle_dtype(name: str) -> str:
    """The dtype a config means here: ``auto`` is bfloat16 wherever the hardware computes in it, else float32.

    A CPU without bfloat16 instructions emulates them, several times slower than float32.
    """
    if name != "auto":
        return name
    native = default_device().type != "cpu" or any(_cpu_capabilities().get(key) for key in _CPU_BFLOAT16)
    return "bfloat16" if native else "float32"


def _cpu_capabilities() -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def default_device() -> torch.device:
    """The accelerator of this rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def take_device() -> None:
    """Make the accelerator of this rank the one that libraries use by default, which otherwise is the first."""
    if torch.cuda.is_available():
        torch.cuda.set_device(default_device())


def available_bytes() -> int:
    """What is free now: of this rank's accelerator where there is one, else of the machine and of this container."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(default_device())[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files that nobody reads are given back before the limit is felt.
        return min(free, int(limit) - int(used) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no limit, or none that is told
        return free


def check_same_vocabulary(student: Any, teacher: Any, teacher_name: str) -> None:
    """Token ids must mean the same to both, or scoring the student's ids with the teacher is nonsense.

    Compared by content, not by size, so padded embedding rows do not matter. Raises ``ConfigError`` naming the first
    id that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    by_id = {index: token for token, index in theirs.items()}
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if by_id.get(index) != token:
            raise ConfigError(
                f"teacher {teacher_name!r} and the student disagree on token id {index}: {token!r} for the student, "
                f"{by_id.get(index)!r} for the teacher; choose a teacher with the student's tokenizer"
            )
    raise ConfigError(
        f"teacher {teacher_name!r} has {len(theirs) - len(ours)} tokens that the student lacks; "
        "choose a teacher with the student's tokenizer"
    )


def model_hash(name: str) -> str:
    """Digest of a model directory's weights, or the name itself for a hub id (for provenance)."""
    path = Path(resolve_model(name))
    if not path.is_dir():
        return name
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def vocabulary_hash(tokenizer: Any) -> str:
    """Digest of what a tokenizer's ids mean."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Digest of what a tokenizer's ids mean and of its chat template."""
    body = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
