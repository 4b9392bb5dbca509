"""How long selection takes, beside what it replaces and what the machine can do.

``flashprune bench``                      tables, a picture and a report; ``python -m benchmarks`` from a checkout
``pytest benchmarks --benchmark-only``    one file an op on the same cases; ``--benchmark-json FILE`` keeps the figures
``python -m benchmarks.host``              what a Triton call costs the host, without a GPU; see ``launches``
``benchmarks/gpu.sh FOLDER``              on a GPU: tests, sanitizer and the latency of every operator

plan → cases → race, one after the other (sweep) → rows of plain data (results) → table, figure, report.

Protocol: every variant is checked on the very inputs on which it is timed, and one that fails is reported, not timed;
variants take turns in one process; medians with min–max; what the floor is made of is measured in the same run; the
machine is named. Peers live in ``peers/``.
"""
