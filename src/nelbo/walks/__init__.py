"""The three walks, each in one direction: train, evaluate, sample.

train     options -> recipe -> trainer -> (newest valid checkpoint) -> records -> log, save
evaluate  run directory -> model -> evaluation -> table, evaluation/*.json, *.npz
sample    run directory -> model -> sampler -> picture, samples/*.npz
"""
