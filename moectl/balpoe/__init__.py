"""Balanced product of calibrated experts for long-tailed classification.

Reading order, from a command to its report:

- `cli`, `settings`, `taus`: the commands, every knob, and what `taus` may be written as.
- `data`, `longtail`, `lists`: the images, cut to a long tail or listed in text files.
- `model`, `losses`: the network, its loss, and how experts become one posterior.
- `train`: the loop that brings these together.
- `inference`, `logits`, `arrays`: outputs of our own and of other classifiers, as files.
- `eval`, `priors`: accuracy, calibration and shifted test sets; label priors, also estimated.
- `rule`, `groups`, `rejection`, `plugin`, `fitted`, `reject`: when to abstain, fair to groups of
  classes: the rule, its fitting by `balpoe plugin`, its file, and its use on new items.
- `curves`, `selective`, `eval_rejection`: errors over rejection rates, and what eval makes of them.
- `report`, `report_rejection`, `published`: the report, beside published figures.
"""
