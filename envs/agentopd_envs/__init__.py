"""Environments: math, code repair and tool use, and what it takes to write one's own.

An environment of one's own is a subclass of ``ToolEnvironment`` or ``SingleTurnEnvironment``; ``examples/my_env.py``
is a whole one. Import the shipped ones from their modules, or by name through ``agentopd.registry.environments``.
"""

from agentopd.errors import ToolError
from agentopd.registry import register_environment
from agentopd.types import Limits, Message, Task, Verdict, VerdictStatus
from agentopd_envs.authoring import BaseEnvironment, SingleTurnEnvironment, ToolEnvironment, tool_turn
from agentopd_envs.function_verifier import FunctionVerifier
from agentopd_envs.tools import tool

__all__ = [
    "BaseEnvironment",
    "FunctionVerifier",
    "Limits",
    "Message",
    "SingleTurnEnvironment",
    "Task",
    "ToolEnvironment",
    "ToolError",
    "Verdict",
    "VerdictStatus",
    "register_environment",
    "tool",
    "tool_turn",
]
