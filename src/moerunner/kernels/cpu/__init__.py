"""Native kernels for CPUs: C++ behind a plain C interface, one library for each instruction set.

`build` compiles them (it needs no torch), `library` picks one for this machine, `experts` is the custom op.
"""
