"""Log-probs with autograd from all logits at once: what the chunked heads are held against."""

import torch


def plain_logprobs(hidden, head, target, ids):
    """Log-probs in fp32 at the target (N,) and at ``ids`` (N, K)."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logprobs.gather(1, target[:, None])[:, 0], logprobs.gather(1, ids)
