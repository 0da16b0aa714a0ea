"""Say what this machine and project have, what is missing, and what to do about it. Exits with 1 if something is missing."""

from __future__ import annotations

from stages import ROOT, command


def doctor(_arguments: dict[str, str | None]) -> int:
    from quantline.lifecycle.doctor import examine

    findings = examine(ROOT)
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        print(f"{'ok     ' if finding.good else 'MISSING'}  {finding.about:<{width}}  {finding.fact}")
        if finding.remedy:
            print(f"{' ' * (width + 11)}{finding.remedy}")
    return 0 if all(finding.good for finding in findings) else 1


if __name__ == "__main__":
    command(doctor, about=__doc__)
