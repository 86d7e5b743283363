"""What the benchmarks share.

shapes.py           parameter lists of real models      sharded_models.py   the same, as DTensors of several ranks
gradients.py        gradients and caps for a list       providers.py        the ways to clip: torch's and ours
measure.py          rounds, clocks, ceilings            runs.py             one set measured in all its cases
launches.py         what a call makes a GPU do          machine.py          hardware and versions
options.py          command-line options                report.py           ratios, tables, JSON
plot.py, roofline.py   the figures of compare.py    ranks.py            traffic and clock of several ranks
"""
