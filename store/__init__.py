"""Content-addressed storage: trees of tensors and plain values in, digests out.

This layer knows tensors, bytes and digests, and nothing of models, runs or metrics.
"""
