"""Math problems: one turn of worked steps that ends in a boxed answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from agentopd.registry import register_environment
from agentopd.types import Message, Task
from agentopd_envs.authoring import SingleTurnEnvironment, TaskLoader
from agentopd_envs.datasets import gsm8k
from agentopd_envs.micro import math as micro


@register_environment("math")
class MathEnvironment(SingleTurnEnvironment):
    """Sums and word problems (``micro``), grade-school math (``gsm8k``)."""

    name = "math"
    verifier = "math"
    loaders: ClassVar[dict[str, TaskLoader]] = {"micro": micro.tasks, "gsm8k": gsm8k.tasks}
    sources = tuple(loaders)

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """An empty box."""
        return (Message(role="assistant", content="\\boxed{}"),)

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """A slip, a step left out, an empty box (``micro``)."""
        return micro.wrong_turns(task) if task.source.dataset == micro.SOURCE.dataset else ()
