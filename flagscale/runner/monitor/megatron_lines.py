"""What of a training's output a person who follows it wants to see.

Megatron-LM prints some nine hundred lines before its first iteration and a dozen around each checkpoint. On the screen
the few that tell something are said shortly, and those that are known to tell nothing are left out; the output file
keeps everything. Known by a list of what to leave out, and not of what to show: an error or a line of the user's own
code that nobody foresaw must reach the screen. The price is a list that newer versions make incomplete, harmlessly.
"""

import re
from dataclasses import dataclass, field

_PREFIX = re.compile(r"\[\w+\d+\]:")
"""torchrun's, before each line of a rank"""

_NOISE = re.compile(
    r"-{20,}\s*$|-{5,} (?:arguments|end of arguments) -{5,}"
    r"|  (?=.{49} )\w+ \.+ |  \w{44,}  "  # one argument each, in a column of its own
    r"|INFO:megatron\.|WARNING:megatron\.core\.rerun_state_machine:|WARNING: one_logger package"
    r"|.*(?:GPTModel IS DEPRECATED|MCore's async save is deprecated)"
    r"|    [\w/-]+ \.+: \(|\(min, max\) time across ranks"
    r"|\[Rank \d+\] \(.*\) memory \(MB\)"
    r"|(?:Total n|N)umber of (?:active )?parameters in|compute_activation_memory|Activation memory footprint"
    r"|Theoretical memory footprints|Number of virtual stages|using torch\.\S+ for parameters|using world size:"
    r"|\[(?:after|before) .*\] datetime:"
    r"|>+ (?:initializ|setting random seeds|compiling dataset index|done with dataset index|building train)"
    r"|time to initialize megatron| > number of parameters on| > datasets target sizes"
    r"|    (?:train|validation|test): +\d+\s*$"
    r"|Params for bucket |\t.*\(param\.main_grad\.dtype"
    r"|done with setup|training \.\.\.|Overwriting rerun_state_machine|Evaluating (?:iter|on) "
    r"|(?:Storing|Loading) distributed optimizer|sharded_state_dict metadata loaded| checkpoint version"
    r"| loading distributed checkpoint|\[[^]]*\] saving checkpoint at iteration"
    r"|WARNING: could not find the metadata file|    will not load any checkpoints"
)
_WARNING = re.compile(r"\S*/(?:site-packages|megatron|torch)/\S+\.py:\d+: \w*Warning: ")
"""a library that warns its own authors; the line of code that Python prints below it is indented"""

_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (.*?)(?: \[ t .*)?$")
_LOADED = re.compile(r"successfully loaded checkpoint from (.*?)(?: \[ t .*\])? at iteration (\d+)")
_EVALUATED = re.compile(
    r"(validation|test) loss at iteration (\d+)(?: on \w+ set)? \| lm loss value: (\S+) \| lm loss PPL: (\S+)"
)


def shorten_line(text: str) -> str | None:
    """A checkpoint or an evaluation in a few words; None for any other line."""
    if found := _SAVED.search(text):
        return f"checkpoint saved: iteration {found[1]} in {found[2]}"
    if found := _LOADED.search(text):
        return f"checkpoint loaded: iteration {found[2]} of {found[1]}"
    if found := _EVALUATED.search(text):
        return f"{found[1]} loss {float(found[3]):.4f} at iteration {found[2]} · perplexity {float(found[4]):.2f}"
    return None


@dataclass(slots=True)
class LineFilter:
    """Remembers, for each rank, whether its last line was a warning, whose line of code comes next."""

    warned: set[str] = field(default_factory=set)

    def choose(self, line: str) -> str | None:
        """The line as it is to be shown; None where it is noise."""
        prefix = found[0] if (found := _PREFIX.match(line)) else ""
        text = line[len(prefix) :]
        is_code = prefix in self.warned and text.startswith("  ")
        self.warned.discard(prefix)
        if is_code:
            return None
        if _WARNING.match(text):
            self.warned.add(prefix)
            return None
        if short := shorten_line(text):
            return short
        return None if _NOISE.match(text) or (prefix and not text.strip()) else line
