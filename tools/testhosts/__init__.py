"""Hosts for tests: N of them on one machine, each with its own network, processes, name and sshd.

    machine
    └── control namespace: a bridge, 10.77.K.254, from where launchers run
        ├── h1: 10.77.K.1, sshd on port 22, pid, mount, uts and ipc namespaces, a HOME of its own
        └── h2: 10.77.K.2, ..

A host is a process tree in namespaces, not a virtual machine: it starts in milliseconds and fails as real ones do (its
link can be cut, it can be killed whole), but it shares the kernel, the clock and, unless told otherwise, the files. The
bridge lies in a namespace too, so that the machine's own network gains no link, no address and no route.
"""
