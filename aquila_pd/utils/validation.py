"""Validated settings: frozen pydantic dataclasses, the kinds of their fields, and every violation as a sentence.

A plain scalar of a YAML file (`Unquoted`) takes the type of its field: `no` is text among languages and false for a
flag, and `1e-5`, text to YAML 1.1, a number. Values from Python are not converted. Imports pydantic, which takes a
third of a second: modules that a fast command loads import this one in a function.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from .errors import AquilaError, report, shown_value

WHOLE = re.compile(r"[-+]?\d+(_\d+)*")
NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?(\d+)?|\.\d+)([eE][-+]?\d+)?")
LONGEST = 40  # characters of a number
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# Pydantic's type of an error -> what the value must be.
MUST = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "literal_error": "{expected}",
    "tuple_type": "a list",
    "too_long": "a list of {max_length}",
    "dict_type": "keys and values",
    "dataclass_type": "keys and values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
OTHERS = {
    "missing": "it is missing",
    "unexpected_keyword_argument": "unknown key",
    "string_too_short": "it is empty",
}


class Unquoted(str):
    """A scalar written without quotes: text, unless its field is a number or a flag."""


# ------------------------------------------------------------------------------------------------ kinds of fields


def whole(doc: str | None = None, **limits: float) -> Any:
    """A whole number. doc: for tables and editors; limits: ge, gt, le, lt."""
    return Annotated[int, Field(strict=True, description=doc, **limits), BeforeValidator(_read_whole)]


def number(doc: str | None = None, **limits: float) -> Any:
    """A finite number."""
    finite = Field(strict=True, allow_inf_nan=False, description=doc, **limits)
    return Annotated[float, finite, BeforeValidator(_read_number)]


def flag(doc: str | None = None) -> Any:
    return Annotated[bool, Field(strict=True, description=doc), BeforeValidator(_read_flag)]


def text(doc: str | None = None, **limits: int) -> Any:
    return Annotated[str, Field(strict=True, description=doc, **limits)]


def choice(values: tuple[str, ...], doc: str | None = None) -> Any:
    return Annotated[Literal[values], Field(description=doc)]


def several(kind: Any, doc: str | None = None, *, least: int = 0) -> Any:
    """A tuple of at least 0 or 1 values of a kind; one value alone stands for a list of one."""
    return Annotated[tuple[kind, ...], Field(strict=True, description=doc), _OneOrMore(least)]


def section(cls: type, doc: str | None = None) -> Any:
    """Settings inside settings; null stands for all defaults."""
    return Annotated[cls, Field(description=doc), BeforeValidator(lambda value: {} if value is None else value)]


def _read_whole(value: object) -> object:
    return int(value) if _matches(WHOLE, value) else value


def _read_number(value: object) -> object:
    if isinstance(value, int | float):
        return value
    if _matches(NUMBER, value):
        return float(value)
    raise PydanticKnownError("float_type")  # pydantic takes all that has __float__, NumPy's True too


def _read_flag(value: object) -> object:
    return BOOLS.get(value.lower(), value) if isinstance(value, Unquoted) else value


def _matches(pattern: re.Pattern, value: object) -> bool:
    return isinstance(value, Unquoted) and len(value) <= LONGEST and pattern.fullmatch(value) is not None


@dataclasses.dataclass(frozen=True)
class _OneOrMore:
    """An annotation of a tuple: `x` is read as `[x]`, also by editors. (Pydantic's min_length counts valid values.)"""

    least: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        many = handler(schema)
        return {"anyOf": [many["items"], {**many, **({"minItems": self.least} if self.least else {})}]}

    def _read(self, value: object) -> object:
        if value is None:
            return None
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if len(values) < self.least:
            raise wrong("it is empty")
        return values


# ------------------------------------------------------------------------------------------------------- classes


def settings(error: type[AquilaError], headline: str, advice: str, *, kw_only: bool = False) -> Callable:
    """A class decorator: a frozen pydantic dataclass whose constructor raises `error` with every violation at once.

    An argument that the constructor does not have is a TypeError. Nested in other settings, violations are reported by
    the outermost.
    """

    def decorate(cls: type) -> type:
        made = dataclass(frozen=True, kw_only=kw_only, config=ConfigDict(extra="forbid"))(cls)
        construct = made.__init__

        @wraps(construct)
        def __init__(self, *args, **values):
            try:
                construct(self, *args, **values)
            except ValidationError as found:
                items = found.errors(include_url=False)
                _refuse_arguments(items)
                raise error(report(headline, [_line(item, made) for item in items], advice)) from None

        made.__init__ = __init__
        return made

    return decorate


def _refuse_arguments(items: list) -> None:
    strange = [f"{item['msg']}: {dotted(item['loc'])}" for item in items if item["type"].startswith("unexpected_")]
    if strange:
        raise TypeError("; ".join(strange))


def _line(item: Mapping, cls: type) -> str:
    first, *rest = item["loc"]
    name = dataclasses.fields(cls)[first].name if isinstance(first, int) else first  # a positional argument is counted
    return f"{dotted((name, *rest))}: {sentence(item)}"


def wrong(sentence: str) -> PydanticCustomError:
    """What a validator of a settings class raises."""
    return PydanticCustomError("wrong", "{sentence}", {"sentence": sentence})


def contradiction(key: str) -> Callable:
    """Decorates a check of a key against earlier ones: (its value, their valid values); it raises wrong()."""

    def decorate(check: Callable[[Any, Mapping], None]) -> Any:
        def validate(cls: type, value: Any, info: ValidationInfo) -> Any:
            check(value, info.data)
            return value

        return field_validator(key)(classmethod(validate))

    return decorate


# ----------------------------------------------------------------------------------------------------- sentences


def dotted(place: tuple) -> str:
    """("train", 0, "weight") -> "train.0.weight"."""
    return ".".join(map(str, place))


def sentence(item: Mapping, value: str | None = None) -> str:
    """One error of a ValidationError in words. value: the input as the message shows it (default: as Python does)."""
    kind = item["type"]
    if kind not in MUST:
        return OTHERS.get(kind, item["msg"])
    limits = {name: written(limit) for name, limit in item.get("ctx", {}).items()}
    return f"it is {value or shown_value(item['input'])} and must be {MUST[kind].format(**limits)}"


def written(limit: object) -> object:
    """A limit as sentences and tables have it: 1,048,576 and 0.5; words stay."""
    return f"{limit:g}" if isinstance(limit, float) else f"{limit:,}" if isinstance(limit, int) else limit
