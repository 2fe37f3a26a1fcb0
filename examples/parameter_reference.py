"""The table of the algorithm's numbers, from the parameters themselves.

python examples/parameter_reference.py                              # prints it
python examples/parameter_reference.py --write docs/algorithm.md    # into the page, between its two marks
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import BaseModel

from regtool.config.resolve import explanation, is_advanced
from regtool.config.schema import Parameters

BEGIN, END = "<!-- numbers: from here", "<!-- numbers: to here -->"


def table() -> str:
    """Markdown rows: parameter, default, unit, range, meaning, what it was chosen on."""
    parameters = Parameters()
    rows = ["| parameter | default | unit | range | meaning | chosen on |", "|---|---|---|---|---|---|"]
    for name in Parameters.model_fields:
        section = getattr(parameters, name)
        for key, info in type(section).model_fields.items() if isinstance(section, BaseModel) else ():
            if not is_advanced(info) or isinstance(getattr(section, key), dict):
                continue
            found = explanation(f"{name}.{key}", parameters)
            cells = (f"`{found['key']}`", *(str(found.get(fact, "")) for fact in ("default", "unit", "range", "meaning", "chosen_on")))
            rows.append("| " + " | ".join(cells) + " |")
    presets = ["", "| `refine.presets` | diffusion | smoothings | step, voxels |", "|---|---|---|---|"]
    presets += [f"| `{name}` | {p.diffusion:g} | {p.smoothings} | {p.step_voxels:g} |" for name, p in parameters.refine.presets.items()]
    return "\n".join([*rows, *presets]) + "\n"


def written(page: str) -> str:
    """The page with the table of today between its marks."""
    head, _, rest = page.partition(BEGIN)
    mark = BEGIN + rest.partition("\n")[0]
    return f"{head}{mark}\n\n{table()}\n{END}" + page.partition(END)[2]


def main() -> None:
    """As the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE.md")
    page = parser.parse_args().write
    if page is None:
        print(table(), end="")
    else:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
