"""The tproxy engine: Balabit's 2003 mechanism on packets from NFQUEUE.

`core` computes (values in, values out); `shell` touches the kernel; `daemon` joins the two.
"""
