#!/usr/bin/env python3
"""Check the English of docstrings, comments, messages and pages: `tools/check_words.py [FILES OR FOLDERS]`.

Two things fail. First, a public docstring (of a module, class, function or method) whose first sentence has no verb:
a reader cannot tell what the thing does. Second, a phrase of the list PHRASES below, in any docstring, comment, string
literal or page. Each failure is printed as `file:line`, the sentence, and what to write in its place. Docstrings under
fields and constants may be noun phrases ("Tokens per second."); only the phrases are checked in them.

Whether a sentence has a verb is decided by lists of words, without a grammar:
- Only the main clause counts. Text in backticks stands for a noun; text in parentheses, text behind a colon or a
  semicolon, and a subordinate clause (from "which", "that", "where", "if" ... to the next comma) are left out.
- A form of "be", "have" or "do", or a modal verb, is a verb wherever it stands.
- A word of VERBS is one in the third person wherever it stands, and in the base form at the beginning of the clause
  or behind a plural.
- A word of NOUN_LIKE or MOSTLY_NOUNS is a noun as often as a verb ("checks", "names"). It counts as a verb only where
  its neighbours say so: at the beginning of the sentence without "of", "per" or another preposition behind it ("Names
  of the domains" has no verb), and elsewhere with an article or a similar word behind it and none before it.
A sentence that is right and fails all the same should be written more plainly, or its verb added to the list.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHOLE_TREE = ("fiberpo_megatron", "tools", "examples", "README.md", "CONTRIBUTING.md", "docs")
PAGE_ENDINGS = (".md", ".toml", ".sh", ".jinja", ".def")
EXEMPT = ("tools/check_words.py", "CHANGELOG.md")
"""Paths from the root that are not checked: this file quotes what it forbids."""

PHRASES: tuple[tuple[str, str], ...] = (
    (r"\btold\b", 'say what happens: "reported", "recorded", "recognised", "given"'),
    (r"\bpassed over\b", 'write "skipped" or "ignored"'),
    (r"\bnot at all\b", 'write "never", "do not ..." or "no ..."'),
    (r"\bfor want of\b", 'write "because there is no ..."'),
    (r"\bbut for\b", 'write "except for" or "except"'),
    (r"\bNone where\b", 'write "None if ..." or "None when ..."'),
    (r"\bwithout a word\b", 'write "silently"'),
    (r"\bof one's own\b", 'write "your own ..." or "a custom ..."'),
    (r"\bnobody\b", 'name who is meant: "no rank", "no process", "no user"'),
    (r"\bby (?:itself|themselves)\b", 'write "automatically", or name who does it'),
    (r"\bits like\b|\band the like\b", 'name the others, or write "and similar ..."'),
    (r"\b(?:therein|thereof|whence|whither|hitherto|lest)\b", "write it in everyday words"),
)
"""Regular expressions of phrases that are not allowed, each with what to write in their place."""

IDENTIFIERS = {
    "there": 'name what the function does: "to_device"',
    "_there": 'name what the function does: "_to_device"',
    "told": "name what the value is",
    "_told": "name what the value is",
}
"""Names of functions and variables that are not allowed, each with what to write in its place."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


