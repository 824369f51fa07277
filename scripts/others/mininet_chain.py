"""A lab in mininet, for scripts/bench build: run by a Python that has mininet, talks over standard input and output.

In: a line with the job (other_testbeds.Job). Out: a line "ready" before that, and one with the pid in each node. At the
end of the input the lab is deleted.
"""

from __future__ import annotations

import json
import sys

from mininet.net import Mininet

print("ready", flush=True)
job = json.loads(sys.stdin.readline())
net = Mininet(topo=None, build=False, controller=None)
for name in job["nodes"]:
    net.addHost(name, ip=None).cmd(job["settings"][name])
for left, left_interface, right, right_interface in job["links"]:
    net.addLink(net.get(left), net.get(right), intfName1=left_interface, intfName2=right_interface)
net.start()
for name in job["nodes"]:
    if said := net.get(name).cmd(job["commands"][name]):
        sys.exit(f"{name}: {said}")
print(json.dumps({name: net.get(name).pid for name in job["nodes"]}), flush=True)
sys.stdin.read()
net.stop()
