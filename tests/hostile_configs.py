"""Configurations, generation defaults and tokenizer files that no sane model has.

Each is put beside the complete, good weights of a BERT2BERT. `CONFIGS` change config.json,
`GENERATION` generation_config.json, `TOKENIZERS` one tokenizer file; a change is a function of the
good JSON, or the file's whole content. The text beside an attack is a part of the refusal.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Change = Callable[[Json], Any] | bytes


def content(change: Change, good: Json) -> bytes:
    """The file that an attack makes of the good one."""
    if isinstance(change, bytes):
        return change
    changed = change(copy.deepcopy(good))
    return changed if isinstance(changed, bytes) else json.dumps(changed).encode()


def both(**fields: Any) -> Change:
    """Fields of the encoder's and the decoder's configuration; `...` removes one."""

    def change(good: Json) -> Json:
        for side in ("encoder", "decoder"):
            good[side] = _with(good[side], fields)
        return good

    return change


def decoder(**fields: Any) -> Change:
    """Fields of the decoder's configuration."""
    return lambda good: {**good, "decoder": _with(good["decoder"], fields)}


def top(**fields: Any) -> Change:
    """Fields of the file."""
    return lambda good: _with(good, fields)


def _with(data: Json, fields: Json) -> Json:
    return {key: value for key, value in (data | fields).items() if value is not ...}


def _nested(depth: int) -> Change:
    def change(good: Json) -> Json:
        inner = good
        for _ in range(depth):
            inner = {"model_type": "encoder-decoder", "encoder": inner, "decoder": inner["decoder"]}
        return inner

    return change


def _raw(old: str, new: str) -> Change:
    return lambda good: json.dumps(good).replace(old, new, 1).encode()


_FIT, _POSITIVE, _JSON = "does not fit", "must be positive", "JSON"
_MB = "m" * (1 << 20)

