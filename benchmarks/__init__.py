"""How long selection takes, beside what it replaces.

``python -m benchmarks``                  one table, one run: medians, ratios to each peer, peak memory
``pytest benchmarks --benchmark-only``    the same cases and more; ``--benchmark-json FILE`` keeps the raw figures

Protocol: every variant is checked on the very inputs on which it is timed, and one that fails is reported, not timed;
variants take turns in one process; medians with min–max; the machine is named. Peers live in ``peers/``.
"""
