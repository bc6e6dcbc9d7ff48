"""Prometheus texts of several instances as one: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

TEXT = b"text/plain; version=0.0.4; charset=utf-8"
SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?(?P<rest>\s.*)")
ABOUT = re.compile(r"# (?:HELP|TYPE) (?P<name>\S+)")


def merged(texts: Mapping[str, bytes | None]) -> bytes:
    """The texts by model. One alone stays as it is; of several, each sample gets a label `model`.

    None is a model that gave no text; it gets a comment.
    """
    told = {model: text for model, text in texts.items() if text is not None}
    if len(texts) == len(told) == 1:
        return next(iter(told.values()))
    lines = [] if texts else ["# No model of this service is loaded."]
    lines += [f"# '{model}' is loaded and gave no metrics." for model in texts if model not in told]
    return "\n".join([*lines, *grouped(told), ""]).encode()


def grouped(texts: Mapping[str, bytes]) -> Iterator[str]:
    """All lines of a metric together, as the format wants it, and what is said about it once."""
    about: dict[str, dict[str, None]] = {}
    samples: dict[str, list[str]] = {}
    for model, text in texts.items():
        family = ""
        for line in text.decode("utf-8", "replace").splitlines():
            if said := ABOUT.match(line):
                family = said["name"]
                about.setdefault(family, {})[line] = None
            elif sample := SAMPLE.fullmatch(line):
                family = family if family and sample["name"].startswith(family) else sample["name"]
                samples.setdefault(family, []).append(labelled(sample, model))
    for family in {**about, **samples}:
        yield from about.get(family, ())
        yield from samples.get(family, ())


def labelled(sample: re.Match[str], model: str) -> str:
    """A model's name has no letter that the format would want escaped."""
    others = (sample["labels"] or "").rstrip(", ")
    labels = ",".join(filter(None, (f'model="{model}"', others)))
    return f"{sample['name']}{{{labels}}}{sample['rest']}"
