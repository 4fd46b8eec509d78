"""The check of words: sentences of the design and of this package that must fail, and others that must pass."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/check_words.py"
spec = importlib.util.spec_from_file_location("check_words", TOOL)
assert spec is not None and spec.loader is not None
words = importlib.util.module_from_spec(spec)
sys.modules["check_words"] = words
spec.loader.exec_module(words)


@pytest.mark.parametrize(
    "sentence",
    [
        "Of one expert.",
        "Bytes of each all-reduce.",
        "Names of the domains, in the order of `Prompt.domain`.",
        "What a checkpoint holds of one rank.",
        "The store in which ranks meet.",
        "The keys a call must pass.",
        "The values it returns.",
        "Everything a rank needs of the run.",
        "`build_objective`: every objective by name, its default budgets, and the options it reads.",
        "Finding what a config names: a class by its import path, or by a short name.",
        "One packed row, as one rank sees it.",
        "A checkpoint that is missing, incomplete or not as it was written; an earlier one may be whole.",
        "Ranks along every dimension.",
        "Rank 0's text on every rank; others pass None.",
        "Mean absolute difference of two arrays.",
        "Checks before the start.",
        "Names and shapes of the tensors.",
        "Rows packed by length.",
        "The final checks before a run.",
        "Group-relative advantages.",
        "float32 [n, experts]: what each response token was routed to.",
        "log G = clip(x - l S_same) - clip(-l S_opp) + sum of log base weights (equation 2).",
        "None where `generator` is.",
        "Idempotent.",
    ],
)
def test_a_sentence_without_a_verb_is_found(sentence: str):
    assert not words.has_verb(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the weights of one expert.",
        "Returns the weights of one expert.",
        "Names the domains.",
        "Check that every rank has the same layout.",
        "Sum the rows over all ranks.",
        "Gates the tokens of one call, once the first reduction has summed the nodes over all ranks.",
        "Every rank calls it with its error or None.",
        "All ranks call this together; it raises on all of them when it fails on one.",
        "A publisher carries weights to the engines.",
        "These settings describe the engines: [rollout.engine].",
        "If `x` is set, return it.",
        "Never return more than `count` plans.",
        "`generate` returns the token ids.",
        "A plug-in cannot be used; the message says which, why, and what to do.",
        "This module holds the tables that `fiberpo plan` prints (docs/planning.md).",
        "This module shows plans as Markdown.",
        "These checks look at the machine: GPUs, shared memory, open files.",
        "Return (training GPUs, engine GPUs), which are the same ones if engines are colocated.",
        "Reads and writes the folder of one job.",
        "The engine ended a response before its end.",
        "The CPU platform runs real Megatron-Core on gloo.",
        "Wait for every rank.",
        "Apply every patch of the table, once per process.",
        "This is one failure: where it stands, the sentence, and the reason with the fix.",
    ],
)
def test_a_whole_sentence_passes(sentence: str):
    assert words.has_verb(sentence)


def test_the_first_sentence_ends_at_its_full_stop():
    assert words.first_sentence("Return x, e.g. 0.5 of\n    the rows. Raises ValueError.") == (
        "Return x, e.g. 0.5 of the rows."
    )
    assert words.first_sentence("A heading without an end\n\nAnother paragraph.") == "A heading without an end"
    assert words.first_sentence("Equation 4 of arXiv:2604.03044, section 3.3. More.") == (
        "Equation 4 of arXiv:2604.03044, section 3.3."
    )


@pytest.mark.parametrize(
    "text",
    [
        "A damaged checkpoint is told and passed over",
        "call it not at all",
        "skipped for want of a GPU",
        "every rank calls it, but for `unfinished`",
        "None where `generator` is",
        "ended without a word",
        "measurements of one's own",
        "0: nobody watches",
        "it goes on by itself",
        "None\n    where there is none",
    ],
)
def test_a_phrase_of_the_design_is_found(text: str):
    assert list(words.phrases_in(text))


def test_what_is_found_names_line_and_reason(tmp_path: Path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""This module is an example."""\n'
        "\n"
        "# Its first line is right, and the\n"
        "# second one is told.\n"
        "def public():\n"
        '    """Of one expert."""\n'
        '    raise ValueError(f"{1} ended without a word")\n'
        "\n"
        "def _private():\n"
        '    """Of one expert."""\n'
        "\n"
        "class Public:\n"
        "    field: int\n"
        '    """Tokens per second."""\n'
        "    def method(self):\n"
        '        """Of one token."""\n'
        "        there = 1\n"
    )
    page = tmp_path / "page.md"
    page.write_text("# A page\n\nThe job goes on\nby itself.\n")
    findings = words.check([tmp_path])
    assert [(f.line, f.reason) for f in findings if f.path.endswith(".md")] == [(4, words.PHRASES[9][1])]
    no_verb = "the first sentence has no verb; write a whole sentence"
    assert [(f.line, f.reason) for f in findings if f.path.endswith(".py")] == [
        (4, words.PHRASES[0][1]),
        (6, no_verb),
        (7, words.PHRASES[6][1]),
        (16, no_verb),
        (17, words.IDENTIFIERS["there"]),
    ]
    run = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1 and f"{source}:6: 'Of one expert.'" in run.stdout
    source.write_text('"""This module is an example."""\n')
    page.unlink()
    assert subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True).returncode == 0
