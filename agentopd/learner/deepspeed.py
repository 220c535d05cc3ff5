"""The optimiser: a DeepSpeed engine around the student, one ``step`` per batch.

Gradients of micro-batches are plain sums (``objective.streams``), so the loss is only multiplied by the number of
ranks, because DeepSpeed averages over them. With a bf16 model the optimiser works on fp32 master weights and
accumulates gradients in fp32.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentopd.config.objective import Blocks, ObjectiveConfig
from agentopd.config.run import LearnerConfig
from agentopd.errors import ConfigError, InfraError
from agentopd.learner import runtime
from agentopd.learner.body import checkpoint_activations, hidden_states
from agentopd.learner.fused_head import FusedHead, HeadStreams
from agentopd.learner.head import Head, output_head
from agentopd.learner.schedule import scheduled_rate
from agentopd.objective.compose import compute_loss
from agentopd.objective.guidance import Guidance, phi_sums, teacher_guidance
from agentopd.objective.metrics import Sums, add_sums, means
from agentopd.objective.microbatches import deal_rows, select_tokens, split_micro_batches
from agentopd.objective.phi import mean_of
from agentopd.objective.streams import PER_TOKEN, Batch, Streams
from agentopd.weights import full_weights, gathered, has_lora, keep_lora

_TAG = "learner"
Known = dict[str, Any]
"""Fields of ``Streams`` that are known before the loss is taken: the policy before the update, progress."""


class _Scorer(nn.Module):
    """The module DeepSpeed wraps: a micro-batch in, its loss (scalar) with parts and sums out."""

    def __init__(self, model: Any, teacher_heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.model = model
        self._teacher_heads = dict(teacher_heads)

    def forward(self, batch: Batch, objective: Blocks, known: Known) -> tuple[Tensor, dict[str, Tensor], Sums]:
        parts: dict[str, Tensor] = {}
        sums: Sums = {}

        def loss_of(start: int, stop: int, found: HeadStreams) -> Tensor:
            nonlocal parts, sums
            given = {name: x[start:stop] if name.endswith(PER_TOKEN) else x for name, x in known.items()}
            output = compute_loss(Streams(select_tokens(batch, start, stop), **found._asdict(), **given), objective)
            parts, sums = add_sums(parts, output.parts), add_sums(sums, output.sums)
            return output.loss

        hidden_NH = self._hidden(batch)
        return self._head(batch, objective).loss(hidden_NH, loss_of), parts, sums

    @torch.no_grad()
    def streams(self, batch: Batch, objective: Blocks) -> HeadStreams:
        """What the objective reads of the policy as it is."""
        hidden_NH = self._hidden(batch)
        # After the body: where the head is its embedding too, ZeRO-3 lets go of it when that layer is done.
        with gathered([x for x in output_head(self.model)[:2] if x is not None]):
            return self._head(batch, objective).streams(hidden_NH)

    def _hidden(self, batch: Batch) -> Tensor:
        return hidden_states(self.model, batch.input_ids_BT, batch.row_N, batch.position_N)

    def _head(self, batch: Batch, objective: Blocks) -> FusedHead:
        return FusedHead(output_head(self.model), batch, objective, self._teacher_heads)


class DeepSpeedLearner:
    """Trains ``model`` (a Hugging Face causal LM, in bf16 or fp32) in place on one objective.

    The same class runs alone in one process and as each rank of a launched job; every rank must call every method.
    The model is kept in eval mode: dropout would make the update's log-probs differ from the sampled policy's.
    ``teacher_heads`` are the output heads of local teachers by name, for objectives on whole distributions.
    """

    def __init__(
        self,
        model: Any,
        config: LearnerConfig,
        objective: ObjectiveConfig,
        total_steps: int,
        teacher_heads: Mapping[str, Head] | None = None,
    ) -> None:
        self.config = config
        self.objective = objective
        self.total_steps = total_steps
        self.stretches: Sequence[int] = (total_steps,)
        """Lengths of the stretches of steps that each have a learning-rate schedule of their own."""
        self.rate_scale = 1.0
        """Factor on the scheduled learning rate."""
        self.steps_done = 0
        self.poisoned: dict[int, str] = {}
        """Rows of the last batch that were left out because their loss was not finite, by source, and why."""
        self._deepspeed = runtime.start(config.collective_timeout_s)
        if config.activation_checkpointing:
            checkpoint_activations(model)
        self._adapters_only = has_lora(model)
        scorer = _Scorer(model.eval(), teacher_heads or {})
        if self._adapters_only:
            scorer.register_state_dict_post_hook(keep_lora)  # type: ignore[no-untyped-call]
        self._engine = self._initialised(scorer)
        self.device = next(model.parameters()).device

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done, in [0, 1]."""
        return self.steps_done / sum(self.stretches)

    @property
    def module(self) -> Any:
        """The student itself, sharing its weights with whoever else holds it."""
        return self._engine.module.model

    def step(self, batch: Batch) -> dict[str, float]:
        """Up to ``epochs`` passes of ``mini_batches`` optimiser steps each; returns metrics of the last pass.

        Metrics are reduced over ranks and micro-batches. Further passes stop once mean |logprobs - old_logprobs|
        exceeds ``max_epoch_kl``. A batch without a token on any rank only counts as a step. Rows whose own loss is not
        finite are left out and named in ``poisoned``; raises ``InfraError`` if that is all of them, before the weights
        change.
        """
        self.poisoned = {}
        if not runtime.all_reduce_max(batch.num_tokens):
            self.steps_done += 1
            return {**batch.metrics, "learner/skipped": 1.0}
        blocks, progress = self.objective.at(self.progress), self.progress
        dealt = deal_rows(batch, self.config.mini_batches)
        mini_batches = [micros for micros in map(self._micro_batches, dealt) if micros]
        rate = self.rate_scale * scheduled_rate(self.config, self.steps_done, self.stretches)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        old = self._before(mini_batches, blocks)
        metrics: dict[str, float] = {}
        passes = 0
        for _ in range(self.config.epochs):
            metrics = self._one_pass(mini_batches, old, blocks, progress)
            passes += 1
            if metrics["student/drift"] > self.config.max_epoch_kl:
                break
        self.steps_done += 1
        found = float(runtime.all_reduce(torch.tensor(len(self.poisoned))))
        metrics["batch/quarantined"] = batch.metrics.get("batch/quarantined", 0.0) + found
        return {**batch.metrics, **metrics, "learner/lr": rate, "learner/passes": float(passes)}

    @torch.no_grad()
    def inspect(self, batch: Batch) -> list[tuple[Tensor, Guidance | None]]:
        """Of each row, the student's log-probs (N,) and the teacher term as ``step`` would see them; changes nothing.

        Every rank must call it, with as many rows as it likes. Where phi is on, its mean is the row's own, not the
        batch's.
        """
        blocks = self.objective.at(self.progress)
        found: list[tuple[Tensor, Guidance | None]] = []
        for row in range(runtime.all_reduce_max(batch.num_rows)):
            micro = (batch.select_rows([row]) if row < batch.num_rows else _filler(batch)).to(self.device)
            streams = Streams(micro, **self._engine.module.streams(micro, blocks)._asdict())
            guidance = teacher_guidance(streams, blocks) if blocks.needs_teacher else None
            found.append((streams.logprobs_N, guidance))
        return found[: batch.num_rows]

    def save(self, directory: str | Path) -> None:
        """Write weights (of adapters alone, where there are some), fp32 masters, optimiser state, schedule position and
        random states.
        """
        state = {"steps_done": self.steps_done, "rate_scale": self.rate_scale}
        with runtime.quiet():
            self._engine.save_checkpoint(
                str(directory), tag=_TAG, client_state=state, exclude_frozen_parameters=self._adapters_only
            )
        torch.save(torch.get_rng_state(), self._rng_file(directory))

    def load(self, directory: str | Path) -> None:
        """Continue exactly where ``save`` stopped, on the same number of ranks. Raises ``ConfigError``."""
        if not self._rng_file(directory).is_file():
            raise ConfigError(f"{str(directory)!r} holds no learner state for rank {runtime.rank()}")
        with runtime.quiet():
            _, client_state = self._engine.load_checkpoint(
                str(directory), tag=_TAG, load_module_strict=not self._adapters_only
            )
        self.steps_done, self.rate_scale = client_state["steps_done"], client_state.get("rate_scale", 1.0)
        torch.set_rng_state(torch.load(self._rng_file(directory), weights_only=True))

    def export(self, directory: str | Path) -> None:
        """Write the student as a Hugging Face directory (safetensors), in its dtype, adapters folded in."""
        is_main, kept = runtime.rank() == 0, self.module.state_dict()
        weights = {name: kept[name] for name, _ in self.module.named_buffers() if name in kept}
        weights |= {name: weight.cpu() for name, weight in full_weights(self.module) if is_main}
        if is_main:
            with redirect_stderr(io.StringIO()):  # a progress bar per shard
                self.module.save_pretrained(str(directory), state_dict=weights)
        runtime.all_reduce_max(0)

    def close(self) -> None:
        """Detach DeepSpeed's hooks from the model; the model stays usable."""
        with runtime.quiet():
            self._engine.destroy()

    def _initialised(self, scorer: _Scorer) -> Any:
        config = self.config
        parameters = [p for p in scorer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        head = output_head(scorer.model)
        for used in (head.weight, head.bias):
            if used is not None:  # outside the forward pass of its own layer
                self._deepspeed.zero.register_external_parameter(scorer, used)
        settings = _engine_config(config, parameters[0].dtype, width=head.weight.shape[1])
        with runtime.quiet():
            engine, *_ = self._deepspeed.initialize(model=scorer, optimizer=optimizer, config=settings)
        return engine

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """As many micro-batches on every rank: a rank that is short adds fillers without weight."""
        local = split_micro_batches(batch, self.config.micro_batch_tokens)
        missing = runtime.all_reduce_max(len(local)) - len(local)
        return [micro.to(self.device) for micro in [*local, *[_filler(batch)] * missing]]

    @torch.no_grad()
    def _before(self, mini_batches: Sequence[Sequence[Batch]], blocks: Blocks) -> list[list[Known]]:
        """What the loss reads of the policy before the update; nothing for micro-batches that measure it themselves."""
        nothing: list[list[Known]] = [[{} for _ in micros] for micros in mini_batches]
        # The first update of the only pass sees the policy as it was.
        start = 1 if self.config.epochs == 1 and not blocks.needs_batch_statistics else 0
        later = list(mini_batches[start:])
        if not later:
            return nothing
        scored = [[self._engine.module.streams(micro, blocks) for micro in micros] for micros in later]
        found: list[list[Known]] = [
            [{"old_logprobs_N": x.logprobs_N, "old_topk_logprobs_NK": x.topk_logprobs_NK} for x in some]
            for some in scored
        ]
        if blocks.needs_batch_statistics:
            looks = [
                look for micros, some in zip(later, scored, strict=True) for look in zip(micros, some, strict=True)
            ]
            sums = torch.stack([phi_sums(Streams(micro, **values._asdict()), blocks) for micro, values in looks]).sum(0)
            mean = mean_of(runtime.all_reduce(sums))
            found = [[{**values, "phi_mean": mean} for values in some] for some in found]
        return nothing[:start] + found

    def _one_pass(
        self,
        mini_batches: Sequence[Sequence[Batch]],
        old: Sequence[Sequence[Known]],
        blocks: Blocks,
        progress: float,
    ) -> dict[str, float]:
        """One optimiser step for each mini-batch."""
        parts: dict[str, Tensor] = {}
        sums: Sums = {}
        norms = []
        for micros, before in zip(mini_batches, old, strict=True):
            found, counted = self._backward(micros, before, blocks, progress, scale=len(mini_batches))
            self._check_sound(micros, found)
            norm = self._plain_grad_norm()
            self._engine.step()
            norms.append(float(self._engine.get_global_grad_norm() if norm is None else norm))
            parts, sums = add_sums(parts, found), add_sums(sums, counted)
        metrics = self._reduced(parts, sums, mini_batches[0][0].skills)
        metrics["learner/grad_norm"] = sum(norms) / len(norms)
        return metrics

    def _backward(
        self, micros: Sequence[Batch], before: Sequence[Known], blocks: Blocks, progress: float, scale: int
    ) -> tuple[dict[str, Tensor], Sums]:
        """Gradients of one mini-batch; ``scale`` makes up for the share of the batch's tokens that it holds."""
        parts: dict[str, Tensor] = {}
        sums: Sums = {}
        for index, (micro_batch, known) in enumerate(zip(micros, before, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
            loss, found, counted = self._loss(micro_batch, {**known, "progress": progress}, blocks)
            self._engine.backward(loss * (scale * runtime.world_size()), scale_wrt_gas=False)
            parts, sums = add_sums(parts, found), add_sums(sums, counted)
        return parts, sums

    def _loss(self, micro: Batch, known: Known, blocks: Blocks) -> tuple[Tensor, dict[str, Tensor], Sums]:
        """Loss, parts and sums of a micro-batch, without the rows whose own loss is not finite."""
        output: tuple[Tensor, dict[str, Tensor], Sums] = self._engine(micro, blocks, known)
        if not runtime.all_reduce_max(not output[0].isfinite()):
            return output
        alone = [_select(micro, known, [row]) for row in range(micro.num_rows)]
        alone += [(_filler(micro), known)] * (runtime.all_reduce_max(len(alone)) - len(alone))
        losses = [self._value(*item, blocks) for item in alone][: micro.num_rows]
        sound = [row for row, loss in enumerate(losses) if math.isfinite(loss)]
        sources = micro.source_B.tolist()
        self.poisoned |= {s: f"its loss is {x}" for s, x in zip(sources, losses, strict=True) if not math.isfinite(x)}
        rest = _select(micro, known, sound) if sound else (_filler(micro), known)
        output = self._engine(rest[0], blocks, rest[1])
        return output

    @torch.no_grad()
    def _value(self, micro: Batch, known: Known, blocks: Blocks) -> float:
        streams = Streams(micro, **self._engine.module.streams(micro, blocks)._asdict(), **known)
        return float(compute_loss(streams, blocks).loss)

    def _check_sound(self, micros: Sequence[Batch], parts: dict[str, Tensor]) -> None:
        """Raise, on all ranks alike, where no row is left to train on, or the loss is not finite all the same."""
        rows = {source for micro in micros if micro.counted for source in micro.source_B.tolist()}
        total = runtime.all_reduce(torch.stack(list(parts.values())).sum().double())
        if not runtime.all_reduce_max(len(rows - self.poisoned.keys())) or not math.isfinite(float(total)):
            found = {name: float(value) for name, value in parts.items()}
            raise InfraError(f"the loss of step {self.steps_done} is not finite on any row: {found}")

    def _reduced(self, parts: dict[str, Tensor], sums: Sums, skills: tuple[str, ...]) -> dict[str, float]:
        """Everything a pass measured, summed over ranks in one message."""
        flat = torch.cat([torch.stack(list(parts.values())), *(table.flatten() for table in sums.values())]).double()
        total = runtime.all_reduce(flat)
        losses, rest = total[: len(parts)].tolist(), total[len(parts) :].view(len(sums), len(skills), 2)
        metrics = {**dict(zip(parts, losses, strict=True)), "loss/total": sum(losses)}
        return metrics | means(dict(zip(sums, rest, strict=True)), skills)

    def _plain_grad_norm(self) -> Tensor | None:
        """Gradient norm before clipping, where DeepSpeed does not report one (fp32 without ZeRO)."""
        if isinstance(self._engine.optimizer, torch.optim.Optimizer):
            grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(grads)
        return None

    def _rng_file(self, directory: str | Path) -> Path:
        return Path(directory) / f"rng_rank{runtime.rank()}.pt"


def _engine_config(config: LearnerConfig, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """DeepSpeed's own settings. ZeRO-3 leaves biases and norms whole, which are up to a few times ``width`` long.

    A bf16 model without ZeRO runs as stage 1, which on one rank is the same thing: DeepSpeed's stage-0 optimiser for
    bf16 sums gradients in bf16 and starts Adam with an empty step that distorts its bias correction.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage, "stage3_param_persistence_threshold": 10 * width},
        "steps_per_print": None,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["zero_optimization"]["stage"] = max(1, config.zero_stage)
    elif dtype != torch.float32:
        raise ConfigError(f"the student is in {dtype}; train it in bfloat16 or float32")
    return settings


def _select(micro: Batch, known: Known, rows: list[int]) -> tuple[Batch, Known]:
    """Some rows of a micro-batch, and what is known of their tokens."""
    kept_N = torch.isin(micro.row_N, torch.tensor(rows, device=micro.row_N.device))
    return micro.select_rows(rows), {name: x[kept_N] if name.endswith(PER_TOKEN) else x for name, x in known.items()}


def _filler(batch: Batch) -> Batch:
    """A micro-batch of one token that weighs nothing, for a rank that has fewer micro-batches than another."""
    tokens: dict[str, Any] = {
        f.name: torch.zeros(1, *getattr(batch, f.name).shape[1:], dtype=getattr(batch, f.name).dtype)
        for f in fields(batch)
        if f.name.endswith(PER_TOKEN)
    }
    tokens["position_N"] = torch.ones(1, dtype=torch.int64)
    return replace(
        batch,
        **tokens,
        input_ids_BT=torch.zeros(1, 2, dtype=torch.int64),
        lengths_B=torch.tensor([2]),
        truncated_B=torch.tensor([False]),
        source_B=torch.tensor([-1]),
        counted=False,
        metrics={},
    )
