"""A policy that sets how much of a vision-language mixture runs, to meet a latency budget.

Reading order, from a command to its report:

- `cli`, `settings`: the commands, and every knob; `size` is for `--dry-run`.
- `samples`, `data`, `hub`, `local`, `synth`: questions about images, and where they come from.
- `plans`, `model`, `policy`: what may be set, the network that sets it, and draws from it.
- `backbone`, `native`, `resized`, `open`: what a vision-language network must do, and how one is
  opened: `llava`, `qwen_vl`, `smolvlm`, `tiny` or `molmoe` (`molmoe_model`, `tiling`,
  `molmoe_convert`).
- `environment`, `execution`, `executor`, `apply`, `timing`, `flops`, `simulator`: answering by a
  plan, for real or by formula, and what that takes.
- `scores`, `normalise`, `captions`, `answers`: what an answer is worth; answers shown.
- `losses`, `rewards`, `rollout`, `objective`, `schedule`, `train`: the training.
- `start`, `clone`, `world`, `ledger`, `history`, `records`, `weights`: what it begins with, acts
  in and leaves behind.
- `profile`, `influence`, `importance`, `table`, `latency`, `overhead`, `toy`: before a training.
- `infer`, `questions`, `guard`: answers within a budget.
- `eval`, `rivals`, `results`, `pareto`: the controller beside other policies.
- `report`, `report_profile`, `plots`: the reports, and their pictures.
"""
