"""A process that generates from a file as the command line does, slowly enough to be killed.

python generating_child.py SECONDS_PER_BATCH WINDOW ARGUMENT...
"""

from __future__ import annotations

import sys
import time

from jax_encdec import file_generation, pipeline
from jax_encdec.cli import main

if __name__ == "__main__":
    pause = float(sys.argv[1])
    file_generation.WINDOW = int(sys.argv[2])
    run = pipeline.Text2TextPipeline.run

    def slowly(*arguments):
        time.sleep(pause)
        return run(*arguments)

    pipeline.Text2TextPipeline.run = slowly  # type: ignore[method-assign]
    sys.exit(main(sys.argv[3:]))
