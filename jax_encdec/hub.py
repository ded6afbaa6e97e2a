"""From what the user names to a folder on this machine: a folder, a file, or a hub repository.

A repository's files are listed once; its configuration, its tokenizer files and the first of the
weight formats below are downloaded through `huggingface_hub` into its cache, and nothing else is.
Without a network the cache serves. Whatever goes wrong becomes one sentence, in which no token ever
appears. At the end: JSON in, with limits, and files out, whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax_encdec.convert.readers import FORMATS, MAX_INDEX, NOT_WEIGHTS
from jax_encdec.errors import CheckpointError, ConfigError, EncDecError, InputError, nearest

Token = str | bool | None
"""A hub token; None: the stored one (HF_TOKEN, `hf auth login`), if any; False: none at all."""

DIGESTS = "SHA256SUMS"
_PLAIN = re.compile(r"\w[\w.+-]*")
_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")
_ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*")
_MAX_CONFIG = 2_000_000
_MAX_DEPTH = 64
_MAX_DIGITS = 40


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """Return the local folder (or weight file) for a path or a hub repository id.

    Args:
        name: a path, which wins, or an id such as "google-bert/bert-base-uncased".
        revision: branch, tag or commit of a repository; None: its main branch.
        token: for repositories that ask for one; by default the stored one.
        cache_dir: where downloads are kept; by default where `huggingface_hub` keeps them.
        local_files_only: take what the cache holds and ask nobody, as with HF_HUB_OFFLINE=1.
        weights: False: configuration and tokenizer are enough.

    Raises:
        CheckpointError: no such folder, and no such repository can be had.
        InputError: an argument is none of these.
    """
    path, text = Path(name).expanduser(), str(name)
    try:
        if path.exists():
            return path.resolve() if path.is_dir() else path.absolute()
    except (OSError, ValueError):  # too long a name, or one with a null character
        raise CheckpointError(f"{text[:80]!r} is neither a path nor a repository id") from None
    if address := _ADDRESS.fullmatch(text):
        raise CheckpointError(f"{text} is a web address; pass the repository's id {address[1]!r}")
    if (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or path.suffix in (".bin", ".json", *(f".{suffix}" for suffix, *_ in FORMATS))
    ):
        raise CheckpointError(f"{text}: no such file or folder{_nearby(path)}")
    if not _ID.fullmatch(text) or "--" in text or ".." in text or len(text) > 96:
        raise CheckpointError(
            f"{text[:120]!r} is neither a folder here{_nearby(path)} nor a hub repository id, "
            f"which reads owner/name"
        )
    if revision is not None and (not re.fullmatch(r"[\w./-]+", revision) or ".." in revision):
        raise InputError(f"revision must be a branch, tag or commit; got {revision[:80]!r}")
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        # Not shown, whatever it is.
        raise InputError("the token must be a word of letters and digits such as hf_...")
    return _Repository(text, revision, token, cache_dir, weights).fetch(local_files_only)


def _nearby(path: Path) -> str:
    try:
        return nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""


# Repositories ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Repository:
    """One revision of a repository, and how it may be had."""

    id: str
    revision: str | None
    token: Token = field(repr=False)
    cache_dir: str | Path | None
    weights: bool

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id} at revision {self.revision!r}"

    def fetch(self, local_files_only: bool) -> Path:
        """The folder of the cache that holds it all, what is missing there being downloaded."""
        from huggingface_hub import HfApi, constants

        if local_files_only:
            return self._cached("downloads are switched off (local_files_only, --offline)")
        if constants.HF_HUB_OFFLINE:
            return self._cached("downloads are switched off (HF_HUB_OFFLINE)")
        api = HfApi(endpoint=_endpoint(), token=self.token)
        # What the library can raise is open-ended: its own errors, those of the HTTP library of the
        # day, and whatever an answer that is none brings about. All of it is "could not be had".
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = api.model_info(self.id, revision=self.revision, timeout=timeout)
            names = {str(entry.rfilename) for entry in info.siblings or ()}
        except Exception as error:
            if not _is_outage(error):
                raise self._refused(error) from None
            return self._cached(f"the hub cannot be asked ({self._reason(error)})")
        files = self._choose(names, f"{self} holds")
        folder = self._download(files)
        if shards := _shards(folder, files[-1]):
            if lost := sorted(set(shards) - names):
                raise CheckpointError(
                    f"{self} is incomplete: {files[-1]} names {lost[0]!r}, which is not there"
                )
            self._download(shards, folder.name)
        return folder

    def _choose(self, names: Collection[str], who: str) -> list[str]:
        """Of all files those that are needed, the weight file or index last."""
        from jax_encdec.tokenizer_files import FILES

        folders = ("", "encoder_tokenizer/", "decoder_tokenizer/")
        known = ["config.json", "generation_config.json", DIGESTS]
        known += [folder + name for folder in folders for name in FILES]
        files = [name for name in known if name in names]
        if not self.weights:
            if not files:
                raise CheckpointError(f"{who} neither a tokenizer nor a config.json")
            return files
        there = ", ".join(sorted(n for n in names if _PLAIN.fullmatch(n))[:8]) or "nothing"
        if "config.json" not in names:
            raise CheckpointError(f"{who} no model: config.json is not among its files ({there})")
        for _, *pair in FORMATS:
            for name in pair:
                if name in names:
                    return [*files, name]
        for suffix, *_ in FORMATS:
            plain = [n for n in sorted(names) if _PLAIN.fullmatch(n) and n not in NOT_WEIGHTS]
            lone = [n for n in plain if n.endswith(f".{suffix}")]
            if len(lone) == 1:
                return [*files, lone[0]]
        looked = ", ".join(single for _, single, _ in FORMATS)
        raise CheckpointError(
            f"{who} no weights that can be read: looked for {looked}; got {there}"
        )

    def _download(self, files: Collection[str], commit: str | None = None) -> Path:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    self.id,
                    revision=commit or self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    endpoint=_endpoint(),
                    allow_patterns=list(files),
                    tqdm_class=_bar_class(),
                )
            )
        except Exception as error:
            if not _is_outage(error):
                raise self._refused(error) from None
            raise self._broken_off(self._reason(error)) from None
        # Without an answer the library is content with what an earlier download left.
        if lost := [name for name in files if not (folder / name).is_file()]:
            raise self._broken_off(f"{lost[0]} did not arrive")
        return folder

    def _broken_off(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the download of {self} broke off ({reason}); call again: files that have arrived "
            f"are kept"
        )

    # Without the hub -----------------------------------------------------------------------------

    def _cached(self, why: str) -> Path:
        folder = self._snapshot()
        if folder is None:
            there = self._cached_revisions()
            held = f"; it holds {', '.join(there)}" if there else ""
            raise CheckpointError(
                f"{self} is not in the cache {self._cache()}{held}, and {why}; "
                f"download it once with a network, or pass a local folder"
            )
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        try:
            files = self._choose(names, f"the cache's copy of {self} has")
            lost = sorted(set(_shards(folder, files[-1])) - set(names))
        except CheckpointError as error:
            raise CheckpointError(f"{error}, and {why}; complete it with a network") from None
        if lost:
            raise CheckpointError(
                f"the cache's copy of {self} lacks {lost[0]}, and {why}; complete it with a network"
            )
        return folder

    def _snapshot(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        from jax_encdec.tokenizer_files import FILES

        for name in ("config.json", *FILES):
            found = try_to_load_from_cache(
                self.id, name, cache_dir=self._cache(), revision=self.revision
            )
            if isinstance(found, str):
                return Path(found).parent
        return None

    def _cached_revisions(self) -> list[str]:
        refs = self._cache() / f"models--{self.id.replace('/', '--')}" / "refs"
        return sorted(p.relative_to(refs).as_posix() for p in refs.rglob("*") if p.is_file())

    def _cache(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(self.cache_dir or HF_HUB_CACHE).expanduser()

    # What the hub answers ------------------------------------------------------------------------

    def _refused(self, error: Exception) -> EncDecError:
        """What an answer means and what to do about it."""
        from huggingface_hub import errors, get_token

        given = self.token if isinstance(self.token, str) else self.token is None and get_token()
        status = _status(error)
        page = f"{_endpoint() or 'https://huggingface.co'}/{self.id}"
        if isinstance(error, errors.LocalTokenNotFoundError):
            text = (
                f"{self}: token=True needs a stored token, and there is none: run `hf auth login`"
            )
        elif isinstance(error, errors.GatedRepoError):
            text = f"{self.id} is gated: ask for access at {page}, " + (
                "with the account that the token belongs to"
                if given
                else "and pass that account's token (token=, --token, HF_TOKEN)"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            text = (
                f"{self.id} has no revision {self.revision or 'main'!r}; its branches and tags "
                f"are listed at {page}/tree/main"
            )
        elif isinstance(error, errors.DisabledRepoError):
            text = f"{self.id} has been disabled on the hub"
        elif status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
            text = f"{self}: the hub does not accept the token; pass a valid one, or token=False"
        elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            text = (
                f"the hub has no repository {self.id}, or it is private: check the spelling, "
                + (
                    "or pass the token of an account that may read it"
                    if given
                    else "or pass a token (token=, --token, HF_TOKEN)"
                )
            )
        elif status == 403:
            text = f"{self}: the hub denies access (403); the token lacks the permission to read it"
        else:
            text = f"{self} could not be fetched from the hub: {self._reason(error)}"
        if self._snapshot() is not None:
            text += "; local_files_only=True (--offline) takes the copy in the cache"
        return CheckpointError(text)

    def _reason(self, error: Exception) -> str:
        """An error in a few words, of which none is a token."""
        from huggingface_hub import get_token

        status = _status(error)
        if status is not None:
            return "too many requests: wait a while" if status == 429 else f"it answers {status}"
        text, kind = " ".join(str(error).split()), type(error).__name__
        if not text or any(isinstance(s, str) and s in text for s in (self.token, get_token())):
            return kind
        return f"{kind}: {text[:200].rstrip('. ')}"


def _endpoint() -> str | None:
    """The hub's address, if it is another; read when called, not when first imported."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def _bar_class() -> Any:
    """The library's progress bar, for terminals only."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{"disable": None, **options})

    return Bar


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what it came of, stands for."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _is_outage(error: Exception) -> bool:
    """Whether it is the network or the server, rather than the question."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    # A page that asks for a login, as hotel networks answer, is an outage as well.
    return not isinstance(error, LocalTokenNotFoundError)


