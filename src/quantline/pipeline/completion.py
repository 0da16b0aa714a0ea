"""Completion in a shell: names of commands, groups, choices and options.

Hydra's own completion knows only commands that are started as `python file.py`. This one reads conf/ and the source of
the commands without importing them, so that an answer takes a moment.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from quantline.config import files

BASH = """\
_quantline() {
  local line="${COMP_LINE:0:COMP_POINT}" last found
  last="${line##* }"
  if [[ "${COMP_WORDS[0]##*/}" == quantline ]]; then
    mapfile -t found < <("${COMP_WORDS[0]}" completion words="stages.${line#* }" 2>/dev/null)
    found=("${found[@]#stages.}")
  elif [[ "$line" == *"-m stages"* ]]; then
    mapfile -t found < <("${COMP_WORDS[0]}" -m stages.completion words="${line#*-m }" 2>/dev/null)
  else
    return 0
  fi
  [[ "${found[*]}" == *[=.] ]] && compopt -o nospace
  [[ "$last" == *=* ]] && found=("${found[@]#"${last%%=*}="}")  # bash takes = as the end of a word
  COMPREPLY=("${found[@]}")
}
complete -o default -o bashdefault -F _quantline python python3 quantline
"""
# Of its own: bash's has `mapfile` and `compopt`, which zsh's emulation has not.
ZSH = """\
(( $+functions[compdef] )) || { autoload -U compinit && compinit }
_quantline() {
  local line="${(j: :)${(@)words[1,CURRENT]}}"
  local -a found open
  if [[ "${words[1]:t}" == quantline ]]; then
    found=("${(@f)$(${words[1]} completion words="stages.${line#* }" 2>/dev/null)}")
    found=("${(@)found#stages.}")
  elif [[ "$line" == *"-m stages"* ]]; then
    found=("${(@f)$(${words[1]} -m stages.completion words="${line#*-m }" 2>/dev/null)}")
  else
    _files
    return
  fi
  open=(${(M)found:#*[=.]})
  found=(${found:#(|*[=.])})
  (( $#open )) && compadd -Q -S '' -- $open
  (( $#found )) && compadd -Q -- $found
}
compdef _quantline python python3 quantline
"""
FISH = """\
function __quantline_line
  set -l words (commandline -opc)
  set -l current (commandline -ct)
  if string match -qr '(^|/)quantline$' -- $words[1]
    set -e words[1]
    echo "stages."(string join ' ' -- $words "$current")
  else if test (count $words) -ge 2; and test "$words[2]" = -m
    set -e words[1..2]
    string match 'stages*' -- (string join ' ' -- $words "$current")
  end
end
function __quantline_complete
  set -l program (commandline -opc)[1]
  set -l line (__quantline_line)
  if string match -qr '(^|/)quantline$' -- $program
    $program completion words="$line" 2>/dev/null | string replace -r '^stages\\.' ''
  else
    $program -m stages.completion words="$line" 2>/dev/null
  end
end
for program in python python3 quantline
  complete -c $program -f -n 'string length -q -- (__quantline_line)' -a '(__quantline_complete)'
end
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str) -> str:
    """The lines that a shell reads to complete."""
    return SCRIPTS[shell]


def candidates(words: str, root: Path) -> list[str]:
    """What may stand in place of the last word.

    Args:
        words: the command line from the module on, such as `stages.quantize method=gp`. A space at the end starts a word.
        root: the checkout.
    """
    module, *arguments = words.split(" ")
    if not arguments:
        names = [path.stem for path in sorted((root / "stages").glob("[a-z]*.py"))]
        return [f"stages.{name}" for name in names if f"stages.{name}".startswith(module)]
    path = root / "stages" / f"{module.removeprefix('stages.')}.py"
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    own, configured = _own_options(source), "DictConfig" in source or "@stage(" in source
    name, equals, _ = arguments[-1].partition("=")
    found = (
        [f"{name}={value}" for value in _values(name, own, root / "conf", arguments)]
        if equals
        else [*(f"{key}=" for key in own), *(_names(root / "conf", arguments) if configured else [])]
    )
    return [one for one in dict.fromkeys(found) if one.startswith(arguments[-1])]


def _own_options(source: str) -> dict[str, tuple[str, ...]]:
    """The options that a command's module defines, each with the values that it allows."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Option":
            allowed = next((word.value for word in node.keywords if word.arg == "allowed"), None)
            values = ast.literal_eval(allowed) if allowed is not None else ()
            found[ast.literal_eval(node.args[0])] = tuple(values)
    return found


def _values(name: str, own: dict[str, tuple[str, ...]], conf: Path, arguments: list[str]) -> list[str]:
    if name in own:
        return list(own[name])
    known = files.groups(conf)
    if name in known:
        return [path.stem for path in files.files_of(conf, name, known[name])]
    value = dict(_options(conf, arguments)).get(name)
    return ["true", "false"] if isinstance(value, bool) else []


def _names(conf: Path, arguments: list[str]) -> list[str]:
    given = {argument.partition("=")[0] for argument in arguments[:-1]}
    names = [*files.groups(conf), *(name for name, _ in _options(conf, arguments) if not name.endswith(".name"))]
    return [f"{name}=" for name in names if name not in given]


def _options(conf: Path, arguments: list[str]) -> Iterator[tuple[str, object]]:
    """Every option with its default, for the choices that the command line makes."""
    root = files.load(conf / "config.yaml")
    yield from files.flat({key: value for key, value in root.items() if key not in ("defaults", "hydra")})
    for group, choice in files.choices_of(conf, arguments).items():
        yield from files.flat(files.chosen(conf, group, choice), files.section_of(conf, group))
