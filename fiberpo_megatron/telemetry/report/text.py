"""This module turns values of a run folder into HTML that is safe to show."""

from html import escape

from fiberpo_megatron.printable import printable

LONGEST_TEXT = 2000
"""Characters of a prompt or response that are shown."""
TEXT = "\n\t"
"""Control characters that stand in texts as they are."""


def shown(value: object, longest: int = LONGEST_TEXT, keep: str = "") -> str:
    """Return a value as HTML, at most `longest` characters of it. Hidden characters are escaped, except those in
    `keep`."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (RecursionError, ValueError) as error:  # nested too deep, or thousands of digits
        text = f"(a {type(value).__name__} that cannot be shown: {error})"
    cut = text if len(text) <= longest else f"{text[:longest]} … ({len(text)} characters)"
    return escape(printable(cut, keep=keep))


def html_table(titles: list[str], rows: list[list[str]]) -> str:
    """Return a table; the cells are HTML already."""
    head = "".join(f"<th>{shown(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
