"""Log-sum-exp and best keys of all inner products, which are never stored together."""

from unweave.kernels.ranking.functions import streaming_logsumexp_topk

__all__ = ["streaming_logsumexp_topk"]
