"""Per-rule row counters: a rule is one thing that can happen to a row, with a line that explains it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """effect: "counted" (nothing happens to the row), "changed" or "dropped"."""

    name: str
    meaning: str
    effect: str = "changed"


class Counters:
    """Rows per rule, in the order in which the rules were first named. Sums of counters are counters.

    A row is counted once for each rule that touched it, and by exactly one rule that drops when it is dropped.
    """

    def __init__(self, rules: Iterable[Rule] = ()):
        self._rules: dict[str, Rule] = {}
        self._rows: dict[str, int] = {}
        self.name(rules)

    def name(self, rules: Iterable[Rule]) -> None:
        """Show these rules from now on, also while no row met them."""
        for rule in rules:
            known = self._rules.setdefault(rule.name, rule)
            assert known == rule, f"two rules are called {rule.name}"
            self._rows.setdefault(rule.name, 0)

    def count(self, rule: Rule, rows: int = 1) -> None:
        if rule.name not in self._rows:
            self.name([rule])
        self._rows[rule.name] += rows

    def __getitem__(self, rule: Rule | str) -> int:
        """The rows a rule touched; 0 for one that was never named."""
        return self._rows.get(rule if isinstance(rule, str) else rule.name, 0)

    def __iter__(self) -> Iterator[tuple[Rule, int]]:
        return ((rule, self._rows[name]) for name, rule in self._rules.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters) and list(self) == list(other)

    __hash__ = None  # it changes

    def __add__(self, other: "Counters") -> "Counters":
        total = Counters()
        for counters in (self, other):
            for rule, rows in counters:
                total.count(rule, rows)
        return total

    def __repr__(self) -> str:
        return f"Counters({ {rule.name: rows for rule, rows in self if rows} })"

    @property
    def dropped(self) -> int:
        """Rows that a rule dropped."""
        return sum(rows for rule, rows in self if rule.effect == "dropped")

    def to_json(self) -> list[dict]:
        """[{"rule", "rows", "effect", "meaning"}, ...] in order."""
        return [
            {"rule": rule.name, "rows": rows, "effect": rule.effect, "meaning": rule.meaning} for rule, rows in self
        ]

    @classmethod
    def from_json(cls, found: list[dict]) -> "Counters":
        counters = cls()
        for entry in found:
            counters.count(Rule(entry["rule"], entry["meaning"], entry["effect"]), entry["rows"])
        return counters

    def lines(self, *, zeros: bool = False) -> list[str]:
        """One line a rule, for a terminal; zeros: also those that no row met."""
        shown = [(rule, f"{rows:,}") for rule, rows in self if rows or zeros]
        width = max((len(rows) for _, rows in shown), default=0)
        name = max((len(rule.name) for rule, _ in shown), default=0)
        return [f"{rows:>{width}}  {rule.name:<{name}}  {rule.effect}: {rule.meaning}" for rule, rows in shown]
