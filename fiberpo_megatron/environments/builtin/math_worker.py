"""This script runs math-verify for `MathVerifier`: it gets a JSON request per line and answers with one.

Run as a script, it imports nothing of this package. An alarm signal ends it when one comparison takes too
long (`9**9**9**9` never returns, and no Python exception can interrupt it); the parent starts another one.
The alarm also ends it when the parent has died, and so does the end of stdin.
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, whose names must not stand before those of the standard library

import json
import resource
import signal
from typing import Any

MEMORY_BYTES = 4 * 2**30


def build_check() -> Any:
    """Return (answer, response) -> bool by math-verify, without its own timeouts (they do not work in threads)."""
    from math_verify import parse, verify

    def check(answer: str, response: str) -> bool:
        # A bare answer is LaTeX; only between dollar signs does the parser read `x+1` or `\\frac12` as such.
        gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        parsed = parse(gold, parsing_timeout=None)
        return bool(verify(parsed, parse(response, parsing_timeout=None), timeout_seconds=None))

    return check


def main(timeout_s: float) -> None:
    """Answer requests until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    check = build_check()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            correct = check(request["answer"], request["response"])
        except Exception:  # a response that breaks the parser is a wrong response
            correct = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"correct": correct}), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
