"""Sandboxes: where untrusted programs run. Values come out as data; expectations never go in."""

from agentopd_sandboxes.jail import JailSandbox, probe

__all__ = ["JailSandbox", "probe"]
