"""Say what this machine and project have, what is missing, and what to do about it; with variant=NAME, what a variant has.

Exits with 1 if something is missing or a cause is found.

Examples:
    python -m stages.doctor
    python -m stages.doctor variant=awq-w4-g128
    python -m stages.doctor variant=awq-w4-g128 bundle=report.zip
"""

from __future__ import annotations

from quantline.pipeline.command_line import Option
from stages import ROOT, command

OPTIONS = [
    Option("variant", "NAME", "why it does not load, lost accuracy, or is slow"),
    Option("bundle", "FILE.zip", "findings, results and logs of the variant, without secrets, for a report of a bug"),
]


def doctor(arguments: dict[str, str | None]) -> int:
    if arguments["variant"]:
        return of_variant(arguments["variant"], arguments["bundle"])
    if arguments["bundle"]:
        from quantline.core.errors import UserError

        raise UserError(f"bundle={arguments['bundle']}: is of a variant; give variant=NAME")
    from quantline.lifecycle.doctor import examine

    findings = examine(ROOT)
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        print(f"{'ok     ' if finding.good else 'MISSING'}  {finding.about:<{width}}  {finding.fact}")
        if finding.remedy:
            print(f"{' ' * (width + 11)}{finding.remedy}")
    return 0 if all(finding.good for finding in findings) else 1


def of_variant(name: str, to: str | None) -> int:
    from pathlib import Path

    from quantline.lifecycle.variant_doctor import as_lines, bundle, examine_variant
    from quantline.pipeline.records import variant_record

    record = variant_record(ROOT, name)
    report = examine_variant(ROOT, record)
    print("\n".join(as_lines(report)))
    if to:
        print(bundle(ROOT, record, report, Path(to).absolute()))
    return 1 if report.causes else 0


if __name__ == "__main__":
    command(doctor, OPTIONS, about=__doc__)
