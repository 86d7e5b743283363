"""The rooms of `finetune_stability.py`, the paper's experiment.

options.py      the command line
settings.py     what a run depends on besides its arm and its seed
arms.py         ways to clip: read from a word, made for a model
tasks.py        what is learnt and when a run counts as failed; names.py, hub.py: the data; metrics.py: the scores
models.py       a pretrained encoder with a fresh head
optimizer.py    Adam with or without bias correction
stepping.py     clipping and Adam's step, one after the other or in one pass
train.py        one run
runs.py         finished runs on disk
schedule.py     many runs, several processes, a progress bar
calibrate.py    what is chosen before judging, on seeds of its own
statistics.py   summaries of an arm, bootstrap intervals
gradients.py    where in the model failed runs differ, and what caps hold back
significance.py the tests of a component cap against its global control
findings.py     what the runs say, as numbers and sentences
report.py       Markdown, JSON, the terminal; figures.py the PNGs
"""
