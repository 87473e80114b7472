"""Concept-based similarity reasoning on medical images.

Reading order, from a command to its report:

- `cli`, `settings`: the commands, and every knob; `size` is for `--dry-run`.
- `data`, `tables`, `columns`, `readers`, `boxes`, `synthetic`: label tables, what readers saw and
  drew, and a small set that is generated; `check` finds all that is wrong with them.
- `images`, `dicom`, `transforms`, `cache`: from files to tensors, and features kept on disk.
- `backbones`, `projector`, `model`: the network.
- `losses`, `prototypes`: what the stages minimise, and what else happens to prototypes.
- `train`, `stages`, `verdict`: the three stages, what they share, and the task head.
- `inference`, `eval`, `metrics`, `bootstrap`, `localisation`: a trained network, measured.
- `explain`, `panel`, `atlas`, `contact_sheets`: why it says what it says, in pictures.
- `edits`, `edit_list`, `intervene`, `oracle`, `study`, `curation`: what a person may correct.
- `baselines`: simpler verdicts on the same backbone.
- `report`, `charts`, `html_report`: the reports of a run and of one evaluation.
- `import_original`, `convert`: weights of the original program and of backbones.
"""
