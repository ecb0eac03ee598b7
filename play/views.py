"""What the page shows, as HTML: the bar, pictures that can be chosen, a sheet, two pictures under a slider, metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

from play.files import File
from play.predictions import Request, Running

# A click on a button tells which one was chosen; gr.HTML runs this once, whatever it shows later.
CHOOSE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-choice]');
  if (!button) return;
  element.querySelectorAll('[aria-pressed]').forEach((one) => one.setAttribute('aria-pressed', one === button));
  trigger('click', {choice: button.dataset.choice});
});
"""
# A button copies the text beside it, and says so.
COPY = """
element.addEventListener('click', async (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  await navigator.clipboard.writeText(element.querySelector('pre, a').textContent);
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
});
"""
SECONDS = "_time"  # how the metrics that are seconds end


@dataclass(frozen=True)
class Picture:
    """A picture and the request that makes it alone: one output, its own seed."""

    number: int  # from 1, in the order in which this session drew them
    file: File
    request: Request
    metrics: Mapping[str, Any]
    log: str
    about: str = ""  # what is special about it, on a sheet

    @property
    def caption(self) -> str:
        about = self.about or (f"seed {self.request['seed']}" if "seed" in self.request else "")
        return f"#{self.number}, {about}" if about else f"#{self.number}"

    @property
    def alt(self) -> str:
        return f"Picture {self.caption}: {self.request.get('prompt', '')}"


def address(file: File) -> str:
    return f"/gradio_api/file={quote(str(file.path))}"


def image(picture: Picture, more: str = "") -> str:
    return f'<img src="{address(picture.file)}" alt="{escape(picture.alt)}"{more}>'


def problem(sentences: Sequence[str]) -> str:
    """What is wrong, said at once to whoever listens to the page."""
    return f'<p class="problem" role="alert">{"<br>".join(map(escape, sentences))}</p>'


def status(sentence: str) -> str:
    return f'<p role="status">{escape(sentence)}</p>'


def bar(running: Running, done: int = 0, pictures: int = 1) -> str:
    """The progress of the picture that is being drawn, after `done` of `pictures`."""
    parts = [f"picture {done + 1} of {pictures}"] if pictures > 1 else []
    share = 0.0
    if running.waiting:
        parts.append("the server is busy with another request; waiting for it")
    elif running.bar:
        share = running.bar.done / running.bar.total
        parts.append(f"step {running.bar.done} of {running.bar.total}")
    else:
        parts.append("the server is at work")
    parts.append(f"{running.seconds:.0f} s")
    text = ", ".join(parts)
    known = running.bar or pictures > 1
    value = f'value="{(done + share) / pictures:.3f}"' if known and not running.waiting else ""
    return f'<div class="bar"><progress max="1" {value} aria-label="Progress"></progress><span>{text}</span></div>'


def results(pictures: Sequence[Picture]) -> str:
    """The pictures of one request, as large as there is room."""
    if not pictures:
        return '<div class="empty large">The picture appears here.</div>'
    return f'<div class="results">{"".join(choice(one) for one in pictures)}</div>'


def choices(pictures: Sequence[Picture]) -> str:
    """The pictures to choose from, newest first."""
    if not pictures:
        return '<p class="hint">What you draw is kept here until you close the page or load it again.</p>'
    return f'<div class="choices">{"".join(choice(one) for one in reversed(pictures))}</div>'


def choice(picture: Picture) -> str:
    return (
        f'<button type="button" data-choice="{picture.number}" aria-pressed="false">'
        f"{image(picture)}<span>{escape(picture.caption)}</span></button>"
    )


def sheet(columns: Sequence[str], rows: Sequence[str], pictures: Sequence[Picture]) -> str:
    """A table of pictures to choose from, filled row by row as far as there are any."""
    if not columns:
        return '<p class="hint">A strip draws the prompt with the LoRA at strengths from -1 to 1.5.</p>'
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns)
    corner = "<td></td>" if any(rows) else ""
    lines = [f"<tr>{corner}{head}</tr>"]
    for row, label in enumerate(rows):
        places = range(row * len(columns), (row + 1) * len(columns))
        cells = [choice(pictures[i]) if i < len(pictures) else '<div class="empty"></div>' for i in places]
        side = f'<th scope="row">{escape(label)}</th>' if label else corner
        lines.append(f"<tr>{side}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="sheet" tabindex="0" role="region" aria-label="Sheet"><table>{"".join(lines)}</table></div>'


def comparison(left: Picture | None, right: Picture | None) -> str:
    """Two pictures on top of each other; the slider says how much of the left one covers the right one."""
    if left is None or right is None:
        return '<p class="hint">Choose two pictures to compare.</p>'
    return f"""<div class="compare">
  <div class="stack">{image(right)}{image(left, ' class="over"')}</div>
  <input type="range" min="0" max="100" value="50" aria-label="How much of the left picture is shown"
    oninput="this.parentNode.style.setProperty('--left', this.value + '%')">
  <p><span>{escape(left.caption)}</span><span>{escape(right.caption)}</span></p>
</div>"""


def details(picture: Picture) -> str:
    """The chosen picture, small, and its metrics."""
    parts = "".join(
        f"<div><dt>{escape(_spoken(name))}</dt><dd>{escape(_shown(name, value))}</dd></div>"
        for name, value in sorted(picture.metrics.items(), key=lambda one: (one[0].endswith(SECONDS), one[0]))
    )
    save = f'<a href="{address(picture.file)}" download="{escape(picture.file.name)}">Save the picture</a>'
    figure = f"<figure>{image(picture)}<figcaption>{save}</figcaption></figure>"
    return f'<h2>How {escape(picture.caption)} was made</h2><div class="details">{figure}<dl>{parts}</dl></div>'


def downloads(files: Sequence[File]) -> str:
    """What the request reads, beside the commands that need it."""
    if not files:
        return ""
    links = ", ".join(
        f'<a href="{address(file)}" download="{escape(file.name)}">{escape(file.name)}</a>' for file in files
    )
    return f'<p class="hint">Run it in a folder with {links}.</p>'


def words(trigger_words: Sequence[str], missing: Sequence[str]) -> str:
    """The LoRAs' trigger words; a click puts one into the prompt."""
    buttons = "".join(
        f'<button data-choice="{escape(word)}"{"" if word in missing else " disabled"}>{escape(word)}</button>'
        for word in trigger_words
    )
    rest = "a click puts one into the prompt" if missing else "in the prompt"
    return f'<p class="words"><span>Trigger words, {rest}:</span>{buttons}</p>'


def code(text: str, label: str) -> str:
    return f'''<div class="code"><button type="button">Copy</button>
<pre tabindex="0" role="region" aria-label="{label}">{escape(text)}</pre></div>'''


def link(url: str) -> str:
    return f'''<div class="code"><button type="button">Copy</button>
<p>It opens the page with these inputs: <a href="{escape(url)}" target="_blank">{escape(url)}</a></p></div>'''


def log(text: str) -> str:
    return f'<pre tabindex="0" role="region" aria-label="Server log">{escape(text)}</pre>'


def _spoken(metric: str) -> str:
    return metric.removesuffix(SECONDS).replace("_", " ")


def _shown(name: str, value: Any) -> str:
    if name.endswith(SECONDS) and isinstance(value, int | float):
        return f"{value:.2f} s"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
