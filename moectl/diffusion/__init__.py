"""Images from noise, by a U-Net of convolutional experts.

Reading order, from a command to its report:

- `cli`, `settings`: the commands, and every knob; `size` is for `--dry-run`.
- `data`: the images that are learned, and those held out.
- `model`, `blocks`, `experts`, `frequency`: the U-Net, and its parts.
- `process`, `losses`: from images to noise, and what the network minimises.
- `train`, `usage`: the training, and how many images each expert gets.
- `inference`, `solvers`, `sample`: a trained network, and back from noise to images.
- `eval`, `reference`, `features`, `distances`, `measures`: samples, loss and experts measured.
- `ablate`, `variants`: networks that differ in one part, compared.
- `quick_check`, `profile`: whether networks compute, and what they cost.
- `report`, `pictures`, `heat_maps`: the report, and its pictures.
"""
