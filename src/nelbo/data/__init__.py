"""Data: embedded, generated with known truth, or read from files; see the modules.

`embedded` and `toys` need nothing but the package, `sources` reads what lies on disk, `loading`
gives the order of the training batches as a function of the seed and the step.
"""
