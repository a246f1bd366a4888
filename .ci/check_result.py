"""Fails unless a tiny run kept what the README promises: `check_result.py result.json SECONDS`."""

import json
import sys
from pathlib import Path

SECONDS_ALLOWED = 360


def main(path: str, seconds: str) -> None:
    """Compares `result.json` with the promise."""
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    before, after = result["before"], result["after"]
    saved = 1 - after["tokens"] / before["tokens"]
    gained = after["accuracy"] - before["accuracy"]
    print(f"tokens saved {saved:.1%}, accuracy {gained:+.1%}, {seconds} s")
    assert before["questions"] >= 512, "too few questions"
    assert 0.70 <= before["accuracy"] <= 0.95, "untrained accuracy outside 70 to 95 %"
    assert saved >= 0.25, "fewer than 25 % of the tokens saved"
    assert gained >= -0.01, "more than one point of accuracy lost"
    assert int(seconds) <= SECONDS_ALLOWED, "slower than promised"


if __name__ == "__main__":
    main(*sys.argv[1:])
