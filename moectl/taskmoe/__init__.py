"""Specialist classifiers merged into one gated mixture over all their classes.

Reading order, from a command to its report:

- `cli`, `settings`: the commands, and every knob; `size` is for `--dry-run`.
- `manifest`, `files`, `rows`, `data`: a task, its data files, and the images as one data set.
- `build`, `prepare`: how the data files are written and counted.
- `model`, `losses`: specialists and the mixture, and what it minimises.
- `specialist`: the training of one specialist.
- `stages`, `merge`, `align`: specialists found, brought into one order, and merged.
- `train`, `start`, `weights`: the training of the mixture, its beginning, and weights files.
- `inference`, `eval`, `measures`: a trained mixture, and its scores.
- `analyze`, `analysis`: what experts and gates do; `predict`: images from files.
- `compare`, `baselines`: the mixture beside what it must be weighed against.
- `report`, `pictures`, `heat_maps`, `published`: the report, beside published figures.
"""
