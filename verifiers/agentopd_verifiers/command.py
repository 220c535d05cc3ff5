"""The command verifier: a script of the task's runs beside the submitted program, and its exit code decides.

An exit code belongs to the process that the submitted program runs in, so the program can forge it (``os._exit(0)``).
It is for repositories that offer nothing better: a task has to say ``hidden.trust = "low"``, every verdict is stamped
with it, and no certificate is given.
"""

from __future__ import annotations

import json
from typing import ClassVar

from agentopd.contracts import Case, CaseStatus, Program, Sandbox
from agentopd.errors import SandboxError, TaskError, boundary
from agentopd.types import Episode, Flag, Task, VerdictStatus
from agentopd_verifiers.judge import Finding, JudgingVerifier, hidden_field

LOW = "low"
_STATUS = {CaseStatus.TIMEOUT: VerdictStatus.TIMEOUT, CaseStatus.RESOURCE: VerdictStatus.RESOURCE}
_RUNNER = """
import os, runpy, sys, traceback

def run(argv):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.chdir("project")
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(__name__, None)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    os._exit(code & 255)
"""


class CommandVerifier(JudgingVerifier):
    """Outcome 1 if ``hidden.command`` (a Python script and its arguments) ends with exit code 0.

    It runs in a folder of ``public.files``, ``hidden.files`` and, as ``hidden.target``, the submitted program.
    """

    name: ClassVar[str] = "command"
    version: ClassVar[str] = "1"
    needs_sandbox: ClassVar[bool] = True

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Run the command once, in the sandbox."""
        program, argv = _project(task, episode)
        if program is None:
            return _stamped(0.0, VerdictStatus.NO_ANSWER, "no program was submitted")
        if sandbox is None:
            raise SandboxError("the command verifier needs a sandbox and was given none")
        with boundary(SandboxError, f"running the command of task {task.id}"):
            (result,) = await sandbox.run_cases(program, [Case("command", f"run({json.dumps(argv)})")])
        if result.status is not CaseStatus.VALUE:
            return _stamped(0.0, _STATUS.get(result.status, VerdictStatus.CRASH), result.detail)
        passed = result.value == 0
        return _stamped(float(passed), VerdictStatus.OK if passed else VerdictStatus.WRONG, f"exit code {result.value}")


def _project(task: Task, episode: Episode) -> tuple[Program | None, list[str]]:
    """What is run and how; None where nothing was handed in. Raises ``TaskError``."""
    if task.hidden.get("trust") != LOW:
        raise TaskError("the program judged can forge its exit code: set hidden.trust = 'low' to accept that")
    argv, target = hidden_field(task, "command", list), hidden_field(task, "target", str)
    files = {**(task.public.get("files") or {}), **(task.hidden.get("files") or {})}
    if not argv or not all(isinstance(word, str) for word in argv) or argv[0] not in files:
        raise TaskError("hidden.command is a list of strings that begins with one of the task's files")
    if target in (task.hidden.get("files") or {}) or target == argv[0]:
        raise TaskError(f"hidden.target {target!r} would replace a file of the judge's")
    source = episode.final_state.get("program")
    if not episode.final_state.get("submitted") or not isinstance(source, str):
        return None, argv
    placed = {f"project/{name}": text for name, text in {**files, target: source}.items()}
    return Program(_RUNNER, placed), argv


def _stamped(outcome: float, status: VerdictStatus, detail: str) -> Finding:
    flag = Flag(code="low_trust", detail="an exit code decided, which the program judged can forge")
    return Finding(outcome, status, flags=[flag], detail=detail, evidence={"trust": LOW})
