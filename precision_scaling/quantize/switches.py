"""When a run's precision changes: at a share of its steps, or where its learning rate begins to decay.

Formats are data, so a run that changes them trains on with the same program and the same state.
"""

import re

DECAY = "decay"
GRAMMAR = (
    "switches WHEN=FORMATS with commas between them, WHEN a share of the steps above 0 and below 1 or decay (of the "
    "learning rate), in order, FORMATS as in a grid (w4_a8, a preset, bf16); or none"
)
WHEN = rf"0?\.\d*[1-9]\d*|{DECAY}"


def split(text: str) -> list[tuple[str, str]]:
    """(when, formats) of each switch in a text with commas between them. ValueError: the wrong one."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return [] if words == ["none"] else [_switch(word) for word in words]


def _switch(word: str) -> tuple[str, str]:
    match = re.fullmatch(rf"({WHEN})\s*=\s*([^=@\s]+)", word)
    if not match:
        raise ValueError(word)
    return canonical(match[1]), match[2]


def canonical(when: str) -> str:
    """One way to write a share: ".80" is "0.8"."""
    return when if when == DECAY else f"{float(when):.10g}"


def in_order(whens: set[str] | dict[str, None]) -> list[str]:
    """Ascending; as they stand where one is the decay, which is somewhere in each run."""
    return list(whens) if DECAY in whens else sorted(whens, key=float)


def step_of(when: str, steps: int, decay_start: int) -> int:
    """The first step after the switch, of a run of so many steps whose rate decays from `decay_start` on."""
    return decay_start if when == DECAY else round(float(when) * steps)
