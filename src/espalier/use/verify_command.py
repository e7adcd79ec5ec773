"""The command `espalier verify`: an adapter, a merged model's folder or GGUF files, told apart by what lies there."""

from __future__ import annotations

import json
from pathlib import Path

from espalier.errors import UsageError
from espalier.model.adapter_settings import CONFIG
from espalier.use.verify import Finding, verify
from espalier.use.verify_merged import verify_gguf, verify_merged


def findings(path: str, model_path: str | None, trust_remote_code: bool, use_cpu: bool) -> list[Finding]:
    """What there is to say about `path`. Raises UsageError for a base where none is compared with."""
    place = Path(path).expanduser()
    is_adapter = (place / CONFIG).is_file()
    is_gguf = place.suffix == ".gguf" or (place.is_dir() and any(place.glob("*.gguf")))
    if not is_adapter and (is_gguf or (place / "config.json").is_file()):
        if model_path is not None:
            raise UsageError("a merged model is compared with no base", where="--model_path", todo="Leave it out.")
        return verify_gguf(place) if is_gguf else verify_merged(place, trust_remote_code)
    return verify(place, model_path, trust_remote_code, use_cpu)


def run_verify(path: str, model_path: str | None, trust_remote_code: bool, use_cpu: bool, as_json: bool) -> int:
    """The command: prints the findings; 0, or 1 where one is a problem."""
    from espalier.model.embedded import quiet_transformers

    with quiet_transformers():
        found = findings(path, model_path, trust_remote_code, use_cpu)
    if as_json:
        print(json.dumps([{"level": entry.level, "text": entry.text} for entry in found], ensure_ascii=False))
    else:
        for entry in found:
            print(f"{entry.level:<8} {entry.text}")
    return int(any(entry.level == "problem" for entry in found))
