"""XGLM's tensors: BART's decoder without a name of its own."""

from __future__ import annotations

from jax_encdec.convert.bart import IGNORED, body, head
from jax_encdec.convert.table import NO_CROSS, Standalone, Table

TABLES = {
    "xglm": Table(
        body=body,
        head=head,
        nested="model.",
        standalone=lambda config, role: Standalone(
            ("model.", ""),
            ignored=(("*encoder_attn*", NO_CROSS),) if role == "encoder" else (),
        ),
        ignored=IGNORED,
    )
}
