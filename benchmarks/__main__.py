"""`python -m benchmarks` from a checkout is `flashprune bench`."""

import sys

from flashprune.cli import main

sys.argv[1:1] = ["bench"]
main()
