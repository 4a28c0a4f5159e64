"""Caveats about the rows that a fit was made from, in notes of one line."""

import numpy as np

from analysis.fitting.setup import Setup
from analysis.table.columns import ALL_FORMAT_COLUMNS, BASE, MODEL, NUMERIC, PRECISIONS
from analysis.table.runs import PLACE

# In columns with one of these words in their name, values that follow N or D are a mixture, too.
RECIPE = (
    "method",
    "quantizer",
    "format",
    "granularity",
    "dataset",
    "corpus",
    "within_documents",
    "tokenizer",
    "schedule",
    "group_size",
)
# Columns about the measurement or the machine, not about how the model was trained or quantized.
MEASURED = (
    *("status", "seed", "device", "imported", "diverged_step", "batches_left_out", "fallback_layers", "epochs"),
    *("training_flops", "stored_bits", "validation_tokens", "loss_before", "delta"),
)
MOST_WORDS = 12  # values of a mixture that a note names


def about_the_rows(setup: Setup) -> tuple[str, ...]:
    """All notes on the rows of a fit."""
    return (*mixed_rows(setup), *shared_names(setup), *dropped_deltas(setup))


def mixed_rows(setup: Setup) -> tuple[str, ...]:
    """A note for each column that tells rows apart but that the law does not read: methods have different constants."""
    silent = {*setup.law.columns, *NUMERIC, *MEASURED, "run", MODEL, BASE}
    if setup.law.reads_formats:
        silent |= set(ALL_FORMAT_COLUMNS)
    known = [c for c in dict.fromkeys((*PRECISIONS, "P_post", *setup.law.columns)) if c not in ("N", "D")]
    notes = []
    for name in setup.rows.columns:
        if name not in silent and not name.endswith("version") and (note := _mixture(setup, name, known)):
            notes.append(note)
            known.append(name)  # a column that follows this one is not a second mixture
    return tuple(notes)


def shared_names(setup: Setup) -> tuple[str, ...]:
    """A note on run names that several models share."""
    rows = setup.rows
    models_of: dict[str, set[int]] = {}
    for name, model in set(zip(rows["run"], setup.run_n, strict=True)):
        models_of.setdefault(name, set()).add(model)
    shared = sorted(name for name, models in models_of.items() if len(models) > 1)
    if not shared:
        return ()
    which = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
    return (
        f"run names of several models ({len(shared)}: {which}): models are distinguished by {', '.join(PLACE)} "
        "and seed, and rows that differ in D alone count as one",
    )


def dropped_deltas(setup: Setup) -> tuple[str, ...]:
    """A note on rows that have no log δ."""
    dropped = sum(count for reason, count in setup.left_out.items() if reason.startswith("delta is zero"))
    if not dropped:
        return ()
    return (
        f"{dropped} row{'s' if dropped > 1 else ''} with delta <= 0 have no log: without them the fit is biased "
        "towards large delta; --delta_residual=floored or log_loss keeps them",
    )


def _mixture(setup: Setup, name: str, known: list[str]) -> str | None:
    """The note on one column, None where its values are no mixture.

    They are none where they follow the known columns (the name of a format follows the bits, say), where they label
    models, and where they are numbers that are not whole: codes of a recipe are whole, measurements seldom.
    """
    column, is_number = setup.rows[name], setup.rows[name].dtype != object
    here = np.isfinite(column) if is_number else np.ones(len(column), bool)
    if is_number and np.any(column[here] != np.round(column[here])):
        return None
    words, word_n = np.unique(column[here] if is_number else column.astype(str), return_inverse=True)
    if len(words) < 2:
        return None
    mixed = _varying(_groups(setup, here, known), word_n)
    if not mixed.any() or (not any(word in name for word in RECIPE) and _is_label(setup, here, word_n, is_number)):
        return None
    show = [f"{word:g}" if is_number else (word or "(empty)") for word in words]
    several = [word for word, is_mixed in zip(show, mixed, strict=True) if is_mixed]
    # A word that is alone at its precision, such as that of the rows in 16 bits, is kept beside any other.
    alone = "".join(f"|{word}" for word, is_mixed in zip(words, mixed, strict=True) if not is_mixed and word != "")
    more = f" and {len(several) - MOST_WORDS} more" if len(several) > MOST_WORDS else ""
    where = f"--where={name}=VALUE" if not alone else f"--where='{name}=VALUE{alone}'"
    return f"the rows mix {name}: {', '.join(several[:MOST_WORDS])}{more}; {where} fits one of them"


def _groups(setup: Setup, here: np.ndarray, names: list[str]) -> np.ndarray:
    """A number for every combination of these columns."""
    codes = np.stack([np.unique(setup.rows[name][here], return_inverse=True)[1] for name in names])
    return np.unique(codes, axis=1, return_inverse=True)[1].ravel()


def _varying(group_n: np.ndarray, word_n: np.ndarray) -> np.ndarray:
    """Which words share a group with another word."""
    group, word = np.unique(np.stack([group_n, word_n]), axis=1)
    shared = np.bincount(group) > 1
    return np.bincount(word, shared[group], minlength=word_n.max() + 1) > 0


def _is_label(setup: Setup, here: np.ndarray, word_n: np.ndarray, is_number: bool) -> bool:
    """Whether the words name sizes, token budgets or models.

    One to one, or, of numbers, as a function of them, as the layers of a model are of N.
    """
    if np.median([len(set(setup.run_n[here][word_n == word])) for word in range(word_n.max() + 1)]) == 1:
        return True
    for names in (["N"], ["D"], ["N", "D"], ["N", "D", *PRECISIONS]):
        group_n = _groups(setup, here, names)
        if not _varying(group_n, word_n).any() and (is_number or not _varying(word_n, group_n).any()):
            return True
    return False
