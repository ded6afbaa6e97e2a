"""`python -m jax_encdec`: the `jax-encdec` command, of this very interpreter."""

import sys

from jax_encdec.cli import main

if __name__ == "__main__":
    sys.exit(main())
