"""Inspected rows as one self-contained page: no script, no file beside it, readable on a phone and without colour."""

from __future__ import annotations

from html import escape

from espalier.encode.inspect_text import visible
from espalier.encode.pieces import InspectedRow, Inspection, Piece

_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1a; --page: #fdfdfb; --soft: #6b6b64; --line: #d8d8d0; --learnt: #0b6b3a;
  --wash: #e6f4ea; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e2; --page: #181816; --soft: #a0a098; --line: #3a3a36;
  --learnt: #7ddba3; --wash: #16321f; } }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; color: var(--text); background: var(--page);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.row { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; overflow-wrap: anywhere;
  font-family: ui-monospace, monospace; font-size: .92rem; line-height: 1.9; white-space: pre-wrap; }
.given { border-bottom: 1px dotted var(--line); }
.added { color: var(--soft); font-style: italic; }
.learnt { color: var(--learnt); background: var(--wash); font-weight: 700; text-decoration: underline;
  text-underline-offset: .2em; font-style: normal; }
.sign { opacity: .55; }
table { border-collapse: collapse; font: .85rem ui-monospace, monospace; width: 100%; }
th, td { text-align: left; padding: .15rem .5rem .15rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; }
pre { overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; padding: .5rem 0; color: var(--soft); }
"""


def page(inspection: Inspection) -> str:
    """The whole page as HTML text."""
    notices = "".join(f"<p>Note: {escape(notice)}</p>" for notice in inspection.notices)
    rows = "".join(_row(row) for row in inspection.rows)
    bad = "".join(f"<li>{escape(str(row))}</li>" for row in inspection.bad)
    left_out = f"<h2>Left out</h2><ul>{bad}</ul>" if bad else ""
    tree = ""
    if inspection.tree:
        lines = escape("\n".join(inspection.tree))
        tree = f"<h2>What the rows share, each run of tokens once</h2><pre>{lines}</pre>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Rows as they are trained</title><style>{_STYLE}</style></head><body>"
        "<h1>Rows as they are trained</h1>"
        f'<p class="soft">Chat template: {escape(inspection.template)}</p>{notices}'
        '<p><span class="learnt">bold and underlined</span>: learnt · <span class="given">upright</span>: from the '
        'data, not learnt · <span class="added">slanted</span>: added by the template, not learnt · ↵ is a line end</p>'
        f"{rows}{left_out}{tree}</body></html>\n"
    )


def _row(row: InspectedRow) -> str:
    notes = "".join(f"<p>Note: {escape(note)}</p>" for note in row.notes)
    text = "".join(_piece(piece) for piece in row.pieces)
    table = "".join(
        f"<tr><td>{piece.start}</td><td>{' '.join(map(str, piece.ids))}</td>"
        f'<td class="{_kind(piece)}">{escape(visible(piece.text))}</td><td>{"yes" if piece.learnt else ""}</td></tr>'
        for piece in row.pieces
    )
    return (
        f"<h2>{escape(row.place)}</h2>"
        f'<p class="soft">{row.num_tokens} tokens, {row.num_learnt} learnt</p>{notes}'
        f'<div class="row">{text}</div>'
        "<details><summary>Tokens and ids</summary><table>"
        f"<tr><th>token</th><th>id</th><th>text</th><th>learnt</th></tr>{table}</table></details>"
    )


def _piece(piece: Piece) -> str:
    shown = escape(piece.text).replace("\n", '<span class="sign">↵</span>\n')
    ids = " ".join(map(str, piece.ids))
    return f'<span class="{_kind(piece)}" title="{ids}">{shown}</span>'


def _kind(piece: Piece) -> str:
    return "learnt" if piece.learnt else "added" if piece.added else "given"
