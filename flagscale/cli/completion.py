"""`flagscale completion`: shell code that completes verbs, examples, configuration files and run ids."""

import argparse

BASH = """# flagscale completion for bash: eval "$(flagscale completion bash)"
_flagscale() {
  local IFS=$'\\n' word=${COMP_WORDS[COMP_CWORD]}
  COMPREPLY=($(compgen -W "$(flagscale completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$word"))
  [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}
complete -o filenames -F _flagscale flagscale
"""

ZSH = """#compdef flagscale
# flagscale completion for zsh: eval "$(flagscale completion zsh)"
_flagscale() {
  local -a found
  found=(${(f)"$(flagscale completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  compadd -a found || _files
}
compdef _flagscale flagscale
"""

SHELLS = {"bash": BASH, "zsh": ZSH}
OF_CONFIGS = ("train", "run", "dryrun", "explain")
OF_RUNS = ("stop", "status", "logs", "rerun")


def find_words(typed: list[str]) -> list[str]:
    """What may stand where the last of the typed words stands."""
    from flagscale import env
    from flagscale.cli import VERBS

    if len(typed) <= 1:
        return list(VERBS)
    if len(typed) > 2:
        return []
    if typed[0] in OF_CONFIGS:
        return sorted(folder.parent.name for folder in (env.root_dir() / "examples").glob("*/conf"))
    if typed[0] in OF_RUNS:
        return sorted(path.stem for path in (env.state_dir() / "runs").glob("*.json"))
    if typed[0] == "patch":
        from flagscale.cli.patch import ACTIONS

        return list(ACTIONS)
    return {"source": ["fetch", "status"], "completion": sorted(SHELLS)}.get(typed[0], [])


def main(argv: list[str]) -> int:
    if argv[:1] == ["--words"]:
        print("\n".join(find_words(argv[1:])))
        return 0
    parser = argparse.ArgumentParser(
        prog="flagscale completion",
        description="Print the shell code that completes this command.",
        epilog='in ~/.bashrc: eval "$(flagscale completion bash)"',
    )
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell that is to read it")
    print(SHELLS[parser.parse_args(argv).shell], end="")
    return 0
