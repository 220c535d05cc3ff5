"""Micro checkpoints from nothing: tokenizer, then supervised stages on gold trajectories, then a provenance file.

Deterministic under the recipe's seed and resumable: a build that was stopped continues from its newest checkpoint and
ends with the same weights.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from agentopd.batching import build_batch
from agentopd.build import Judge, Policy, Skill, build_sandbox, load_skills
from agentopd.checkpoint import list_checkpoints, load_latest, save_checkpoint
from agentopd.config.load import load_section, resolve_objective
from agentopd.config.micro import MicroRecipe, StageRecipe
from agentopd.config.run import ReplayConfig, SandboxConfig
from agentopd.console import eval_table, progress
from agentopd.contracts import ScoredEpisode
from agentopd.engines import HFEngine
from agentopd.errors import AgentOPDError
from agentopd.evaluate import evaluate_model, heldout_tasks, stable_seed, summarise
from agentopd.evaluation.metrics import EvalResult
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.mixture import Mixture, TaskStream
from agentopd.rendering import ChatRenderer, HermesJSON, assistant_text
from agentopd.rendering.micro_template import MICRO_CHAT_TEMPLATE
from agentopd.rollout import EpisodeSpec, run_scripted
from agentopd.tracking import Session, write_atomic
from agentopd.types import Task, Verdict, VerdictStatus, content_hash

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
_PIECES = r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
"""Digits stand alone, so that arithmetic is done digit by digit; words keep their leading space."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> MicroRecipe:
    """Read a recipe. Raises ``ConfigError``."""
    return load_section(MicroRecipe, path, overrides)


def build(recipe: MicroRecipe, console: Console) -> list[EvalResult]:
    """Run every stage; returns the evaluation of each. Raises ``AgentOPDError`` where a stage misses its band."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    logging.disable_progress_bar()
    skills = load_skills(recipe.suite)
    out, work = Path(recipe.out), Path(recipe.work_dir)
    tokenizer = _tokenizer(recipe, skills, work / "tokenizer")
    torch.manual_seed(recipe.seed)
    model = _model(recipe, tokenizer).to(torch.bfloat16)
    results = []
    for stage in recipe.stages:
        result = asyncio.run(_run_stage(recipe, stage, _policy(model, tokenizer), skills, console))
        results.append(result)
        console.print(f"stage {stage.name}")
        console.print(eval_table(result))
        _check_bands(stage, result)
        if stage.export:
            model.save_pretrained(out / stage.name)
            tokenizer.save_pretrained(out / stage.name)
    write_atomic(out / "provenance.json", json.dumps(_provenance(recipe, skills, results), indent=2) + "\n")
    return results


async def _run_stage(
    recipe: MicroRecipe, stage: StageRecipe, policy: Policy, skills: dict[str, Skill], console: Console
) -> EvalResult:
    root = Path(recipe.work_dir) / stage.name
    objective = resolve_objective("sft")
    learner = DeepSpeedLearner(policy.model, stage.learner, objective, stage.steps)
    mixture = _mixture(recipe, stage, skills)
    done = 0
    if list_checkpoints(root):
        done, state = load_latest(root, learner)
        mixture.restore(state)
    with progress(console, stage.name, stage.steps) as advance:
        advance(done)
        for step in range(done, stage.steps):
            drawn = mixture.draw(stage.batch_size)
            scored = [await _gold(skills[item.skill], item.task, policy) for item in drawn]
            batch = build_batch(scored, objective, mixture.shares(), policy.classify(), policy.pad_id)
            metrics = learner.step(batch)
            advance(1, note=f"loss {metrics['loss/total']:.4f}")
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == stage.steps:
                save_checkpoint(root, step + 1, learner, mixture.state(), keep=1)
    result = await _evaluate(recipe, stage, policy, skills)
    learner.close()
    return result


async def _gold(skill: Skill, task: Task, policy: Policy) -> ScoredEpisode:
    """A gold trajectory as an episode; its tokens are those a student would have to sample."""
    spec = EpisodeSpec(task=task, env_cls=skill.env, id=task.id, skill=skill.name, seed=task.seed)
    turns = skill.env.gold_turns(task)  # type: ignore[attr-defined]
    episode = await run_scripted(spec, turns, policy.codec, policy.renderer)
    return ScoredEpisode(episode, Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0, detail="gold"))


async def _evaluate(recipe: MicroRecipe, stage: StageRecipe, policy: Policy, skills: dict[str, Skill]) -> EvalResult:
    judge = Judge(skills.values(), build_sandbox(SandboxConfig(), skills.values()))
    tasks = heldout_tasks(skills.values(), recipe.eval.tasks_per_skill, recipe.eval.seed)
    try:
        judged = await evaluate_model(policy, skills, tasks, judge, recipe.eval)
    finally:
        await judge.sandbox.aclose()
        await policy.engine.aclose()
    return summarise(judged, stage.name, recipe.eval.k, seed=recipe.eval.seed)


def _mixture(recipe: MicroRecipe, stage: StageRecipe, skills: dict[str, Skill]) -> Mixture:
    """Skills by the stage's shares; every stage draws its own stretch of the task stream."""
    configs = [
        skills[name].config.model_copy(update={"role": "new", "weight": share}) for name, share in stage.mix.items()
    ]
    seed = stable_seed("micro", recipe.seed, stage.name) % 2**31
    streams = {config.name: TaskStream(skills[config.name].env, config, seed) for config in configs}
    return Mixture(streams, configs, ReplayConfig(share=0.0))