def _shards(folder: Path, index: str) -> list[str]:
    """The files that an index of shards names; none if it is no index but the weights."""
    if not index.endswith(".index.json"):
        return []
    where = folder / index
    shards = read_json(where, limit=MAX_INDEX).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(n, str) and _PLAIN.fullmatch(n) for n in names):
        raise CheckpointError(
            f"{where} is no index of shards: expected a weight_map from tensors to the plain names "
            f"of files beside it"
        )
    return sorted(set(names))


# Files -------------------------------------------------------------------------------------------


def read_json(path: Path, *, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """Read a JSON object strictly: a key counts once, and a number is finite.

    Raises:
        ConfigError: the file is missing, longer than `limit` bytes, not JSON or not an object.
    """
    data = json_object(read_bytes(path, limit), str(path))
    _check_values(data, str(path))
    return data


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        ConfigError: it is anything else.
    """
    try:
        # Asked first: opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path} is not a file")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > limit:
        raise ConfigError(f"{path} is longer than {limit} bytes, which no such file is")
    return content


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys, NaN and what overflows."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{where} names {twice[:80]!r} twice")
        return found

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ConfigError(f"{where} holds {text[:20]}, which is not a finite number")
        return value

    def integer(text: str) -> int:
        if len(text) > _MAX_DIGITS:
            raise ConfigError(f"{where} holds an integer of {len(text)} digits")
        return int(text)

    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=once,
            parse_float=number,
            parse_int=integer,
            parse_constant=number,
        )
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not readable as JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must hold a JSON object; got {type(value).__name__}")
    return value


def _check_values(data: Mapping[str, Any], where: str) -> None:
    """Refuse what would fail later, where nobody knows any more which file it came from."""
    level: list[Any] = [data]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:
                    raise ConfigError(f"{where} holds text that is not Unicode") from None
        level = inner
        if not level:
            return
    raise ConfigError(f"{where} nests more than {_MAX_DEPTH} levels deep")


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
