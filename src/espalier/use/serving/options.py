"""The options of `espalier serve`, their defaults, and what can be said about them before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from espalier.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXTRA = ("fastapi", "uvicorn", "pydantic")


@dataclass(frozen=True)
class ServeOptions:
    """adapters: folders, or name=folder. max_queue: requests that may wait while one is answered."""

    adapters: tuple[str, ...] = ()
    model_path: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 16
    max_new_tokens: int = 1024
    template: str | None = None
    use_cpu: bool = False
    trust_remote_code: bool = False


def check_options(options: ServeOptions) -> dict[str, Path]:
    """Name -> folder of every adapter. Raises UsageError for wrong options, all together, and AdapterError."""
    from espalier.model.load_adapter import check_adapter_folder  # here, since the command line imports this file

    lacking = [name for name in EXTRA if find_spec(name) is None]
    if lacking:
        raise UsageError(
            f"espalier serve needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed",
            todo='pip install "espalier-lm[serve]"',
        )
    wrong = []
    if not 0 <= options.port <= 65535:
        wrong.append(f"--port {options.port}: must be from 0 (any that is free) to 65535")
    if options.api_key is not None and not options.api_key.strip():
        wrong.append("--api_key is empty: leave it out to serve without a key")
    if options.max_queue < 0:
        wrong.append(f"--max_queue {options.max_queue}: must be 0 (nobody waits) or more")
    if options.max_new_tokens < 1:
        wrong.append(f"--max_new_tokens {options.max_new_tokens}: must be 1 or more")
    named: dict[str, str] = {}
    for given in options.adapters:
        name, folder = _named(given)
        if not name:
            wrong.append(f"--adapter {given}: the name before '=' is empty")
        elif not folder:
            wrong.append(f"--adapter {given}: the folder after '=' is empty")
        elif name in named:
            wrong.append(f"--adapter {given}: the name {name!r} is taken by {named[name]}; give name=folder")
        named.setdefault(name, folder)
    if not named:
        wrong.append("--adapter is missing: an adapter's folder, or name=folder")
    if wrong:
        raise UsageError(
            wrong[0] if len(wrong) == 1 else f"{len(wrong)} options are wrong", details=wrong[1:] and wrong
        )
    return {name: check_adapter_folder(folder) for name, folder in named.items()}


def _named(given: str) -> tuple[str, str]:
    """(name, folder) of name=folder; a folder alone is called by its own name, also where that holds a '='."""
    name, equals, folder = given.partition("=")
    if not equals or Path(given).expanduser().is_dir():
        return Path(given).expanduser().resolve().name, given
    return name, folder
