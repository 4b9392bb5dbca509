"""`python -m flashprune` is the `flashprune` command."""

from .cli import main

main()
