"""Follow a page word for word: write the files that it shows, run the commands that it shows, in its order.

    python tests/follow.py docs/add-a-method.md

works in the current folder, as a reader would, in one shell from the first command to the last. A block below
`<!-- example: PATH -->` is the content of a file; a block marked `console` holds commands.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(
    r"(?:^<!-- example: (?P<path>\S+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


def script(page: str) -> str:
    """What a reader of the page does, as a shell script that stops at the first failure.

    Args:
        page: its text.
    """
    lines = ["set -euo pipefail"]
    for block in BLOCK.finditer(page):
        path, text = block["path"], block["text"]
        if path:
            lines.append(f"mkdir -p {shlex.quote(str(Path(path).parent))}")
            lines.append(f"printf %s {shlex.quote(text)} > {shlex.quote(path)}")
        elif block["kind"] == "console":
            lines += [
                line
                for command in text.splitlines()
                for line in (f"echo {shlex.quote('$ ' + command)}", command)
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(subprocess.run(["bash", "-c", script(Path(sys.argv[1]).read_text())], check=False).returncode)
