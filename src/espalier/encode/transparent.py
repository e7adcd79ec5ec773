"""Does a chat template look into the texts that it lays out, or does it only copy them?

A template that only copies gives the same pieces for all rows with the same roles, so that no row needs rendering.
The answer is read off its syntax tree: a message's `content` may stand in the output, joined with other text, and in a
bare test (`if m['content']`, which only an empty text decides); any other use, and all that is not understood here,
counts as looking.
"""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError, nodes

# Keys other than the text. Messages with more than role and content are not laid out by pieces anyway.
_KEYS = {"role", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "prefix", "weight"}
_OPAQUE = (
    nodes.AssignBlock,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.Extends,
    nodes.Macro,
    nodes.ExprStmt,
)


def only_copies(source: str) -> bool:
    """True where the template's text shows that it copies contents without looking into them."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError:
        return False
    names = {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and _is_messages(loop.iter)
    }
    return _copies(tree, names, printed=False)


def _is_messages(node: nodes.Node) -> bool:
    """`messages`, or a slice of it: what a loop may run over."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node = node.node
    return isinstance(node, nodes.Name) and node.name == "messages"


def _key(node: nodes.Node, names: set[str]) -> str | None:
    """The key of an access to one message: 'content' for m['content'], m.content, messages[0]['content']."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key, base = node.arg.value, node.node
    elif isinstance(node, nodes.Getattr):
        key, base = node.attr, node.node
    else:
        return None
    one = isinstance(base, nodes.Name) and base.name in names
    indexed = isinstance(base, nodes.Getitem) and not isinstance(base.arg, nodes.Slice) and _is_messages(base.node)
    return key if (one or indexed) and isinstance(key, str) else None


def _copies(node: nodes.Node, names: set[str], *, printed: bool) -> bool:
    if isinstance(node, _OPAQUE):
        return False
    key = _key(node, names)
    if key is not None:
        return printed if key == "content" else key in _KEYS
    if isinstance(node, nodes.Name):
        return (node.name != "messages" and node.name not in names) or node.ctx == "store"
    if isinstance(node, nodes.Getattr) and node.attr in ("previtem", "nextitem"):
        return False
    if isinstance(node, nodes.Filter) and node.name in ("length", "count") and node.node is not None:
        return _is_messages(node.node) or _copies(node.node, names, printed=False)
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.For) and _is_messages(node.iter):
        children.remove(node.iter)
    if isinstance(node, (nodes.If, nodes.CondExpr)) and _key(node.test, names) == "content":
        children.remove(node.test)
    stays_printed = isinstance(node, nodes.Output) or (printed and isinstance(node, (nodes.Add, nodes.Concat)))
    return all(_copies(child, names, printed=stays_printed) for child in children)
