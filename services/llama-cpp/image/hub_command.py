"""`huggingface-cli` and `hf` in this image: as the cache's user, and `huggingface-cli` with its old words.

huggingface_hub has only `hf` today, whose words differ in places.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import identity

HF = "/opt/hub/bin/hf"
OLD_WORDS = {
    "login": ("auth", "login"),
    "logout": ("auth", "logout"),
    "whoami": ("auth", "whoami"),
    "scan-cache": ("cache", "ls"),
    "delete-cache": ("cache", "rm"),
    "repo": ("repos",),
}


def main(program: str, arguments: Sequence[str]) -> int:
    """Only returns where our own download does the work: the exit code."""
    try:
        identity.step_down(os.environ)
    except identity.BadIdentity as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = list(arguments)
    if program == "huggingface-cli":
        if words[:1] == ["download"]:
            import hub_download  # not for the others: it takes half a second

            wish = hub_download.read_wish(words[1:])
            if wish is not None:
                return hub_download.main(wish)
        words = in_new_words(words)
    return os.execv(HF, [HF, *words])


def in_new_words(words: Sequence[str]) -> list[str]:
    return [*OLD_WORDS.get(words[0], (words[0],)), *words[1:]] if words else ["--help"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
