"""DataSpec and Source: the data settings of a recipe and of `aquila-pd data`.

No file is opened here; what can be judged from the values alone is, all findings at once. The words beside each key
stand in docs/sft.md and recipes/recipe.schema.json, too.
"""

from typing import Annotated

from pydantic import AfterValidator

from ..utils.errors import DataError
from ..utils.validation import choice, contradiction, flag, number, section, settings, several, text, whole, wrong

FORMATS = ("auto", "infinity", "openai", "alpaca", "paddlenlp")
OVERLONG = ("split", "truncate", "drop")
DEDUPLICATE = ("exact", "near", "none")
SHARPEST, LOOSEST = 0.99, 0.5  # thresholds of near-duplicates that signatures of 128 numbers can tell apart
HEAVIEST = 1000.0  # weight: a row seen more often in one epoch is a mistake in a file, not a wish

WORDS = text(min_length=1)
_settings = settings(DataError, "These settings of the data cannot be:", "Nothing was read.")


@_settings
class Source:
    """Files that belong together."""

    files: several(WORDS, "paths and globs", least=1)
    format: choice(FORMATS, "of the rows; `auto`: row by row") = "auto"
    weight: number(
        "how often a row is seen in an epoch; 2.5: twice, and half of the rows once more", gt=0, le=HEAVIEST
    ) = 1.0


def _once(source: Source) -> Source:
    if source.weight != 1:
        raise wrong("rows for evaluation are seen once; leave the weight out")
    return source


@_settings
class DataSpec:
    """The rows of one stage.

    Held-out rows are drawn by a hash of seed and content: equal rows are on one side, rows that are nearly equal only
    where `near` leaves one of them. A row of `evaluate` that is in `train` too is not trained on.
    """

    train: several(section(Source), "`{files, format, weight}`, or a list of them", least=1)
    held_out: number("share of the rows kept for evaluation", ge=0, lt=1) = 0.0
    evaluate: several(Annotated[section(Source), AfterValidator(_once)], "files for evaluation, like `train`") = ()
    overlong: choice(OVERLONG, "what becomes of a sample longer than a pack") = "split"
    max_bad_lines: whole("rows that cannot be read before the run stops", ge=0) = 100
    deduplicate: choice(DEDUPLICATE, "`near`: also rows that are nearly the same") = "exact"
    near_threshold: number("share of shingles that nearly equal rows have in common", ge=LOOSEST, le=SHARPEST) = 0.8
    languages: several(WORDS, "such as `[zh, en]`; none: all") = ()
    sources: several(WORDS, "names or globs for a row's `source`; none: all") = ()
    exclude_sources: several(WORDS, "names or globs, too") = ()
    contamination: several(WORDS, "benchmark files") = ()
    drop_contaminated: flag("rows that hold a piece of a benchmark; false: counted and kept") = True

    @contradiction("evaluate")
    def _from_one_place(value, others):
        if value and others.get("held_out"):
            raise wrong("held_out is there too; rows for evaluation come from one of them")
