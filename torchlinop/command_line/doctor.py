"""``torchlinop doctor SPEC``: what a run would be of, and what is wrong, before it is begun."""

from __future__ import annotations

import argparse
from typing import Any

from torchlinop.command_line.curvature import assembled, operator_for, parts_of, prepared
from torchlinop.command_line.environment import environment
from torchlinop.command_line.examination import of_data, of_matrix, of_model
from torchlinop.command_line.findings import Finding, examining
from torchlinop.command_line.loading import built
from torchlinop.command_line.options import Subparsers, add_json, add_spec, command
from torchlinop.command_line.report import print_json
from torchlinop.command_line.run import DONE, NOT_CONVERGED


def add(subparsers: Subparsers) -> None:
    """The arguments of this command."""
    parser = command(
        subparsers,
        "doctor",
        "examine model, data, loss and a few products",
        "A handful of products, and two passes over the data. Without SPEC, the environment alone."
        "\nExit code 1: a fault was found.",
    )
    add_spec(parser, optional=True)
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    facts = environment()
    findings = examined(built(options.spec, options.seed), options) if options.spec else []
    code = NOT_CONVERGED if any(finding.level == "FAULT" for finding in findings) else DONE
    if options.json:
        listed = [vars(finding) for finding in findings]
        print_json({"ok": code == DONE, "environment": facts, "findings": listed})
        return code
    for name, fact in facts.items():
        print(f"{name:10}{fact}")
    if findings:
        print(f"\n{options.spec}")
        print(*findings, sep="\n")
        print(f"\n{_verdict(findings)}")
    return code


def examined(made: Any, options: argparse.Namespace) -> list[Finding]:
    """All that is found in what build() returned.

    Raises:
        OptionError: it returned something else than a matrix can be made of.
    """
    findings: list[Finding] = []
    parts, operator = parts_of(made), None
    if parts is None:
        operator = operator_for(made, options)
    else:
        parts = prepared(parts, options)
        for subject, examine in (("model", of_model(parts.model)), ("data", of_data(parts))):
            with examining(subject, findings):
                findings.extend(examine)
        with examining("matrix", findings):
            operator = assembled(parts, options.operator or "hessian")
    if operator is not None:
        of_matrix(operator, findings)
    return findings


def _verdict(findings: list[Finding]) -> str:
    counts = {level: sum(f.level == level for f in findings) for level in ("FAULT", "warning")}
    if not any(counts.values()):
        return "nothing is wrong"
    told = [f"{n} {level.lower()}{'s' * (n > 1)}" for level, n in counts.items() if n]
    return " and ".join(told)
