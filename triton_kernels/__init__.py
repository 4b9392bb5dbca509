"""Triton kernels of flashprune, one file a stage: `@triton.jit` kernels and their launchers."""
