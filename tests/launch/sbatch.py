"""How SLURM reads a batch script: the options in #SBATCH lines, and the pattern of the job's log (after the sources of
sbatch/opt.c and slurmstepd/fname.c, 22.05)."""

import re


def options(script: str) -> list[str]:
    """The words of all #SBATCH lines. A backslash protects the next character, in quotes of both kinds as well."""
    found = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            found += _words(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return found


def _words(text: str) -> list[str]:
    words: list[str] = []
    word, quote, escaped = None, "", False
    for character in text:
        if escaped:
            word, escaped = (word or "") + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            if character == quote:
                quote = ""
            else:
                word = (word or "") + character
        elif character in "'\"":
            word, quote = word or "", character
        elif character == "#":
            break
        elif character in " \t\r\v\f":
            words += [word] if word is not None else []
            word = None
        else:
            word = (word or "") + character
    assert not quote, f"unmatched quote in {text!r}: sbatch refuses the script"
    return [*words, word] if word is not None else words


def log_name(pattern: str, job: int) -> str:
    """The file that a job writes to; it is no array."""
    if "\\" in pattern:
        return pattern.replace("\\", "")
    return re.sub(r"%(.)", lambda found: {"%": "%", "j": str(job)}.get(found[1], f"<{found[1]}>"), pattern)