AUXILIARIES = _words("""
    am is are was were be has have had do does did can cannot could may might must shall should will would isn't aren't
    wasn't weren't hasn't haven't doesn't don't didn't can't couldn't won't wouldn't mustn't
""")
VERBS = _words("""
    abort accept accompany accumulate acquire activate adapt add adjust adopt agree allocate allow announce appear
    append apply approximate arise arrange arrive ask assemble assert assign assume attach average avoid await become
    begin behave believe belong bind bring broadcast build calculate cancel capture carry cause choose clamp clean
    clear close collect combine come commit compare compile compose compress compute concatenate configure confirm
    connect consist construct consume contain continue convert correct correspond cover crash create cross deal decide
    declare decode decompose decorate decrease deduce defer define delay delegate delete deliver demand deny depend
    derive describe deserve destroy detach detect determine differ differentiate disable discard disconnect dispatch
    display distinguish distribute divide download drain draw duplicate edit elaborate embed emit enable enclose encode
    enforce ensure enter enumerate erase establish evaluate examine exceed exchange exclude execute exist expand expect
    explain export expose extend extract fail fake fetch find finish fit fix flatten flush follow forbid forget fork
    freeze generate get give go grow guarantee guess guide halve happen hide hold identify ignore illustrate implement
    include increase infer inform inherit initialise initialize inject insert inspect install instruct intend
    interpolate interpret interrupt introduce invert invoke isolate iterate join justify keep kill know lack launch
    learn leave let lie listen live locate look loop lose lower maintain make manage maximise meet mention merge
    migrate minimise modify monitor multiply mutate negate neglect normalise normalize notify obey observe obtain occur
    offer omit open optimise outlive overlap override overwrite own parse perform persist pick pickle predict prefer
    prefix prepare present preserve prevent proceed produce propagate propose protect prove provide prune publish put
    quantise quote raise reach react rebuild receive recognise recompute reconstruct recover recur redirect reduce
    refuse regard register reject relate rely remain remember remove rename render replace represent require rescale
    resemble resolve respond restore restrict resume retain retrieve retry return reuse reveal reverse rewind rotate
    route say scan scatter scrape see seek select separate serve shorten shrink shuffle shut simplify simulate sit skip
    sleep slice smooth solve spawn speak specialise specify spell spread stand stay strip submit subtract succeed
    summarise suppress surround survive suspend symbolise synchronise take talk teach terminate throw toggle tokenise
    tolerate train transform translate transpose treat try understand undo unfold unite unlink unpack unwrap upload
    validate vary verify visualise wait wake warm warn widen withdraw write zip
""")
NOUN_LIKE = _words("""
    access act advance answer attempt bound break call cap cast change chart check claim clip copy cost count cut drop
    dump end estimate exit fall fill filter format gather handle help hint import label lay limit link list load mark
    match measure mirror move need note pad park pass patch pause place plan plot post print probe process profile
    queue read record refer release repeat replay report request reserve reset rest result rewrite round run save scale
    schedule score search send set share shift show sort split start stop store supply support swap sweep switch tag
    tell test touch track transfer travel trim turn update use visit walk watch weigh wrap yield
""")
MOSTLY_NOUNS = _words("""
    base block complete empty force form gate group hash index lead lease lock log map mask mean name order pack pair
    part point pool promise rank rate sample shard sign stack state step stream sum time trace wish work
""")
DETERMINERS = _words("""
    a an the this that these those its their his her our your my each every all both no any some one two three four
    it them us you everything nothing something anything what which whether how who where only exactly
""")
PREPOSITIONS = _words("""
    of for in on at by from between per with as to before after over under through into and or within without during
    across against about above below behind than along among around beside beyond inside outside
""")
SUBORDINATE = _words("""
    what which that where who whose whom when whenever while if because whether how why until unless since although
    though wherever whatever whichever as
""")
ARTICLES = _words("a an the every each")
PLURAL_SUBJECTS = _words("they we you i people both all many several")
SUBJECT_PRONOUNS = _words("it they we you i he she")
OPENING = _words("also never always first then only and or not but")
NOUN = "\N{BULLET}"  # stands for text in backticks


@dataclass(frozen=True)
class Finding:
    """This is one failure: where it stands, the sentence, and the reason with the fix."""

    path: str
    line: int
    sentence: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.sentence!r}: {self.reason}"


def third_person(verb: str) -> str:
    """Return the third person singular of a verb."""
    if verb in ("go", "do"):
        return verb + "es"
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


