"""Files as people have them: support tickets, and pairs of sentences with scores."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

DEPARTMENTS = {
    "billing": ("the invoice", "my refund", "the monthly payment", "a double charge", "the credit card"),
    "delivery": ("the parcel", "my shipment", "the courier", "a late delivery", "the tracking number"),
    "technical": ("the app", "my password", "the login page", "an error message", "the latest update"),
    "returns": ("the return label", "my exchange", "the wrong size", "a damaged item", "the warranty"),
}
_OPENINGS = ("Hello, I have a question about", "Please help me with", "Nobody answers me about", "I am not happy with")
_ENDINGS = ("since last week.", "again, for the third time!", "and I need an answer by Friday.", "; what should I do?")


def tickets(count: int = 300) -> list[tuple[int, str, str]]:
    """(id, text, department), the departments in turn; texts are all different."""
    subjects = [
        (name, subject)
        for subjects in zip(*DEPARTMENTS.values(), strict=True)
        for name, subject in zip(DEPARTMENTS, subjects, strict=True)
    ]
    sentences = itertools.product(range(1, 99), _ENDINGS, _OPENINGS, subjects)
    rows = [
        (name, f"{opening} {subject} {ending} (order {number})")
        for number, ending, opening, (name, subject) in itertools.islice(sentences, count)
    ]
    return [(number, text, name) for number, (name, text) in enumerate(rows, 1)]


def write_tickets(path: Path, count: int = 300, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    """A CSV of tickets with the columns id, text and department."""
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(("id", "text", "department"))
        writer.writerows(tickets(count))
    return path


def write_scored_pairs(path: Path, count: int = 60) -> Path:
    """A CSV of pairs with whole scores from 0 to 5."""
    rows = tickets(count + 1)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text1", "text2", "score"))
        writer.writerows((a[1], b[1], number % 6) for number, (a, b) in enumerate(itertools.pairwise(rows)))
    return path
