"""Activations on disk: written once by ``fastsae cache``, read by token or by sequence, memory-mapped."""
