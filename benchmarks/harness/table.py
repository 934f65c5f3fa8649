"""Tables as text and as Markdown."""


def table(header: list[str], rows: list[list[object]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The same for a Markdown file."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])
