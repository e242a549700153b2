"""Row filters by `source` and by detected language, each reason counted.

The language is found in the text: what data sets write into a column is often wrong.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..utils.errors import DataError
from .counters import Rule
from .formats import SYSTEM
from .ngrams import IDEOGRAPH

SOURCE_EXCLUDED = Rule("source_excluded", "the row's source is one of exclude_sources", "dropped")
SOURCE_NOT_ASKED = Rule("source_not_asked", "the row's source is none of sources", "dropped")
OTHER_LANGUAGE = Rule("other_language", "the text is in none of the languages asked for", "dropped")
LANGUAGE_UNSURE = Rule(
    "language_unsure", "too few letters to tell the language; its script is one asked for", "counted"
)
RULES = (SOURCE_EXCLUDED, SOURCE_NOT_ASKED, OTHER_LANGUAGE, LANGUAGE_UNSURE)

# Languages a text may be in beside those asked for. Of all 97 that the library knows, it takes short English for
# Luxembourgish or Latin; of these it is seldom wrong.
COMMON = (
    "ar", "cs", "de", "el", "en", "es", "fa", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl", "pl", "pt", "ro",
    "ru", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip
LETTERS = 40  # of fewer, "def f(x): return x" is French to the library
SIDE = 400  # characters looked at of what users say, and as many of what is answered
IDEOGRAPH_WEIGHT = 2.5  # letters that say as much as one ideograph or syllable
_SKIPPED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\$\$.*?\$\$|\\[a-zA-Z]+|<[^<>\n]*>", re.DOTALL)
_LETTER = re.compile(r"[^\W\d_]")
_EAST_ASIAN = re.compile(f"[{IDEOGRAPH}\uac00-\ud7af]")
_KANA = re.compile("[\u3040-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_SCRIPTS = {  # of languages not written in Latin letters
    **dict.fromkeys(("zh", "ja"), f"[{IDEOGRAPH}]"),
    **dict.fromkeys(("ko",), "[\uac00-\ud7af]"),
    **dict.fromkeys(("ru", "uk", "bg", "be", "kk", "ky", "mk", "mn", "sr"), "[\u0400-\u052f]"),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), "[\u0600-\u06ff]"),
    **dict.fromkeys(("hi", "mr", "ne"), "[\u0900-\u097f]"),
    **dict.fromkeys(("el",), "[\u0370-\u03ff]"),
    **dict.fromkeys(("he",), "[\u0590-\u05ff]"),
    **dict.fromkeys(("th",), "[\u0e00-\u0e7f]"),
    **dict.fromkeys(("am",), "[\u1200-\u137f]"),
    **dict.fromkeys(("hy",), "[\u0530-\u058f]"),
    **dict.fromkeys(("ka",), "[\u10a0-\u10ff]"),
    **dict.fromkeys(("km",), "[\u1780-\u17ff]"),
    **dict.fromkeys(("lo",), "[\u0e80-\u0eff]"),
    **dict.fromkeys(("as", "bn"), "[\u0980-\u09ff]"),
    **dict.fromkeys(("gu", "kn", "ml", "or", "pa", "ta", "te", "si"), "[\u0a00-\u0dff]"),
    **dict.fromkeys(("dz",), "[\u0f00-\u0fff]"),
}
_LATIN = "[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"


class SourceFilter:
    """Rows by their `source`: names, or globs such as "flan*". Without any, every row passes."""

    def __init__(self, wanted: Sequence[str], excluded: Sequence[str]):
        self._wanted, self._excluded = tuple(wanted), tuple(excluded)
        self._seen: dict[str, Rule | None] = {}
        self._unmet = dict.fromkeys((*wanted, *excluded))

    def why_not(self, source: str) -> Rule | None:
        """The rule that drops a row of this source, None when it stays. A row without a source has the source ""."""
        if source not in self._seen:
            if len(self._seen) > 10_000:  # a data set in which every row has a source of its own
                self._seen.clear()
            self._seen[source] = self._judge(source)
        return self._seen[source]

    def _judge(self, source: str) -> Rule | None:
        fits = [name for name in (*self._wanted, *self._excluded) if name == source or fnmatchcase(source, name)]
        for name in fits:
            self._unmet.pop(name, None)
        if set(fits) & set(self._excluded):
            return SOURCE_EXCLUDED
        return SOURCE_NOT_ASKED if self._wanted and not set(fits) & set(self._wanted) else None

    @property
    def unmet(self) -> list[str]:
        """Names that fitted no row so far: perhaps they are written differently in the data."""
        return list(self._unmet)


class LanguageFilter:
    """Rows by the language of what users and the assistant say. Raises DataError for a code that is not known."""

    def __init__(self, languages: Sequence[str]):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_pickled_model(MODEL_FILE)
        known = set(self._identifier.nb_classes)
        unknown = [code for code in languages if code not in known]
        if unknown:
            raise DataError(
                f"languages: {', '.join(unknown)}: no such language is known.\nKnown are {', '.join(sorted(known))}."
            )
        self._identifier.set_languages(sorted({*languages, *COMMON}))
        self._wanted = set(languages)
        self._scripts = re.compile("|".join(sorted({_SCRIPTS.get(code, _LATIN) for code in languages})))

    def judge(self, messages: Iterable[dict]) -> Rule | None:
        """OTHER_LANGUAGE when the row is to be dropped, LANGUAGE_UNSURE when it stays unjudged, None when it stays."""
        text = sample(messages)
        found = self.language(text)
        if found is not None:
            return None if found in self._wanted else OTHER_LANGUAGE
        # without a letter, arithmetic for example, it is in every language
        return LANGUAGE_UNSURE if self._scripts.search(text) or not _LETTER.search(text) else OTHER_LANGUAGE

    def language(self, text: str) -> str | None:
        """The code of a text's language, None where too few letters tell."""
        letters = len(_LETTER.findall(text))
        eastern = _EAST_ASIAN.findall(text)
        weight = IDEOGRAPH_WEIGHT * len(eastern)
        western = letters - len(eastern)
        if weight > western:  # letters tell these three apart, and better than statistics of short texts do
            syllables = "".join(eastern)
            if len(_HANGUL.findall(syllables)) * 2 > len(eastern):
                return "ko"
            return "ja" if len(_KANA.findall(syllables)) * 10 > len(eastern) else "zh"
        if western < LETTERS:
            return None
        # uint32: the library's own uint16 is no gain here and counts in it may overflow
        return self._identifier.classify(_EAST_ASIAN.sub(" ", text), datatype="uint32")[0]


def sample(messages: Iterable[dict]) -> str:
    """What of a conversation says its language: the beginnings of both sides, without code, formulas and addresses."""
    sides: dict[str, str] = {}
    for message in messages:
        role = message["role"]
        side = sides.get(role, "")
        if role != SYSTEM and len(side) < SIDE:
            # cut before the search too: a text may be megabytes of code
            sides[role] = side + " " + _SKIPPED.sub(" ", message["content"][: 4 * SIDE])
    return " ".join(side[:SIDE] for side in sides.values())