CONFIGS: dict[str, tuple[Change, str]] = {
    # Numbers
    "-1 layers": (both(num_hidden_layers=-1), _POSITIVE),
    "0 layers": (both(num_hidden_layers=0), _POSITIVE),
    "2 layers": (both(num_hidden_layers=2), _FIT),
    "5,000 layers": (both(num_hidden_layers=5_000), f"{_FIT}|at most"),
    "10^9 layers": (both(num_hidden_layers=10**9), f"{_FIT}|at most"),
    "10^9 layers of the decoder": (decoder(num_hidden_layers=10**9), f"{_FIT}|at most"),
    "10^18 layers": (both(num_hidden_layers=10**18), f"{_FIT}|at most"),
    "1.5 layers": (both(num_hidden_layers=1.5), "must be int"),
    "true layers": (both(num_hidden_layers=True), "must be int"),
    "layers in a list": (both(num_hidden_layers=[1]), "must be int"),
    "null layers": (both(num_hidden_layers=None), "must be int"),
    "a vocabulary of 0": (both(vocab_size=0), "positive|vocabulary"),
    "a vocabulary of -1": (both(vocab_size=-1), "positive|vocabulary"),
    "a vocabulary of 10^12": (both(vocab_size=10**12), _FIT),
    "a vocabulary of 2^62": (both(vocab_size=2**62), _FIT),
    "a vocabulary of 10^30": (both(vocab_size=10**30), _FIT),
    "a width of 0": (both(hidden_size=0), _POSITIVE),
    "a width of -16": (both(hidden_size=-16), _POSITIVE),
    "a width of 10^18": (both(hidden_size=10**18), _FIT),
    "a width of 17": (both(hidden_size=17), "multiple"),
    "0 heads": (both(num_attention_heads=0), _POSITIVE),
    "-4 heads": (both(num_attention_heads=-4), _POSITIVE),
    "3 heads": (both(num_attention_heads=3), "multiple"),
    "10^18 heads": (both(num_attention_heads=10**18), "multiple"),
    "a feed-forward of 0": (both(intermediate_size=0), _POSITIVE),
    "a feed-forward of 10^15": (both(intermediate_size=10**15), _FIT),
    "positions: -1": (both(max_position_embeddings=-1), _POSITIVE),
    "positions: 10^15": (both(max_position_embeddings=10**15), _FIT),
    "token types: -1": (both(type_vocab_size=-1), f"{_FIT}|must be"),
    "token types: 10^15": (both(type_vocab_size=10**15), _FIT),
    "an epsilon of 0": (both(layer_norm_eps=0), _POSITIVE),
    "an epsilon of NaN": (both(layer_norm_eps=float("nan")), "finite|NaN"),
    "an epsilon of infinity": (both(layer_norm_eps=float("inf")), "finite|Infinity"),
    "an epsilon of 1e999": (_raw('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e999'), "finite"),
    "an epsilon of 1e-999": (
        _raw('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-999'),
        _POSITIVE,
    ),
    "a dropout of 2": (both(hidden_dropout_prob=2), "dropout must be"),
    "a dropout of -1": (both(attention_probs_dropout_prob=-1), "dropout must be"),
    "an integer of 100,000 digits": (
        _raw('"hidden_size": 16', '"hidden_size": ' + "9" * 100_000),
        "digits",
    ),
    "an integer of 41 digits": (_raw('"hidden_size": 16', '"hidden_size": ' + "9" * 41), "digits"),
    # Ids
    "a start of -1": (top(decoder_start_token_id=-1), "within the decoder's vocabulary"),
    "a start of 10^18": (top(decoder_start_token_id=10**18), "within the decoder's vocabulary"),
    "a start of text": (top(decoder_start_token_id="[CLS]"), "must be an integer"),
    "a start of 1.5": (top(decoder_start_token_id=1.5), "must be an integer"),
    "an end of a million ids": (
        top(eos_token_id=[3] * 400_000 + [-1]),
        "within the decoder's vocabulary",
    ),
    "an end of objects": (top(eos_token_id=[{}]), "must be an integer"),
    "a pad in an object": (top(pad_token_id={"id": 0}), "must be an integer"),
    # Types and kinds
    "a width of text": (both(hidden_size="16"), "must be int"),
    "1 MB of text for a width": (decoder(hidden_size=_MB), "must be int"),
    "an unknown activation": (both(hidden_act="exec"), "activation"),
    "an activation of 1 MB": (decoder(hidden_act=_MB), "activation"),
    "an activation as a path": (both(hidden_act="../../etc/passwd"), "activation"),
    "an activation in a list": (both(hidden_act=["gelu"]), "must be str"),
    "other positions": (both(position_embedding_type="relative_key"), "not supported"),
    "positions in an object": (both(position_embedding_type={}), "not supported"),
    "another width of cross-attention": (
        decoder(cross_attention_hidden_size=17),
        "cross_attention_hidden_size",
    ),
    "text for a width of cross-attention": (
        decoder(cross_attention_hidden_size="16"),
        "cross_attention_hidden_size",
    ),
    "tied, and of two sizes": (
        lambda c: _with(
            c, {"tie_encoder_decoder": True, "encoder": c["encoder"] | {"intermediate_size": 31}}
        ),
        "tie_encoder_decoder",
    ),
    "no encoder": (top(encoder=...), "lacks the 'encoder'"),
    "an encoder of null": (top(encoder=None), "must be an object"),
    "an encoder in a list": (lambda c: c | {"encoder": [c["encoder"]]}, "must be an object"),
    "an encoder as text": (top(encoder="bert"), "must be an object"),
    "an encoder in an encoder, 50 deep": (_nested(50), "not supported"),
    "an encoder in an encoder, 100 deep": (_nested(100), "deep|longer|not supported"),
    "no model_type": (top(model_type=...), "model_type"),
    "an unknown model_type": (both(model_type="burt"), "did you mean 'bert'"),
    "a model_type of 1 MB": (decoder(model_type=_MB), "not supported"),
    "a model_type in a list": (both(model_type=["bert"]), "not supported"),
    "a model_type in an object": (top(model_type={"encoder-decoder": 1}), "model_type"),
    "a model_type of null": (both(model_type=None), "model_type"),
    "a model_type as a path": (both(model_type="../../../tmp/evil"), "not supported"),
    "a model_type as a module": (both(model_type="os"), "not supported"),
    "another family": (both(model_type="gpt2"), _FIT),
    "a single model": (lambda c: c["encoder"], "single model"),
    # Code
    "auto_map": (top(model_type="evil", auto_map={"AutoModel": "evil.Model"}), "never run"),
    "auto_map of an encoder": (
        both(model_type="evil", auto_map={"AutoModel": "a/b--evil.Model"}),
        "never run|not supported",
    ),
    "auto_map of 1 MB": (top(model_type="evil", auto_map=_MB), "never run"),
    "trust_remote_code": (top(model_type="evil", trust_remote_code=True), "model_type"),
    # The file
    "nothing": (b"", _JSON),
    "a list": (b"[]", _JSON),
    "text": (b'"bert"', _JSON),
    "NaN": (b"NaN", "finite"),
    "cut short": (lambda c: json.dumps(c).encode()[:-1], _JSON),
    "two objects": (lambda c: json.dumps(c).encode() * 2, _JSON),
    "comments": (lambda c: b"// a model\n" + json.dumps(c).encode(), _JSON),
    "single quotes": (lambda c: repr(c).encode(), _JSON),
    "a byte order mark": (lambda c: b"\xef\xbb\xbf" + json.dumps(c).encode(), _JSON),
    "UTF-16": (lambda c: json.dumps(c).encode("utf-16"), _JSON),
    "not UTF-8": (lambda c: json.dumps(c).encode().replace(b"gelu", b"g\xfflu"), _JSON),
    "half a character": (top(note="\ud800"), "Unicode"),
    "half a character as a key": (top(**{"\ud800": 1}), "Unicode"),
    "a key twice": (_raw("{", '{"model_type": "bert", '), "twice"),
    "a key of the encoder twice": (
        _raw('"hidden_size": 16', '"hidden_size": 16, "hidden_size": 32'),
        "twice",
    ),
    "1,000 brackets": (_raw("{", '{"a": ' + "[" * 1_000 + "]" * 1_000 + ", "), "deep|recursion"),
    "100,000 brackets": (b'{"a":' * 100_000, _JSON),
    "3 MB of text": (top(note="x" * 3_000_000), "longer than"),
    "60 MB of text": (lambda c: json.dumps(c | {"note": "x" * 60_000_000}).encode(), "longer than"),
    "60 MB of spaces": (lambda c: b" " * 60_000_000 + json.dumps(c).encode(), "longer than"),
    "many wide texts in an unknown width": (
        both(hidden_size="\U0001f600" * 300_000),
        "must be int|longer",
    ),
    "600,000 empty objects for a width": (
        lambda c: (
            json.dumps(_with(c, {"encoder": c["encoder"] | {"hidden_size": [{}]}}))
            .replace("[{}]", "[" + "{}," * 600_000 + "{}]")
            .encode()
        ),
        "must be int|longer",
    ),
}

