"""Workers on other machines, as Ray actors behind the protocols that parts in this process have."""

from agentopd.scaleout.rollout import RayEngine
from agentopd.scaleout.verification import RaySandbox, RayVerifier, verification_pool

__all__ = ["RayEngine", "RaySandbox", "RayVerifier", "verification_pool"]
