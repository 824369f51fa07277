"""A lab in munet, for scripts/bench build: run by a Python that has munet, talks over standard input and output.

In: a line with the job (other_testbeds.Job). Out: a line "ready" before that, and one with the pid in each node. At the
end of the input the lab is deleted.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile

from munet.base import BaseMunet

logging.disable(logging.WARNING)

with tempfile.TemporaryDirectory() as folder:
    print("ready", flush=True)
    job = json.loads(sys.stdin.readline())
    # With namespaces of its own for processes, it wants those of process 1, which a container does not give.
    net = BaseMunet(rundir=folder, isolated=False, pid=False)
    for name in job["nodes"]:
        net.add_host(name).cmd_raises(job["settings"][name])
    for left, left_interface, right, right_interface in job["links"]:
        net.add_link(net[left], net[right], left_interface, right_interface)
    for name in job["nodes"]:
        net[name].cmd_raises(job["commands"][name])
    print(json.dumps({name: net[name].pid for name in job["nodes"]}), flush=True)
    sys.stdin.read()
    net.delete()
