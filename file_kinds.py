"""What a file is that people send for a picture, where it is none that is read: for the sentence that says so."""

import re

LOOKED_AT = 1024  # bytes from a file's start
KINDS = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), kind)
    for start, kind in (
        (rb"$", "an empty one"),
        (rb"....ftyp(?:hei|hev|mif1|msf1)", "a HEIC photo"),
        (rb"....ftyp(?!avi)|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL one"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 one"),
        (rb"%PDF-", "a PDF"),
        (rb"8BPS", "a Photoshop document"),
        (rb"PK\x03\x04", "a zip archive"),
        (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*|<!doctype svg[^>]*>\s*)*<svg\b", "an SVG drawing"),
        (rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html)", "a web page"),
        (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml|[{\[]\s*[\"{\]}])", "a server's answer in text"),
    )
)


def kind_of(file: bytes) -> str | None:
    """With its article; None where nothing is known of it."""
    return next((kind for pattern, kind in KINDS if pattern.match(file[:LOOKED_AT])), None)
