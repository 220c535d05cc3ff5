"""What a run needs, checked before it starts: one line for each check, worst first in the exit code.

To add a check: write a function from a config to diagnoses and put it into ``CHECKS``. A check raises nothing but
``AgentOPDError``; one raised is the diagnosis that the run cannot succeed.
"""

from __future__ import annotations

from agentopd.config import RunConfig
from agentopd.doctor.diagnosis import Check, Diagnosis, UnknownShapeError
from agentopd.doctor.disk import disk
from agentopd.doctor.machine import memory
from agentopd.doctor.parts import certificates, packages, run_directory, sandbox, trackers
from agentopd.doctor.ports import ports
from agentopd.doctor.speech import chat_template, check_template, teacher_template, vocabulary
from agentopd.doctor.teachers import chat_endpoints, scoring_teachers, self_disagreement, served_teachers
from agentopd.errors import AgentOPDError

__all__ = ["CHECKS", "Check", "Diagnosis", "check_template", "diagnose", "self_disagreement"]


def diagnose(config: RunConfig) -> list[Diagnosis]:
    """Every check on a run's config."""
    found: list[Diagnosis] = []
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            found += check(config)
        except AgentOPDError as exc:
            found.append(Diagnosis(name, "fail", str(exc)))
        except UnknownShapeError as exc:
            found.append(Diagnosis(name, "warn", str(exc)))
    return found


CHECKS: tuple[Check, ...] = (
    *(chat_template, teacher_template, vocabulary, certificates),
    *(memory, disk, ports),  # before teachers are loaded, which take of what is free
    *(scoring_teachers, served_teachers, chat_endpoints, sandbox, packages, trackers, run_directory),
)
