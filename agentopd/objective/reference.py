"""Pull towards a frozen reference policy: the k2 estimator of KL(student || reference).

``0.5 (log p_S - log p_ref)^2`` on the student's own samples, differentiated directly: its expected gradient is that
of the reverse KL (the derivative of k1 has expectation zero, that of k3 is the forward KL's).
"""

from __future__ import annotations

from torch import Tensor


def k2(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """Per-token estimate in nats (N,), at least 0, with gradient to the student."""
    return 0.5 * (logprobs_N - ref_logprobs_N).square()
