"""Resume compatibility: which recipe keys may change under way, and which make another run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...utils.errors import shown_value

# Keys of a recipe, and of a stage, that change nothing about what is learned.
FREE = {"name", "output", "export", "log_every", "visualdl", "save_every", "eval_every", "keep"}
# Keys of a stage that change how it is computed, and with it the last digits of a loss, and draws of dropout.
COMPUTED = {"micro_batch", "recompute", "sharding"}
# Keys of a stage that its prepared rows are made by.
PREPARED = {"data", "template", "length"}
WAITING = "waiting"  # the state of a stage that has not begun


@dataclass
class Differences:
    """Differences from the run so far: lines for those allowed (`said`), and for those not (`refused`)."""

    said: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def differences(old: Mapping, new: Mapping, *, stages: Mapping[str, Mapping]) -> Differences:
    """Compare two recipes as Recipe.written has them.

    stages: name -> what the manifest knows of it: "state", and "data" once its rows are prepared. A stage that has not
    begun may be changed, but for what its prepared rows were made by; stages may be added at the end.
    `model` is not compared: what lies in its folder is (manifest.py).
    """
    found = Differences()
    for key in sorted(old.keys() | new.keys() - {"stages", "model"}):
        if key not in ("stages", "model") and old.get(key) != new.get(key):
            (found.said if key in FREE else found.refused).append(_line(key, old.get(key), new.get(key)))
    before, after = ([stage["name"] for stage in recipe["stages"]] for recipe in (old, new))
    begun = [name for name in before if stages.get(name, {}).get("state", WAITING) != WAITING]
    if after[: len(begun)] != begun:
        found.refused.append(f"stages: {', '.join(begun)} have begun, now there are {', '.join(after)}")
        return found
    if after != before:
        found.said.append(f"stages: there were {', '.join(before)}, now there are {', '.join(after)}")
    olds = {stage["name"]: stage for stage in old["stages"]}
    for stage in new["stages"]:
        if stage["name"] in olds:
            _compare_stage(olds[stage["name"]], stage, stages.get(stage["name"], {}), found)
    return found


def _compare_stage(old: Mapping, new: Mapping, known: Mapping, found: Differences) -> None:
    waiting = known.get("state", WAITING) == WAITING
    for path, before, after in _leaves(old, new):
        key = path.partition(".")[0]
        line = _line(f"{new['name']}.{path}", before, after)
        if key in FREE and not (key == "eval_every" and new["keep_best"]):  # another best one would be found
            found.said.append(line)
        elif key in COMPUTED:
            found.said.append(f"{line}; losses may differ in their last digits from here on")
        elif waiting and (key not in PREPARED or not known.get("data")):
            found.said.append(line)
        else:
            found.refused.append(line)


def _leaves(old: Mapping, new: Mapping, path: str = "") -> Iterator[tuple[str, object, object]]:
    """(path, old value, new value) of everything that differs, mapping by mapping."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        here = f"{path}.{key}" if path else key
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _leaves(before, after, here)
        elif before != after:
            yield here, before, after


def _line(path: str, before: object, after: object) -> str:
    return f"{path}: was {shown_value(before)}, is {shown_value(after)}"
