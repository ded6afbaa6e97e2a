"""TrOCR's tensors: BART's decoder, the head under another name."""

from __future__ import annotations

from jax_encdec.convert.bart import IGNORED, body
from jax_encdec.convert.rules import Rule
from jax_encdec.convert.table import OTHER_HALF, Standalone, Table

_HEAD = "output_projection.weight"

TABLES = {
    "trocr": Table(
        body=body,
        head=lambda config: (Rule(_HEAD, "head/kernel"),),
        nested="model.decoder.",
        # Published inside of a VisionEncoderDecoderModel.
        standalone=lambda config, role: Standalone(
            ("model.decoder.", "decoder.model.decoder.", "decoder."),
            rules=(Rule(f"decoder.{_HEAD}", "head/kernel", fallback=True),),
            ignored=(("encoder.*", OTHER_HALF),),
        ),
        ignored=IGNORED,
    )
}
