"""From what the user names to a folder on this machine: a folder, a file, or a hub repository."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_encdec.errors import CheckpointError, ConfigError

_TEXT = ["*.json", "vocab.txt", "merges.txt", "*.model"]


def resolve(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Return the local folder (or weight file) for a path or a hub repository id.

    A repository's configuration, tokenizer files and weights (safetensors where it has them) are
    downloaded through `huggingface_hub` into its cache, and found there again offline.

    Raises:
        CheckpointError: no such folder, and no such repository can be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve() if path.is_dir() else path.absolute()
    text = str(name)
    if (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or path.suffix in (".bin", ".json", ".safetensors")
    ):
        raise CheckpointError(f"{text}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    def fetch(*patterns: str) -> Path:
        folder = snapshot_download(
            text, revision=revision, cache_dir=cache_dir, allow_patterns=[*_TEXT, *patterns]
        )
        return Path(folder)

    try:
        folder = fetch("model.safetensors", "model-*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("pytorch_model*.bin")
    except (HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{text} is neither a folder here nor a hub repository that could be fetched: {reason}"
        ) from None
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is missing, too large, not JSON or not an object.
    """
    try:
        if path.stat().st_size > 50_000_000:
            raise ConfigError(f"{path} is {path.stat().st_size} bytes long; no configuration is")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object; got {type(data).__name__}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name and rename it."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it and rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
