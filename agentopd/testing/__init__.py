"""What every sandbox must withstand and serve, for backends of one's own too: ``await check_sandbox(sandbox)``.

The hostile programs are the catalogue of docs/security.md; each earns a score only if its attack works.
"""

from agentopd.testing.catalogue import CATALOGUE, HONEST, HOSTILE, Row
from agentopd.testing.suite import LIMITS, Finding, check_sandbox

__all__ = ["CATALOGUE", "HONEST", "HOSTILE", "LIMITS", "Finding", "Row", "check_sandbox"]
