"""BPE merges recovered from the pieces and scores of a SentencePiece bpe model, ordered to give equal ids.

sentencepiece keeps no merges: of all neighbours that together spell a piece it joins those with the best score, the
leftmost of several. The tokenizers library joins by rank, and no two merges share one. So this module answers three
questions: which merges ever happen, in which order do equal scores stand, and where is there no such order.

    Which happen    A piece that is made in a text is made by the steps that make it of its own letters alone, whatever
                    stands around it: a step that crossed its edge would have left no such piece. So of all the ways to
                    cut it in two, at most one is ever joined: the last step of that run.
    Which order     Let n = (C, D) be a merge and (X, C) another of the same score or a better one. Where X C D stand
                    in a row, sentencepiece joins X and C, being on the left, and it makes X before it looks at n.
                    So whatever of the same score makes XC comes before n; for single letters as for long pieces.
                    Ranks that keep this for every C lead to the same ids: a merge with a place further right is only
                    chosen early where nothing to its left would have changed it.
    Where none      Such demands can run in a circle: AB and BA, of one score, in ABA and BAB. Then one of them is
                    broken, and the pieces are counted.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

Merge = tuple[str, str]
NO_PIECE = float("-inf")  # worse than the score of any piece


@dataclass(frozen=True)
class Merges:
    ordered: list[Merge]
    doubtful: set[str]  # pieces that sentencepiece may join in another order
    spelled_otherwise: list[str]  # pieces that sentencepiece makes of characters that are no pieces; they are not made


def last_step(piece: str, scores: dict[str, float]) -> Merge | None:
    """The two pieces that become this one when sentencepiece reads it alone; None when it is never made."""
    parts = list(piece)
    offers = [scores.get(left + right, NO_PIECE) for left, right in pairwise(parts)]
    while len(parts) > 2:
        best = max(offers)
        if best == NO_PIECE:
            return None
        at = offers.index(best)  # the leftmost
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
        del offers[at]
        for i in range(max(at - 1, 0), min(at + 1, len(offers))):
            offers[i] = scores.get(parts[i] + parts[i + 1], NO_PIECE)
    return parts[0], parts[1]


def recover_merges(scores: dict[str, float]) -> Merges:
    """The merges behind the pieces. scores: of all pieces that merging may make, in id order."""
    steps = {piece: step for piece in scores if len(piece) > 1 and (step := last_step(piece, scores))}
    otherwise = [piece for piece in steps if not scores.keys() >= set(piece)]
    for piece in otherwise:
        del steps[piece]
    ordered, doubtful = [], set()
    ties = _Ties(steps, scores)
    for score in sorted({scores[piece] for piece in steps}, reverse=True):
        found, broken = ties.order(score)
        ordered += found
        doubtful |= broken
    return Merges([steps[piece] for piece in ordered], doubtful | ties.outbid, otherwise)


class _Ties:
    """The order of pieces that share a score. steps: piece -> the two it is made of."""

    def __init__(self, steps: dict[str, Merge], scores: dict[str, float]):
        self.steps, self.scores = steps, scores
        self.sharing = Counter(scores[piece] for piece in steps)
        self.members = defaultdict(list)  # score -> its pieces
        for piece in steps:
            self.members[scores[piece]].append(piece)
        # (score, C) -> the pieces of this score that come before every merge with C on its left
        self.before: dict[tuple[float, str], set[str]] = defaultdict(set)
        self.outbid: set[str] = set()  # what is made of them goes before others of their own score
        for piece, (_, right) in steps.items():
            for earlier in self._makers(piece):
                self.before[scores[earlier], right].add(earlier)
            self.outbid.update(self._outbid_by(piece))

    def _makers(self, piece: str) -> Iterator[str]:
        """The tied pieces in the making of this one, itself among them, that wait for nothing of a lower score."""
        waiting = [(piece, float("inf"))]
        while waiting:
            part, lowest = waiting.pop()
            if part not in self.steps:
                continue
            score = self.scores[part]
            if score <= lowest and self.sharing[score] > 1:
                yield part
            waiting += [(inner, min(score, lowest)) for inner in self.steps[part]]

    def _outbid_by(self, piece: str) -> Iterator[str]:
        """Tied pieces at the beginning of its right part whose score is lower than that of all that is made of them."""
        lowest, part = self.scores[piece], self.steps[piece][1]
        while part in self.steps:
            score = self.scores[part]
            if score < lowest and self.sharing[score] > 1:
                yield part
            lowest, part = min(lowest, score), self.steps[part][0]

    def order(self, score: float) -> tuple[list[str], set[str]]:
        """The pieces of a score in the order of their merges, and those for which a demand had to be broken."""
        members = self.members[score]
        if len(members) == 1:
            return members, set()
        starting = defaultdict(list)
        for piece in members:
            starting[self.steps[piece][0]].append(piece)
        line = _Line(starting, {left: set(self.before.get((score, left), ())) for left in starting})
        line.run()
        return line.ordered, line.broken


class _Line:
    """Topological order of tied pieces: each behind those it depends on.

    starting: C -> the pieces made of C and something. missing: C -> the pieces that all these wait for.
    """

    def __init__(self, starting: dict[str, list[str]], missing: dict[str, set[str]]):
        self.starting, self.missing = starting, missing
        self.ordered: list[str] = []
        self.broken: set[str] = set()
        self.wanted_by = defaultdict(list)
        for left, pieces in missing.items():
            for piece in pieces:
                self.wanted_by[piece].append(left)
        self.places = {left: place for place, left in enumerate(starting)}
        self.turns: list[tuple[int, int, str]] = []  # (pieces waited for, place, C); older entries of a C stay in it
        for left in starting:
            self._push(left)

    def run(self) -> None:
        while self.turns:
            count, _, left = heapq.heappop(self.turns)
            if not self.starting[left] or count != self._count(left):
                continue
            taken = self._free(left)
            if count:  # nothing is free, here or elsewhere: first what others wait for, else all
                taken = [piece for piece in self.starting[left] if piece in self.missing[left]] or self.starting[left]
                self.broken |= self.missing[left].union(taken)
            self._take(left, taken)

    def _free(self, left: str) -> list[str]:
        # a piece need not wait for itself: of several places of one merge the leftmost is taken first anyway
        missing = self.missing[left]
        return [piece for piece in self.starting[left] if missing <= {piece}] if len(missing) < 2 else []

    def _count(self, left: str) -> int:
        return 0 if self._free(left) else len(self.missing[left])

    def _push(self, left: str) -> None:
        heapq.heappush(self.turns, (self._count(left), self.places[left], left))

    def _take(self, left: str, pieces: list[str]) -> None:
        self.ordered += pieces
        taken = set(pieces)
        self.starting[left] = [piece for piece in self.starting[left] if piece not in taken]
        freer = {other for piece in pieces for other in self.wanted_by[piece]}
        for other in freer:
            self.missing[other] -= taken
        for other in sorted(freer | {left}, key=self.places.__getitem__):
            self._push(other)
