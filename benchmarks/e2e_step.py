"""A whole step of on-policy distillation against TRL's ``DistillationTrainer``: completion tokens per CPU second.

Both sides start from the micro student and learn from the same teacher, the micro student with noise on its weights, on
the same prompts with the same limits, one completion a prompt. A step is sampling, the teacher's forward pass, the
reverse KL over the whole vocabulary, backward pass and AdamW. TRL runs in a process of its own that waits while the
other works; rounds alternate, and each gives one ratio. ``topk_*`` is ours with the teacher's top 64 in the place of
whole distributions.

Both compute in the precision of ``dtype = "auto"``: bfloat16 where the hardware does, which is TRL's default everywhere
(ours with float32 master weights, TRL's student under its autocast, both teachers bfloat16). ``*_fp32`` has everything
in float32 on both sides. ``vs_trl_vllm`` has TRL generate with vLLM; null where that cannot run, with the reason
printed.

``python -m benchmarks.e2e_step [--prompts 32] [--new 128] [--rounds 5]``
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from agentopd.batching import build_batch
from agentopd.build import build_policy
from agentopd.config.load import resolve_objective
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.run import LearnerConfig, RolloutConfig
from agentopd.contracts import Generation, GenerationRequest, SamplingParams, ScoredEpisode
from agentopd.engines import HFEngine
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.memory import keep_freed_memory
from agentopd.models import load_model, load_tokenizer, settle_dtype
from agentopd.objective.masks import ClassifyTokens
from agentopd.teachers.local import LocalTeacher
from agentopd.types import Episode, StopReason, Turn, Verdict, VerdictStatus
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_envs.math import MathEnvironment
from agentopd_envs.micro import math, repair, store
from agentopd_envs.tool_use import ToolUseEnvironment
from benchmarks.harness import Ratio, ratio, report

SKILLS = (
    (math.tasks, MathEnvironment),
    (repair.tasks, CodeRepairEnvironment),
    (store.tasks, ToolUseEnvironment),
)
UNJUDGED = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
LR, TOP_K = 1e-5, 64
WHOLE: dict[str, Any] = {"divergence": {"kind": "full_rkl"}}
TOP: dict[str, Any] = {"divergence": {"kind": "topk_rkl", "top_k": TOP_K, "tail": "bucket"}}


@dataclass(frozen=True)
class Speech:
    """How answers are sampled and read, and by which clock."""

    params: SamplingParams
    classify: ClassifyTokens
    pad_id: int
    now: Callable[[], float] = time.process_time


class Ours:
    """AgentOPD's engine, teacher and learner, without environments and judges, of which TRL has none here."""

    def __init__(
        self, student: Any, teacher: Any, prompts: Sequence[tuple[int, ...]], speech: Speech, whole: bool
    ) -> None:
        self.engine, self._prompts, self._speech, self._step = HFEngine(student), prompts, speech, 0
        self._teacher = LocalTeacher("teacher", teacher, keep_hidden=whole)
        bounds = resolve_objective("topk_opd").model_dump()
        self._objective = ObjectiveConfig.model_validate({**bounds, **(WHOLE if whole else TOP)})
        heads = {"teacher": self._teacher.head} if whole else {}
        self._learner = DeepSpeedLearner(student, LearnerConfig(lr=LR, warmup_steps=0), self._objective, 1000, heads)
        self.spent = dict.fromkeys(("rollout", "teacher", "learner"), 0.0)
        """Seconds of each part so far, by the clock of ``speech``."""

    def step(self, size: int) -> tuple[float, int]:
        """Seconds and completion tokens of the next ``size`` prompts."""
        now = self._speech.now
        started = now()
        first = self._step * size
        asked = [
            GenerationRequest(self._prompts[n % len(self._prompts)], self._speech.params, n)
            for n in range(first, first + size)
        ]
        episodes = [played(request, made) for request, made in zip(asked, self.engine.generate_now(asked), strict=True)]
        self.engine.sleep()
        sampled = now()
        evidence = asyncio.run(self._teacher.score(episodes, self._objective.top_k))
        answered = now()
        scored = [ScoredEpisode(episode, UNJUDGED, found) for episode, found in zip(episodes, evidence, strict=True)]
        batch = build_batch(scored, self._objective, {"e2e": 1.0}, self._speech.classify, self._speech.pad_id)
        self._learner.step(batch)
        self._step += 1
        self.engine.sync_weights(self._step)
        ended = now()
        for part, seconds in zip(self.spent, (sampled - started, answered - sampled, ended - answered), strict=True):
            self.spent[part] += seconds
        return ended - started, sum(episode.num_sampled for episode in episodes)


def played(request: GenerationRequest, made: Generation) -> Episode:
    """One turn as an episode."""
    return Episode(
        id=str(request.seed),
        task_id=str(request.seed),
        task_hash=str(request.seed),
        env="e2e",
        split="train",
        skill="e2e",
        prompt_ids=tuple(request.token_ids),
        turns=(Turn(token_ids=made.token_ids, rollout_logprobs=made.logprobs),),
        stop_reason=StopReason.COMPLETED if made.finish_reason == "stop" else StopReason.MAX_TOKENS,
    )


def from_disk(model: str, teacher: str, prompts: Sequence[tuple[int, ...]], new: int, dtype: str, whole: bool) -> Ours:
    """Ours with models and tokenizer of two directories."""
    policy = build_policy(model, dtype, RolloutConfig())
    params = SamplingParams(max_tokens=new, stop_ids=policy.renderer.end_of_turn_ids)
    speech = Speech(params, policy.classify(), policy.pad_id)
    return Ours(policy.model, load_model(teacher, dtype), prompts, speech, whole)


