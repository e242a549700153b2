"""manifest.json of a run: recipe, model and data fingerprints, environment, state and results of stages.

{
  "version": 1, "written_by": "aquila_pd 0.1.0",
  "recipe":      {"digest", "text", "overrides", "values": all keys, "written": the same with paths as in the file},
  "model":       {"folder", "digest", "files": {name: {"bytes", "sha256", "mtime_ns"}}},
  "environment": {"devices", "device", "versions": {...}}; what the run was started with, "resumed" what it went on with
  "stages":      {name: {"state": "waiting" | "running" | "done", "data": ..., "steps", "last_loss", "result", ...}}
}
It is written whole at each change. Paths of results are relative to the run folder, which may be moved.
"""

import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.io.manifest import MANIFEST as CONVERSION
from ...runtime.versions import NAME, VERSION, pin
from ...utils.errors import CheckpointError, RecipeError, TrainingError, report
from ...utils.files import hash_file, read_object, write_json
from .resuming import WAITING, differences

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

FILE = "manifest.json"
FORMAT = 1
RUNNING, DONE = "running", "done"
HASHED_AT_ONCE = 4  # files; hashing leaves the interpreter free
ADVICE = "Go on as it was with `aquila-pd sft {folder}`, or give this recipe another output."


# ------------------------------------------------------------------------------------------------------------ facts


def versions() -> dict[str, str]:
    """What is installed of the packages that decide about numbers; "-" for what is not there."""
    paddle = pin("paddlepaddle")
    names = [next(filter(_installed, (paddle.name, *paddle.instead)), paddle.name), "paddlenlp", "numpy"]
    return {NAME: VERSION, "python": platform.python_version(), **{name: _installed(name) or "-" for name in names}}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment(*, devices: int, device: str) -> dict:
    """What a run is computed with. devices: of the whole run; device: the name of one."""
    return {"devices": devices, "device": device, "versions": versions()}


def describe_model(folder: Path, known: Mapping | None = None) -> dict:
    """The files of a model folder with their hashes, and one digest for all of them.

    known: what an earlier call said; a file with the size and time it had then is not read again.
    Raises CheckpointError when there is no model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json: it is no model folder. Convert one with `aquila-pd convert`."
        )
    old = (known or {}).get("files", {})
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        files = dict(pool.map(lambda path: (path.name, _file_facts(path, old.get(path.name, {}))), paths))
    # the converter's own manifest says where a model comes from, not what it is
    listed = [f"{name} {facts['sha256']}" for name, facts in files.items() if name != CONVERSION]
    return {"folder": str(folder), "digest": sha256("\n".join(listed).encode()).hexdigest(), "files": files}


def _file_facts(path: Path, old: Mapping) -> dict:
    status = path.stat()
    same = old.get("bytes") == status.st_size and old.get("mtime_ns") == status.st_mtime_ns
    hashed = old["sha256"] if same else hash_file(path)
    return {"bytes": status.st_size, "sha256": hashed, "mtime_ns": status.st_mtime_ns}


# --------------------------------------------------------------------------------------------------------- the file


class Manifest:
    """The manifest of one run, in memory and on disk the same. Only rank 0 writes."""

    def __init__(self, path: Path, content: dict):
        self.path, self.content = path, content

    @classmethod
    def start(cls, folder: Path, recipe: "Recipe", *, model: Mapping, environment: Mapping) -> "Manifest":
        """The manifest of a run that begins; written at once."""
        content = {
            "version": FORMAT,
            "written_by": f"{NAME} {VERSION}",
            "recipe": _recipe_facts(recipe),
            "model": dict(model),
            "environment": dict(environment),
            "resumed": [],
            "stages": {stage.name: {"state": WAITING} for stage in recipe.stages},
        }
        manifest = cls(folder / FILE, content)
        manifest.write()
        return manifest

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """The manifest in a run folder. Raises TrainingError when there is none that can be read."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise TrainingError(f"{folder} holds no {FILE}: it is no run folder. Give the output folder of a run.")
        content = read_object(path, TrainingError)
        if content.get("version") != FORMAT or not {"recipe", "model", "environment", "stages"} <= content.keys():
            raise TrainingError(
                f"{path} is not a manifest of this version (format {content.get('version')!r}, here {FORMAT}). "
                f"Go on with the version of {NAME} that wrote it: {content.get('written_by')!r}."
            )
        return cls(path, content)

    def write(self) -> None:
        write_json(self.path, self.content, fsync=True)

    @property
    def recipe(self) -> "Recipe":
        """The recipe the run is following."""
        from ..recipe.load import load_values  # loads pydantic and YAML, which an export does not always need

        kept = self.content["recipe"]
        return load_values(kept["values"], text=kept["text"], overrides=kept["overrides"], written=kept["written"])

    def resume(self, recipe: "Recipe", *, model: Mapping, environment: Mapping, record: bool = True) -> list[str]:
        """Go on with a recipe, which may be the old one; returns the differences as lines.

        record: false for a look alone, after which the manifest is what it was.

        Raises RecipeError, with everything, when it would not be the same run any more.
        """
        before = self.content["environment"] if not self.content["resumed"] else self.content["resumed"][-1]
        found = differences(self.content["recipe"]["written"], recipe.written, stages=self.content["stages"])
        found.refused += _other_model(self.content["model"], model)
        if found.refused:
            advice = ADVICE.format(folder=self.path.parent)
            raise RecipeError(report(f"The run in {self.path.parent} cannot go on as asked:", found.refused, advice))
        said = found.said + _environment_lines(before, environment)
        if not record:
            return said
        self.content["recipe"] = _recipe_facts(recipe)
        self.content["model"] = dict(model)
        self.content["resumed"].append(dict(environment))
        known = self.content["stages"]
        self.content["stages"] = {stage.name: known.get(stage.name, {"state": WAITING}) for stage in recipe.stages}
        self.write()
        return said

    def stage(self, name: str) -> dict:
        """What is known of a stage."""
        return self.content["stages"][name]

    def update(self, stage: str, **facts: object) -> None:
        """Put facts about a stage down: state, data, steps, losses, result (relative to the run folder), ..."""
        self.content["stages"][stage].update(facts)
        self.write()


def _recipe_facts(recipe: "Recipe") -> dict:
    return {
        "digest": recipe.digest,
        "text": recipe.text,
        "overrides": list(recipe.overrides),
        "values": recipe.values(),
        "written": recipe.written,
    }


def _other_model(old: Mapping, new: Mapping) -> list[str]:
    """Lines for the files that are not what the run began with; the folder may be another."""
    if old["digest"] == new["digest"]:
        return []
    names = sorted(old["files"].keys() | new["files"].keys())
    sha = {name: [side["files"].get(name, {}).get("sha256") for side in (old, new)] for name in names}
    changed = [name for name, (one, other) in sha.items() if one != other and name != CONVERSION]
    return [f"model: {new['folder']}/{name} is not what the run began with" for name in changed]


def _environment_lines(before: Mapping, now: Mapping) -> list[str]:
    """Lines for what computes differently now; the run goes on, and its numbers may differ in the last digits."""
    flat = [{"devices": side["devices"], "device": side["device"], **side["versions"]} for side in (before, now)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return [
        f"{key}: was {flat[0].get(key, '-')}, is {flat[1].get(key, '-')}; losses may differ in their last digits"
        for key in keys
        if flat[0].get(key) != flat[1].get(key)
    ]
