"""Triton kernels of flashprune, one file a stage: `@kernel`s (see `launch`) and their launchers."""
