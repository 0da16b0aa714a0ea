"""Complete commands and options in the shell; the output is read by the shell itself.

Examples:
    source <(python -m stages.completion)
    source <(python -m stages.completion shell=zsh)
    python -m stages.completion shell=fish | source
"""

from __future__ import annotations

from quantline.pipeline.command_line import Option
from stages import ROOT, command

OPTIONS = [
    Option("shell", "bash", "the shell that reads the output", allowed=("bash", "zsh", "fish")),
    Option("words", "LINE", "answer a shell: what may stand in place of the last word of LINE"),
]


def completion(arguments: dict[str, str | None]) -> None:
    from quantline.pipeline.completion import candidates, script

    words = arguments["words"]
    print(script(str(arguments["shell"])) if words is None else "\n".join(candidates(words, ROOT)))


if __name__ == "__main__":
    command(completion, OPTIONS, __doc__)
