"""Which server a command talks to, and with which key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Where:
    """As the options and variables say; None where they say nothing. A key file wins over a key.

    Without a URL it is the server that the settings file leads to: `config`, or the one of this folder.
    """

    url: str | None = None
    key: str | None = field(default=None, repr=False)
    key_file: Path | None = None
    config: Path | None = None
