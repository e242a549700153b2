"""Manifest of an output folder: size and sha256 of each file, for a later integrity check.

It holds no time, path or machine: the same weights and options give the same manifest, byte for byte.
"""

from pathlib import Path, PurePosixPath

from ...runtime.versions import NAME, VERSION
from ...utils.errors import CheckpointError
from ...utils.files import files_under, hash_file, read_object, write_json
from ..layout import CONFIG
from ..plan import Plan
from .journal import OF_THE_RUN
from .pipeline import in_order

MANIFEST = "conversion-manifest.json"


def write_manifest(folder: Path, plan: Plan, hashes: dict[str, str]) -> None:
    """Write the manifest of a staging folder's files, lock and journal left out. hashes: those already known."""
    files = {}
    for name in files_under(folder):
        if name not in (MANIFEST, *OF_THE_RUN):
            path = folder / name
            files[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or hash_file(path)}
    about = {
        "written_by": f"{NAME} {VERSION}",
        "target": {"framework": plan.target.framework, "architecture": plan.target.architecture},
        "tensors": len(plan.moves),
        "files": files,
    }
    write_json(folder / MANIFEST, about)


def read_manifest(folder: Path) -> dict:
    """File -> {"bytes", "sha256"} of a folder with a manifest; a file is a path inside it. Raises CheckpointError."""
    found = read_object(folder / MANIFEST, CheckpointError).get("files")
    if (
        not isinstance(found, dict)
        or CONFIG not in found
        or not all(
            isinstance(about, dict) and isinstance(about.get("sha256"), str) and _is_inside(name)
            for name, about in found.items()
        )
    ):
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest. Convert again, or fetch the folder again.")
    return found


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and path.as_posix() == name and not path.is_absolute() and ".." not in path.parts


def check_manifest(folder: Path, *, workers: int) -> tuple[int, list[str], list[str]]:
    """Hash the files of a manifest: count that match, a finding for each that does not, files it does not name."""
    expected = read_manifest(folder)
    present = [name for name in sorted(expected) if (folder / name).is_file()]
    findings = [f"missing     {name}" for name in sorted(set(expected) - set(present))]
    hashes = in_order(lambda name: (name, hash_file(folder / name)), present, workers=workers)
    differing = [name for name, digest in hashes if digest != expected[name]["sha256"]]
    findings += [f"changed     {name}: its sha256 is not the manifest's" for name in differing]
    others = sorted(set(files_under(folder)) - {*expected, MANIFEST})
    return len(present) - len(differing), findings, others
