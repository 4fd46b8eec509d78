"""This module writes a certificate as certify.json, for programs, and as certify.md, for people."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.certify.certificate import Certificate
from fiberpo_megatron.certify.checks import Check
from fiberpo_megatron.certify.compare import Difference

JSON, PAGE = "certify.json", "certify.md"
VERSION = 1
_SHOWN = 20
"""Comparisons beyond their bound that the page lists; the JSON has all."""


def write(certificate: Certificate, folder: Path) -> Path:
    """Write both files into the folder, which is made, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replaced(folder / JSON, text=True) as file:
        json.dump(as_json(certificate), file, indent=1, allow_nan=False)
    with durable.replaced(folder / PAGE, text=True) as file:
        file.write("\n".join(lines(certificate)) + "\n")
    return folder / PAGE


def as_json(certificate: Certificate) -> dict[str, Any]:
    """Return the certificate as JSON values; a difference that is no finite number is the text "inf"."""
    return {
        "version": VERSION,
        "passed": certificate.passed,
        **certificate.about,
        "states_reached": certificate.reached,
        "states_not_reached": certificate.not_reached,
        "checks": [_check_json(check) for check in certificate.checks],
        "failures": [{"what": what, "error": error} for what, error in certificate.failures],
        "not_run": [{"what": what, "why": why} for what, why in certificate.not_run],
        "peer": [
            {
                "step": peer.check.subject,
                "hint": peer.hint,
                "worst": [vars(offender) for offender in peer.worst],
            }
            for peer in certificate.peers
        ],
    }


def _check_json(check: Check) -> dict[str, Any]:
    return {
        "part": check.part,
        "what": check.what,
        "subject": check.subject,
        "passed": check.passed,
        "tolerance": check.tolerance,
        "results": {
            name: {
                "equal_bits": one.equal,
                "differing": one.differing,
                "largest_difference": _number(one.largest),
                "relative_difference": _number(one.relative),
            }
            for name, one in check.found.items()
        },
        "where": check.where,
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def lines(certificate: Certificate) -> Iterator[str]:
    """Yield the page's lines, in Markdown."""
    about, checks = certificate.about, certificate.checks
    broken = [check for check in checks if not check.passed]
    objective, machine = about["objective"], about["machine"]
    yield "# Certificate"
    yield ""
    if certificate.passed:
        yield f"**Passed**: all {len(checks)} comparisons are within their bounds."
    else:
        yield (
            f"**Not passed**: {len(broken)} of {len(checks)} comparisons are beyond their bounds, and "
            f"{len(certificate.failures)} parts broke off."
        )
    yield ""
    yield f"- Repeat it with `{about['command']}`, which took {about.get('seconds', '?')} s."
    yield f"- Objective: `{objective['use']}` with `{json.dumps(objective['options'])}`."
    yield (
        f"- Machine: torch {machine['torch']} on {machine['device']} ({machine['processor']}), {machine['cores']} "
        f"cores. Layouts ran on {machine['layouts_on']}, on at most {about['ranks']} processes. Seed: {about['seed']}."
    )
    if about["dump"] is not None:
        yield f"- File: `{about['dump']['path']}`, SHA-256 {about['dump']['sha256']}."
        if "replay" in about:
            yield f"- Replay: {about['replay']}."
    if "model" in about:
        model = about["model"]
        yield (
            f"- Model of the training step: {'a small model of the family' if model['shrunk'] else 'the architecture'} "
            f"{model['family']} with drawn weights, {model['tokens']} tokens. An error of 1e-6 in log ratios moves "
            f"coefficients by {model['sensitivity']:.1e} of the largest."
        )
    yield "- Batches: " + "; ".join(about["batches"]) + "."
    if certificate.reached:
        count = len(certificate.reached) + len(certificate.not_reached)
        rest = ", ".join(f"`{name}`" for name in certificate.not_reached)
        yield (
            f"- States of gates and clips that the batches bring about: {len(certificate.reached)} of {count}"
            + (f"; not {rest}." if rest else ".")
        )
    yield ""
    yield "Differences are relative to the largest entry of a tensor; a metric's to itself."
    for part in dict.fromkeys(check.part for check in checks):
        yield from _part(part, [check for check in checks if check.part == part])
    yield from _peers(certificate)
    yield from _broken(certificate, broken)
    if certificate.not_run:
        yield from ["", "## Not run", ""]
        for what, why in certificate.not_run:
            yield f"- {what}: {why}."


def _part(part: str, checks: Sequence[Check]) -> Iterator[str]:
    names = list(dict.fromkeys(name for check in checks for name in check.found))
    yield from ["", f"## {part}", ""]
    yield _row(["what", "tried on", "demanded", *names, "verdict"])
    yield _row(["---"] * (4 + len(names)))
    for what in dict.fromkeys(check.what for check in checks):
        own = [check for check in checks if check.what == what]
        cells = [_worst([check.found[name] for check in own if name in check.found]) for name in names]
        passed = all(check.passed for check in own)
        bounds = sorted({check.tolerance for check in own if check.tolerance is not None})
        demanded = "equal bits" if not bounds else " or ".join(f"{bound:.2g}" for bound in bounds)
        subject = own[0].subject if len(own) == 1 else f"{len(own)} batches"
        yield _row([what, subject, demanded, *cells, "passed" if passed else "**beyond**"])


def _worst(found: Sequence[Difference]) -> str:
    if not found:
        return ""
    if all(one.equal for one in found):
        return "equal bits"
    worst = max(found, key=lambda one: one.relative)
    return f"{worst.relative:.2g}"


def _peers(certificate: Certificate) -> Iterator[str]:
    for peer in certificate.peers:
        if not peer.worst:
            continue
        yield from ["", f"## Tokens of {peer.check.subject} that differ most", ""]
        if peer.hint is not None:
            yield from [f"All coefficients differ in the same way: {peer.hint}.", ""]
        yield _row(["token", "log ratio", "advantage", "theirs", "ours"])
        yield _row(["---"] * 5)
        for one in peer.worst:
            yield _row([one.where, *(f"{x:.9g}" for x in (one.log_ratio, one.advantage, one.theirs, one.ours))])


def _broken(certificate: Certificate, broken: Sequence[Check]) -> Iterator[str]:
    if broken:
        yield from ["", "## Beyond their bounds", ""]
        for check in broken[:_SHOWN]:
            found = "; ".join(f"{name}: {one}" for name, one in check.found.items() if not one.equal)
            yield f"- {check.what} ({check.subject}): {found}. The largest is at {check.where}."
        if len(broken) > _SHOWN:
            yield f"- {len(broken) - _SHOWN} more are in {JSON}."
    if certificate.failures:
        yield from ["", "## Broken off", ""]
        for what, error in certificate.failures:
            yield f"- {what}:"
            yield from ["", "```", error.rstrip(), "```", ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