GENERATION: dict[str, tuple[Change, str]] = {
    "nothing": (b"", _JSON),
    "a list": (b"[]", _JSON),
    "a key twice": (b'{"num_beams": 1, "num_beams": 4}', "twice"),
    "100,000 brackets": (b'{"a":' * 100_000, _JSON),
    "60 MB": (b'{"a": "' + b"x" * 60_000_000 + b'"}', "longer than"),
    "0 beams": (top(num_beams=0), "num_beams"),
    "-1 beams": (top(num_beams=-1), "num_beams"),
    "1.5 beams": (top(num_beams=1.5), "num_beams"),
    "beams of text": (top(num_beams="4"), "num_beams"),
    "a temperature of NaN": (b'{"temperature": NaN}', "finite|NaN"),
    "a temperature of 1e999": (b'{"temperature": 1e999}', "finite"),
    "a temperature of text": (top(temperature="hot"), "temperature"),
    "an end of objects": (top(eos_token_id=[{}]), "eos_token_id"),
    "an end of -1": (top(eos_token_id=-1), "eos_token_id"),
    "a start of 10^18": (top(decoder_start_token_id=10**18), "decoder_start_token_id"),
    "forbidden words that nest": (top(bad_words_ids=[[[1]]]), "bad_words_ids"),
    "a length of -1": (top(max_length=-1, max_new_tokens=...), "max_length"),
    "a length of text": (top(max_new_tokens="all"), "max_new_tokens"),
}
"""Refused by `generate`, before any weight is read."""


