"""Every byte of prepared tokens against the checksums of the manifest."""

from __future__ import annotations

from pathlib import Path

from hqlt.data.manifest import AGAIN, KINDS, Manifest, bad_files, sha256_of
from hqlt.models.tokenizer import TOKENIZER
from hqlt.progress import progress_bar


def check(directory: Path) -> Manifest:
    """Read all files of a folder that ``hqlt data prepare`` has written.

    Returns:
        the manifest, if all is well.

    Raises:
        FileNotFoundError: no such folder, or an unfinished preparation.
        ValueError: files that are missing, or have another size or checksum; all are named.
    """
    manifest = Manifest.read(directory)
    bad = bad_files(directory, manifest)
    problems = [str(problem) for problem in bad.values()]
    files = {f"{shard.name}.{kind}": shard.sha256[kind] for shard in manifest.shards for kind in KINDS}
    files |= {} if manifest.tokenizer is None else {TOKENIZER: manifest.tokenizer}
    sound = [name for name in files if name not in bad]
    with progress_bar("check", sum((directory / name).stat().st_size for name in sound), unit="B") as bar:
        for name in sound:
            if sha256_of(directory / name, bar.update) != files[name]:
                problems.append(f"{directory / name} is damaged: its checksum differs from the manifest's; {AGAIN}")
    if problems:
        raise ValueError("\n".join(problems))
    return manifest