THIRD_PERSON = frozenset(map(third_person, VERBS))
AMBIGUOUS = NOUN_LIKE | MOSTLY_NOUNS | frozenset(map(third_person, NOUN_LIKE | MOSTLY_NOUNS))
RARE = MOSTLY_NOUNS | frozenset(map(third_person, MOSTLY_NOUNS))


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring, on one line."""
    paragraph = re.split(r"\n\s*\n|\n\s*[-*] ", text.strip(), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    for end in re.finditer(r"[.!?](?=\s|$)", line):
        if not re.search(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al)|\b[A-Z])\.$", line[: end.end()]) or end.end() == len(line):
            return line[: end.end()]
    return line


def has_verb(sentence: str) -> bool:
    """Say whether the main clause of a sentence has a verb, by the rules in the docstring of this module."""
    beginning = True
    for words in _main_clauses(sentence):
        if _clause_has_verb(words, beginning=beginning):
            return True
        beginning = beginning and words == [""]  # the main clause of "If x is set, return y" begins after the comma
    return False


def _main_clauses(sentence: str) -> list[list[str]]:
    """Return the words of the main clause, cut at its commas; a part ends with the word that opens a clause in it."""
    text = re.sub(r"``?[^`]*``?", f" {NOUN} ", sentence)
    text = re.sub(r"\([^()]*\)|\[[^\[\]]*\]", " ", text)
    text = re.split(r"[:;](?:\s|$)", text, maxsplit=1)[0]
    clauses = []
    for part in re.split(r",\s| - | -- ", text):
        words = [word.lower() for word in re.findall(rf"[A-Za-z][\w'-]*|\d[\w.]*|{NOUN}", part)]
        kept: list[str] = []
        for i, word in enumerate(words):
            relative = i > 0 and word in SUBJECT_PRONOUNS | ARTICLES and _is_noun(words[i - 1])  # "values it returns"
            if (word in SUBORDINATE and not (word == "that" and i == 0)) or relative:
                kept.append(word if i else "")
                break
            kept.append(word)
        clauses.append(kept)
    return clauses


def _is_noun(word: str) -> bool:
    known = AUXILIARIES | VERBS | THIRD_PERSON | AMBIGUOUS | PREPOSITIONS | SUBORDINATE | DETERMINERS
    return word not in known and not word.endswith(("ly", "ing", "ed"))


def _clause_has_verb(words: Sequence[str], *, beginning: bool) -> bool:
    words = list(words)
    while words and (words[0] in OPENING or (words[0].endswith("ly") and words[0] not in VERBS)):
        words.pop(0)
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        behind = words[i + 1] if i + 1 < len(words) else ""
        if word in AUXILIARIES or (i == 0 and _opens_with_verb(words, beginning=beginning)):
            return True
        if i == 0:
            continue
        if word.endswith("ed") and before not in PREPOSITIONS and behind in ARTICLES:  # "The engine ended a response"
            return True
        plural = before in PLURAL_SUBJECTS or (before.endswith("s") and not before.endswith(("ss", "us", "'s")))
        third = word in THIRD_PERSON or (word in AMBIGUOUS and word.endswith("s"))
        if not (third or (plural and word in VERBS | AMBIGUOUS)) or before in PREPOSITIONS:
            continue
        if word not in AMBIGUOUS:
            return True
        if words[0] in ("this", "these") and i > 1:  # "This module shows plans"
            return True
        if words[0] in ARTICLES and i > 1 and word not in RARE and behind and behind not in PREPOSITIONS:
            return True  # "The platform runs real programs"
        subject = before not in DETERMINERS or before in PLURAL_SUBJECTS | {"this", "it"}
        if subject and (behind in DETERMINERS or behind == NOUN):
            return True
    return False


def _opens_with_verb(words: Sequence[str], *, beginning: bool) -> bool:
    """Say whether the first word of a clause is its verb; `beginning` says that the sentence begins with it."""
    word, behind = words[0], words[1] if len(words) > 1 else ""
    if word not in AMBIGUOUS:
        return word in VERBS or (beginning and word in THIRD_PERSON)
    if behind in ("and", "or") and len(words) > 2:  # "Reads and writes the folder"
        return _opens_with_verb(words[2:], beginning=beginning)
    if word in RARE:
        return beginning and (behind == NOUN or behind in DETERMINERS - {"that", "which", "where", "who"})
    return beginning and bool(behind) and behind not in PREPOSITIONS | AUXILIARIES | {"which", "who"}


def phrases_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the offset of each forbidden phrase in a text, the phrase, and what to write in its place."""
    for pattern, fix in PHRASES:
        for match in re.finditer(pattern.replace(" ", r"[\s#]+"), text, re.IGNORECASE):
            yield match.start(), match.group(), fix


