"""The folder that a preparation writes to: whose it is, who may write, and what a killed process has left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hqlt.data.manifest import MANIFEST, PROGRESS, Manifest
from hqlt.files import sole_user, write_text

SETTINGS = "settings.json"


def finished_before(output: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that is complete."""
    if not (output / MANIFEST).is_file():
        return None
    manifest = Manifest.read(output)
    _same(output, manifest.settings, settings)
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    return manifest


def _same(output: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        name if name in ("sources", "changed") else f"{name}={saved.get(name)!r} instead of {wanted[name]!r}"
        for name in wanted
        if saved.get(name) != wanted[name]
    ]
    if differing:
        names = ", ".join(differing).replace("changed", "times of change of the sources")
        raise ValueError(f"{output} was begun with other settings ({names}); choose another folder or delete it")


@contextmanager
def work_folder(output: Path, settings: dict[str, Any], changed: str) -> Iterator[None]:
    """The output folder while this process alone writes to it; what was half-written is gone afterwards."""
    progress = output / PROGRESS
    if output.exists() and not progress.is_dir() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already and holds something else; choose a new folder")
    with sole_user(progress):
        identity = settings | {"changed": changed}
        if (progress / SETTINGS).is_file():
            _same(output, json.loads((progress / SETTINGS).read_text(encoding="utf-8")), identity)
        else:
            write_text(progress / SETTINGS, json.dumps(identity))
        _sweep(output)
        try:
            yield
        finally:
            _sweep(output)


def _sweep(output: Path) -> None:
    """Remove what a killed process or worker was writing."""
    for path in output.iterdir():
        if re.match(r"\.(\d{5,}\.(tokens|documents)|manifest\.json|tokenizer\.json)\.", path.name):
            path.unlink(missing_ok=True)
