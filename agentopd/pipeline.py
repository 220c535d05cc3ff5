"""Rollouts ahead of the update: while one batch is scored and trained on, the next ones are sampled.

Those who score on other machines are asked about a batch as soon as it is sampled, too.

The prompts of a batch are drawn when the step ``train.max_staleness`` before its own begins, so that all ranks draw the
same; its episodes are sampled after those of the batch before it. So a token is at most so many updates old when it is
trained on. With 0 nothing is ahead, which is the synchronous loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from agentopd.collect import collect, collect_beside
from agentopd.contracts import Evidence
from agentopd.evaluate import Judged
from agentopd.learner import runtime
from agentopd.mixture import Drawn
from agentopd.runs import Run
from agentopd.scoring import gather_evidence
from agentopd.stats import Clock
from agentopd.types import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Collected:
    """The judged episodes of one step."""

    drawn: list[Drawn]
    shares: Mapping[str, float]
    """Every skill's share of the loss."""
    own: list[Judged]
    """The student's."""
    others: list[Judged]
    """Anybody else's."""
    beside: list[Judged]
    """Those that the anchor alone reads."""
    clock: Clock
    evidence: Sequence[Evidence | None] = ()
    """What is known already of ``own`` and ``others``, in this order."""

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of its prompts, by hash."""
        return {item.task.hash: item.task for item in self.drawn}


class Rollouts:
    """The batches of ``run``, in the order of its steps."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ahead: deque[asyncio.Task[Collected]] = deque()
        self._sampled: asyncio.Task[Collected] | None = None
        """The newest batch, once it is sampled."""
        self._samplings: set[asyncio.Task[Collected]] = set()
        """Those that have not ended."""

    async def take(self) -> Collected:
        """The batch of the step that is due; those that may be are begun."""
        run = self._run
        run.enter_stage()
        while self._may_begin(step := run.step + len(self._ahead)):
            self._ahead.append(self._begin(step))
        run.mixture.taken()
        return await self._ahead.popleft()

    def _may_begin(self, step: int) -> bool:
        """Not beyond a stage: what comes after it depends on its end."""
        config, now = self._run.config, self._run.step
        in_reach = step <= now + config.train.max_staleness and step < config.train.steps
        return in_reach and config.stage_at(step) == config.stage_at(now)

    def _begin(self, step: int) -> asyncio.Task[Collected]:
        run = replace(self._run, step=step)
        prompts = run.mixture.ahead(len(self._ahead), run.config.train.prompts_per_step)
        before = self._sampled

        async def sampled() -> Collected:
            if before is not None:
                await asyncio.wait([before])
            clock, mine = Clock(), prompts.drawn[runtime.rank() :: runtime.world_size()]
            with clock.phase("rollout"):
                own, others = await collect(run, mine)
                beside = await collect_beside(run, mine, own)
            return Collected(prompts.drawn, prompts.shares, own, others, beside, clock)

        async def scored(sampling: asyncio.Task[Collected]) -> Collected:
            return await _scored_elsewhere(run, await sampling)

        self._sampled = asyncio.create_task(sampled())
        self._samplings.add(self._sampled)
        self._sampled.add_done_callback(self._samplings.discard)
        return asyncio.create_task(scored(self._sampled))

    async def aclose(self) -> None:
        """Give up what was begun."""
        begun = [*self._ahead, *self._samplings]
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)


async def _scored_elsewhere(run: Run, collected: Collected) -> Collected:
    """With what teachers on other machines say of the student's and others' tokens."""
    blocks, far = run.blocks, run.teachers.elsewhere()
    if not run.config.train.max_staleness or not far.routes or not (blocks.needs_teacher or blocks.top_k):
        return collected
    episodes = [episode for episode, _ in (*collected.own, *collected.others)]
    with collected.clock.phase("teacher"):
        evidence = await gather_evidence(episodes, far, blocks.top_k, collected.tasks)
    return replace(collected, evidence=evidence)


async def apart(run: Run, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``: on a loop of its own where rollouts are ahead on this one, which must not wait for it."""
    return await (asyncio.to_thread(asyncio.run, work) if run.config.train.max_staleness else work)
