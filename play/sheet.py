"""Pictures side by side on one labelled sheet; the page and demo/gallery.py lay theirs out with it."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

CELL = 192  # pixels, the longer side of a picture's place
GAP = 8  # pixels between pictures, and around text
MARGIN = 34  # pixels for a line of text and what is around it
FONT_SIZE = 16  # pixels
LINE = 22  # pixels from one line of the title to the next
BACKGROUND, INK, EMPTY = "white", "black", "#e5e5e5"

Size = tuple[int, int]  # width and height in pixels


def contact_sheet(
    columns: Sequence[str], rows: Mapping[str, Sequence[Image.Image | None]], title: str = "", cell: int = CELL
) -> Image.Image:
    """The pictures of each row side by side, column titles on top, each row's label under it.

    Every picture is scaled to fit its place, whose longer side is `cell` pixels and whose shape is that of the first
    picture; a picture that is `None` leaves its place grey. `title` stands above all, in as many lines as it needs.
    """
    place = _place([picture for row in rows.values() for picture in row], cell)
    across, down = place[0] + GAP, place[1] + MARGIN
    width = GAP + len(columns) * across
    lines = _lines(title, width - 2 * GAP)
    top = len(lines) * LINE + (GAP if lines else 0)
    sheet = Image.new("RGB", (width, top + MARGIN + len(rows) * down), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        _write(pen, (GAP, GAP + i * LINE), line, width - 2 * GAP)
    for column, text in enumerate(columns):
        _write(pen, (GAP + column * across, top + GAP), text, place[0])
    for row, (label, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            corner = (GAP + column * across, top + MARGIN + row * down)
            _paste(sheet, picture, corner, place)
        _write(pen, (GAP, top + MARGIN + row * down + place[1] + 6), label, width - 2 * GAP)
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """The sheets one under another, each at the left edge."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), BACKGROUND)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _place(pictures: Sequence[Image.Image | None], cell: int) -> Size:
    first = next((picture for picture in pictures if picture is not None), None)
    width, height = first.size if first is not None else (1, 1)
    scale = cell / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _paste(sheet: Image.Image, picture: Image.Image | None, corner: Size, place: Size) -> None:
    if picture is None:
        sheet.paste(EMPTY, (*corner, corner[0] + place[0], corner[1] + place[1]))
        return
    scale = min(place[0] / picture.width, place[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(scaled, (corner[0] + (place[0] - size[0]) // 2, corner[1] + (place[1] - size[1]) // 2))


def _write(pen: ImageDraw.ImageDraw, corner: Size, text: str, width: int) -> None:
    """One line of text, cut where it would be wider than `width` pixels."""
    if pen.textlength(text, font_size=FONT_SIZE) > width:
        while text and pen.textlength(f"{text}...", font_size=FONT_SIZE) > width:
            text = text[:-1]
        text = f"{text}..."
    pen.text(corner, text, fill=INK, font_size=FONT_SIZE)


def _lines(text: str, width: int) -> list[str]:
    """The words of `text` in lines of at most `width` pixels."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font_size=FONT_SIZE) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
