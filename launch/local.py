"""One node, any number of ranks: torchrun --standalone --nproc-per-node N launch/local.py [RECIPE] [FLAGS]."""

import sys

from dist_prune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
