"""The ``flashprune`` command."""