def _tokenizer(**parts: Any) -> Change:
    return lambda good: good | parts


def _model(**fields: Any) -> Change:
    return lambda good: good | {"model": good["model"] | fields}


TOKENIZERS: dict[str, tuple[str, Change, str]] = {
    "nothing": ("tokenizer.json", b"", "tokenizer.json"),
    "a list": ("tokenizer.json", b"[]", "tokenizer.json"),
    "binary": ("tokenizer.json", bytes(range(256)) * 400, "tokenizer.json"),
    "cut short": ("tokenizer.json", lambda t: json.dumps(t).encode()[:-9], "tokenizer.json"),
    "10^6 brackets": ("tokenizer.json", b"[" * 1_000_000, "tokenizer.json"),
    "10^6 objects deep": ("tokenizer.json", b'{"model":' * 1_000_000, "tokenizer.json"),
    "10^6 brackets in the vocabulary": (
        "tokenizer.json",
        b'{"model": {"type": "BPE", "merges": [], "vocab": ' + b"[" * 1_000_000,
        "tokenizer.json",
    ),
    "an unknown model": ("tokenizer.json", _model(type="Evil"), "tokenizer.json"),
    "ids of text": ("tokenizer.json", _model(vocab={"[UNK]": "0"}), "tokenizer.json"),
    "ids below zero": ("tokenizer.json", _model(vocab={"[UNK]": -1}), "tokenizer.json"),
    "ids of 2^63": ("tokenizer.json", _model(vocab={"[UNK]": 2**63}), "tokenizer.json"),
    "ids of 2^32 - 1": ("tokenizer.json", _model(vocab={"[UNK]": 2**32 - 1}), "token|vocab"),
    "merges of nothing known": (
        "tokenizer.json",
        _tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
        "tokenizer.json",
    ),
    "merges of one part": (
        "tokenizer.json",
        _tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}),
        "tokenizer.json",
    ),
    "Unigram: unk beyond the vocabulary": (
        "tokenizer.json",
        _tokenizer(model={"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
        "tokenizer.json",
    ),
    "Unigram: scores of text": (
        "tokenizer.json",
        _tokenizer(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]}),
        "tokenizer.json",
    ),
    "a table of characters that is none": (
        "tokenizer.json",
        _tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        "tokenizer.json",
    ),
    "a table of characters that lies": (
        "tokenizer.json",
        _tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
        "tokenizer.json|text",
    ),
    "a regular expression that is none": (
        "tokenizer.json",
        _tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(((("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "tokenizer.json",
    ),
    "a template of unknown tokens": (
        "tokenizer.json",
        _tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer.json",
    ),
    "added tokens in an object": (
        "tokenizer.json",
        _tokenizer(added_tokens={"a": 1}),
        "tokenizer.json",
    ),
    "settings: nothing": ("tokenizer_config.json", b"", _JSON),
    "settings: a list": ("tokenizer_config.json", b"[]", _JSON),
    "settings: not UTF-8": ("tokenizer_config.json", b'{"a": "\xff"}', _JSON),
    "settings: 100,000 brackets": ("tokenizer_config.json", b'{"a":' + b"[" * 100_000, _JSON),
    "settings: an integer of 10^5 digits": (
        "tokenizer_config.json",
        b'{"model_max_length": ' + b"9" * 100_000 + b"}",
        "JSON|digits",
    ),
    "settings: a length of text": (
        "tokenizer_config.json",
        top(model_max_length="long"),
        "model_max_length",
    ),
    "settings: a length of -1": (
        "tokenizer_config.json",
        top(model_max_length=-1),
        "model_max_length|positive|room|limit",
    ),
    "settings: a token that is not there": (
        "tokenizer_config.json",
        top(pad_token=["x"]),
        "pad_token|tokenizer_config",
    ),
    "settings: added tokens in a list": (
        "tokenizer_config.json",
        top(added_tokens_decoder=[1]),
        "added tokens|tokenizer_config",
    ),
    "settings: added tokens of numbers": (
        "tokenizer_config.json",
        top(added_tokens_decoder={"a": 1}),
        "added tokens",
    ),
    "settings: added tokens numbered by words": (
        "tokenizer_config.json",
        top(added_tokens_decoder={"x": {"content": "y"}}),
        "added tokens",
    ),
    "settings: more tokens as a number": (
        "tokenizer_config.json",
        top(extra_special_tokens=7),
        "special_tokens|tokenizer_config|added tokens",
    ),
}
"""Refused by `generate`, before any weight is read."""

VOCABULARIES: dict[str, tuple[dict[str, bytes], str]] = {
    "vocab.txt: nothing": ({"vocab.txt": b""}, "vocab.txt"),
    "vocab.txt: binary": ({"vocab.txt": bytes(range(256)) * 1_000}, "vocab.txt"),
    "vocab.txt: not UTF-8": ({"vocab.txt": b"[UNK]\n[CLS]\n[SEP]\n\xff\n"}, "vocab.txt"),
    "vocab.txt: no special tokens": ({"vocab.txt": b"[UNK]\na\nb\n"}, "vocab.txt"),
    "vocab.txt: one line of 50 MB": ({"vocab.txt": b"a" * 50_000_000}, "vocab.txt"),
    "vocab.json: nothing": ({"vocab.json": b"", "merges.txt": b""}, "vocab.json"),
    "vocab.json: a list": ({"vocab.json": b"[]", "merges.txt": b""}, "vocab.json"),
    "vocab.json: ids below zero": (
        {"vocab.json": b'{"<s>": -1, "</s>": 2}', "merges.txt": b""},
        "vocab.json",
    ),
    "vocab.json without merges.txt": ({"vocab.json": b'{"<s>": 0, "</s>": 1}'}, "merges.txt"),
    "merges.txt: of nothing known": (
        {"vocab.json": b'{"<s>": 0, "</s>": 1, "<pad>": 2}', "merges.txt": b"#version: 0.2\nx y\n"},
        "merges.txt|vocab.json",
    ),
    "merges.txt: lines of one part": (
        {"vocab.json": b'{"<s>": 0, "</s>": 1, "<pad>": 2}', "merges.txt": b"x\n"},
        "merges.txt|vocab.json",
    ),
    "merges.txt: binary": (
        {"vocab.json": b'{"<s>": 0, "</s>": 1, "<pad>": 2}', "merges.txt": bytes(range(256)) * 99},
        "merges.txt|vocab.json",
    ),
    "a SentencePiece model of nothing": ({"spiece.model": b""}, "spiece.model"),
    "a SentencePiece model of noise": ({"spiece.model": bytes(range(256)) * 100}, "spiece.model"),
    "a SentencePiece model of 2^63 bytes": (
        {"spiece.model": b"\x0a" + b"\xff" * 8 + b"\x7f"},
        "spiece.model",
    ),
    "a SentencePiece model without an end": ({"spiece.model": b"\xff" * 100_000}, "spiece.model"),
}
"""Folders that hold these tokenizer files and no others."""
