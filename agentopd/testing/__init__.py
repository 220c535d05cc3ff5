"""What every sandbox must withstand and serve, and every verifier must refuse and accept; for those of one's own too.

``await check_sandbox(sandbox)`` runs the programs of docs/security.md, each of which earns a score only if its attack
works; ``await check_verifier(verifier, sandbox)`` judges the submissions that page lists.
"""

from agentopd.testing.catalogue import CATALOGUE, HONEST, HOSTILE, Row
from agentopd.testing.submissions import SUBMISSIONS, Submission, check_verifier
from agentopd.testing.suite import LIMITS, Finding, check_sandbox

__all__ = [
    "CATALOGUE",
    "HONEST",
    "HOSTILE",
    "LIMITS",
    "SUBMISSIONS",
    "Finding",
    "Row",
    "Submission",
    "check_sandbox",
    "check_verifier",
]
