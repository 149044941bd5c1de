"""A process that forks while an engine's threads wait: the child has threads of its own."""

import subprocess
import sys

FORKED = """
import os, signal, torch
from qkv.native import fast
from tests.adapt.test_quantise import answer, model

made = fast(model(), 2)
expected = answer(made)
child = os.fork()
if not child:
    signal.alarm(30)
    same = torch.equal(answer(made), expected)
    del made
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(answer(made), expected)
print(os.waitstatus_to_exitcode(status))
"""


def test_a_child_runs_programs_too() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
