"""AgentOPD: teach a small agent new skills without making it forget, by verifier-calibrated on-policy distillation."""

__version__ = "0.1.0"