def check_page(path: str, text: str) -> Iterator[Finding]:
    """Yield the forbidden phrases of a page, a shell script or a config."""
    for offset, phrase, fix in phrases_in(text):
        yield Finding(path, text.count("\n", 0, offset) + 1, " ".join(phrase.split()), fix)


def check_python(path: str, text: str) -> Iterator[Finding]:
    """Yield all findings in the source of one Python file."""
    tree = ast.parse(text)
    yield from _docstrings_without_verb(path, tree)
    parts_of_f_strings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts_of_f_strings.update(map(id, node.values))
            values = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield from _phrases_at(path, node.lineno, "".join(map(str, values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts_of_f_strings:
            yield from _phrases_at(path, node.lineno, node.value)
        for name in _names_of(node):
            if name in IDENTIFIERS:
                yield Finding(path, getattr(node, "lineno", 1), name, IDENTIFIERS[name])
    for line, comment in _comments(text):
        yield from _phrases_at(path, line, comment)


def _docstrings_without_verb(path: str, node: ast.AST) -> Iterator[Finding]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and not has_verb(sentence := first_sentence(docstring)):
            first = node.body[0].lineno
            yield Finding(path, first, sentence, "the first sentence has no verb; write a whole sentence")
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if named and not child.name.startswith("_") and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_without_verb(path, child)


def _names_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id


def _phrases_at(path: str, line: int, text: str) -> Iterator[Finding]:
    for offset, phrase, fix in phrases_in(text):
        start = max(text.rfind(". ", 0, offset) + 1, 0)
        end = text.find(". ", offset)
        sentence = " ".join(text[start : end + 1 if end >= 0 else len(text)].split())
        shown = sentence if len(sentence) <= 200 else " ".join(phrase.split())
        yield Finding(path, line + text.count("\n", 0, offset), shown, fix)


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the comments with their lines; a comment over several lines is one text."""
    start, last, lines = 0, -1, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                if lines:
                    yield start, "\n".join(lines)
                start, lines = token.start[0], []
            lines.append(token.string)
            last = token.start[0]
    if lines:
        yield start, "\n".join(lines)


def files_under(paths: Sequence[Path]) -> list[Path]:
    """Return the files to check under the given files and folders, sorted. Raises FileNotFoundError."""
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; pass files or folders, or nothing for the whole tree")
        inside = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        found.update(p.resolve() for p in inside if p.suffix == ".py" or p.name.endswith(PAGE_ENDINGS))
    return sorted(p for p in found if _shown(p) not in EXEMPT)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def check(paths: Sequence[Path]) -> list[Finding]:
    """Return all findings in files and folders, in the order of files and lines."""
    findings: list[Finding] = []
    for path in files_under(paths):
        text = path.read_text(encoding="utf-8")
        checked = check_python if path.suffix == ".py" else check_page
        findings += sorted(checked(_shown(path), text), key=lambda finding: finding.line)
    return findings


def main(arguments: Sequence[str]) -> int:
    """Check the given files and folders, or the whole tree; return the exit code."""
    findings = check([Path(a) for a in arguments] or [ROOT / part for part in WHOLE_TREE])
    for finding in findings:
        print(finding)
    if findings:
        print(f"{len(findings)} sentence(s) to write again; the rules are at the top of tools/check_words.py")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
