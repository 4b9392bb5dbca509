"""`python -m flashprune.cli` is the `flashprune` command."""

from . import main

main()
