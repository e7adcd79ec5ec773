"""How rows share their beginnings: a tree of token runs, for showing (what is computed is planned in tree/)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens [start, stop) that `rows` (indices) have in common after all tokens before `start`."""

    start: int
    stop: int
    rows: tuple[int, ...]
    children: tuple[Branch, ...]

    @property
    def num_tokens(self) -> int:
        """Unique tokens of this branch and all below it."""
        return self.stop - self.start + sum(child.num_tokens for child in self.children)


def prefix_tree(rows: Sequence[Sequence[int]]) -> tuple[Branch, ...]:
    """The branches of some rows' ids, ordered by the ids. Equal rows share one branch to its end."""
    order = sorted(range(len(rows)), key=lambda i: list(rows[i]))
    return _branches(rows, order, 0)


def _branches(rows: Sequence[Sequence[int]], order: list[int], depth: int) -> tuple[Branch, ...]:
    """Branches of sorted rows that agree in their first `depth` tokens and are longer."""
    found = []
    at = 0
    while at < len(order):
        token = rows[order[at]][depth]
        end = at + 1
        while end < len(order) and rows[order[end]][depth] == token:
            end += 1
        group = order[at:end]
        stop = _shared(rows[group[0]], rows[group[-1]], depth)  # sorted: what the outer two share, all share
        longer = [i for i in group if len(rows[i]) > stop]
        found.append(Branch(depth, stop, tuple(group), _branches(rows, longer, stop)))
        at = end
    return tuple(found)


def _shared(a: Sequence[int], b: Sequence[int], start: int) -> int:
    stop = start
    while stop < min(len(a), len(b)) and a[stop] == b[stop]:
        stop += 1
    return stop


def draw(
    branches: Sequence[Branch], names: Sequence[str], texts: Sequence[Sequence[str]], *, width: int = 48
) -> list[str]:
    """The tree as lines of text. names: one a row; texts: the text of each token of each row."""
    lines: list[str] = []
    for branch in branches:
        _draw(branch, names, texts, width, "", "", lines)
    return lines


def _draw(
    branch: Branch,
    names: Sequence[str],
    texts: Sequence[Sequence[str]],
    width: int,
    lead: str,
    indent: str,
    lines: list[str],
) -> None:
    text = "".join(texts[branch.rows[0]][branch.start : branch.stop]).replace("\n", "↵").replace("\t", "⇥")
    if len(text) > width:
        text = f"{text[: width // 2]}…{text[len(text) - width // 2 :]}"
    whose = names[branch.rows[0]] if len(branch.rows) == 1 else f"{len(branch.rows)} rows"
    tokens = branch.stop - branch.start
    lines.append(f"{lead}{tokens} token{'s' if tokens > 1 else ''} · {whose} · {text}")
    for child in branch.children:
        last = child is branch.children[-1]
        _draw(
            child, names, texts, width, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  "), lines
        )
