"""Published recipes for warm-started pairs, by name, and the values that are usual without one.

`PRESETS[name]` holds what a paper states and leaves the rest open; `resolve` fills a configuration
in from its preset, then from what is usual for its optimizer. Options given beside a preset win
over it, and groups given stand before its groups. What a recipe says beyond the optimizer (label
smoothing, dropout, batch size) is noted here and set where it belongs.
"""

from __future__ import annotations

from jax_encdec.training.optimizer_config import Group, OptimizerConfig, filled

PRESETS: dict[str, OptimizerConfig] = {}

# Liu & Lapata 2019, "Text Summarization with Pretrained Encoders", 3.2 and 4.2: two Adam
# optimizers, a slow one for the pretrained encoder, a fast one for the random decoder, with
# rate * min(n^-0.5, n * warmup^-1.5). Beside it: label smoothing 0.1, dropout 0.1, gradients of
# five batches accumulated, 200,000 steps. The gradient is not clipped; Adam's eps is their code's.
PRESETS["liu-lapata"] = OptimizerConfig(
    name="adamw",
    schedule="noam",
    learning_rate=0.1,
    warmup_steps=10_000,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-9,
    clip_norm=0.0,
    groups=(
        Group(name="encoder", pattern="encoder", learning_rate=2e-3, warmup_steps=20_000),
        Group(name="decoder", pattern="decoder, enc_to_dec_proj", required=False),
    ),
)

# Rothe, Narayan & Severyn 2020, "Leveraging Pre-trained Checkpoints for Sequence Generation
# Tasks", 2: Adam, rate 0.05, linear warm-up over 40,000 steps, divided by the square root of the
# hidden size, square root decay. Adam's other constants are not stated: the usual ones.
PRESETS["rothe"] = OptimizerConfig(
    name="adamw",
    schedule="noam",
    learning_rate=0.05,
    warmup_steps=40_000,
    divide_by_sqrt_hidden=True,
    weight_decay=0.0,
)

# von Platen 2020, "Leveraging Pre-trained Language Model Checkpoints for Encoder-Decoder Models":
# 2,000 steps of warm-up, all else as the Trainer has it. Beside it: batches of 16.
PRESETS["warm-starting"] = OptimizerConfig(
    name="adamw",
    schedule="linear",
    learning_rate=5e-5,
    warmup_steps=2_000,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    clip_norm=1.0,
)

# Not of a paper: what no checkpoint held has further to go than what one did.
PRESETS["fresh-cross-attention"] = OptimizerConfig(
    groups=(
        Group(
            name="fresh",
            pattern="decoder/*/cross_attention, decoder/head, enc_to_dec_proj",
            factor=3.0,
            required=False,
        ),
    )
)

_USUAL = {
    "adamw": OptimizerConfig(learning_rate=5e-5, b1=0.9, b2=0.999, eps=1e-8),
    "adafactor": OptimizerConfig(learning_rate=1e-3, b1=0.0, b2=0.0, eps=1e-30),
    "lion": OptimizerConfig(learning_rate=1e-5, b1=0.9, b2=0.99, eps=0.0),
}
_ALWAYS = OptimizerConfig(
    schedule="linear",
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=1.0,
    divide_by_sqrt_hidden=False,
)


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """Fill in every field but `ema_decay`, whose None is "no average"; `preset` becomes None."""
    if config.preset is not None:
        config = filled(config, PRESETS[config.preset])
    config = filled(config, OptimizerConfig(name="adamw"))
    return filled(filled(config, _USUAL[str(config.name)]), _ALWAYS)
