"""What a server says, for people and for machines: a text that also knows which event it is, and the event's facts."""

from __future__ import annotations

from typing import Any


class Note(str):
    """A line of a log. event: "join", "refused", "late", "round", ...; facts: JSON, by name."""

    event: str
    facts: dict[str, Any]

    def __new__(cls, text: str, event: str, **facts: Any) -> Note:
        made = super().__new__(cls, text)
        made.event, made.facts = event, facts
        return made