def _policy(model: Any, tokenizer: Any) -> Policy:
    codec = HermesJSON()
    return Policy(model, tokenizer, codec, ChatRenderer(tokenizer, codec), HFEngine(model))


def _model(recipe: MicroRecipe, tokenizer: Any) -> Any:
    shape = recipe.architecture
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=recipe.tokenizer.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.hidden_size // shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.max_context,
            rope_theta=shape.rope_theta,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _tokenizer(recipe: MicroRecipe, skills: dict[str, Skill], cache: Path) -> Any:
    """Byte-level BPE trained on gold conversations; kept in ``cache`` so that a resumed build uses the same one."""
    if (cache / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(cache)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.tokenizer.vocab_size - len(MARKERS),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(recipe, skills), trainer)
    bpe.add_tokens(list(MARKERS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=CONTROL[2], pad_token=CONTROL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [CONTROL[1]]})
    tokenizer.chat_template = MICRO_CHAT_TEMPLATE
    tokenizer.save_pretrained(cache)
    return tokenizer


def _texts(recipe: MicroRecipe, skills: dict[str, Skill]) -> Iterator[str]:
    """What a tokenizer should be good at: every message of gold conversations."""
    codec = HermesJSON()
    for skill in skills.values():
        for task in islice(_train_tasks(recipe, skill), recipe.tokenizer.tasks_per_skill):
            yield from (message.content for message in task.prompt)
            schemas = skill.env.tool_schemas(task)
            for turn in skill.env.gold_turns(task):  # type: ignore[attr-defined]
                yield assistant_text(turn, codec, schemas)
            for schema in schemas:
                yield f"{schema.name}({', '.join(schema.parameters.get('properties', {}))})"


def _train_tasks(recipe: MicroRecipe, skill: Skill) -> Iterator[Task]:
    return iter(skill.env.load_tasks("train", skill.config.source, None, recipe.seed))


def _check_bands(stage: StageRecipe, result: EvalResult) -> None:
    for name, (low, high) in stage.expect.items():
        found = result.tasks[name].avg_at_k
        if found is None or not low <= found <= high:
            raise AgentOPDError(f"stage {stage.name!r}: {name} ended at {found}, outside [{low}, {high}]")


def _provenance(recipe: MicroRecipe, skills: dict[str, Skill], results: Sequence[EvalResult]) -> dict[str, Any]:
    sample = [task for skill in skills.values() for task in islice(_train_tasks(recipe, skill), 500)]
    session = Session.now(sys.argv).model_dump(include={"python", "platform", "packages"})
    return {
        "command": "agentopd micro build configs/micro.toml",
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json", exclude={"out", "work_dir"}),
        "versions": session,
        "data": {"kind": "procedural", "sha256_of_first_500_train_tasks_per_skill": content_hash(sample)},
        "eval": {result.model: result.to_json()["tasks"] for result in results},
    }
