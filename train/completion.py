"""``gracile completion``: a script by which bash and zsh complete commands, keys and names."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from ..registry import LAYERS, OPTIMIZERS, recipes
from ..validation import nearest

HEAD = """\
usage: gracile completion [bash | zsh]

Prints a script that completes commands, keys, recipes, optimizers and layers. In ~/.bashrc, or ~/.zshrc with zsh:

  eval "$(gracile completion bash)"
"""
SCRIPT = """\
_gracile() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [[ $before == --optimizer ]]; then
        COMPREPLY=($(compgen -W "{optimizers}" -- "$word"))
    elif [[ $before == --layer ]]; then
        COMPREPLY=($(compgen -W "{layers}" -- "$word"))
    elif [[ $word == --* ]]; then
        COMPREPLY=($(compgen -W "{keys}" -- "$word"))
    elif [[ $word == */* ]]; then
        COMPREPLY=($(compgen -f -- "$word"))
    else
        COMPREPLY=($(compgen -W "{recipes}" -- "$word") $(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _gracile gracile
"""
# bash's way in zsh; its own comes first, which a ~/.zshrc may not have begun
ZSH = """\
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit -i }}
autoload -U +X bashcompinit && bashcompinit
"""
SHELLS = {"bash": SCRIPT, "zsh": ZSH + SCRIPT}


def script(shell: str) -> str:
    """What a shell evaluates once, when it starts."""
    from .cli import COMMANDS  # which imports this module for its word
    from .config.finetune_arguments import FinetuneConfig
    from .config.parser import NOT_READ, field_names

    keys = sorted(f"--{name}" for name in (field_names() | field_names(FinetuneConfig)) - NOT_READ.keys())
    names: dict[str, Iterable[str]] = {
        "commands": COMMANDS,
        "optimizers": OPTIMIZERS,
        "layers": LAYERS,
        "keys": keys,
        "recipes": recipes(),
    }
    return SHELLS[shell].format(**{what: " ".join(each) for what, each in names.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input, with one line that says why."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(a in ("-h", "--help") for a in arguments):
        print(HEAD.rstrip())
        return 0
    if len(arguments) > 1 or (arguments and arguments[0] not in SHELLS):
        print(f"gracile completion: unknown shell {arguments[-1]!r}; {nearest(arguments[-1], SHELLS)}", file=sys.stderr)
        return 2
    print(script(arguments[0] if arguments else "bash"), end="")
    return 0
