"""`python -m jax_encdec.convert SRC DST`: the same as `jax-encdec convert SRC DST`."""

import sys

from jax_encdec.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
