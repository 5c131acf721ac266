"""Whether a process that keeps its pages takes freed memory again without asking the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

BLOCK, PAGE = 20 << 20, 4096
CHILD = """
import os, resource, sys
if sys.argv[1] == "keep":
    from server.engine.memory import keep_pages
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    keep_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
def step():
    return [bytearray(int(sys.argv[2])) for _ in range(4)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", CHILD, how, str(BLOCK)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_a_step_frees_the_next_takes_again() -> None:
    step, kept = 4 * BLOCK // PAGE, faults("keep")
    if platform.libc_ver()[0] == "glibc":
        assert kept < step / 10 < step < faults("leave")
