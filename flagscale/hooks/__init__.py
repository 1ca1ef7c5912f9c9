"""What we change of a running backend, as data: a hook names one attribute, the versions it was written for, and why.

A hook costs nothing on disk and leaves the backend's files as they were published; the price is that it can be wrong
about a version it never met. So hooks are checked: each against the backend's version before anything is changed, and
each again afterwards, and a process in which one did not take refuses to start.
"""
