"""Whether a kernel overwrites a tile in shared memory that a product of Hopper's still reads: `python pipelines.py
x.ttgir`.

Triton loads the tiles of a loop ahead into a ring of buffers, and lets the last product run on while the next tile is
under way. It counts one buffer less for a tile that registers read, too (3.6 to 3.9 do): the copy of a later turn then
lands where that product reads. The result is wrong now and then, in some rows, so that no single run shows it.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple


NAME = r"%[\w#-]+"


class Loop(NamedTuple):
    """What one turn does to shared memory, in its order: ("read", tiles), ("wait", products left) or ("copy",
    tile).
    """

    steps: list[tuple]

    def overwrites(self, buffers: dict[str, int], ahead: dict[str, int]) -> set[str]:
        """Tiles that are copied to while a product reads them. `ahead`: turns for which they were copied before the
        loop.
        """
        found, running = set(), []
        for turn in range(4):  # the second finds what the first left running
            for kind, what in self.steps:
                if kind == "read":
                    running.append((turn, what))
                elif kind == "wait":
                    running = running[len(running) - what :] if what else []
                else:
                    here = turn + ahead.get(what, 0)
                    found |= {what for then, read in running if what in read and (here - then) % buffers[what] == 0}
        return found


def overwritten(ttgir: str) -> list[str]:
    """Names of the tiles, from Triton's GPU dialect (`compiled.asm["ttgir"]`)."""
    tile, buffers, ahead, found = {}, {}, {}, set()
    regions = []  # open braces: a Loop, or None
    for line in ttgir.splitlines():
        text = re.sub(r" loc\(.*", "", line).strip()
        loop = next((x for x in reversed(regions) if x is not None), None)
        if text.endswith("{"):
            if text.startswith("}"):  # } else {
                regions.pop()
            regions.append(Loop([]) if "scf.for" in text else None)
        elif text.startswith("}"):
            closed = regions.pop() if regions else None
            found |= closed.overwrites(buffers, ahead) if closed else set()
        if (operation := re.match(rf"({NAME})(?::\d+)? = (\S+) (.*)", text)) is None:
            continue
        result, name, rest = operation.groups()
        operands = re.findall(NAME, rest.split(" : ")[0])
        tiles = [tile[x] for x in operands if x in tile]
        tile.pop(result, None)  # regions use names again
        if name == "ttg.local_alloc":
            shape = re.search(r"memdesc<((?:\d+x)+)", rest)[1].split("x")[:-1]
            tile[result], buffers[result] = result, int(shape[0]) if not operands else 1
            if operands and loop:
                loop.steps.append(("copy", result))
        elif name.startswith("ttg.memdesc_"):
            tile[result] = tiles[0]
        elif name == "ttg.async_copy_global_to_local":
            if loop:
                loop.steps.append(("copy", tiles[0]))
            else:
                ahead[tiles[0]] = ahead.get(tiles[0], 0) + 1
        elif name == "ttng.warp_group_dot" and loop:
            loop.steps.append(("read", frozenset(tiles)))
            if "isAsync = true" not in rest:
                loop.steps.append(("wait", 0))
        elif name == "ttng.warp_group_dot_wait":
            tile |= {f"{result}#{i}": tile[x] for i, x in enumerate(operands) if x in tile}
            if loop:
                loop.steps.append(("wait", int(re.search(r"pendings = (\d+)", rest)[1])))
    return sorted(found)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path, *overwritten(Path(path).read_text()))
