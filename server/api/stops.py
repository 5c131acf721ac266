"""Stop strings: found wherever token boundaries fall, and never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Text in by pieces, text out up to the first stop string.

    What could be the beginning of a stop string is held back until it turns out to be one or not. The
    result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. Once ``found`` is set, nothing more is."""
        if self.found is not None or not text:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        match = self._first_match(held)
        if match is not None:
            start, self.found = match
            self._held = ""
            return held[:start]
        keep = self._possible_start(held)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held

    def release(self, text: str) -> str:
        """Let ``text`` through unsearched (``min_tokens`` are not out yet), after what was held back."""
        return self.flush() + text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins; the longer one of two that end together."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                key = (start + len(stop), start, stop)
                best = key if best is None else min(best, key)
        return None if best is None else (best[1], best[2])

    def _possible_start(self, text: str) -> int:
        """How long the longest end of ``text`` is that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
