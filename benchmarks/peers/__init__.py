"""What people run today: our own re-writes of published selection loops, which flashprune is raced against.

Each keeps the original's tensor operations, their order, launches, host synchronisations and dtype conversions, and
leaves out only what surrounds the selection (reading the model's inputs, building the mask). Tested in
tests/test_peers.py.
"""
