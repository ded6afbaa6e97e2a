"""The card of a trained model, its README.md: what it is, how good, how to use it, how to make it.

A pure function of what the files of its run say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from jax_encdec.training import report


def model_card(record: report.Record, *, step: int, whole: bool, own_target_tokenizer: bool) -> str:
    """The README.md of model/.

    Args:
        record: of the run.
        step: whose parameters these are.
        whole: a whole model (BART, T5, ...), not a pair of two; opened by another class.
        own_target_tokenizer: the target side has a tokenizer of its own.
    """
    start = record.start
    model = start.get("model", {})
    bases = [str(base) for base in model.get("base") or ()]
    front = ["---", "library_name: jax_encdec", "pipeline_tag: text2text-generation"]
    hubs = [base for base in bases if base.count("/") == 1 and not base.startswith((".", "/", "~"))]
    if hubs:
        front += ["base_model:", *(f"- {json.dumps(base)}" for base in dict.fromkeys(hubs))]
    front += ["tags:", "- encoder-decoder", "- jax", "---", ""]
    parts = ["\n".join(front), f"# {report.title(record)}\n", _what(record, bases, step)]
    if record.last:
        split = "test" if record.test else "validation"
        parts.append(f"## Results\n\nOn the {split} data, after step {record.last['step']:,}:\n")
        parts.append(report.table(("", "model", "lead baseline"), report.score_rows(record.last)))
        if any(name.startswith("lead_") for name in record.last):
            parts.append("The lead baseline takes the beginning of the source as its summary.\n")
    parts.append("## Use\n")
    parts.append(_usage(whole, own_target_tokenizer))
    parts.append("## Training\n")
    parts.append(report.facts_table(record))
    parts.append("## Reproduce\n")
    parts.append(report.reproducibility(record))
    parts.append(
        f"With this configuration, `jax-encdec train config.toml`:\n\n"
        f"```toml\n{report.shown_config(record)}\n```\n"
    )
    return "\n".join(parts)


def _what(record: report.Record, bases: Sequence[str], step: int) -> str:
    made = f"It started from {' and '.join(dict.fromkeys(bases))}. " if bases else ""
    return (
        f"A sequence-to-sequence model, trained with jax_encdec for {step:,} steps. {made}"
        f"The files are those of PyTorch Transformers.\n"
    )


def _usage(whole: bool, own_target_tokenizer: bool) -> str:
    kind = "AutoModelForSeq2SeqLM" if whole else "EncoderDecoderModel"
    target = "tokenizer"
    second = ""
    if own_target_tokenizer:
        target = "target_tokenizer"
        second = (
            f'{target} = AutoTokenizer.from_pretrained(folder, subfolder="decoder_tokenizer")\n'
        )
    return (
        "With jax_encdec:\n\n"
        "```python\n"
        "from jax_encdec import Text2TextPipeline\n\n"
        'pipe = Text2TextPipeline.from_pretrained("this-folder")\n'
        'pipe(["a text", "another"])\n'
        "```\n\n"
        "With PyTorch Transformers:\n\n"
        "```python\n"
        f"from transformers import AutoTokenizer, {kind}\n\n"
        'folder = "this-folder"\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"{second}"
        f"model = {kind}.from_pretrained(folder)\n"
        'inputs = tokenizer(["a text", "another"], padding=True, return_tensors="pt")\n'
        "made = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask)\n"
        f"{target}.batch_decode(made, skip_special_tokens=True)\n"
        "```\n"
    )
