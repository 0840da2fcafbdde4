"""Put text of a bundle or of a target file into scripts and C: one function for each place that a text may have.

A bundle is untrusted data. A line end in a name would begin a new line of a script, and the end of a comment would make
the rest of a name C that the user's machine compiles and runs.
"""

from __future__ import annotations

import re
import shlex


def in_c_comment(text: str) -> str:
    """Return text for a comment in C: letters, digits and a few signs, none of which can end the comment."""
    return re.sub(r"[^\w .,:;()+=<>\[\]-]+", " ", text, flags=re.ASCII)


def in_line(text: str) -> str:
    """Return text for a comment of a shell script or of requirements.txt, or for a line of a README: one line."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def in_shell(text: str) -> str:
    """Return text as one word of a shell script."""
    return shlex.quote(text)