def push_through_files() -> None:
    """Have TRL give vLLM its weights through files.

    Its own way writes into parameters that vLLM's CPU backend has repacked, and ends with an error there.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    def sync_weights(self: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.reset_prefix_cache()

    VLLMGeneration.sync_weights = sync_weights


def trl_process(
    pipe: Connection, model: str, teacher: str, prompts: Sequence[str], size: int, dtype: str, settings: dict[str, Any]
) -> None:
    """TRL's trainer: a step for every message on ``pipe``, answered by (CPU seconds, completion tokens)."""
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ.pop("LOCAL_RANK", None)  # the learner's, of which this process is no rank
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    if settings["use_vllm"]:
        push_through_files()

    class Turns(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_step_begin(self, *args: Any, **known: Any) -> None:
            pipe.recv()
            self.started = time.process_time()

        def on_step_end(self, *args: Any, **known: Any) -> None:
            taken = time.process_time() - self.started
            mean = trainer._metrics["train"]["completions/mean_length"][-1]
            pipe.send((taken, round(mean * size)))

    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            folder, per_device_train_batch_size=size, max_steps=10_000, learning_rate=LR, beta=1.0, use_cpu=True,
            bf16=dtype == "bfloat16", gradient_checkpointing=False, logging_steps=10_000, save_strategy="no",
            report_to=[], lr_scheduler_type="constant", disable_tqdm=True, shuffle_dataset=False, **settings,
        )  # fmt: skip
        trainer = DistillationTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype),
            config,
            Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=load_tokenizer(model),
            callbacks=[Turns()],
        )
        trainer.train()


class TRL:
    """The trainer in its process."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=trl_process, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def step(self, size: int) -> tuple[float, int]:
        """CPU seconds and completion tokens of its next step, of the ``size`` prompts it was made for."""
        self._pipe.send("go")
        found: tuple[float, int] = self._pipe.recv()
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def missing(*packages: str) -> str:
    """Why a peer cannot run, or nothing; says which versions run."""
    for package in packages:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            return f"{package} is not installed"
    return ""


def prepared(folder: Path, number: int) -> tuple[str, str, list[tuple[int, ...]], list[str]]:
    """The student, the teacher, and the prompts as ids and as the text that TRL's tokenizer makes the same ids of."""
    policy = build_policy("micro/student", "float32", RolloutConfig())
    each = [
        [policy.renderer.open(task.prompt, env.tool_schemas(task)) for task in islice(tasks("train", None, 0), number)]
        for tasks, env in SKILLS
    ]
    ids = [tuple(prompt) for together in zip(*each, strict=True) for prompt in together][:number]
    texts = [policy.tokenizer.decode(prompt) for prompt in ids]
    assert [tuple(found) for found in policy.tokenizer(text=texts)["input_ids"]] == ids
    names = str(folder / "student"), str(folder / "teacher")
    policy.tokenizer.save_pretrained(names[0])
    policy.model.save_pretrained(names[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0.0
    policy.tokenizer.save_pretrained(names[1])
    policy.model.save_pretrained(names[1])
    return *names, ids, texts


Step = Callable[[int], tuple[float, int]]


def rounds(sides: dict[str, Step], size: int, number: int) -> dict[str, list[float]]:
    """CPU seconds a completion token of every side, round by round, after one that does not count.

    A side whose process ends is left out.
    """
    costs: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(number + 1):
        for name in list(costs):
            try:
                seconds, tokens = sides[name](size)
            except EOFError:
                del costs[name]
                continue
            if index:
                costs[name].append(seconds / tokens)
    return costs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32, help="Prompts a step.")
    parser.add_argument("--new", type=int, default=128, help="Tokens of a completion at most.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(1)
    engine = next(iter(packages_distributions().get("vllm", ["vllm"])))
    dtypes = {"": settle_dtype("auto"), "_fp32": "float32"}
    without = {"trl_hf": missing("trl"), "trl_hf_fp32": missing("trl"), "trl_vllm": missing("trl", engine)}
    with tempfile.TemporaryDirectory() as folder:
        student, teacher, ids, texts = prepared(Path(folder), options.prompts * (options.rounds + 1))
        ours: dict[str, Any] = {
            f"{kind}{ending}": from_disk(student, teacher, ids, options.new, dtype, kind == "whole")
            for ending, dtype in dtypes.items()
            for kind in ("whole", "topk")
        }
        peers: dict[str, TRL] = {}
        try:
            for name in (name for name, reason in without.items() if not reason):
                settings = {"max_completion_length": options.new, "use_vllm": name == "trl_vllm"}
                dtype = dtypes["_fp32" if name.endswith("_fp32") else ""]
                peers[name] = TRL(student, teacher, texts, options.prompts, dtype, settings)
            sides: dict[str, Step] = {name: side.step for name, side in {**ours, **peers}.items()}
            costs = rounds(sides, options.prompts, options.rounds)
        finally:
            for peer in peers.values():
                peer.close()
    without |= dict.fromkeys(peers.keys() - costs.keys(), "its process ended with the error above")
    ratios: dict[str, Ratio] = {}
    nothing: dict[str, Any] = {}
    for name, reason in without.items():
        if reason:
            print(f"{name}: skipped, {reason}")
            nothing[f"vs_{name}"] = None
            continue
        ending = "_fp32" if name.endswith("_fp32") else ""
        ratios[f"vs_{name}"] = ratio(f"step vs {name}", costs[f"whole{ending}"], costs[name])
        ratios[f"topk_vs_{name}"] = ratio(f"step with top {TOP_K} vs {name}", costs[f"topk{ending}"], costs[name])
    medians = {f"tokens_per_cpu_s_{name}": round(1 / statistics.median(found), 1) for name, found in costs.items()}
    print(f"dtype auto is {dtypes['']} here")
    report(ratios, **nothing, **medians)


if __name__ == "__main__":
    main()
