"""Environments proven before they are trained on: checks without a model, and the certificate that records them."""

from agentopd.certify.certificate import Certificate, Finding, certificate_key, find_certificate, require_certificates
from agentopd.certify.validate import skill_of, validate

__all__ = [
    "Certificate",
    "Finding",
    "certificate_key",
    "find_certificate",
    "require_certificates",
    "skill_of",
    "validate",
]
