"""One error tree: who is to blame, and what to do next.

    AgentOPDError
    ├── UserError            the input is wrong: exit code 2
    │   ├── ConfigError          a config file, key or override
    │   ├── RegistryError        an unknown or doubly registered name
    │   └── TaskError            a task that cannot be judged or rendered
    └── InfraError           a part of the machinery failed: never a score
        ├── SandboxError         a sandbox could not start, or died on its own
        ├── EngineError          a rollout engine failed
        ├── TeacherError         a teacher failed or returned unusable evidence
        │   ├── NoAnswerError        a model behind a chat endpoint gave no answer, not even an unusable one
        │   ├── QuestionError        the teacher will never answer this question
        │   └── TeacherEndedError    the teacher will answer no question any more
        ├── StorageError         the disk is full
        └── EnvironmentFault     environment code raised: the episode ends and is masked

``ToolError`` stands apart: it is a message for the student, not a failure of the program.

To add one: subclass the branch that names who is to blame, and keep it picklable (arguments are plain strings).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class AgentOPDError(Exception):
    """Root of every error that AgentOPD raises on purpose."""


class UserError(AgentOPDError):
    """The user's input is wrong. The message names the offending value and the next action."""


class ConfigError(UserError, ValueError):
    """A config file, key, value or override is wrong."""


class RegistryError(UserError, LookupError):
    """A name is unknown, registered twice, or its plugin cannot be imported."""


class TaskError(UserError, ValueError):
    """A task lacks what its environment or verifier needs."""


class InfraError(AgentOPDError):
    """Part of the machinery failed. Episodes it touched get ``outcome=None`` and no loss weight."""


class SandboxError(InfraError):
    """A sandbox could not be started, or died for reasons other than the program under test."""


class EngineError(InfraError):
    """A rollout engine failed."""


class TeacherError(InfraError):
    """A teacher failed, or returned evidence that cannot be used (a non-finite log-prob, say)."""


class NoAnswerError(TeacherError):
    """A model behind a chat endpoint gave no answer at all: it is away, keeps failing, or something else is there."""


class QuestionError(TeacherError):
    """The fault is the question's own: this teacher will never answer it."""


class TeacherEndedError(TeacherError):
    """What computes the teacher is dead, and comes back with a new process only."""


class StorageError(InfraError):
    """The disk is full. What was written before is whole."""


class EnvironmentFault(InfraError):
    """Environment code raised something other than ``ToolError``."""


class ToolError(AgentOPDError):
    """Raised by a tool to tell the student what went wrong; the text is shown to the student."""


@contextmanager
def boundary(error: type[InfraError], what: str) -> Iterator[None]:
    """Attribute any stray exception raised inside to ``error``, naming ``what`` was being done.

    AgentOPD's own errors pass unchanged, so the innermost attribution wins.
    """
    try:
        yield
    except AgentOPDError:
        raise
    except Exception as exc:
        raise error(f"{what}: {type(exc).__name__}: {exc}") from exc
