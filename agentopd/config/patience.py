"""How long one rank may be kept waiting while the others wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from agentopd.config.teachers import EndpointConfig, ServedTeacherConfig

if TYPE_CHECKING:
    from agentopd.config.run import RunConfig


def check_patience(config: RunConfig) -> None:
    """The ranks wait longer for one another than any of them waits for something else. Raises ``ValueError``."""
    seconds, keys = max(_waits(config), default=(0.0, ""))
    deadline = config.learner.collective_timeout_s
    if deadline <= seconds:
        raise ValueError(
            f"learner.collective_timeout_s is {deadline:g}, and a rank may wait {seconds:g} s for others than ranks "
            f"({keys}): raise the former above that, or lower the latter"
        )


def _waits(config: RunConfig) -> Iterator[tuple[float, str]]:
    """Longest waits in seconds, pauses between tries left out, and the keys that they come from."""
    rollout, ray = config.rollout, config.ray
    if rollout.engine == "vllm":
        yield rollout.vllm.timeout_s, "rollout.vllm.timeout_s"
    if rollout.engine == "vllm_servers":
        servers = rollout.servers
        keys = "rollout.servers.outage_s + rollout.servers.turn_timeout_s + rollout.vllm.timeout_s"
        yield servers.outage_s + servers.turn_timeout_s + rollout.vllm.timeout_s, keys
    if ray is not None:
        yield ray.attempts * ray.deadline_s, "ray.attempts x ray.deadline_s"
    asked = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()} | {"judge": config.judge}
    for name, who in asked.items():
        if isinstance(who, ServedTeacherConfig):
            yield who.outage_s + who.timeout_s, f"{name}.outage_s + {name}.timeout_s"
        if isinstance(who, EndpointConfig):
            yield (1 + who.max_retries) * who.timeout_s, f"(1 + {name}.max_retries) x {name}.timeout_s"
