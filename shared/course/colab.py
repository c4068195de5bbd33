"""Week 0. Lets the notebooks be opened in Google Colab, where a notebook comes without its repository.

    python -m shared.course.colab https://github.com/OWNER/NAME

writes into each notebook a badge that opens it there, and one cell that fetches the rest and installs it.
Outside Colab the cell does nothing. To be run once the repository has its public address, and again when that
changes. What a run writes in Colab is lost unless it is downloaded from there.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from shared.commandline import errors_for_people
from shared.course.runs import TOPICS
from shared.runtime import ROOT, read_json, write_atomically

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
SETUP_ID = "colab"
SETUP = """\
# In Colab: fetches the course and installs it, in a minute or two. Anywhere else: nothing.
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    course = Path("/content/{name}")
    installed = Path("/content/.{name}-installed")
    if not course.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", course], check=True)
    if not installed.exists():
        packages = [f"{{course}}[rag,serve,export]", "tiktoken", "bitsandbytes"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", *packages], check=True)
        installed.touch()
    sys.path.insert(0, str(course))"""


def open_in_colab(path: str | Path, address: str) -> None:
    """Writes the badge under a notebook's title and the set-up cell before its code, or replaces them.

    `address` is https://github.com/OWNER/NAME; the notebook is taken to be at weeks/FOLDER/notebook.ipynb of
    its branch main. Raises ValueError for another address.
    """
    path = Path(path)
    match = re.fullmatch(r"https://github\.com/([\w.-]+/([\w.-]+?))(?:\.git)?/?", address)
    if not match:
        raise ValueError(
            f"{address!r} is not the address of a repository that Colab can open: give"
            " https://github.com/OWNER/NAME"
        )
    repository, name = match.groups()
    notebook = read_json(path)
    cells = [cell for cell in notebook["cells"] if cell["id"] != SETUP_ID]
    source = "".join(cells[0]["source"])
    title, *rest = re.sub(rf"\n\n{re.escape(BADGE)}.*", "", source).split("\n")
    target = f"{repository}/blob/main/weeks/{path.parent.name}/{path.name}"
    badge = f"{BADGE}(https://colab.research.google.com/github/{target})"
    cells[0]["source"] = "\n".join([title, "", badge, *rest]).splitlines(keepends=True)
    setup = SETUP.format(name=name, address=f"https://github.com/{repository}")
    cells.insert(1, _code_cell(setup))
    notebook["cells"] = cells
    write_atomically(path, json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")


def _code_cell(source: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": SETUP_ID,
        "metadata": {},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def main(address: str) -> None:
    """Opens every week's notebook in Colab."""
    for topic in TOPICS:
        open_in_colab(ROOT / "weeks" / topic / "notebook.ipynb", address)
    print(f"{len(TOPICS)} notebooks open in Colab from {address}")


if __name__ == "__main__":
    with errors_for_people():
        if len(sys.argv) != 2:
            raise ValueError(
                "one address is wanted: python -m shared.course.colab https://github.com/OWNER/NAME"
            )
        main(sys.argv[1])
