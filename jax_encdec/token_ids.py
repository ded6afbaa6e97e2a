"""Which ids start, pad and end a pair's targets, where several configurations may say so."""

from __future__ import annotations

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import ConfigError

_FALLBACK = {"decoder_start_token_id": "bos_token_id", "pad_token_id": "eos_token_id"}


def resolve_ids(
    name: str, generation_config: GenerationConfig, config: EncoderDecoderConfig
) -> tuple[int, ...]:
    """Every id that `name` stands for: generation config, pair, decoder, then the fallback."""
    for key in (name, _FALLBACK.get(name)):
        if key is None:
            continue
        decoder = getattr(config.decoder, key, config.decoder.extra.get(key))
        asked = (getattr(generation_config, key), getattr(config, key, None))
        for rank, value in enumerate((*asked, decoder)):
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            inside = all(isinstance(i, int) and 0 <= i < config.target_vocabulary for i in ids)
            if ids and inside:
                return ids
            # A family's default id means nothing in a vocabulary that does not hold it; one that
            # was asked for is a mistake.
            if ids and rank < len(asked):
                raise ConfigError(
                    f"{key} must be within the decoder's vocabulary, "
                    f"0..{config.target_vocabulary - 1}; got {value}"
                )
    raise ConfigError(
        f"{name} is not defined by the generation config, the config or the decoder's config; "
        f"set it with {name}=... in EncoderDecoderConfig(...), "
        f"from_encoder_decoder_pretrained(...) or generate(...)"
    )
